"""Which tokens attend to each other in a shifted-window layer, as pieces of the grid instead of a mask.

Rolling an axis by the shift s, cutting it into windows of w and forbidding attention between tokens that the roll brought
together allows exactly what cutting the axis into [s | w | w ... | w - s] allows. So a layer needs no roll and no mask:
sort the tokens by piece, attend inside the pieces, sort them back. Pieces of equal length stand together, so that one
attention call serves them all.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

PADDING = -1
# Far enough below 0 that no sum over four axes with a padded place reaches 0, and none overflows.
_FAR_BELOW = -(1 << 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecePlan:
    """A grid's tokens sorted by piece.

    `index` holds token numbers in C order of the grid, or PADDING where the published code pads the grid to whole
    windows: padding is attended to. `groups` holds (pieces, tokens per piece), in the order of `index`.
    """

    index: NDArray[np.int32]
    groups: tuple[tuple[int, int], ...]


def shrink_window(
    sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Per axis: a window that covers the axis (before padding) becomes the axis, and its shift 0."""
    covers = [length >= size for size, length in zip(sizes, window, strict=True)]
    shrunk = tuple(size if cover else length for size, length, cover in zip(sizes, window, covers, strict=True))
    return shrunk, tuple(0 if cover else step for step, cover in zip(shift, covers, strict=True))


def cut_axis(size: int, window: int, shift: int) -> list[range]:
    """The pieces [shift | window | ... | window - shift] of an axis padded to whole windows; 0 <= shift < window."""
    padded = -(-size // window) * window
    edges = [0, *range(shift or window, padded, window), padded]
    return [range(start, stop) for start, stop in pairwise(edges)]


def plan_pieces(sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> PiecePlan:
    """Sort the tokens of a grid by piece, the longest first; pieces of nothing but padding are left out."""
    window, shift = shrink_window(sizes, window, shift)
    strides = [int(np.prod(sizes[axis + 1 :])) for axis in range(len(sizes))]
    axes = [_axis_terms(*axis) for axis in zip(sizes, window, shift, strides, strict=True)]
    by_length: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for terms in product(*axes):
        pieces = _outer_sum(terms)
        by_length[pieces.shape[1]].append(pieces[(pieces >= 0).any(axis=1)])
    joined = [np.concatenate(by_length[length]) for length in sorted(by_length, reverse=True)]
    groups = [pieces for pieces in joined if len(pieces)]
    index = np.concatenate([pieces.ravel() for pieces in groups])
    return PiecePlan(
        index=np.maximum(index, PADDING).astype(np.int32),
        groups=tuple((pieces.shape[0], pieces.shape[1]) for pieces in groups),
    )


def _axis_terms(size: int, window: int, shift: int, stride: int) -> list[NDArray[np.int64]]:
    """What an axis adds to a token's number: one (pieces, places) array per length of piece."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for piece in cut_axis(size, window, shift):
        by_length[len(piece)].append([place * stride if place < size else _FAR_BELOW for place in piece])
    return [np.array(pieces, np.int64) for pieces in by_length.values()]


def _outer_sum(terms: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All combinations of the axes' pieces: (pieces, tokens), the last axis fastest."""
    total = np.zeros((1, 1), np.int64)
    for term in terms:
        pieces, tokens = total.shape
        total = (total[:, None, :, None] + term[None, :, None, :]).reshape(pieces * len(term), tokens * term.shape[1])
    return total
