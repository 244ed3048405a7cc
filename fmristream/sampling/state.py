"""Where a stream is: a few integers and two digests, the same on every rank and for every world size."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from fmristream.errors import ResumeError

VERSION = 1

# Positions are 64-bit numbers; 2^62 samples are beyond any training.
MAX_CONSUMED = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """How far a stream is, and what it is a stream of."""

    consumed: int  # samples handed out over all ranks
    seed: int | None
    window: int
    stride: int
    windows: int  # in the selection
    selection: str  # digest of the selected runs and the window
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Read a state that `as_dict` made.

        Raises:
            ResumeError: it is none, or of a later release.
        """
        if not isinstance(state, Mapping):
            raise ResumeError(f"not a loader state but {type(state).__name__}; pass what state_dict() returned")
        names = {"consumed", "seed", "window", "stride", "windows", "selection", "version"}
        if set(state) != names or state["version"] != VERSION:
            raise ResumeError(
                f"not a loader state of this release: it has {', '.join(sorted(map(str, state)))} and version "
                f"{state.get('version')}, expected version {VERSION}; resume with the release that wrote it"
            )
        damaged = [name for name in sorted(names) if type(state[name]) not in _types_of(name)]
        if damaged or not 0 <= state["consumed"] < MAX_CONSUMED:
            shown = ", ".join(f"{name} {state[name]!r}" for name in damaged or ["consumed"])
            raise ResumeError(f"the loader state says {shown}; expected counts and a digest: resume from another copy")
        return cls(**dict(state))

    def require_same_stream(self, other: "StreamState") -> None:
        """Raise ResumeError unless the other state (of this stream, now) is of the same stream."""
        for name in ("window", "stride", "seed", "windows", "selection"):
            saved, here = getattr(self, name), getattr(other, name)
            if saved != here:
                shown = (saved[:12], here[:12]) if name == "selection" else (saved, here)
                what = "selection of runs (dataset, split or filter)" if name == "selection" else name
                raise ResumeError(
                    f"the state was made with {what} {shown[0]}, this loader streams {shown[1]}; "
                    "open the same data with the same settings, or start anew without the state"
                )


def _types_of(name: str) -> tuple[type, ...]:
    return {"selection": (str,), "seed": (int, type(None))}.get(name, (int,))
