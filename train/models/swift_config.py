"""What a SwiFT is made of, in the names of the published code, checked before any weight is allocated."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fmristream.errors import UsageError

# How many numbers each list holds; None: one per stage.
_LENGTHS = {
    "img_size": 4,
    "patch_size": 4,
    "window_size": 4,
    "first_window_size": 4,
    "depths": None,
    "num_heads": None,
}
LONGER_CLIPS = ("refuse", "interpolate")
# What a recipe's model section holds beside the backbone's options.
HEAD_OPTIONS = ("head", "outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiftConfig:
    """A SwiFT backbone. Sizes run over (x, y, z, t), `depths` and `num_heads` over stages.

    `img_size[3]` is the length of the learned time tables. A shorter clip uses their beginning; a longer one is refused,
    or with `longer_clips` "interpolate" gets the tables stretched linearly from its first frame to its last.
    With `last_layer_full_MSA` the last stage attends over its whole grid, `window_size[3]` frames at a time, without shift.
    With `checkpointing` only what enters attention, MLP and the layers between stages is kept for the gradient, for which
    they are computed once more.
    """

    img_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: tuple[int, ...] = (4, 4, 4, 4)
    first_window_size: tuple[int, ...] = (4, 4, 4, 4)
    in_chans: int = 1
    c_multiplier: int = 2
    last_layer_full_MSA: bool = True
    longer_clips: str = "refuse"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_stages(self)
        _check_grid(self)

    def stage_channels(self, stage: int) -> int:
        """Width of a stage's tokens."""
        return self.embed_dim * int(self.c_multiplier**stage)

    def stage_grid(self, stage: int) -> tuple[int, int, int]:
        """Tokens along (x, y, z) in a stage."""
        x, y, z = (size // patch >> stage for size, patch in zip(self.img_size[:3], self.patch_size[:3], strict=True))
        return x, y, z

    def stage_window(self, stage: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The window of a stage and the shift of its odd blocks."""
        if self.last_layer_full_MSA and stage == len(self.depths) - 1:
            return (*self.stage_grid(stage), self.window_size[3]), (0, 0, 0, 0)
        window = self.window_size if stage else self.first_window_size
        return window, tuple(length // 2 for length in window)


def swift_config(options: Mapping[str, Any]) -> SwiftConfig:
    """From a recipe's table or a checkpoint's hyper-parameters: lists for tuples, no unknown and no missing name."""
    known = [field.name for field in fields(SwiftConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *HEAD_OPTIONS], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"swift has no option {name}; {hint}")
    missing = [field.name for field in fields(SwiftConfig) if field.default is MISSING and field.name not in options]
    if missing:
        raise UsageError(f"swift needs {', '.join(missing)}; add what is missing to the recipe's model section")
    return SwiftConfig(**{name: _as_tuple(value) for name, value in options.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_types(config: SwiftConfig) -> None:
    for name, length in _LENGTHS.items():
        value = getattr(config, name)
        counts = isinstance(value, tuple) and all(_is_count(number) for number in value)
        if not counts or (length is not None and len(value) != length):
            wanted = "one whole number above 0 per stage" if length is None else f"{length} whole numbers above 0"
            raise UsageError(f"swift: {name} must be a list of {wanted}, got {value!r}")
    for name in ("embed_dim", "in_chans", "c_multiplier"):
        if not _is_count(getattr(config, name)):
            raise UsageError(f"swift: {name} must be a whole number above 0, got {getattr(config, name)!r}")
    for name in ("last_layer_full_MSA", "checkpointing"):
        if not isinstance(getattr(config, name), bool):
            raise UsageError(f"swift: {name} must be true or false, got {getattr(config, name)!r}")
    if config.longer_clips not in LONGER_CLIPS:
        raise UsageError(f"swift: longer_clips must be one of {', '.join(LONGER_CLIPS)}, got {config.longer_clips!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_stages(config: SwiftConfig) -> None:
    if not 2 <= len(config.depths) == len(config.num_heads):
        raise UsageError(
            f"swift: depths and num_heads must name the same stages, two or more, got {list(config.depths)} "
            f"and {list(config.num_heads)}; give each one number per stage"
        )
    for stage, heads in enumerate(config.num_heads):
        channels = config.stage_channels(stage)
        if channels % heads:
            raise UsageError(
                f"swift: {heads} heads do not divide the {channels} channels of stage {stage} "
                f"(embed_dim {config.embed_dim} x {config.c_multiplier}^{stage}); change num_heads or embed_dim"
            )


def _check_grid(config: SwiftConfig) -> None:
    if config.patch_size[3] != 1:
        raise UsageError(
            f"swift: patch_size {list(config.patch_size)} would join frames, which SwiFT does not; make its last number 1"
        )
    halvings = 2 ** (len(config.depths) - 1)
    for axis, size, patch in zip("xyz", config.img_size[:3], config.patch_size[:3], strict=True):
        if size % (patch * halvings):
            raise UsageError(
                f"swift: {size} voxels along {axis} are no multiple of {patch * halvings} (patch {patch}, halved between "
                f"{len(config.depths)} stages); pad or crop the grid, now {list(config.img_size[:3])}"
            )
