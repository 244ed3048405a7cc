"""A trained network for other people's code: arrays in, vectors or scores out.

    from train.beyond.api import load

    network = load("runs/age")
    vectors = network.embed(bold, tr_s=0.72, affine=affine)   # (windows, features)

Arrays are normalised as in training (`network.normalize` says how) by whoever calls; what can be seen of them, sizes, TR
and where axes run, is held against the training data. Whole datasets go through `--task embed`, which normalises too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmristream.errors import SpaceError, UsageError
from fmristream.signal.grid import voxel_sizes_mm
from fmristream.signal.orientation import axis_codes
from train import build
from train.beyond.facts import parcel_places
from train.beyond.features import Named, features_of
from train.beyond.predict import joined_scores, score_names
from train.beyond.trained import Trained, load_trained
from train.tasks import Inputs

# As in train/beyond/facts.py.
_SAME = 0.01
_AT_ONCE = 4


def load(checkpoint: str | Path, *, device: str = "cpu") -> "Network":
    """The network of a run's folder, or of one checkpoint.

    Raises:
        UsageError: there is none, or it is given what arrays do not hold.
        CorruptDataError: it is damaged.
    """
    trained = load_trained(str(checkpoint))
    if trained.extras.sizes:
        raise UsageError(
            f"{checkpoint}: the network is given columns or side series beside the signal; use --task embed or predict"
        )
    signal = trained.signal
    model = trained.network(signal).to(device)
    return Network(trained, model, build.make_inputs(trained.recipe, model, signal), torch.device(device))


class Network:
    """A network in evaluation. `load` makes it."""

    def __init__(self, trained: Trained, model: nn.Module, inputs: Inputs, device: torch.device) -> None:
        self.trained, self.model = trained, model
        self.inputs, self._device = inputs, device

    @property
    def normalize(self) -> str:
        """How arrays must be normalised (docs/recipes.md)."""
        return self.trained.recipe.data.normalize

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns of `predict`."""
        return tuple(score_names(self.trained))

    def embed(
        self, signal: NDArray[Any], *, tr_s: float | None = None, affine: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """(windows, features) of one run; windows are cut as evaluation cuts them.

        Args:
            signal: (x, y, z, t) or (c, x, y, z, t) on the grid of training, or (parcels, t), normalised as in training.
            tr_s: of the run; None where it is not known, which is then not looked at.
            affine: (4, 4) voxel to mm of the grid; likewise.

        Raises:
            SpaceError: sizes, axes or TR are not those of training.
            UsageError: the run is shorter than a window, or holds what is not finite.
        """
        return self._each(self._windows(signal, tr_s, affine), self._features)

    def predict(
        self, signal: NDArray[Any], *, tr_s: float | None = None, affine: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """(windows, len(targets)) scores: logits of classes, numbers in the target's unit; arguments as of `embed`."""
        if not self.trained.objectives:
            raise UsageError(f"{self.trained.source}: the network has no target; use embed")
        return self._each(self._windows(signal, tr_s, affine), self._scores)

    def _features(self, windows: Tensor, named: Named) -> Tensor:
        return features_of(self.model, windows, named)

    def _scores(self, windows: Tensor, named: Named) -> Tensor:
        return joined_scores(self.trained.objectives, self.model(windows, **named))

    def _each(self, windows: Tensor, compute: Any) -> NDArray[np.float32]:
        named = {}
        if "xyz" in self.inputs.names and self.inputs.xyz is not None:
            named["xyz"] = self.inputs.xyz.to(self._device)
        with torch.inference_mode():
            parts = [compute(part.to(self._device), named).float().cpu() for part in torch.split(windows, _AT_ONCE)]
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    def _windows(self, signal: NDArray[Any], tr_s: float | None, affine: NDArray[Any] | None) -> Tensor:
        """(windows, c, x, y, z, t) or (windows, parcels, t)."""
        values = np.asarray(signal, dtype=np.float32)
        self._check(values, tr_s, affine)
        if self.inputs.takes == "volume" and values.ndim == 4:
            values = values[None]
        data, frames = self.trained.recipe.data, values.shape[-1]
        length = data.window or frames
        span = (length - 1) * data.step + 1
        if frames < span:
            raise UsageError(f"the run has {frames} frames, a window of this network spans {span}; give a longer one")
        stride = self.trained.recipe.eval.stride or data.stride or span
        starts = range(0, frames - span + 1, stride)
        cut = [values[..., start : start + span : data.step] for start in starts]
        return torch.from_numpy(np.ascontiguousarray(np.stack(cut)))

    def _check(self, values: NDArray[np.float32], tr_s: float | None, affine: NDArray[Any] | None) -> None:
        facts, source = self.trained.facts, self.trained.source
        assert facts is not None, "load refuses others"
        shape = values.shape[:-1]
        if facts["grid"] is not None:
            grid = tuple(facts["grid"])
            expected = [(facts["channels"], *grid), *([grid] if facts["channels"] == 1 else [])]
        else:
            expected = [(len(parcel_places(facts)),)]
        if shape not in expected:
            raise SpaceError(
                f"{source}: expected {expected[-1]} and frames, got {values.shape}; bring the run onto that"
            )
        if not np.isfinite(values).all():
            raise UsageError(f"{source}: the run holds values that are not finite; normalise it by {self.normalize!r}")
        if tr_s is not None and facts["tr_s"] and not any(abs(tr_s - tr) <= _SAME * tr for tr in facts["tr_s"]):
            raise SpaceError(f"{source}: TR is {tr_s:g} s, training had {facts['tr_s']} s; resample the run")
        if affine is None or facts["grid"] is None:
            return
        axes, sizes = (
            axis_codes(np.asarray(affine, dtype=np.float64)),
            voxel_sizes_mm(np.asarray(affine, dtype=np.float64)),
        )
        if facts["orientation"] and axes != facts["orientation"]:
            raise SpaceError(f"{source}: axes run to {axes}, in training to {facts['orientation']}; turn the run")
        if facts["voxel_sizes_mm"] and not np.allclose(sizes, facts["voxel_sizes_mm"], rtol=_SAME, atol=0):
            raise SpaceError(
                f"{source}: voxels of {sizes} mm, in training of {facts['voxel_sizes_mm']} mm; resample the run"
            )
