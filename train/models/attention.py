"""Attention inside pieces of a token grid: sort the tokens by piece once, few dense calls, sort back.

Slicing the tokens into pieces would be exact too, but autograd then fills one full-size gradient per slice, which eats
the gain; here a permutation's gradient is the inverse permutation, and the gradients of all pieces go into one buffer.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Forward and backward, head width 12, one and two AVX-512 threads: two plain products take .76 and .43 of the fused
# kernel's time at 32 tokens, but 1.9 and 1.3 of it at 64.
LARGEST_PLAIN_PIECE = 32

Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOrder:
    """The tokens of a batch sorted by piece: (pieces, tokens per piece) of each group, and the way there and back.

    Where `padding` is true, `index` names some token, whose value is replaced by zero.
    """

    groups: Groups
    index: Tensor
    inverse: Tensor
    padding: Tensor | None


def batch_order(index: Tensor, groups: Groups, *, batch: int, tokens: int, has_padding: bool) -> TokenOrder:
    """Repeat the order of one grid (negative: padding) for every sample, so that equal pieces of all stand together."""
    beyond = batch * tokens
    first = torch.arange(batch, device=index.device).unsqueeze(1) * tokens
    parts = index.long().split_with_sizes([pieces * length for pieces, length in groups])
    rows = torch.cat([torch.where(part < 0, beyond, part + first).flatten() for part in parts])
    places = torch.arange(len(rows), device=rows.device)
    # All padding claims one row more than there are tokens, which is cut off.
    inverse = rows.new_empty(beyond + 1).index_copy_(0, rows, places)[:beyond]
    return TokenOrder(
        groups=tuple((batch * pieces, length) for pieces, length in groups),
        index=rows.clamp_max(beyond - 1) if has_padding else rows,
        inverse=inverse,
        padding=(rows == beyond).unsqueeze(1) if has_padding else None,
    )


class _Permute(torch.autograd.Function):
    """Rows by index, their gradients by the inverse index; rows where `zero` is true become zero."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, zero: Tensor | None, inverse: Tensor, inverse_zero: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, inverse_zero)
        return _select(x, index, zero)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _select(gradients[0], *ctx.saved_tensors), None, None, None, None


def _select(x: Tensor, index: Tensor, zero: Tensor | None) -> Tensor:
    chosen = x.index_select(0, index)
    return chosen if zero is None else chosen.masked_fill_(zero, 0)


def sort_tokens(x: Tensor, order: TokenOrder) -> Tensor:
    """(tokens, channels) in grid order to (tokens and padding, channels) sorted by piece."""
    return cast(Tensor, _Permute.apply(x, order.index, order.padding, order.inverse, None))  # type: ignore[no-untyped-call]


def unsort_tokens(x: Tensor, order: TokenOrder) -> Tensor:
    """The inverse of `sort_tokens`; padding is dropped."""
    return cast(Tensor, _Permute.apply(x, order.inverse, None, order.index, order.padding))  # type: ignore[no-untyped-call]


class _SplitHeads(torch.autograd.Function):
    """q, k, v of every group as views; their gradients are written once, where split and stack would copy them twice."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Groups, heads: int) -> tuple[Tensor, ...]:
        ctx.groups, ctx.heads, ctx.shape = groups, heads, qkv.shape
        return _head_views(qkv, groups, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].new_empty(ctx.shape)
        for view, gradient in zip(_head_views(total, ctx.groups, ctx.heads), gradients, strict=True):
            view.copy_(gradient)
        return total, None, None


def _head_views(qkv: Tensor, groups: Groups, heads: int) -> tuple[Tensor, ...]:
    """q, k, v of the first group, then of the next: each (pieces, heads, tokens, width)."""
    width = qkv.shape[1] // (3 * heads)
    views: list[Tensor] = []
    for part, group in zip(qkv.split_with_sizes([pieces * length for pieces, length in groups]), groups, strict=True):
        views.extend(part.view(*group, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0))
    return tuple(views)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(pieces, heads, tokens, width) to (pieces * tokens, channels)."""
    if q.shape[2] <= LARGEST_PLAIN_PIECE and q.device.type == "cpu":
        out: Tensor = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    pieces, heads, tokens, width = q.shape
    return out.transpose(1, 2).reshape(pieces * tokens, heads * width)


class PieceAttention(nn.Module):
    """Multi-head self-attention among the tokens of each piece, with a bias in q, k and v."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, order: TokenOrder) -> Tensor:
        """(tokens, channels) in grid order, before and after."""
        qkv = self.qkv(sort_tokens(x, order))
        views: tuple[Tensor, ...] = _SplitHeads.apply(qkv, order.groups, self.heads)  # type: ignore[no-untyped-call]
        attended = [_attend(*views[at : at + 3]) for at in range(0, len(views), 3)]
        out: Tensor = self.proj(unsort_tokens(torch.cat(attended), order))
        return out
