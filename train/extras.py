"""What a network is given beside the signal: series aligned to the frames, and columns about subjects, for late fusion.

Numbers are standardised by the training runs and subjects alone. Words are codes; one that no training subject has is not
known, and what is not known is NaN.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fmristream.errors import UsageError
from fmristream.sampling.clip import Clip
from train.files import write_whole
from train.launch import World, main_first

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch
    from fmristream.stream.clips import StreamingDataset

_FILE = "side-statistics.json"
# How long other ranks wait for rank 0 to read the side series of all training runs once: a day.
_READING_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the participants table: a number (mean and SD of training subjects), or codes that they have."""

    name: str
    mean: float = 0.0
    sd: float = 1.0
    codes: int = 0
    known: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What is given, in order; `side_mean` and `side_sd` are of each column of the side series."""

    columns: tuple[Column, ...] = ()
    side: tuple[str, ...] = ()
    side_mean: tuple[float, ...] = ()
    side_sd: tuple[float, ...] = ()

    @property
    def sizes(self) -> dict[str, Any]:
        """What networks are told: the number of series, and for each column 0 (a number) or how many codes."""
        columns = {"columns": [column.codes for column in self.columns]} if self.columns else {}
        return columns | ({"side": len(self.side_mean)} if self.side else {})

    def state(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from; empty where nothing is given."""
        return {"extras": asdict(self)} if self.sizes else {}

    def __call__(self, batch: "Batch") -> dict[str, Tensor]:
        """`columns` (b, columns) and `side` (b, t, series), where there are some."""
        found = {}
        if self.columns:
            found["columns"] = torch.stack(
                [_coded(column, batch.targets[column.name]) for column in self.columns], dim=1
            )
        if self.side:
            rows = (batch.side[name] for name in self.side)
            series = [values.unsqueeze(2) if values.dim() == 2 else values for values in rows]
            side = torch.cat(series, dim=2)
            mean, sd = (side.new_tensor(numbers) for numbers in (self.side_mean, self.side_sd))
            found["side"] = (side - mean) / sd
        return found


NO_EXTRAS = Extras()


def fit_extras(clips: "StreamingDataset", *, columns: Sequence[str], out: Path, world: World) -> Extras:
    """Means and SDs of training clips' extras; those of side series are kept in the run's folder.

    Raises:
        UsageError: a column has no values that differ.
    """
    fitted = tuple(_fit_column(clips, name) for name in columns)
    names = tuple(clips.side.wanted)
    if not names:
        return Extras(columns=fitted)
    with main_first(world, timeout_s=_READING_S):
        mean, sd = _side_statistics(clips, out / _FILE)
    return Extras(columns=fitted, side=names, side_mean=mean, side_sd=sd)


def _coded(column: Column, values: Tensor) -> Tensor:
    if not column.codes:
        return (values - column.mean) / column.sd
    known = (values[:, None] == values.new_tensor(column.known)).any(1)
    return torch.where(known, values, torch.nan)


def _fit_column(clips: "StreamingDataset", name: str) -> Column:
    values = np.array(clips.target_values[name], dtype=np.float64)
    known = values[np.isfinite(values)]
    if len(np.unique(known)) < 2:
        raise UsageError(f"data.columns: {name} is the same for all training subjects, or not known; leave it out")
    labels = clips.target_labels[name]
    if labels:
        return Column(name=name, codes=len(labels), known=tuple(map(float, np.unique(known))))
    return Column(name=name, mean=float(known.mean()), sd=float(known.std()))


def _side_statistics(clips: "StreamingDataset", path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, SDs) over all frames of all runs: those that are kept, or made now."""
    asked = {"selection": clips.selection_digest, "content": clips.content_digest, "side": list(clips.side.wanted)}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("of") != asked:
        kept = {"of": asked, **_measured(clips)}
        write_whole(path, json.dumps(kept, indent=1) + "\n")
    return tuple(kept["mean"]), tuple(kept["sd"])


def _measured(clips: "StreamingDataset") -> Mapping[str, list[float]]:
    totals = None
    for run, frames in enumerate(clips.runs.numbers("frames").astype(int).tolist()):
        rows = clips.side.empty(1, frames)
        clips.side.read(
            Clip(run=run, start=0, length=frames, step=1), {name: values[0] for name, values in rows.items()}
        )
        side = np.concatenate([values[0].reshape(frames, -1) for values in rows.values()], axis=1).astype(np.float64)
        known = np.isfinite(side)
        side = np.where(known, side, 0)
        sums = np.stack([known.sum(0), side.sum(0), np.square(side).sum(0)])
        totals = sums if totals is None else totals + sums
    assert totals is not None, "a selection has a run"
    count, total, squares = totals
    mean = total / np.maximum(count, 1)
    variance = squares / np.maximum(count, 1) - mean**2
    # Summed squares lose half the digits: what varies by less than that is constant, and becomes 0.
    sd = np.where(variance > 1e-12 * np.square(mean), np.sqrt(np.maximum(variance, 0)), 1.0)
    return {"mean": mean.tolist(), "sd": sd.tolist()}
