"""The contrastive loss of pairs of windows, against the windows of all ranks."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def nt_xent(embeddings: Tensor, subjects: Tensor, temperature: float = 0.1) -> Tensor:
    """Loss of each pair of windows (b,), float32: a window should find its partner among the windows of other subjects.

    NT-Xent with cosine similarity. Negatives are the windows of all ranks, which may hold different numbers of pairs; the
    mean over all ranks' pairs and its gradient are those of one process. Other pairs of the same subject are neither
    positive nor negative. Where there is no other subject at all, the loss is 0 and teaches nothing.

    Args:
        embeddings: (b, 2, width): two windows of one subject each. Every rank has one pair or more.
        subjects: (b,) whole numbers that are the same for the same subject on every rank.
        temperature: what similarities are divided by. Default as published for SwiFT.
    """
    own = F.normalize(embeddings.float(), dim=2)
    counts = _counts(len(own), own.device)
    if len(counts) == 1:
        return _losses(own, own, subjects, subjects, before=0, temperature=temperature)
    everyone = cast(Tensor, _GatherRows.apply(own, counts))  # type: ignore[no-untyped-call]
    before = sum(counts[: dist.get_rank()])
    return _losses(own, everyone, subjects, _gather(subjects, counts), before=before, temperature=temperature)


def nt_xent_alone(embeddings: Tensor, subjects: Tensor, temperature: float = 0.1) -> Tensor:
    """The same among these pairs alone, whatever other ranks there are; for evaluation, where all have all pairs."""
    own = F.normalize(embeddings.float(), dim=2)
    return _losses(own, own, subjects, subjects, before=0, temperature=temperature)


def _losses(
    own: Tensor, everyone: Tensor, subjects: Tensor, everyones_subjects: Tensor, *, before: int, temperature: float
) -> Tensor:
    """(b,) of this rank's pairs, which come after `before` others among everyone's."""
    scores = own.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature
    # Rows and columns: the two windows of the first pair, of the second, and so on.
    rows = torch.arange(len(scores), device=scores.device)
    partners = 2 * before + (rows ^ 1)
    is_same = (subjects.unsqueeze(1) == everyones_subjects).repeat_interleave(2, 0).repeat_interleave(2, 1)
    is_partner = partners.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
    losses = F.cross_entropy(scores.masked_fill(is_same & ~is_partner, -torch.inf), partners, reduction="none")
    return losses.view(-1, 2).mean(1)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks; a row's gradient is the sum of what all ranks' losses say about it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _gather(rows, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split_with_sizes(ctx.counts)[dist.get_rank()], None


def _counts(own: int, device: torch.device) -> list[int]:
    """How many rows each rank has."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([own], device=device))
    return [int(count) for count in torch.cat(counts).tolist()]


def _gather(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows of all ranks in their order; short ranks send zeros beside theirs, which are cut off again."""
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
