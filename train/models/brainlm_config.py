"""What a BrainLM is made of, in the names of the published config.json, checked before any weight is allocated."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from fmristream.errors import UsageError

T = TypeVar("T", bound="_Transformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transformer:
    """What both variants share: an encoder that reads the tokens it was shown and a decoder that completes them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    decoder_hidden_size: int
    decoder_num_hidden_layers: int
    decoder_num_attention_heads: int
    decoder_intermediate_size: int
    mask_ratio: float
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    norm_pix_loss: bool = False
    qkv_bias: bool = True

    def _check(self, family: str) -> None:
        _check_transformer(self, family)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrainlmConfig(_Transformer):
    """The token model: one token per parcel and `timepoint_patching_size` frames.

    `num_landmarks` must equal `segment_means_seq_len`: only then is the published attention defined for the token numbers
    of both encoder and decoder, and it is exact.
    """

    mask_ratio: float = 0.2
    num_brain_voxels: int = 424
    num_timepoints_per_voxel: int = 200
    timepoint_patching_size: int = 20
    loss_fn: str = "mse"
    use_tanh_decoder: bool = False
    conv_kernel_size: int | None = 65
    num_landmarks: int = 64
    segment_means_seq_len: int = 64

    def __post_init__(self) -> None:
        self._check("brainlm")
        _check_counts(self, "brainlm", "num_brain_voxels", "num_timepoints_per_voxel", "timepoint_patching_size")
        _check_tokens(self)

    @property
    def num_patches(self) -> int:
        """Tokens per parcel."""
        return self.num_timepoints_per_voxel // self.timepoint_patching_size


@dataclass(frozen=True, slots=True, kw_only=True)
class VitmaeConfig(_Transformer):
    """The image model: parcels x frames is a picture, padded with -1 to `image_size` squared, cut into square patches."""

    mask_ratio: float = 0.75
    image_size: int = 432
    patch_size: int = 16
    num_channels: int = 3
    train_mode: str = "auto_encode"

    def __post_init__(self) -> None:
        self._check("brainlm_vitmae")
        _check_counts(self, "brainlm_vitmae", "image_size", "patch_size", "num_channels")
        _check_image(self)

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return self.image_size // self.patch_size


_BASE_DECODER = {
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}
# Name of a size -> its options. "5m" is the sample in the published repository, "13m" the first release.
BRAINLM_SIZES: Mapping[str, Mapping[str, Any]] = {
    name: {
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 1024,
    }
    for name, width in (("5m", 256), ("13m", 512))
}
# "111m" and "650m" are published; "13m" is ours, for comparison with the token model of that size.
VITMAE_SIZES: Mapping[str, Mapping[str, Any]] = {
    "13m": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "decoder_hidden_size": 192,
        "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": 6,
        "decoder_intermediate_size": 768,
    },
    "111m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        **_BASE_DECODER,
    },
    "650m": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "image_size": 434,
        "patch_size": 14,
        **_BASE_DECODER,
    },
}


def brainlm_config(options: Mapping[str, Any]) -> BrainlmConfig:
    """The token model from a recipe's table: `size` (5m or 13m) and options that replace that size's, or all options."""
    return _build(BrainlmConfig, "brainlm", _with_size(options, "brainlm", BRAINLM_SIZES))


def vitmae_config(options: Mapping[str, Any]) -> VitmaeConfig:
    """The image model from a recipe's table: `size` (13m, 111m or 650m) and options that replace that size's, or all."""
    return _build(VitmaeConfig, "brainlm_vitmae", _with_size(options, "brainlm_vitmae", VITMAE_SIZES))


def published_brainlm(config: Mapping[str, Any]) -> BrainlmConfig:
    """From a published config.json, whose many options of other kinds are left out."""
    return _build(BrainlmConfig, "brainlm", _known(BrainlmConfig, config))


def published_vitmae(config: Mapping[str, Any]) -> VitmaeConfig:
    """From a published config.json, whose many options of other kinds are left out."""
    return _build(VitmaeConfig, "brainlm_vitmae", _known(VitmaeConfig, config))


def _known(kind: type[_Transformer], config: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    return {name: config[name] for name in names if name in config}


def _with_size(options: Mapping[str, Any], family: str, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rest = dict(options)
    if "size" not in rest:
        return rest
    size = rest.pop("size")
    if size not in sizes:
        raise UsageError(f"{family} has no size {size!r}; known: {', '.join(sizes)}")
    return dict(sizes[size]) | rest


def _build(kind: type[T], family: str, options: Mapping[str, Any]) -> T:
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: size, {', '.join(known)}"
            raise UsageError(f"{family} has no option {name}; {hint}")
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in options]
    if missing:
        raise UsageError(f"{family} needs {', '.join(missing)}; add them, or a size, to the recipe's model section")
    return kind(**options)


def _check_transformer(config: _Transformer, family: str) -> None:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    _check_counts(config, family, *sizes, *(f"decoder_{name.removeprefix('decoder_')}" for name in sizes))
    for prefix in ("", "decoder_"):
        width, heads = getattr(config, f"{prefix}hidden_size"), getattr(config, f"{prefix}num_attention_heads")
        if width % heads:
            raise UsageError(
                f"{family}: {heads} heads do not divide the {width} channels of {prefix}hidden_size; change one of them"
            )
    if not 0 <= config.mask_ratio < 1:
        raise UsageError(f"{family}: mask_ratio must lie in [0, 1), got {config.mask_ratio!r}")
    if not 0 <= config.hidden_dropout_prob < 1:
        raise UsageError(f"{family}: hidden_dropout_prob must lie in [0, 1), got {config.hidden_dropout_prob!r}")
    if config.hidden_act != "gelu":
        raise UsageError(f"{family}: hidden_act {config.hidden_act!r} is unknown here; expected gelu")
    if config.norm_pix_loss:
        raise UsageError(f"{family}: norm_pix_loss is not supported; expected false, as in every published size")


def _check_counts(config: _Transformer, family: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{family}: {name} must be a whole number above 0, got {value!r}")


def _check_tokens(config: BrainlmConfig) -> None:
    frames, patch = config.num_timepoints_per_voxel, config.timepoint_patching_size
    if frames % patch:
        raise UsageError(
            f"brainlm: {frames} frames are no multiple of {patch} (timepoint_patching_size); change one of them"
        )
    if config.decoder_hidden_size != config.hidden_size:
        raise UsageError(
            f"brainlm: decoder_hidden_size {config.decoder_hidden_size} must equal hidden_size {config.hidden_size}, "
            "as the published decoder requires"
        )
    if config.num_landmarks != config.segment_means_seq_len:
        raise UsageError(
            f"brainlm: num_landmarks {config.num_landmarks} differs from segment_means_seq_len "
            f"{config.segment_means_seq_len}; make them equal: every published size does, and attention is then exact"
        )
    kernel = config.conv_kernel_size
    if kernel is not None and (kernel < 1 or kernel % 2 == 0):
        raise UsageError(f"brainlm: conv_kernel_size must be an odd number or none, got {kernel!r}")
    if config.loss_fn not in ("mse", "mae"):
        raise UsageError(f"brainlm: loss_fn {config.loss_fn!r} is unknown; expected mse or mae")


def _check_image(config: VitmaeConfig) -> None:
    if config.image_size % config.patch_size:
        raise UsageError(
            f"brainlm_vitmae: image_size {config.image_size} is no multiple of patch_size {config.patch_size}; "
            "the published pairs are 432 with 16 and 434 with 14"
        )
    for name in ("hidden_size", "decoder_hidden_size"):
        if getattr(config, name) % 4:
            raise UsageError(
                f"brainlm_vitmae: {name} {getattr(config, name)} must be a multiple of 4, for sine and cosine of two axes"
            )
    if config.train_mode not in ("auto_encode", "predict_last", "predict_last_pixel"):
        raise UsageError(
            f"brainlm_vitmae: train_mode {config.train_mode!r} is unknown; "
            "expected auto_encode, predict_last or predict_last_pixel"
        )
