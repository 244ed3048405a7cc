"""Single samples, as a map-style dataset gives them: read now, placed on the grid, with what they are."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run import Run
from fmristream.stream.window_reader import Scratch

if TYPE_CHECKING:
    from fmristream.stream.clips import Row, StreamingDataset


def item_of(clips: "StreamingDataset", rows: "Sequence[Row]") -> dict[str, Any]:
    """One sample: a row for each of its views, which have a leading axis where there are two."""
    read = [_values(clips, row) for row in rows]
    kept = [clips.frames_kept(row) for row in rows] if clips.scrubs else []
    side = [clips.read_side(row.clip) for row in rows]
    first, is_one = rows[0], len(rows) == 1
    return {
        "bold" if clips.has_grid else "packed": read[0] if is_one else np.stack(read),
        "run": first.run.name if is_one else tuple(row.run.name for row in rows),
        "start": first.clip.start if is_one else tuple(row.clip.start for row in rows),
        **({} if clips.has_windows else {"length": first.clip.length}),
        **({"frames_kept": kept[0] if is_one else np.stack(kept)} if kept else {}),
        **({"side": side[0] if is_one else _stacked(side)} if side[0] else {}),
        "subject": first.run.subject,
        "targets": {target.name: np.float32(target.of(first.run.subject)) for target in clips.targets},
        "window": first.number,
    }


def _values(clips: "StreamingDataset", row: "Row") -> NDArray[np.float32]:
    packed = np.empty((clips.channels, clips.window, clips.voxels), dtype=np.float32)
    clips.read_clip(row.run, row.clip, packed, Scratch())
    return _placed(clips, packed, row.run) if clips.has_grid else packed


def _placed(clips: "StreamingDataset", packed: NDArray[np.float32], run: Run) -> NDArray[np.float32]:
    """(c, x, y, z, t) of (c, t, v)."""
    inside = clips.positions >= 0
    bold = np.empty((*packed.shape[:2], int(np.prod(clips.grid))), dtype=np.float32)
    bold[:] = clips.fill(run)[:, None, None]
    bold[..., clips.positions[inside]] = packed[..., inside]
    return np.moveaxis(bold.reshape(*packed.shape[:2], *clips.grid), 1, -1)


def _stacked(side: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
    return {name: np.stack([one[name] for one in side]) for name in side[0]}
