"""Where a stream is: a few integers and digests, the same on every rank and for every world size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fmristream.errors import ResumeError

VERSION = 2

# Positions are 64-bit numbers; 2^62 samples are beyond any training.
MAX_CONSUMED = 2**62

_COUNTS = ("consumed", "stride", "windows", "version")
_V1 = {"consumed", "seed", "window", "stride", "windows", "selection", "version"}
_NAMES = _V1 | {"settings"}

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
        version: of the state; 1 had no settings.
    """

    consumed: int
    seed: int | None
    window: int | None
    stride: int
    windows: int
    selection: str
    settings: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        return {**values, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Read a state that `as_dict` made, in this release or one of version 1.

        Raises:
            ResumeError: it is none, or of a later release.
        """
        if not isinstance(state, Mapping):
            raise ResumeError(f"not a loader state but {type(state).__name__}; pass what state_dict() returned")
        version = state.get("version")
        names = _V1 if type(version) is int and version == 1 else _NAMES
        if set(state) != names or type(version) is not int or version not in (1, VERSION):
            raise ResumeError(
                f"not a loader state of this release: it has {', '.join(sorted(map(str, state)))} and version "
                f"{version}, expected version 1 or {VERSION}; resume with the release that wrote it"
            )
        damaged = [name for name in sorted(names) if not _is_sound(name, state[name])]
        if damaged or not 0 <= state["consumed"] < MAX_CONSUMED:
            shown = ", ".join(f"{name} {state[name]!r}" for name in damaged or ["consumed"])
            raise ResumeError(f"the loader state says {shown}; expected counts and a digest: resume from another copy")
        return cls(**dict(state))

    def require_same_stream(self, other: "StreamState") -> None:
        """Raise ResumeError unless the other state (of this stream, now) is of the same stream."""
        for name in ("window", "stride", "seed"):
            _require_equal(name, getattr(self, name), getattr(other, name))
        if self.version == other.version:
            named = sorted({*self.settings, *other.settings})
            for name in (name for name in named if not name.startswith(_DATASET)):
                _require_equal(name, self.settings.get(name), other.settings.get(name))
            if self.selection != other.selection:
                for name in (name for name in named if name.startswith(_DATASET)):
                    saved, here = (_short(settings.get(name, "")) for settings in (self.settings, other.settings))
                    _require_equal(f"{name} content", saved, here)
        if self.selection != other.selection:
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
    if name == "settings":
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and isinstance(text, str) for key, text in value.items()
        )
    return isinstance(value, str)
