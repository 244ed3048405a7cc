"""A batch's rows in words and numbers: who, which frames, since when, for what; beside the values that threads write."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.sampling.deal import Draws
from fmristream.signal.grid import Shape3
from fmristream.stream.batch import Batch
from fmristream.stream.clips import Row, StreamingDataset
from fmristream.stream.mixture import Mixture
from fmristream.stream.targets import Target

Scale = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Buffers:
    """Memory of a batch, written to while it is described.

    Attributes:
        values: (b, c, t, v or x*y*z).
        fill: (b, c) float32.
        side: (b, t) or (b, t, k) float32 by name.
        kept: (b, t) bool; None where no recipe scrubs.
    """

    values: torch.Tensor
    fill: NDArray[np.float32]
    side: Mapping[str, NDArray[np.float32]]
    kept: NDArray[np.bool_] | None


class Describer:
    """What batches of one loader have in common.

    Args:
        clips: what is loaded.
        members: the selections in it.
        is_placed: whether values come on the grid.
        global_size: samples of a batch over all ranks.
        offset: place of this rank's first sample in a batch.
    """

    def __init__(
        self,
        clips: StreamingDataset | Mixture,
        members: Sequence[StreamingDataset],
        *,
        is_placed: bool,
        global_size: int,
        offset: int,
    ) -> None:
        self._clips = clips
        self._is_placed = is_placed
        self._global_size, self._offset = global_size, offset
        self._grid: Shape3 | None = clips.grid if is_placed or clips.has_grid else None
        self._positions = torch.from_numpy(clips.positions) if clips.has_grid and not is_placed else None
        self._targets: list[dict[str, Target]] = [{one.name: one for one in member.targets} for member in members]

    def describe(self, rows: Sequence[Row], draws: Draws, position: int, buffers: Buffers) -> Batch:
        """The batch of these rows, its values still being written."""

        def numbers(found: Iterable[int]) -> torch.Tensor:
            return torch.tensor(list(found), dtype=torch.int64)

        clips, values = self._clips, buffers.values
        places = torch.arange(position + self._offset, position + self._offset + len(draws.number))
        return Batch(
            packed=None if self._is_placed else values,
            placed=values.view(*values.shape[:3], *clips.grid) if self._is_placed else None,
            positions=self._positions,
            grid=self._grid,
            fill=torch.from_numpy(buffers.fill),
            valid=torch.from_numpy(np.tile(draws.valid, clips.views)),
            window=numbers(row.number for row in rows),
            start=numbers(row.clip.start for row in rows),
            lengths=None if clips.has_windows else numbers(row.clip.length for row in rows),
            source=numbers(row.source for row in rows),
            views=clips.views,
            subject=[row.run.subject for row in rows],
            run=[row.run.name for row in rows],
            targets={target.name: self._target(target.name, rows) for target in clips.targets},
            global_size=self._global_size,
            position=position,
            side={name: torch.from_numpy(known) for name, known in buffers.side.items()},
            kept=None if buffers.kept is None else torch.from_numpy(buffers.kept),
            epoch=torch.from_numpy(np.tile(draws.epoch, clips.views)),
            sample=places.repeat(clips.views),
            orientation=clips.orientation,
            voxel_sizes_mm=clips.voxel_sizes_mm,
        )

    def _target(self, name: str, rows: Sequence[Row]) -> torch.Tensor:
        """(b,) float32, of each row's own dataset."""
        return torch.tensor([self._targets[row.source][name].of(row.run.subject) for row in rows], dtype=torch.float32)


def with_scales(batch: Batch, sources: Sequence[Row], scales: Mapping[tuple[int, str], Scale]) -> Batch:
    """The batch with what its residuals are scaled by, a row for each run."""
    keys = [(row.source, row.run.name) for row in sources]
    rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    return replace(
        batch,
        scale=torch.from_numpy(np.stack([scales[key][0] for key in rows])),
        offset=torch.from_numpy(np.stack([scales[key][1] for key in rows])),
        scale_row=torch.tensor([rows[key] for key in keys], dtype=torch.int64),
    )
