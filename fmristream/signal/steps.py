"""The steps that recipes are made of, as values, and how each is written: `name` or `name:argument`."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fmristream.errors import UsageError
from fmristream.signal.confounds import Strategy, parse_strategy
from fmristream.signal.normalize import RECIPES, Normalization


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step; `text` is how it is written."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(Step):
    """The signal in its units: nothing happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Global(Step):
    """z or min-max over the foreground of the run, all voxels alike."""

    normalization: Normalization


@dataclass(frozen=True, slots=True, kw_only=True)
class Voxelwise(Step):
    """A centre and a scale for each voxel: `zscore`, `zscore-sample`, `center` or `percent`."""

    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Temporal(Step):
    """Something is taken out of each voxel's course: `detrend`, `highpass`, `bandpass` or `confounds`."""

    kind: str
    low_hz: float = 0.0
    high_hz: float = math.inf
    strategy: Strategy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Framewise(Step):
    """Each frame over its voxels: `zscore`, `center` or `minmax`."""

    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Range(Step):
    """Smallest and largest value over time to 0 and 1.

    Attributes:
        is_voxelwise: of each voxel, else of all of them together.
        keeps_constant: what never changes stays what it is, as BrainLM's code has it; else it becomes 0.
    """

    is_voxelwise: bool
    keeps_constant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Step):
    """Values below and above are set to the bounds."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divide(Step):
    """Every value is divided by a number."""

    by: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort(Step):
    """Scaled by statistics that were fitted to the training runs.

    Attributes:
        kind: of the statistics: `moments`, `robust`, `range`, `voxel-range`, `frame-range` or `pca`.
        is_released: `robust`: what BrainLM's released code computes, x - (median / IQR).
        keeps_constant: see `Range`.
        components: of `pca`.
    """

    kind: str
    is_released: bool = False
    keeps_constant: bool = False
    components: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool(Step):
    """Means of cubes of `size` voxels a side, over the stored voxels in each."""

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop(Step):
    """A box of the grid: Python slices of three axes."""

    cuts: tuple[tuple[int | None, int | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParcelMeans(Step):
    """Means of an atlas's parcels; "" for the only one that the run has."""

    atlas: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Step):
    """No statistic uses the first frames of a run."""

    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoChannels(Step):
    """TFF's input: global z and per-voxel z."""


REDUCTIONS = (Pool, Crop, ParcelMeans)

# One published name -> the steps that it stands for. BrainLM's are the columns of its converters: those of the UK Biobank
# converter act per parcel, those of the toolkit's version per frame. The two constants are in the former's code.
ALIASES: Mapping[str, str] = {
    "tff-hcp": "crop:8:-8,8:-8,:-10 | skip:10 | tff",
    "brainlm-robust": "voxel-center | cohort-robust",
    "brainlm-robust-released": "voxel-center | cohort-robust:released",
    "brainlm-subtract-mean": "voxel-center",
    "brainlm-global-std": "voxel-center | divide:41.44047",
    "brainlm-global-99": "voxel-center | divide:111.13143061224855",
    "brainlm-per-patient-all-voxel": "run-minmax",
    "brainlm-per-patient-per-voxel": "voxel-minmax:keep",
    "brainlm-all-patient-all-voxel": "cohort-minmax",
    "brainlm-per-voxel-all-patient": "cohort-voxel-minmax:keep",
    "brainlm-toolkit-subtract-mean": "frame-center",
    "brainlm-toolkit-per-patient-per-voxel": "frame-minmax",
    "brainlm-toolkit-per-voxel-all-patient": "cohort-frame-minmax",
}


def parse_step(text: str) -> Step:
    """The step that is written so.

    Raises:
        UsageError: there is no such step, or its argument makes no sense.
    """
    name, colon, argument = text.partition(":")
    name, argument = name.strip(), argument.strip()
    written = f"{name}:{argument}" if colon else name
    if name in RECIPES and not (name == "voxel-zscore" and colon):
        _none(written, argument, colon)
        return _plain(name)
    if name in _PLAIN:
        _none(written, argument, colon)
        return _PLAIN[name]
    if name in _PARSERS:
        return _PARSERS[name](written, argument)
    raise UsageError(f"normalize={text!r}: no such normalisation{_nearest(name)}; use one of {', '.join(step_names())}")


def step_names() -> tuple[str, ...]:
    """Every name, also those that stand for several steps."""
    return tuple(dict.fromkeys([*RECIPES, *_PLAIN, *_PARSERS, *ALIASES]))


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, step_names(), n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _plain(name: str) -> Step:
    normalization = RECIPES[name]
    if normalization.kind == "none":
        return Scaled(text=name)
    if normalization.kind == "voxel-z":
        return Voxelwise(text=name, kind="zscore")
    return Global(text=name, normalization=normalization)


_PLAIN: Mapping[str, Step] = {
    "voxel-center": Voxelwise(text="voxel-center", kind="center"),
    "percent-change": Voxelwise(text="percent-change", kind="percent"),
    "detrend": Temporal(text="detrend", kind="detrend"),
    "run-minmax": Range(text="run-minmax", is_voxelwise=False),
    "frame-zscore": Framewise(text="frame-zscore", kind="zscore"),
    "frame-center": Framewise(text="frame-center", kind="center"),
    "frame-minmax": Framewise(text="frame-minmax", kind="minmax"),
    "cohort-zscore": Cohort(text="cohort-zscore", kind="moments"),
    "cohort-minmax": Cohort(text="cohort-minmax", kind="range"),
    "cohort-frame-minmax": Cohort(text="cohort-frame-minmax", kind="frame-range"),
    "tff": TwoChannels(text="tff"),
}


def _none(written: str, argument: str, colon: str) -> None:
    if colon:
        raise UsageError(f"{written}: takes no argument, got {argument!r}; write {written.partition(':')[0]!r}")


def _sample(written: str, argument: str) -> Step:
    _one_of(written, argument, "sample")
    return Voxelwise(text=written, kind="zscore-sample")


def _range(written: str, argument: str) -> Step:
    _one_of(written, argument, "", "keep")
    return Range(text=written, is_voxelwise=True, keeps_constant=argument == "keep")


def _cohort_range(written: str, argument: str) -> Step:
    _one_of(written, argument, "", "keep")
    return Cohort(text=written, kind="voxel-range", keeps_constant=argument == "keep")


def _cohort_robust(written: str, argument: str) -> Step:
    _one_of(written, argument, "", "released")
    return Cohort(text=written, kind="robust", is_released=argument == "released")


def _pca(written: str, argument: str) -> Step:
    return Cohort(text=f"pca:{_count(written, argument)}", kind="pca", components=_count(written, argument))


def _highpass(written: str, argument: str) -> Step:
    hz = _positive(written, argument)
    return Temporal(text=f"highpass:{hz:g}", kind="highpass", low_hz=hz)


def _bandpass(written: str, argument: str) -> Step:
    low, dash, high = argument.partition("-")
    if not dash:
        raise UsageError(f"{written}: expected two frequencies in Hz, as in bandpass:0.008-0.1")
    low_hz, high_hz = _positive(written, low or "0", or_zero=True), _positive(written, high)
    if low_hz >= high_hz:
        raise UsageError(f"{written}: expected the lower frequency first, as in bandpass:0.008-0.1")
    return Temporal(text=f"bandpass:{low_hz:g}-{high_hz:g}", kind="bandpass", low_hz=low_hz, high_hz=high_hz)


def _confounds(written: str, argument: str) -> Step:
    strategy = parse_strategy(argument)
    return Temporal(text=f"confounds:{'+'.join(strategy.names)}", kind="confounds", strategy=strategy)


def _clip(written: str, argument: str) -> Step:
    parts = argument.split(",")
    if len(parts) == 1:
        bound = _positive(written, argument)
        return Clip(text=f"clip:{bound:g}", low=-bound, high=bound)
    low, high = (_number(written, part) for part in parts) if len(parts) == 2 else (1.0, 0.0)
    if not low < high:
        raise UsageError(f"{written}: expected one bound above 0 or two rising ones, as in clip:5 or clip:0,1")
    return Clip(text=f"clip:{low:g},{high:g}", low=low, high=high)


def _divide(written: str, argument: str) -> Step:
    return Divide(text=written, by=_positive(written, argument))


def _pool(written: str, argument: str) -> Step:
    return Pool(text=f"pool:{_count(written, argument or '2')}", size=_count(written, argument or "2", least=2))


def _crop(written: str, argument: str) -> Step:
    cuts = [re.fullmatch(r"(-?\d*):(-?\d*)", part.strip()) for part in argument.split(",")]
    if len(cuts) != 3 or None in cuts:
        raise UsageError(f"{written}: expected slices of three axes, as in crop:8:-8,8:-8,:-10")
    numbers = [[int(text) if text else None for text in cut.groups()] for cut in cuts if cut]
    return Crop(text=written.replace(" ", ""), cuts=tuple((start, stop) for start, stop in numbers))


def _parcels(written: str, argument: str) -> Step:
    return ParcelMeans(text=written if argument else "parcels", atlas=argument)


def _skip(written: str, argument: str) -> Step:
    return Skip(text=f"skip:{_count(written, argument)}", frames=_count(written, argument))


_PARSERS: Mapping[str, Callable[[str, str], Step]] = {
    "voxel-zscore": _sample,
    "voxel-minmax": _range,
    "highpass": _highpass,
    "bandpass": _bandpass,
    "confounds": _confounds,
    "clip": _clip,
    "divide": _divide,
    "cohort-robust": _cohort_robust,
    "cohort-voxel-minmax": _cohort_range,
    "pca": _pca,
    "pool": _pool,
    "crop": _crop,
    "parcels": _parcels,
    "skip": _skip,
}


def _one_of(written: str, argument: str, *allowed: str) -> None:
    if argument not in allowed:
        name = written.partition(":")[0]
        shown = " or ".join(repr(f"{name}:{one}" if one else name) for one in allowed)
        raise UsageError(f"{written}: expected {shown}")


def _number(written: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{written}: {text!r} is no number")
    return value


def _positive(written: str, text: str, *, or_zero: bool = False) -> float:
    value = _number(written, text)
    if value < 0 or (value == 0 and not or_zero):
        raise UsageError(f"{written}: expected a number above 0, got {text}")
    return value


def _count(written: str, text: str, *, least: int = 1) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise UsageError(f"{written}: expected a whole number of {least} or more, got {text!r}")
    return int(text)
