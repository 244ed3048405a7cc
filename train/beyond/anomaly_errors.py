"""How badly a network of pre-training completes each place of a window: parcels, patches of the brain, or cubes of it.

| network | place | kinds of error |
| --- | --- | --- |
| brainlm, brainlm-vitmae | parcel | hidden values, every one hidden once; the frames after a context |
| mae4d-pretrain | patch of voxels | hidden values, by the network's own masks |
| tff1, tff2 | cube of voxels | what went in and came out |

What is hidden is the same in every window, so that errors of runs can be compared; nothing depends on the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmristream.errors import UsageError
from fmristream.sampling.keys import key_of
from train.attribution_runs import cube_regions
from train.beyond.features import Named
from train.beyond.opened import Opened
from train.data import uniform_noise
from train.models.brainlm import Brainlm
from train.models.brainlm_vitmae import BrainlmVitmae
from train.models.mae4d import Mae4dPretrain
from train.models.series_masking import Masking
from train.models.tff import AutoEncoder, EncoderTransformerDecoder

# Share of a window's tokens that is hidden at once: the least published one for BrainLM.
_HIDDEN = 0.2
# Cubes along an axis of the grid.
_CUBES = 6
# (sums of squared errors, how many values), (b, places) each, by kind.
Sums = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Errors:
    """What a network's errors are.

    Attributes:
        kinds: of error.
        places: what each is called.
        of: the sums of a batch.
    """

    kinds: tuple[str, ...]
    places: tuple[str, ...]
    of: Callable[[Tensor, Named], Sums]


def errors_of(opened: Opened) -> Errors:
    """The errors that a network's completions have.

    Raises:
        UsageError: it completes nothing.
    """
    model: Any = opened.model
    if isinstance(model, Brainlm | BrainlmVitmae):
        assert opened.signal.parcels is not None
        names = tuple(f"parcel {place}" for place in opened.signal.parcels)
        return Errors(kinds=("reconstruction", "forecast"), places=names, of=lambda x, named: _series(model, x, named))
    if isinstance(model, Mae4dPretrain):
        patch, grid = model.config.patch_size[:3], model.config.grid
        places = model.encoder.patches.places.tolist()
        names = tuple(_cube_name(np.array(np.unravel_index(place, grid)), np.array(patch)) for place in places)
        return Errors(kinds=("reconstruction",), places=names, of=lambda x, named: _patches(model, x))
    if isinstance(model, AutoEncoder | EncoderTransformerDecoder):
        block = max(2, -(-max(opened.clips.grid) // _CUBES))
        regions = cube_regions(opened.clips, block)
        names = tuple(
            _cube_name(np.argwhere(regions == number)[0] // block, np.array([block] * 3))
            for number in range(int(regions.max()) + 1)
        )
        where = torch.from_numpy(np.ascontiguousarray(regions)).flatten()
        return Errors(kinds=("reconstruction",), places=names, of=lambda x, named: _cubes(model, x, where))
    raise UsageError(
        f"{opened.trained.source}: a network of objective {opened.trained.recipe.objective.kind!r} completes nothing; anomalies "
        "are told by one that was pre-trained to (masked or reconstruct)"
    )


def series_masks(masking: Masking, model: Any, series: Tensor, named: Named) -> Sequence[Any]:
    """Completions that together hide every token: one order for all windows, turned on by as many as are hidden at once."""
    size = model.noise_size(series.shape[1], series.shape[2])
    noise = uniform_noise(key_of("fmristream-anomaly-v1"), size).to(series.device).expand(len(series), -1)
    first = model(series, **named, masking=masking, noise=noise)
    number, at_once = first.restore.shape[1], int(first.hidden_tokens[0].sum())
    if not 0 < at_once < number:
        raise UsageError(f"a share of {masking.ratio} hides {at_once} of {number} tokens; windows are too short for it")
    found = [first]
    for turned in range(at_once, number, at_once):
        order = (first.restore + turned) % number
        found.append(model(series, **named, masking=masking, noise=order.float()))
    return found


def _series(model: Any, series: Tensor, named: Named) -> Sums:
    total = series.new_zeros(series.shape[:2], dtype=torch.float64)
    count = torch.zeros_like(total)
    for found in series_masks(Masking(ratio=_HIDDEN), model, series, named):
        error = (found.series.double() - series.double()).square()
        total += torch.where(found.hidden, error, 0.0).sum(2)
        count += found.hidden.sum(2)
    step = model.patch
    if not step < series.shape[2]:
        raise UsageError(f"windows of {series.shape[2]} frames have no context before the {step} that are predicted")
    masked = torch.cat([series[:, :, :-step], series.new_zeros(*series.shape[:2], step)], dim=2)
    ahead = model(masked, **named, masking=Masking(mode="predict_last_pixel", frames=step)).series[:, :, -step:]
    missed = (ahead.double() - series[:, :, -step:].double()).square().sum(2)
    return {"reconstruction": (total, count), "forecast": (missed, torch.full_like(missed, step))}


def _patches(model: Any, bold: Tensor) -> Sums:
    places = model.encoder.patches.count
    total = bold.new_zeros(len(bold), places, dtype=torch.float64)
    count = torch.zeros_like(total)
    for noise in _turned_noise(model, bold.shape[-1]):
        found = model(bold, noise=noise.to(bold.device).expand(len(bold), -1))
        error = torch.where(found.counted, (found.predicted.double() - found.target.double()).square(), 0.0)
        where = found.hidden % places
        total.scatter_add_(1, where, error.sum(2))
        count.scatter_add_(1, where, found.counted.sum(2, dtype=torch.float64))
    return {"reconstruction": (total, count)}


def _turned_noise(model: Any, frames: int) -> list[Tensor]:
    """Rows of noise whose masks together hide every place, whatever the mode."""
    size, masking = model.noise_size(frames), model.config.masking
    if size <= 1:
        return [torch.full((1, size), share) for share in (0.0, 0.25, 0.5, 0.75, 0.999)][: 1 if size == 0 else 5]
    rank = uniform_noise(key_of("fmristream-anomaly-v1"), size).argsort(stable=True).argsort()
    shift = max(1, int(size * masking.ratio))
    return [(((rank + turned) % size).float() / size)[None] for turned in range(0, size, shift)]


def _cubes(model: Any, bold: Tensor, where: Tensor) -> Sums:
    error = (model(bold)[:, 0].double() - bold[:, 0].double()).square().mean(-1).flatten(1)
    where = where.to(bold.device)
    inside = (where >= 0).nonzero().squeeze(1)
    total = error.new_zeros(len(bold), int(where.max()) + 1)
    number = where[inside].expand(len(bold), -1)
    total.scatter_add_(1, number, error[:, inside])
    count = torch.zeros_like(total).scatter_add_(1, number, torch.ones_like(number, dtype=torch.float64))
    return {"reconstruction": (total, count)}


def _cube_name(place: Any, size: Any) -> str:
    """Such as `voxels 0-5, 6-11, 0-5`."""
    spans = zip((place * size).tolist(), ((place + 1) * size - 1).tolist(), strict=True)
    return f"voxels {', '.join(f'{first}-{last}' for first, last in spans)}"
