"""What the two plain networks on parcel series are made of, checked before any weight is allocated."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from fmristream.errors import UsageError

MLP_INPUTS = ("connectivity", "series")
CELLS = ("lstm", "gru")
POOLINGS = ("last", "mean")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpConfig:
    """A multi-layer perceptron: of the correlations of the parcels (`connectivity`), or of all values (`series`).

    `frames` is what a flattened series has; shorter ones count as padded with zeros.
    """

    parcels: int
    frames: int
    outputs: int = 1
    inputs: str = "connectivity"
    hidden: tuple[int, ...] = (256, 64)
    dropout: float = 0.2
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _check_counts("mlp", self, "parcels", "frames", "outputs")
        hidden: Any = self.hidden
        if not isinstance(hidden, tuple) or not hidden or not all(_is_count(width) for width in hidden):
            raise UsageError(f"mlp: hidden must be a list of one width or more, each above 0, got {hidden!r}")
        _check_choice("mlp", "inputs", self.inputs, MLP_INPUTS)
        _check_share("mlp", "dropout", self.dropout)
        _check_flags("mlp", self, "checkpointing")
        if self.inputs == "connectivity" and (self.parcels < 2 or self.frames < 2):
            raise UsageError(
                f"mlp: {self.parcels} parcels over {self.frames} frames have no correlations; give 2 or more of each, or "
                "inputs = 'series'"
            )

    @property
    def width(self) -> int:
        """How many numbers enter."""
        return self.parcels * (self.parcels - 1) // 2 if self.inputs == "connectivity" else self.parcels * self.frames


@dataclass(frozen=True, slots=True, kw_only=True)
class LstmConfig:
    """A recurrent network over frames: LSTM or GRU, one way or both, read out at the true end or by the mean over frames."""

    parcels: int
    frames: int
    outputs: int = 1
    cell: str = "lstm"
    hidden: int = 128
    layers: int = 1
    bidirectional: bool = False
    pooling: str = "last"
    dropout: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _check_counts("lstm", self, "parcels", "frames", "outputs", "hidden", "layers")
        _check_choice("lstm", "cell", self.cell, CELLS)
        _check_choice("lstm", "pooling", self.pooling, POOLINGS)
        _check_share("lstm", "dropout", self.dropout)
        _check_flags("lstm", self, "bidirectional", "checkpointing")


def mlp_config(options: Mapping[str, Any]) -> MlpConfig:
    """From a recipe's table: lists for tuples, no unknown and no missing name."""
    return _config(MlpConfig, "mlp", options)


def lstm_config(options: Mapping[str, Any]) -> LstmConfig:
    """From a recipe's table: no unknown and no missing name."""
    return _config(LstmConfig, "lstm", options)


def _config(cls: type[T], family: str, options: Mapping[str, Any]) -> T:
    own = fields(cls)  # type: ignore[arg-type]
    known = [field.name for field in own]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{family} has no option {name}; {hint}")
    missing = [field.name for field in own if field.default is MISSING and field.name not in options]
    if missing:
        raise UsageError(f"{family} needs {', '.join(missing)}; add what is missing to the recipe's model section")
    return cls(**{name: _as_tuple(value) for name, value in options.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_counts(family: str, config: Any, *names: str) -> None:
    for name in names:
        if not _is_count(getattr(config, name)):
            raise UsageError(f"{family}: {name} must be a whole number above 0, got {getattr(config, name)!r}")


def _check_choice(family: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{family}: {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_share(family: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UsageError(f"{family}: {name} must lie in [0, 1), got {value!r}")


def _check_flags(family: str, config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise UsageError(f"{family}: {name} must be true or false, got {getattr(config, name)!r}")
