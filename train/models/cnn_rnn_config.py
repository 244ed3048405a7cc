"""What a CNN-RNN is made of, checked before any weight is allocated."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fmristream.errors import UsageError

ENCODERS = ("own", "tff")
NORMS = ("group", "batch", "sync_batch")
RNNS = ("gru", "lstm", "none")
READOUTS = ("last+mean", "last", "mean", "attention")
# Options that only one of the encoders reads: given to the other one, they would do nothing without a word.
_OF_ENCODER: Mapping[str, tuple[str, ...]] = {
    "own": ("channels", "norm", "norm_groups"),
    "tff": ("model_depth", "intermediate_vec", "dropout_green", "frame_vec"),
}
_CHOICES = {"encoder": ENCODERS, "norm": NORMS, "rnn": RNNS, "readout": READOUTS}
_COUNTS = ("outputs", "in_chans", "norm_groups", "model_depth", "frame_vec", "hidden", "layers", "fusion")
_COUNTS_OR_NONE = ("intermediate_vec", "side", "frame_chunk")
_SHARES = ("dropout", "dropout_green")
_BOOLS = ("freeze_cnn", "checkpointing")


@dataclass(frozen=True, slots=True, kw_only=True)
class CnnRnnConfig:
    """A 3-D network over frames and a recurrent one over what it makes of them.

    `img_size` is (x, y, z, frames of a window); the number of frames binds nothing, because the recurrence takes any.

    Frames: `encoder` is "own" (a block of convolution, normalisation, ReLU and pooling for each of `channels`, then the mean
    over what is left of the grid) or "tff" (phase 1's encoder with its bottleneck, of `model_depth` and `intermediate_vec`
    as there, 0: the flattened bottleneck; reduced to `frame_vec`). `freeze_cnn` keeps their weights as they are loaded.

    Time: `rnn` with `hidden` units in `layers`; "none" is the control that knows no order. `readout` makes one vector of the
    states: the last true one, their mean, both, or a mean with learned weights.

    Other inputs: `side` series aligned to the frames; `columns` of a table, 0 for a number and n for codes 0 to n - 1; both
    are joined late, each as `fusion` numbers.

    `frame_chunk` frames pass the 3-D network at once (0: all of the batch), and with `checkpointing` a chunk's activations
    are not kept but computed again for its gradient. Batch norm has the statistics of all frames however they are cut:
    training without checkpointing passes all at once, and with it convolves twice.
    """

    img_size: tuple[int, ...]
    outputs: int = 1
    in_chans: int = 1
    encoder: str = "own"
    channels: tuple[int, ...] = (16, 32, 64, 128)
    norm: str = "group"
    norm_groups: int = 8
    model_depth: int = 4
    intermediate_vec: int = 0
    dropout_green: float = 0.2
    frame_vec: int = 128
    freeze_cnn: bool = False
    rnn: str = "gru"
    hidden: int = 128
    layers: int = 1
    dropout: float = 0.0  # between layers of the recurrence and before the head
    readout: str = "last+mean"
    side: int = 0
    columns: tuple[int, ...] = ()
    fusion: int = 32
    frame_chunk: int = 8
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sequences(self)
        _check_frames(self)
        _check_time(self)

    @property
    def has_batch_statistics(self) -> bool:
        """Whether a frame's vector depends on the other frames of the batch while training."""
        return self.norm != "group" and not self.freeze_cnn


def cnn_rnn_config(options: Mapping[str, Any]) -> CnnRnnConfig:
    """From a recipe's table: lists for tuples, no unknown and no missing name, none of the encoder that is not chosen."""
    known = [field.name for field in fields(CnnRnnConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"cnn_rnn has no option {name}; {hint}")
    missing = [field.name for field in fields(CnnRnnConfig) if field.default is MISSING and field.name not in options]
    if missing:
        raise UsageError(f"cnn_rnn needs {', '.join(missing)}; add what is missing to the recipe's model section")
    config = CnnRnnConfig(**{name: _as_tuple(value) for name, value in options.items()})
    other = "tff" if config.encoder == "own" else "own"
    idle = [name for name in _OF_ENCODER[other] if name in options]
    if idle:
        raise UsageError(
            f"cnn_rnn: {', '.join(idle)} mean nothing to encoder = {config.encoder!r}; "
            f"leave them out or choose encoder = {other!r}"
        )
    return config


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_types(config: CnnRnnConfig) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise UsageError(f"cnn_rnn: {name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
    for name in _COUNTS:
        if not _is_count(getattr(config, name)):
            raise UsageError(f"cnn_rnn: {name} must be a whole number above 0, got {getattr(config, name)!r}")
    for name in _COUNTS_OR_NONE:
        if not _is_count(getattr(config, name), least=0):
            raise UsageError(f"cnn_rnn: {name} must be a whole number, 0 or more, got {getattr(config, name)!r}")
    for name in _BOOLS:
        if not isinstance(getattr(config, name), bool):
            raise UsageError(f"cnn_rnn: {name} must be true or false, got {getattr(config, name)!r}")
    for name in _SHARES:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise UsageError(f"cnn_rnn: {name} must lie in [0, 1), got {value!r}")


def _is_count(value: Any, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_sequences(config: CnnRnnConfig) -> None:
    size: Any = config.img_size
    if not isinstance(size, tuple) or len(size) != 4 or not all(_is_count(number) for number in size):
        raise UsageError(f"cnn_rnn: img_size must be a list of 4 whole numbers above 0 (x, y, z, frames), got {size!r}")
    channels: Any = config.channels
    if not isinstance(channels, tuple) or not channels or not all(_is_count(number) for number in channels):
        raise UsageError(
            f"cnn_rnn: channels must be a list of whole numbers above 0, one for a block, got {channels!r}"
        )
    columns: Any = config.columns
    if not isinstance(columns, tuple) or not all(_is_count(kind, least=0) and kind != 1 for kind in columns):
        raise UsageError(
            f"cnn_rnn: columns must be a list with 0 for a number and n, 2 or more, for codes 0 to n - 1, got {columns!r}"
        )


def _check_frames(config: CnnRnnConfig) -> None:
    if config.checkpointing and not config.frame_chunk:
        raise UsageError(
            "cnn_rnn: checkpointing saves nothing where all frames are one chunk; give frame_chunk too, such as 8"
        )
    if config.encoder != "own":
        return
    uneven = [number for number in config.channels if number % config.norm_groups]
    if config.norm == "group" and uneven:
        raise UsageError(f"cnn_rnn: norm_groups {config.norm_groups} does not divide channels {uneven[0]}; change one")
    halvings = len(config.channels) - 1
    if all(-(-size // 2**halvings) == 1 for size in config.img_size[:3]):
        raise UsageError(
            f"cnn_rnn: a grid of {list(config.img_size[:3])} is one voxel after {halvings} halvings, which cannot be "
            "normalised; give fewer channels, which are the blocks"
        )


def _check_time(config: CnnRnnConfig) -> None:
    if config.rnn == "none" and "last" in config.readout:
        raise UsageError(
            f"cnn_rnn: without a recurrence the last frame is one of many, so readout = {config.readout!r} makes no sense; "
            "choose 'mean' or 'attention'"
        )
