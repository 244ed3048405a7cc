"""Fine-tuning either BrainLM: the cls token or the mean of all others, three linear maps, and the reconstruction beside."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmristream.errors import UsageError
from train.models.brainlm import Brainlm
from train.models.brainlm_config import brainlm_config, vitmae_config
from train.models.brainlm_vitmae import BrainlmVitmae
from train.models.series_masking import Masking, Reconstruction

Pooling = Literal["cls", "mean"]
Learning = Literal["all", "encoder", "head"]
Head = Literal["mlp", "linear"]


class SeriesModel(Protocol):
    """What both BrainLMs are to those who use them: `Brainlm` and `BrainlmVitmae`."""

    @property
    def num_features(self) -> int: ...

    @property
    def patch(self) -> int: ...

    @property
    def masking(self) -> Masking: ...

    def __call__(
        self,
        series: Tensor,
        xyz: Tensor,
        *,
        masking: Masking | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction: ...

    def features(self, series: Tensor, xyz: Tensor) -> Tensor: ...

    def parcel_attention(self, series: Tensor, xyz: Tensor, *, layer: int = -1) -> Tensor: ...


class FineTuneOutput(NamedTuple):
    """(b, outputs) and, where something was hidden, what became of it."""

    outputs: Tensor
    reconstruction: Reconstruction | None


class MlpHead(nn.Module):
    """Three linear maps with GELU between, in float32 also under autocast."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, channels)
        self.linear2 = nn.Linear(channels, channels // 2)
        self.linear3 = nn.Linear(channels // 2, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(b, channels) to (b, outputs)."""
        with torch.autocast(pooled.device.type, enabled=False):
            x = F.gelu(self.linear1(pooled.float()))
            out: Tensor = self.linear3(F.gelu(self.linear2(x)))
        return out


class ProbeHead(nn.Module):
    """One linear map, in float32 also under autocast."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(b, channels) to (b, outputs)."""
        with torch.autocast(pooled.device.type, enabled=False):
            out: Tensor = self.linear(pooled.float())
        return out


HEADS = {"mlp": MlpHead, "linear": ProbeHead}


class FineTuned(nn.Module):
    """A pre-trained network and a head; parameters that cannot get a gradient are frozen, so that DDP works.

    `learning`: all parameters; the encoder and the head, for losses without a reconstruction; or the head alone. `head`: the
    published three linear maps, or one, for a linear probe.
    """

    takes = "series"

    def __init__(
        self,
        model: nn.Module,
        *,
        outputs: int,
        pooling: Pooling = "cls",
        learning: Learning = "encoder",
        head: Head = "mlp",
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean") or learning not in ("all", "encoder", "head"):
            raise UsageError(
                f"brainlm: pooling {pooling!r} must be cls or mean, and learning {learning!r} all, encoder or head"
            )
        if head not in HEADS:
            raise UsageError(f"brainlm: head {head!r} must be one of {', '.join(HEADS)}")
        if outputs < 1:
            raise UsageError(f"outputs must be a whole number above 0, got {outputs!r}")
        self.model = model
        self.pooling = pooling
        self.learning = learning
        self.output_head = HEADS[head](_series_model(model).num_features, outputs)
        for name, parameter in model.named_parameters():
            is_learnt = learning == "all" or (learning == "encoder" and not name.startswith("decoder."))
            parameter.requires_grad_(is_learnt and parameter.requires_grad)

    def forward(
        self,
        series: Tensor,
        xyz: Tensor,
        *,
        masking: Masking | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> FineTuneOutput:
        """(b, parcels, t) to (b, outputs); with `masking`, from what is shown, and with its reconstruction.

        The published fine-tuning adds .5 of the reconstruction's loss: `train.masked_objectives.joint_loss`.
        """
        model = _series_model(self.model)
        if masking is None:
            return FineTuneOutput(self.output_head(self._pooled(model.features(series, xyz))), None)
        reconstruction = model(series, xyz, masking=masking, noise=noise, generator=generator)
        return FineTuneOutput(self.output_head(self._pooled(reconstruction.latent)), reconstruction)

    def _pooled(self, latent: Tensor) -> Tensor:
        return latent[:, 0] if self.pooling == "cls" else latent[:, 1:].float().mean(1)


def _series_model(model: nn.Module) -> SeriesModel:
    return model  # type: ignore[return-value]


def build_brainlm(variant: str, options: Mapping[str, Any]) -> nn.Module:
    """Either BrainLM from a recipe's model section: `brainlm` or `brainlm-vitmae`.

    With `outputs` the network is `FineTuned`, which also has `pooling`, `learning` and `head`; without, that of pre-training.
    `parcels` and `frames` are those of the windows; the other options are those of the variant's configuration, and
    `checkpointing`.
    """
    rest = dict(options)
    given = {"num_brain_voxels": rest.pop("parcels"), "num_timepoints_per_voxel": rest.pop("frames")}
    checkpointing = rest.pop("checkpointing", False)
    own = {name: rest.pop(name) for name in ("outputs", "pooling", "learning", "head") if name in rest}
    if not isinstance(checkpointing, bool):
        raise UsageError(f"{variant}: checkpointing must be true or false, got {checkpointing!r}")
    if own and "outputs" not in own:
        raise UsageError(f"{variant}: {' and '.join(own)} are of a supervised objective; leave them out")
    model: nn.Module
    if variant == "brainlm":
        for name in given:
            if name in rest:
                raise UsageError(f"{variant}: {name} follows from the data; leave it out of the recipe")
        model = Brainlm(brainlm_config(rest | given), checkpointing=checkpointing)
    else:
        model = BrainlmVitmae(vitmae_config(rest), checkpointing=checkpointing)
    return FineTuned(model, **own) if own else model
