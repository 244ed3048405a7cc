"""Statistics fitted to the training runs: made in one pass, kept as a named object that is never changed, tied to its split.

An object is a safetensors file (numbers only), named by its own digest: with the dataset as `fitted/NAME-DIGEST.safetensors`,
or anywhere. It says which content and which split it was fitted to, and is used with no other.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmristream.catalog.run_table import RunTable
from fmristream.catalog.split import SplitPart
from fmristream.errors import CorruptDataError, ObjectExistsError, ResumeError, UsageError
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import sha256, sha256_json
from fmristream.shards.fitted import FOLDER, SUFFIX, decode_object, encode_object, object_key
from fmristream.signal.cohort import Accumulator, Components, Moments, Quantiles, Ranges
from fmristream.signal.prepared import Prepared, RecipeSource
from fmristream.signal.recipes import FittedValues, Recipe, expand, prepare
from fmristream.signal.steps import Cohort
from fmristream.storage import open_store
from fmristream.storage.store import is_key
from fmristream.stream.run_source import RunSource
from fmristream.stream.values import inputs_of

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset

# What an object says of itself beside its values.
_RECORDED = ("name", "content_digest", "split", "split_digest", "runs", "frames", "first_frames")
# BrainLM's code takes medians and quartiles of the first 200 frames of each recording.
BRAINLM_FRAMES = 200
_TRAIN = "train"
# Between a part and the digest of a split that is not stored.
_AT = "@"
# Of values that are worked on at a time.
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """Statistics of a cohort, and what they are of.

    Attributes:
        name: for people and object names: letters, digits, '.', '_', '-'.
        values: the statistics, their kind, and the recipe whose output they are of.
        content_digest: of the dataset.
        split: that the runs are of; "" where the dataset is not split.
        split_digest: of the runs of that split (`split_digest`).
        runs: how many were read.
        frames: how many of all of them.
        first_frames: of each run at most; 0 for all.
    """

    name: str
    values: FittedValues
    content_digest: str
    split: str
    split_digest: str
    runs: int
    frames: int
    first_frames: int

    @property
    def digest(self) -> str:
        """Hex sha256 of the object."""
        return sha256(encode_fitted(self))

    @property
    def key(self) -> str:
        """Its name with the dataset."""
        return object_key(self.name, encode_fitted(self))


def fit(
    clips: "StreamingDataset",
    step: str,
    *,
    name: str | None = None,
    first_frames: int | None = None,
    max_bytes: int = 512 * 2**20,
) -> Fitted:
    """Fit the statistics that a recipe step needs to what the clips' recipe gives, over whole training runs, read once.

    Args:
        clips: the training split, with the recipe that comes before the step as `normalize`.
        step: a step or published recipe that uses such statistics, as `brainlm-robust`, `cohort-zscore` or `pca:32`.
        name: of the object; the step's where not given.
        first_frames: take so many of each run at most; all where not given, 200 for `brainlm-robust` as its code does.
        max_bytes: for medians: exact while the values fit, else with an error that the result states.

    Raises:
        UsageError: the clips are not the training split, or the step needs no such statistics.
        CorruptDataError: a run cannot be read or normalised.
    """
    split = _training_split(clips)
    if clips.recipe.stats != "run":
        raise UsageError(
            f"fit({step!r}) of clips with stats={clips.recipe.stats!r}: statistics of a cohort are fitted to what whole runs "
            "give; open the clips without stats"
        )
    before, cohort = _parted(step)
    recipe = Recipe(steps=(*clips.recipe.steps, *before), fitted=clips.recipe.fitted, atlases=clips.recipe.atlases)
    if recipe.channels != 1:
        raise UsageError(f"fit({step!r}) after {clips.normalize!r}: expected one channel, got {recipe.channels}")
    if first_frames is None and step.strip().startswith("brainlm-robust"):
        first_frames = BRAINLM_FRAMES
    dataset, runs = clips.dataset, clips.runs
    source = RunSource(dataset, runs[0])
    longest = max(runs.column("frames"))
    width = recipe.width(source)
    accumulator = _accumulator(cohort, width, frames=min(longest, first_frames or longest), max_bytes=max_bytes)
    frames = 0
    for place in range(len(runs)):
        source = RunSource(dataset, runs[place])
        for numbers, values in _outputs(prepare(recipe, source, exact=True), source, first_frames):
            accumulator.add(numbers, values)
            frames += len(numbers)
    return Fitted(
        name=_named(name or step.strip().replace(":", "-")),
        values=FittedValues(
            kind=cohort.kind, recipe=recipe.text, arrays=accumulator.finish(), inputs=inputs_of(recipe)
        ),
        content_digest=dataset.content_digest,
        split=_name_of(split),
        split_digest=split_digest(dataset, split),
        runs=len(runs),
        frames=frames,
        first_frames=first_frames or 0,
    )


def split_digest(dataset: Dataset, split: str | SplitPart) -> str:
    """Hex sha256 over the identities of a split's runs, in base order: changes when any run comes, goes or changes.

    Of a dataset that was opened with a condition, those that it leaves: statistics of some of the training runs are not
    those of all, and conditions may be what divides who trains from who tests.
    """
    runs: RunTable = dataset.runs
    if isinstance(split, SplitPart):
        runs = runs.select(np.array([split.has(subject) for subject in runs.column("subject")], dtype=bool))
    else:
        runs = runs.where("split", split)
    return sha256_json({"runs": sorted(runs.identities()), "split": _name_of(split)})


def require_fitted(
    fitted: Sequence[Fitted], dataset: Dataset, split: str | SplitPart | None, *, is_frozen: bool = False
) -> None:
    """Raise ResumeError unless statistics were fitted to this dataset, and to the training part of its split as it is now.

    Args:
        fitted: the statistics.
        dataset: what they are going to be used with.
        split: the part that they are going to be used with.
        is_frozen: they belong to a trained network, and no part of this dataset is to be learnt from.
    """
    if is_frozen:
        return
    for one in fitted:
        train: str | SplitPart = replace(split, part=_TRAIN) if isinstance(split, SplitPart) else one.split
        if one.split != _name_of(train) or (not isinstance(split, SplitPart) and _AT in one.split):
            here = str(split) if isinstance(split, SplitPart) else f"the stored split {split!r}"
            raise ResumeError(
                f"{dataset.store.name}: the statistics {one.name!r} were fitted to {one.split!r}, these clips are of {here}; "
                "fit them to the training part of the same split: they may know test subjects"
            )
        if one.content_digest != dataset.content_digest:
            raise ResumeError(
                f"{dataset.store.name}: the statistics {one.name!r} were fitted to content {one.content_digest[:12]}, this "
                f"dataset has {dataset.content_digest[:12]}; fit them again, or open the version they belong to"
            )
        now = split_digest(dataset, train)
        if one.split_digest != now:
            raise ResumeError(
                f"{dataset.store.name}: the statistics {one.name!r} were fitted to a split {one.split!r} of digest "
                f"{one.split_digest[:12]}, it is {now[:12]} now, or these clips have "
                "another `where`; fit them again: they may know test subjects"
            )


def save_fitted(fitted: Fitted, target: str | Dataset) -> str:
    """Write the object, `fitted/NAME-DIGEST.safetensors`; returns that key. What is there already must be the same.

    Args:
        fitted: the statistics.
        target: a dataset, with which they are kept, or the URL of any folder.

    Raises:
        CorruptDataError: something else has the name.
        StorageError: the target cannot be written.
    """
    data = encode_fitted(fitted)
    store = target.store if isinstance(target, Dataset) else open_store(target)
    with suppress(ObjectExistsError):
        store.put_new(fitted.key, data)
        return fitted.key
    if store.read(fitted.key) != data:
        raise CorruptDataError(f"{store.name}/{fitted.key}: is not what its name says; remove it and save again")
    return fitted.key


def load_fitted(source: str | Dataset, name: str) -> Fitted:
    """Read statistics.

    Args:
        source: a dataset, or the URL that they were saved to.
        name: as given to `fit`, or with the first digits of the digest, or the whole file name.

    Raises:
        UsageError: there is none of this name, or there are several.
        CorruptDataError: the object is not what its name says.
    """
    store = source.store if isinstance(source, Dataset) else open_store(source)
    listed = [key for key in store.list(FOLDER) if key.endswith(SUFFIX)]
    found = [key for key in listed if _is_called(key.rpartition("/")[2], name)]
    if len(found) != 1:
        known = ", ".join(key.rpartition("/")[2] for key in (found or listed)) or "none"
        raise UsageError(
            f"{store.name}: {len(found)} fitted statistics are called {name!r}, expected one; there are: {known}; give more of "
            "the file's name, or make them with fmristream.fit and save_fitted"
        )
    return decode_fitted(store.read(found[0]), name=found[0].rpartition("/")[2], where=f"{store.name}/{found[0]}")


def encode_fitted(fitted: Fitted) -> bytes:
    """The object."""
    about = {name: getattr(fitted, name) for name in _RECORDED}
    values = fitted.values
    # Objects that were given nothing have the bytes, and names, that they had before this was noted.
    given = {"inputs": values.inputs} if values.inputs else {}
    return encode_object({**about, "kind": values.kind, "recipe": values.recipe, **given}, values.arrays)


def decode_fitted(data: bytes, *, name: str, where: str) -> Fitted:
    """The statistics in an object.

    Raises:
        CorruptDataError: it is damaged, or not what its file name says.
    """
    about, arrays = decode_object(data, key=name, where=where)
    try:
        inputs = str(about.get("inputs", ""))
        values = FittedValues(kind=about["kind"], recipe=about["recipe"], arrays=arrays, inputs=inputs)
        return Fitted(values=values, **{key: about[key] for key in _RECORDED})
    except LookupError as error:
        raise CorruptDataError(f"{where}: no statistics that this release wrote (no {error})") from error


def _is_called(file: str, name: str) -> bool:
    stem = file.removesuffix(SUFFIX)
    own, _, digest = stem.rpartition("-")
    asked, dash, digits = name.removesuffix(SUFFIX).rpartition("-")
    return name in (file, stem, own) or bool(dash and asked == own and len(digits) >= 4 and digest.startswith(digits))


def _named(name: str) -> str:
    if not is_key(name) or "/" in name:
        raise UsageError(f"name={name!r}: expected letters, digits, '.', '_' and '-'")
    return name


def _name_of(split: str | SplitPart) -> str:
    return f"{split.part}{_AT}{split.split.digest}" if isinstance(split, SplitPart) else split


def _training_split(clips: "StreamingDataset") -> str | SplitPart:
    if isinstance(clips.split, SplitPart) and clips.split.part == _TRAIN:
        return clips.split
    splits = set(clips.dataset.runs.counts("split")) - {""}
    if isinstance(clips.split, SplitPart) or (splits and clips.split != _TRAIN):
        raise UsageError(
            f"{clips.dataset.store.name}: statistics are fitted to the split {_TRAIN!r}, these clips are of {str(clips.split)!r} "
            f"(the dataset has {', '.join(sorted(splits))}); open them with split={_TRAIN!r}, or test subjects get in"
        )
    return clips.split or ""


def _parted(step: str) -> tuple[tuple[Any, ...], Cohort]:
    """The steps before the one that uses statistics, and that one."""
    steps = expand(step)
    places = [place for place, one in enumerate(steps) if isinstance(one, Cohort)]
    if len(places) != 1:
        raise UsageError(
            f"fit(clips, {step!r}): expected one step that uses statistics of the training runs (brainlm-robust, "
            f"cohort-zscore, cohort-robust, cohort-minmax, pca:N), got {len(places)}"
        )
    cohort = steps[places[0]]
    assert isinstance(cohort, Cohort)
    return tuple(steps[: places[0]]), cohort


def _accumulator(cohort: Cohort, width: int, *, frames: int, max_bytes: int) -> Accumulator:
    if cohort.kind == "moments":
        return Moments(width)
    if cohort.kind == "robust":
        return Quantiles(width, max_bytes=max_bytes)
    if cohort.kind == "pca":
        return Components(width, components=cohort.components)
    return Ranges(width, kind=cohort.kind, frames=frames)


def _outputs(
    prepared: Prepared, source: RecipeSource, first_frames: int | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """What a recipe makes of a run's first frames, some at a time: (numbers, (t, width))."""
    run = source.run
    frames = min(run.frames, first_frames or run.frames)
    step = max(1, _BLOCK_BYTES // (8 * max(1, run.voxels if prepared.needs_frames else prepared.width)))
    for start in range(0, frames, step):
        stop = min(start + step, frames)
        stored = np.empty((stop - start, 0), dtype=run.dtype)
        if prepared.needs_frames:
            stored = source.read_stored(start, stop)
            if source.is_difference:
                with np.errstate(over="ignore"):
                    stored = stored - source.reference
        out = np.empty((1, stop - start, prepared.width), dtype=np.float32)
        prepared(stored, range(start, stop), out)
        yield np.arange(start, stop), out[0]
