"""Our networks of parcel series for brainmarks (0.1.1, https://github.com/MedARC-AI/brainmarks), which finds this file by itself.

    PYTHONPATH=tools/brainmarks_plugin:. python -m brainmarks.main_logistic fmristream_run patch aabc_sex \
        --overrides model_kwargs.ckpt_path=runs/brainlm model_kwargs.space=schaefer400

brainmarks hands out series of a parcellation, each z-scored over its run. So the network must have learnt from
`parcels | voxel-zscore` of the same parcels in the same order: their number is checked, their order cannot be.
"""

from typing import Any

import torch
from brainmarks.models.base import Embeddings
from brainmarks.models.registry import register_model
from torch import Tensor, nn

from fmristream.errors import UsageError
from train.beyond.api import Network, load
from train.beyond.facts import parcel_places
from train.beyond.features import features_of

# Of a run, as brainmarks' own wrappers take at most.
MAX_WINDOWS = 8
# TRs that differ by less are the same: headers round them.
_SAME = 0.01


class FmristreamTransform:
    """(frames, parcels) of a run to (windows, parcels, frames) as the network was trained on."""

    def __init__(self, network: Network, max_windows: int) -> None:
        facts, data = network.trained.facts, network.trained.recipe.data
        assert facts is not None
        self.parcels, self.tr_s = len(parcel_places(facts)), facts["tr_s"]
        self.window, self.step, self.max_windows = data.window, data.step, max_windows

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """One sample of brainmarks, its `bold` in windows that follow each other; a shorter run is filled up with its mean."""
        bold = torch.as_tensor(sample["bold"], dtype=torch.float32)
        if bold.shape[1] != self.parcels:
            raise UsageError(
                f"fmristream_run: series of {bold.shape[1]} parcels, the network has {self.parcels}; choose `space`"
            )
        bold = self._at_training_tr(bold, float(sample["tr"]))
        span = (self.window - 1) * self.step + 1
        if len(bold) < span:
            bold = torch.cat([bold, bold.mean(0).expand(span - len(bold), -1)])
        count = min(len(bold) // span, self.max_windows)
        windows = [bold[start : start + span : self.step].T for start in range(0, count * span, span)]
        return {**sample, "bold": torch.stack(windows).contiguous()}

    def _at_training_tr(self, bold: Tensor, tr_s: float) -> Tensor:
        """Linear interpolation in time, where the TR is none of training."""
        if not self.tr_s or any(abs(tr_s - one) <= _SAME * one for one in self.tr_s):
            return bold
        wanted = min(self.tr_s, key=lambda one: abs(one - tr_s))
        frames = max(1, int((len(bold) - 1) * tr_s / wanted) + 1)
        places = torch.arange(frames) * (wanted / tr_s)
        low = places.floor().long().clamp(max=max(0, len(bold) - 2))
        share = (places - low)[:, None]
        return bold[low] * (1 - share) + bold[(low + 1).clamp(max=len(bold) - 1)] * share


class FmristreamWrapper(nn.Module):
    """The features of every window: `patch` a token a window, `cls` their mean."""

    def __init__(self, network: Network, space: str) -> None:
        super().__init__()
        self.__space__ = space
        self.model = network.model.requires_grad_(False)
        xyz = network.inputs.xyz if "xyz" in network.inputs.names else None
        self.register_buffer("xyz", xyz, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> Embeddings:
        """`bold` (b, windows, parcels, frames)."""
        bold = batch["bold"]
        named = {} if self.xyz is None else {"xyz": self.xyz}
        features = features_of(self.model, bold.flatten(0, 1), named).unflatten(0, bold.shape[:2])
        return Embeddings(cls_embeds=features.mean(1, keepdim=True), reg_embeds=None, patch_embeds=features)


@register_model
def fmristream_run(
    ckpt_path: str = "", space: str = "schaefer400", max_windows: int = MAX_WINDOWS
) -> tuple[FmristreamTransform, FmristreamWrapper]:
    """The network of a run's folder.

    Raises:
        UsageError: no folder is given, or its network reads volumes or series that are normalised otherwise.
    """
    if not ckpt_path:
        raise UsageError("fmristream_run: give the folder of a run, --overrides model_kwargs.ckpt_path=FOLDER")
    network = load(ckpt_path)
    steps = [step.strip() for step in network.normalize.split("|")]
    if len(steps) != 2 or steps[0].partition(":")[0] != "parcels" or steps[1] != "voxel-zscore":
        raise UsageError(
            f"{ckpt_path}: trained on {network.normalize!r}; brainmarks gives z-scored series of parcels, which is "
            "'parcels | voxel-zscore'"
        )
    if not network.trained.recipe.data.window:
        raise UsageError(f"{ckpt_path}: trained on whole runs; brainmarks' runs are cut into windows: train on some")
    return FmristreamTransform(network, max_windows), FmristreamWrapper(network, space)
