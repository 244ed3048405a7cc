"""What a TFF is made of, in the names of the published code where it has one, checked before any weight is allocated."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fmristream.errors import UsageError

STAGES = 4
_COUNTS = (
    "in_chans",
    "out_chans",
    "model_depth",
    "intermediate_vec",
    "transformer_hidden_layers",
    "bert_intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
_SHARES = ("dropout_green", "dropout_transformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class TffConfig:
    """A TFF of any phase; defaults are the published sizes.

    `img_size` is (x, y, z, longest clip in frames). `intermediate_vec` is the width of a frame's vector and of the
    transformer; where the flattened bottleneck has that width already (2640 at 75 x 93 x 81), no linear map leads to it.
    `frame_chunk` frames pass the 3-D network at once (0: all of the batch), and with `recompute` a chunk's activations
    are not kept but computed again for its gradient.
    """

    img_size: tuple[int, ...]
    in_chans: int = 2
    out_chans: int = 1
    model_depth: int = 4
    intermediate_vec: int = 2640
    transformer_hidden_layers: int = 2
    bert_intermediate_size: int = 3072
    num_attention_heads: int = 16
    max_position_embeddings: int = 30
    dropout_green: float = 0.2  # published: .2 in phases 1 and 2, .35 in phase 3
    dropout_transformer: float = 0.1
    frame_chunk: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self)

    def stage_grid(self, stage: int) -> tuple[int, int, int]:
        """Voxels along (x, y, z) after `stage` convolutions of stride 2, each of which rounds a half up."""
        x, y, z = (-(-size // 2**stage) for size in self.img_size[:3])
        return x, y, z

    def stage_channels(self, stage: int) -> int:
        """Channels of a stage."""
        return self.model_depth << stage

    @property
    def bottleneck(self) -> tuple[int, int, int, int]:
        """What one frame becomes: (channels, x, y, z)."""
        return (self.model_depth // 2, *self.stage_grid(STAGES - 1))


def tff_config(options: Mapping[str, Any]) -> TffConfig:
    """From a recipe's table: lists for tuples, no unknown and no missing name."""
    known = [field.name for field in fields(TffConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"tff has no option {name}; {hint}")
    missing = [field.name for field in fields(TffConfig) if field.default is MISSING and field.name not in options]
    if missing:
        raise UsageError(f"tff needs {', '.join(missing)}; add what is missing to the recipe's model section")
    return TffConfig(**{name: _as_tuple(value) for name, value in options.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_types(config: TffConfig) -> None:
    size: Any = config.img_size
    if not isinstance(size, tuple) or len(size) != 4 or not all(_is_count(number) for number in size):
        raise UsageError(f"tff: img_size must be a list of 4 whole numbers above 0 (x, y, z, frames), got {size!r}")
    for name in _COUNTS:
        if not _is_count(getattr(config, name)):
            raise UsageError(f"tff: {name} must be a whole number above 0, got {getattr(config, name)!r}")
    if config.frame_chunk != 0 and not _is_count(config.frame_chunk):
        raise UsageError(
            f"tff: frame_chunk must be a number of frames, or 0 for all at once, got {config.frame_chunk!r}"
        )
    recompute: Any = config.recompute
    if not isinstance(recompute, bool):
        raise UsageError(f"tff: recompute must be true or false, got {recompute!r}")
    if recompute and not config.frame_chunk:
        raise UsageError("tff: recompute saves nothing where all frames are one chunk; give frame_chunk too, such as 2")
    for name in _SHARES:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise UsageError(f"tff: {name} must lie in [0, 1), got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_sizes(config: TffConfig) -> None:
    if config.model_depth % 4:
        raise UsageError(
            f"tff: model_depth must be a multiple of 4, the channels of one group of a normalisation, "
            f"got {config.model_depth}"
        )
    if config.stage_grid(STAGES - 1) == (1, 1, 1):
        raise UsageError(
            f"tff: a grid of {list(config.img_size[:3])} is one voxel after three halvings, which cannot be normalised; "
            "give it more than 8 voxels along one axis"
        )
    if config.intermediate_vec % config.num_attention_heads:
        raise UsageError(
            f"tff: {config.num_attention_heads} heads do not divide intermediate_vec {config.intermediate_vec}; "
            "change one of them"
        )
