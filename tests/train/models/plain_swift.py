"""SwiFT written the long way, as an oracle: roll, cut into windows, add -100 where two tokens came from different places.

Nothing here is fast and nothing is shared with `train.models`, but for the parameter names: one state dict fits both.
"""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

Axes = tuple[int, ...]
Weights = Mapping[str, Tensor]


def shrink(sizes: Axes, window: Axes, shift: Axes) -> tuple[Axes, Axes]:
    """A window as large as the axis, or larger, becomes the axis, and that axis no longer shifts."""
    fits = [size <= length for size, length in zip(sizes, window, strict=True)]
    return (
        tuple(size if fit else length for size, length, fit in zip(sizes, window, fits, strict=True)),
        tuple(0 if fit else step for step, fit in zip(shift, fits, strict=True)),
    )


def cut(x: Tensor, window: Axes) -> Tensor:
    """(b, x, y, z, t, c) to (windows, tokens of a window, c)."""
    b, *sizes, c = x.shape
    split = [n for size, length in zip(sizes, window, strict=True) for n in (size // length, length)]
    return (
        x.reshape(b, *split, c)
        .permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9)
        .reshape(-1, window[0] * window[1] * window[2] * window[3], c)
    )


def uncut(windows: Tensor, window: Axes, shape: Axes) -> Tensor:
    """The inverse of `cut`."""
    b, *sizes, c = shape
    counts = [size // length for size, length in zip(sizes, window, strict=True)]
    return windows.reshape(b, *counts, *window, c).permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).reshape(shape)


def origin(sizes: Axes, window: Axes, shift: Axes, device: torch.device | None = None) -> Tensor:
    """After the roll: which tokens of a window were neighbours before it, as one number per token of the padded grid."""
    label = torch.zeros(sizes, device=device)
    for axis, (size, length, step) in enumerate(zip(sizes, window, shift, strict=True)):
        place = torch.arange(size, device=device)
        # 0: whole windows; 1: the end of the axis; 2: its beginning, rolled behind the end
        part = (place >= size - length).float() + (place >= size - step).float() if step else 0.0 * place
        label = 3 * label + part.reshape([-1 if i == axis else 1 for i in range(4)])
    return label


def mask(sizes: Axes, window: Axes, shift: Axes, device: torch.device | None = None) -> Tensor:
    """-100 between tokens that the roll brought together, else 0; (windows, tokens, tokens)."""
    label = cut(origin(sizes, window, shift, device)[None, ..., None], window).squeeze(-1)
    return torch.where(label.unsqueeze(1) == label.unsqueeze(2), 0.0, -100.0)


def attention(x: Tensor, weights: Weights, name: str, heads: int, bias: Tensor | None) -> Tensor:
    count, n, c = x.shape
    qkv = F.linear(x, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
    q, k, v = qkv.reshape(count, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    scores = (q * (c // heads) ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = (scores.reshape(-1, len(bias), heads, n, n) + bias[None, :, None]).reshape(count, heads, n, n)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, n, c)
    return F.linear(out, weights[f"{name}.proj.weight"], weights[f"{name}.proj.bias"])


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def block(x: Tensor, weights: Weights, name: str, heads: int, window: Axes, shift: Axes) -> Tensor:
    sizes = tuple(x.shape[1:5])
    window, shift = shrink(sizes, window, shift)
    y = norm(x, weights, f"{name}.norm1")
    pads = [-size % length for size, length in zip(sizes, window, strict=True)]
    y = F.pad(y, (0, 0, 0, pads[3], 0, pads[2], 0, pads[1], 0, pads[0]))
    padded = tuple(y.shape[1:5])
    rolled = torch.roll(y, tuple(-step for step in shift), (1, 2, 3, 4))
    bias = mask(padded, window, shift, x.device).to(x.dtype) if any(shift) else None
    y = uncut(attention(cut(rolled, window), weights, f"{name}.attn", heads, bias), window, tuple(y.shape))
    y = torch.roll(y, shift, (1, 2, 3, 4))
    x = x + y[:, : sizes[0], : sizes[1], : sizes[2], : sizes[3]]
    hidden = F.gelu(
        F.linear(
            norm(x, weights, f"{name}.norm2"),
            weights[f"{name}.mlp.linear1.weight"],
            weights[f"{name}.mlp.linear1.bias"],
        )
    )
    return x + F.linear(hidden, weights[f"{name}.mlp.linear2.weight"], weights[f"{name}.mlp.linear2.bias"])


def merge(x: Tensor, weights: Weights, name: str) -> Tensor:
    corners = [x[:, i::2, j::2, k::2] for i, j, k in product(range(2), repeat=3)]
    return F.linear(norm(torch.cat(corners, -1), weights, f"{name}.norm"), weights[f"{name}.reduction.weight"])


def embed(x: Tensor, weights: Weights, patch: Axes) -> Tensor:
    b, c, sx, sy, sz, t = x.shape
    px, py, pz = patch
    x = x.reshape(b, c, sx // px, px, sy // py, py, sz // pz, pz, t).permute(0, 2, 4, 6, 8, 3, 5, 7, 1)
    x = x.reshape(b, sx // px, sy // py, sz // pz, t, px * py * pz * c)
    return F.linear(x, weights["patch_embed.fc.weight"], weights["patch_embed.fc.bias"])


def stage_windows(published: Mapping[str, object], stage: int, spatial: Axes) -> tuple[Axes, bool]:
    """The window of a stage and whether its odd blocks shift."""
    last = len(published["depths"]) - 1
    if stage == last and published["last_layer_full_MSA"]:
        return (*spatial, published["window_size"][3]), False
    return tuple(published["first_window_size" if stage == 0 else "window_size"]), True


def plain_swift(x: Tensor, weights: Weights, published: Mapping[str, object]) -> Tensor:
    """The feature (b, c, x, y, z, t) of a published-style config (`img_size`, `patch_size`, `depths`, ...)."""
    x = embed(x, weights, tuple(published["patch_size"][:3]))
    for stage, depth in enumerate(published["depths"]):
        x = x + weights[f"pos_embeds.{stage}.pos_embed"].permute(0, 2, 3, 4, 5, 1)
        x = x + weights[f"pos_embeds.{stage}.time_embed"].permute(0, 2, 3, 4, 5, 1)[:, :, :, :, : x.shape[4]]
        window, shifts = stage_windows(published, stage, tuple(x.shape[1:4]))
        for number in range(depth):
            shift = tuple(length // 2 if shifts and number % 2 else 0 for length in window)
            x = block(x, weights, f"layers.{stage}.blocks.{number}", published["num_heads"][stage], window, shift)
        if stage < len(published["depths"]) - 1:
            x = merge(x, weights, f"layers.{stage}.downsample")
    return x.permute(0, 5, 1, 2, 3, 4)
