"""What a recipe trains on: splits of a dataset as streams of windows, and what a network must know of a window."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fmristream.errors import UsageError
from fmristream.signal.recipes import expand
from fmristream.signal.steps import Cohort, ParcelMeans, TwoChannels
from fmristream.storage.urls import display_url
from train.config import Recipe
from train.launch import World, main_first

if TYPE_CHECKING:
    from fmristream.catalog.split import SplitPart
    from fmristream.shards.dataset import Dataset
    from fmristream.stream.augment import Compose
    from fmristream.stream.clips import StreamingDataset
    from fmristream.stream.fitted import Fitted
    from fmristream.stream.loader import StreamingLoader

# How long the other ranks wait for rank 0 to fit statistics, which may read the training runs once: a day.
_FITTING_S = 86400.0
# What `--check` takes for numbers that only the data can tell.
_SOME_PARCELS, _SOME_FRAMES = 100, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One split of a dataset, and this rank's share of it."""

    clips: "StreamingDataset"
    loader: "StreamingLoader"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signal:
    """What a window is, to those who build networks.

    Attributes:
        takes: `volume`, bold (b, c, x, y, z, t), or `series`, (b, parcels, t).
        grid: (x, y, z) of volumes.
        channels: of volumes; series have one.
        frames: of the longest window.
        parcels: places in a packed frame of the parcels that have a voxel, of series.
        centres_mm: (parcels, 3) of those, where they come from an atlas.
        brain: (x, y, z) which voxels are stored, of volumes.
        varies: whether windows differ in length.
    """

    takes: Literal["volume", "series"]
    channels: int
    frames: int
    grid: tuple[int, int, int] | None = None
    parcels: NDArray[np.int64] | None = None
    centres_mm: NDArray[np.float32] | None = None
    brain: NDArray[np.bool_] | None = None
    varies: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """What networks are told of it."""
        if self.takes == "volume":
            assert self.grid is not None
            return {"img_size": (*self.grid, self.frames), "in_chans": self.channels}
        assert self.parcels is not None
        return {"parcels": len(self.parcels), "frames": self.frames}


def open_parts(recipe: Recipe, *, out: Path, world: World, stack: ExitStack) -> dict[str, Part]:
    """`train`, and `val` and `test` where the recipe names them; statistics that it needs are fitted first."""
    data = recipe.data
    fitted = fitted_of(recipe, out=out, world=world)
    splits = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    return {
        name: open_part(
            recipe,
            split=split,
            seed=recipe.train.seed if name == "train" else None,
            world=world,
            stack=stack,
            fitted=fitted,
        )
        for name, split in splits.items()
        if split
    }


def open_part(
    recipe: Recipe,
    *,
    split: str,
    seed: int | None,
    world: World,
    stack: ExitStack,
    fitted: "tuple[Fitted, ...]" = (),
) -> Part:
    """One split: with a seed in the order of training, else every window once in stored order."""
    from fmristream import StreamingLoader

    data, training = recipe.data, seed is not None
    stride = data.stride if training or recipe.eval.stride is None or not data.window else recipe.eval.stride
    source, chosen = training_part(recipe) if split == data.train_split else (None, split)
    clips = open_clips(
        recipe,
        source=source,
        split=chosen,
        normalize=data.normalize,
        window=data.window or None,
        stride=stride,
        step=data.step,
        seed=seed,
        random_phase=training and data.random_phase,
        views=data.views,
        targets=(*recipe.targets, *data.columns),
        side=data.side,
        grid=data.grid,
        orientation=data.orientation or None,
        stats=data.stats,
        context=data.context,
        fitted=fitted,
        # Fitted to some of the training runs: a split of their own, whose statistics others are refused.
        fitted_elsewhere=source is None and data.train_groups is not None,
    )
    batch_size = recipe.train.batch_size
    if not training:
        # The last batch is padded to the full size, and all of it computed: none need be larger than the split.
        batch_size = min(recipe.eval.batch_size or batch_size, max(clips.num_windows, world.size))
    loader = StreamingLoader(
        clips,
        batch_size=batch_size,
        rank=world.rank,
        world_size=world.size,
        threads=data.threads,
        prefetch_batches=data.prefetch_batches,
    )
    stack.callback(loader.close)
    return Part(clips=clips, loader=loader)


def unreachable(recipe: Recipe) -> dict[str, str]:
    """Why data of `eval.urls` cannot be opened, by URL: told before training, not only after it."""
    from fmristream import open

    found: dict[str, str] = {}
    for url in recipe.eval.urls:
        try:
            open(url)
        except Exception as error:  # this only tells
            found[display_url(url)] = str(error)
    return found


def training_part(recipe: Recipe) -> "tuple[Dataset | None, str | SplitPart]":
    """What a recipe learns from: its training split, or some groups of it, drawn so that more of them hold fewer.

    Raises:
        UsageError: there are not so many groups.
    """
    from fmristream import open, split

    data = recipe.data
    if data.train_groups is None:
        return None, data.train_split
    dataset = open(data.url) if not data.where else open(data.url).where(data.where)
    column = "runs.split" if "split" in dataset.participant_columns else "split"
    training = dataset.where(f"{column} == {data.train_split!r}")
    count = training.runs.distinct("group")
    if data.train_groups > count:
        raise UsageError(
            f"data.train_groups {data.train_groups}: split {data.train_split!r} has {count} groups of subjects; ask for fewer"
        )
    share = data.train_groups / count
    parted = split(training, fractions=(share, 0.0, 1.0 - share), seed=data.train_groups_seed)
    return training, parted.train


def open_clips(
    recipe: Recipe, *, url: str = "", source: "Dataset | None" = None, where: str = "", **arguments: Any
) -> "StreamingDataset":
    """A recipe's dataset with its conditions and atlases, or another one (`url` or `source`, `where`) with its atlases."""
    from fmristream import StreamingDataset
    from fmristream.ingest.atlas import read_atlas

    data = recipe.data
    atlases = {name: read_atlas(path).atlas for name, path in data.atlases.items()}
    chosen = where if url or source is not None else data.where
    return StreamingDataset(source or url or data.url, where=chosen or None, atlases=atlases, **arguments)


def fitted_of(recipe: Recipe, *, out: Path, world: World) -> "tuple[Fitted, ...]":
    """What the recipe's normalisation needs to know of the training runs; kept in `out`, the run's folder."""
    if not any(isinstance(step, Cohort) for step in expand(recipe.data.normalize)):
        return ()
    with main_first(world, timeout_s=_FITTING_S):
        return _fitted(recipe, out)


def _fitted(recipe: Recipe, out: Path) -> "tuple[Fitted, ...]":
    """Statistics of the training runs for each step that needs some: those in the run's folder, or made now and kept there."""
    from fmristream import fit, load_fitted, save_fitted

    parts = [part.strip() for part in recipe.data.normalize.split("|")]
    found: list[Fitted] = []
    for place, part in enumerate(parts):
        if not any(isinstance(step, Cohort) for step in expand(part)):
            continue
        name = fitted_name(parts, place)
        if not list((out / "fitted").glob(f"{name}-*")):
            source, chosen = training_part(recipe)
            clips = open_clips(
                recipe,
                source=source,
                split=chosen,
                normalize=" | ".join(parts[:place]) or "none",
                window=None,
                fitted=tuple(found),
            )
            save_fitted(fit(clips, part, name=name), str(out))
        found.append(load_fitted(str(out), name))
    return tuple(found)


def fitted_name(parts: Sequence[str], place: int) -> str:
    """What the statistics of one step of a normalisation are called in a run's folder."""
    return f"fit-{sha256(' | '.join(parts[: place + 1]).encode()).hexdigest()[:16]}"


def frozen_statistics(recipe: Recipe, folder: Path | None) -> "tuple[Fitted, ...]":
    """What a run fitted to its training runs, from its folder; nothing is fitted.

    Raises:
        UsageError: the recipe needs some, and the folder has none.
    """
    from fmristream import load_fitted

    parts = [part.strip() for part in recipe.data.normalize.split("|")]
    places = [place for place, part in enumerate(parts) if any(isinstance(step, Cohort) for step in expand(part))]
    if places and folder is None:
        raise UsageError(
            f"data.normalize {recipe.data.normalize!r} needs statistics of the training runs, which a run keeps in its folder "
            "`fitted`; give the run's folder, or a checkpoint within it"
        )
    return tuple(load_fitted(str(folder), fitted_name(parts, place)) for place in places)


def signal_of(parts: Mapping[str, Part]) -> Signal:
    """What the windows of all parts are.

    Raises:
        UsageError: series with several channels, or parts whose windows are not alike.
    """
    clips = parts["train"].clips
    every = [part.clips for part in parts.values()]
    for name, part in parts.items():
        if _sizes_of(part.clips) != _sizes_of(clips):
            raise UsageError(
                f"the windows of split {name!r} have sizes {_sizes_of(part.clips)}, those of training {_sizes_of(clips)}; one "
                "network takes one size: set data.grid, or choose runs with data.where"
            )
    frames = max(one.window for one in every)
    lengths = {int(number) for one in every for number in one.runs.numbers("frames")}
    varies = not clips.has_windows and len(lengths) > 1
    if clips.has_grid:
        brain = np.zeros(int(np.prod(clips.grid)), dtype=bool)
        brain[clips.positions[clips.positions >= 0]] = True
        return Signal(
            takes="volume",
            grid=clips.grid,
            channels=clips.channels,
            frames=frames,
            brain=brain.reshape(clips.grid),
            varies=varies,
        )
    if clips.channels != 1:
        raise UsageError(
            f"data.normalize {clips.normalize!r} gives series of {clips.channels} channels; networks take one"
        )
    centres, kept = clips.parcel_centres_mm, parcels_with_voxels(clips)
    for name, part in parts.items():
        if not np.array_equal(parcels_with_voxels(part.clips), kept):
            raise UsageError(
                f"split {name!r} has stored voxels in other parcels than training has; convert all runs with one --mask, or "
                "choose runs with data.where"
            )
    return Signal(
        takes="series",
        channels=1,
        frames=frames,
        parcels=kept,
        centres_mm=None if centres is None else centres[kept].astype(np.float32),
        varies=varies,
    )


def parcels_with_voxels(clips: "StreamingDataset") -> NDArray[np.int64]:
    """Places of those that have a signal; one without a stored voxel is left out, and not shown to be 0."""
    centres = clips.parcel_centres_mm
    return np.arange(clips.voxels) if centres is None else np.flatnonzero(np.isfinite(centres).all(axis=1))


def _sizes_of(clips: "StreamingDataset") -> tuple[int, ...]:
    return clips.grid if clips.has_grid else (clips.voxels,)


def signal_of_recipe(recipe: Recipe) -> Signal | None:
    """What the recipe alone tells of its windows, numbers of parcels made up; None where that is too little."""
    data, steps = recipe.data, expand(recipe.data.normalize)
    frames = data.window or _SOME_FRAMES
    is_list = any(isinstance(step, ParcelMeans) or (isinstance(step, Cohort) and step.kind == "pca") for step in steps)
    if is_list:
        some = np.arange(_SOME_PARCELS)
        centres = np.zeros((_SOME_PARCELS, 3), dtype=np.float32)
        return Signal(takes="series", channels=1, frames=frames, parcels=some, centres_mm=centres)
    if data.grid is None:
        return None
    channels = 2 if any(isinstance(step, TwoChannels) for step in steps) else 1
    return Signal(takes="volume", grid=data.grid, channels=channels, frames=frames)


def augmentation(recipe: Recipe) -> "Compose | None":
    """How training windows are varied."""
    from fmristream.stream.augment import SWIFT, Compose

    return Compose(SWIFT, seed=recipe.train.seed) if recipe.data.augment == "swift" else None


def uniform_noise(key: int, count: int) -> torch.Tensor:
    """(count,) float32 in [0, 1), 24 bits each: the same for a key on any machine."""
    from fmristream.sampling.keys import GOLDEN, mix

    words = mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))
