"""What a window number of a run's log or of an error means: which run and frames, and what its values look like.

    python -m train.windows OUT 17 203 [--split train] [--epoch 3]

Reads the recipe that a run keeps in OUT. What is printed names subjects; neither log nor checkpoint does.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fmristream.errors import FmriStreamError, UsageError
from fmristream.stream.window_reader import Scratch
from train.config import Recipe, load_recipe
from train.data import fitted_of, open_part
from train.launch import World

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFacts:
    """One window, as training saw it."""

    number: int
    run: str
    subject: str
    start_frame: int
    frames: int
    step: int  # frames from one to the next
    target: float | None
    not_finite: int  # in-mask values that are NaN or infinite
    least: float
    largest: float
    sd: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell windows; 0, 1 where the data cannot be read, 2 for a number that there is not."""
    chosen = _parser().parse_args(arguments)
    try:
        path = chosen.out / "recipe.toml"
        if not path.exists():
            raise UsageError(f"{chosen.out}: is not the folder of a run, which has a recipe.toml")
        recipe = load_recipe(str(path))
        for facts in look_up(recipe, chosen.windows, split=chosen.split, epoch=chosen.epoch, out=chosen.out):
            print(_told(facts, target=recipe.data.target))
    except FmriStreamError as error:
        print(f"train.windows: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def look_up(recipe: Recipe, numbers: Sequence[int], *, split: str, epoch: int, out: Path) -> list[WindowFacts]:
    """Facts of windows by number, read and normalised as the recipe says; of pairs, the first view.

    Raises:
        UsageError: there is no such split or window.
    """
    splits = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    if not splits[split]:
        raise UsageError(f"split {split!r}: the recipe has {', '.join(name for name, own in splits.items() if own)}")
    world, seed = World(), recipe.train.seed if split == "train" else None
    with ExitStack() as stack:
        fitted = fitted_of(recipe, out=out, world=world)
        clips = open_part(recipe, split=splits[split], seed=seed, world=world, stack=stack, fitted=fitted).clips
        for number in numbers:
            if not 0 <= number < clips.num_windows:
                raise UsageError(f"window {number}: split {split!r} has windows 0 to {clips.num_windows - 1}")
        return [_facts(clips, number, epoch=epoch, target=recipe.data.target) for number in numbers]


def _facts(clips: "StreamingDataset", number: int, *, epoch: int, target: str | None) -> WindowFacts:
    clip = clips.clip(number, epoch)
    run = clips.runs[clip.run]
    packed = np.empty((clips.channels, clips.window, clips.voxels), dtype=np.float32)
    clips.read_clip(run, clip, packed, Scratch())
    own = packed[:, : clip.length]  # without the padding of a run that is shorter than the longest
    values = own[np.isfinite(own)]
    return WindowFacts(
        number=number,
        run=run.name,
        subject=run.subject,
        start_frame=clip.start,
        frames=clip.length,
        step=clip.step,
        target=None if target is None else _value_of(clips, target, run.subject),
        not_finite=own.size - values.size,
        least=float(values.min(initial=np.inf)),
        largest=float(values.max(initial=-np.inf)),
        sd=float(values.std(dtype=np.float64)) if values.size else float("nan"),
    )


def _value_of(clips: "StreamingDataset", target: str, subject: str) -> float:
    """A subject's target; `target_values` has one for each subject, not for each run."""
    (found,) = (one for one in clips.targets if one.name == target)
    return found.of(subject)


def _told(facts: WindowFacts, *, target: str | None) -> str:
    stride = f", one in {facts.step}" if facts.step > 1 else ""
    parts = [
        f"run {facts.run}",
        f"subject {facts.subject}",
        f"{facts.frames} frames from frame {facts.start_frame}{stride}",
    ]
    if target is not None:
        parts.append(f"{target} {facts.target:g}")
    parts.append(f"in-mask values {facts.least:.4g} to {facts.largest:.4g}, SD {facts.sd:.4g}")
    parts += [f"{facts.not_finite} values NOT FINITE"] if facts.not_finite else []
    return f"window {facts.number}: {', '.join(parts)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.windows", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of a run")
    parser.add_argument("windows", type=int, nargs="+", metavar="N", help="window numbers")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"))
    parser.add_argument("--epoch", type=int, default=0, help="matters where data.random_phase shifts windows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
