"""Where a stream is: a few integers and digests, the same on every rank and for every world size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fmristream.errors import ResumeError

VERSION = 3

# Positions are 64-bit numbers; 2^62 samples are beyond any training.
MAX_CONSUMED = 2**62

_COUNTS = ("consumed", "stride", "windows", "version")
_WORDS = ("settings", "values")
_V1 = frozenset({"consumed", "seed", "window", "stride", "windows", "selection", "version"})
# What a state of each version has: the first release told nothing in words, the second nothing of values.
_NAMES = {1: _V1, 2: _V1 | {"settings"}, VERSION: _V1 | {*_WORDS}}

# Told where the selection differs, but no reason to refuse alone: runs that were added elsewhere change nothing here.
_DATASET = "dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """How far a stream is, and what it is a stream of.

    Attributes:
        consumed: samples handed out over all ranks.
        seed: of the order; None for stored order.
        window: frames of a clip; None for whole runs.
        stride: frames from one to the next.
        windows: in the selection.
        selection: digest of the selected runs, the window and whatever else decides which samples come.
        settings: what the selection was made with, in words: split, where, views, weights, ...
        values: what the values of a window are made with, in words: normalize, stats, grid, orientation, ...
        version: of the state; 1 had no settings, 2 no values.
    """

    consumed: int
    seed: int | None
    window: int | None
    stride: int
    windows: int
    selection: str
    settings: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), **{name: dict(getattr(self, name)) for name in _WORDS}}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Read a state that `as_dict` made, in this release or an earlier one.

        Raises:
            ResumeError: it is none, or of a later release.
        """
        if not isinstance(state, Mapping):
            raise ResumeError(f"not a loader state but {type(state).__name__}; pass what state_dict() returned")
        version = state.get("version")
        names = _NAMES.get(version) if type(version) is int else None
        if names is None or set(state) != names:
            raise ResumeError(
                f"not a loader state of this release: it has {', '.join(sorted(map(str, state)))} and version "
                f"{version}, expected version {', '.join(map(str, _NAMES))}; resume with the release that wrote it"
            )
        damaged = [name for name in sorted(names) if not _is_sound(name, state[name])]
        if damaged or not 0 <= state["consumed"] < MAX_CONSUMED:
            shown = ", ".join(f"{name} {state[name]!r}" for name in damaged or ["consumed"])
            raise ResumeError(f"the loader state says {shown}; expected counts and a digest: resume from another copy")
        return cls(**dict(state))

    def require_same_stream(self, other: "StreamState") -> None:
        """Raise ResumeError unless the other state (of this stream, now) is of the same stream.

        What a state of an earlier version does not tell is not asked.
        """
        for name in ("window", "stride", "seed"):
            _require_equal(name, getattr(self, name), getattr(other, name))
        tells = min(self.version, other.version)
        named = sorted({*self.settings, *other.settings}) if tells > 1 else []
        for name in (name for name in named if not name.startswith(_DATASET)):
            _require_equal(name, self.settings.get(name), other.settings.get(name))
        for name in sorted({*self.values, *other.values}) if tells > 2 else []:
            _require_equal(name, self.values.get(name), other.values.get(name))
        if self.selection != other.selection:
            for name in (name for name in named if name.startswith(_DATASET)):
                saved, here = (_short(settings.get(name, "")) for settings in (self.settings, other.settings))
                _require_equal(f"{name} content", saved, here)
            _require_equal("windows", self.windows, other.windows)
            _require_equal(
                "selection of runs (dataset, split or filter)", _short(self.selection), _short(other.selection)
            )
        _require_equal("windows", self.windows, other.windows)


def _require_equal(what: str, saved: object, here: object) -> None:
    if saved != here:
        raise ResumeError(
            f"the state was made with {what} {saved}, this loader streams {here}; "
            "open the same data with the same settings, or start anew without the state"
        )


def _short(digest: str) -> str:
    return digest[:12]


def _is_sound(name: str, value: object) -> bool:
    if name in _COUNTS:
        return type(value) is int
    if name in ("seed", "window"):
        return value is None or type(value) is int
    if name in _WORDS:
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and isinstance(text, str) for key, text in value.items()
        )
    return isinstance(value, str)
