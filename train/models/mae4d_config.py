"""What a 4-D masked autoencoder is made of, checked before any weight is allocated."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar

from fmristream.errors import UsageError
from train.models.volume_masking import VolumeMasking

T = TypeVar("T", bound="Mae4dConfig")

# The vision transformers of these names, with a lighter decoder each; `b` is the published one of CortexMAE.
SIZES: Mapping[str, Mapping[str, int]] = {
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
DECODER_SIZES: Mapping[str, Mapping[str, int]] = {
    "t": {"decoder_dim": 128, "decoder_depth": 4, "decoder_heads": 4},
    "s": {"decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8},
    "b": {"decoder_dim": 512, "decoder_depth": 4, "decoder_heads": 16},
}
_COUNTS = ("in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "decoder_dim", "decoder_depth", "decoder_heads")
_CHOICES = {
    "positions": ("learned", "sinusoidal"),
    "decoder": ("self", "cross"),
    "pooling": ("mean", "cls", "attention"),
    "learning": ("all", "head"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mae4dConfig:
    """An encoder; the defaults are the sizes of CortexMAE's volume model.

    `img_size` is (x, y, z, frames of the longest clip); `patch_size` is (voxels along x, y, z, frames) and need not divide
    x, y and z, only the frames. With `checkpointing` a layer's activations are computed again for its gradient.
    """

    img_size: tuple[int, ...]
    patch_size: tuple[int, ...] = (8, 8, 8, 4)
    in_chans: int = 1
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    positions: Literal["learned", "sinusoidal"] = "learned"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along x, y and z; the last ones may reach beyond the volume."""
        x, y, z = (-(-size // patch) for size, patch in zip(self.img_size[:3], self.patch_size[:3], strict=True))
        return x, y, z

    @property
    def times(self) -> int:
        """Patches along time of the longest clip."""
        return self.img_size[3] // self.patch_size[3]

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        px, py, pz, pt = self.patch_size
        return px * py * pz * pt * self.in_chans


@dataclass(frozen=True, slots=True, kw_only=True)
class Mae4dHeadConfig(Mae4dConfig):
    """A supervised network: an encoder, what makes one vector of its tokens, and a head of `train.models.heads`.

    With `learning` head, the encoder stays as it is: `pooling` mean or cls with head v1 is then a linear probe, attention
    is the attention-pool probe.
    """

    outputs: int = 1
    head: str = "v1"
    pooling: Literal["mean", "cls", "attention"] = "mean"
    learning: Literal["all", "head"] = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mae4dPretrainConfig(Mae4dConfig):
    """Encoder and decoder, and what is hidden.

    The decoder relates all tokens to each other (self), or asks only what is shown (cross), which is cheaper. With
    `normalise_target` each patch is to be predicted in units of its own mean and SD.
    """

    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    decoder: Literal["self", "cross"] = "self"
    normalise_target: bool = False
    masking: VolumeMasking = field(default_factory=VolumeMasking)


def head_config(options: Mapping[str, Any]) -> Mae4dHeadConfig:
    """From a recipe's table: lists for tuples, `size` for the encoder's widths, no unknown and no missing name."""
    return _build(Mae4dHeadConfig, "mae4d", _sized(options, "mae4d", SIZES), more=("size",))


def pretrain_config(options: Mapping[str, Any]) -> Mae4dPretrainConfig:
    """As `head_config`; what is hidden is said by `mask`, `mask_ratio` and `mask_window`."""
    family = "mae4d-pretrain"
    sizes = {name: {**SIZES[name], **DECODER_SIZES[name]} for name in SIZES}
    rest = _sized(options, family, sizes)
    if "masking" in rest:
        raise UsageError(f"{family}: say what is hidden by mask, mask_ratio and mask_window, not by masking")
    names = {"mask": "mode", "mask_ratio": "ratio", "mask_window": "window"}
    masking = VolumeMasking(**{new: _as_tuple(rest.pop(old)) for old, new in names.items() if old in rest})
    return _build(Mae4dPretrainConfig, family, {**rest, "masking": masking}, more=("size", *names), hidden="masking")


def _sized(options: Mapping[str, Any], family: str, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    rest = dict(options)
    if "size" not in rest:
        return rest
    size = rest.pop("size")
    if size not in sizes:
        raise UsageError(f"{family} has no size {size!r}; known: {', '.join(sizes)}")
    return {**sizes[size], **rest}


def _build(
    kind: type[T], family: str, options: Mapping[str, Any], *, more: tuple[str, ...], hidden: str | None = None
) -> T:
    """`more` are names that a recipe may use beside the fields, `hidden` is a field that it may not."""
    own = [item.name for item in fields(kind)]
    known = [name for name in own if name != hidden] + list(more)
    for name in options:
        if name not in own:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{family} has no option {name}; {hint}")
    missing = [item.name for item in fields(kind) if _is_needed(item) and item.name not in options]
    if missing:
        raise UsageError(f"{family} needs {', '.join(missing)}; add what is missing to the recipe's model section")
    return kind(**{name: _as_tuple(value) for name, value in options.items()})


def _is_needed(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_types(config: Mae4dConfig) -> None:
    for name in ("img_size", "patch_size"):
        value: Any = getattr(config, name)
        if not isinstance(value, tuple) or len(value) != 4 or not all(_is_count(number) for number in value):
            raise UsageError(
                f"mae4d: {name} must be a list of 4 whole numbers above 0 (x, y, z, frames), got {value!r}"
            )
    for name in (*_COUNTS, "outputs"):
        if hasattr(config, name) and not _is_count(getattr(config, name)):
            raise UsageError(f"mae4d: {name} must be a whole number above 0, got {getattr(config, name)!r}")
    for name, known in _CHOICES.items():
        if hasattr(config, name) and getattr(config, name) not in known:
            raise UsageError(f"mae4d: {name} must be one of {', '.join(known)}, got {getattr(config, name)!r}")
    for name in ("checkpointing", "normalise_target"):
        if hasattr(config, name) and not isinstance(getattr(config, name), bool):
            raise UsageError(f"mae4d: {name} must be true or false, got {getattr(config, name)!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_sizes(config: Mae4dConfig) -> None:
    frames, patch = config.img_size[3], config.patch_size[3]
    if frames % patch:
        raise UsageError(
            f"mae4d: clips of {frames} frames are no multiple of the {patch} frames of a patch; change the window or patch_size"
        )
    for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
        if not hasattr(config, width):
            continue
        channels, count = getattr(config, width), getattr(config, heads)
        if channels % count:
            raise UsageError(
                f"mae4d: {heads} {count} does not divide the {channels} channels of {width}; change one of them"
            )
        if channels < 6 or channels % 2:
            raise UsageError(
                f"mae4d: {width} must be even and 6 or more, for sine and cosine of three axes, got {channels}"
            )
