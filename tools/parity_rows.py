"""What a parity check reports: one row per compared tensor, statistic, gradient or count."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tools.golden import GoldenError, formula_tensor
from tools.parity_swift import GRADIENT_TOLERANCE, TOLERANCE, Difference

STATISTICS = ("mean", "std", "min", "max")


def tensor_row(group: str, name: str, ours: Tensor, expected: Tensor) -> Difference:
    """The largest absolute difference of two tensors of one shape."""
    if ours.shape != expected.shape:
        raise GoldenError(f"{name}: ours has shape {list(ours.shape)}, the case {list(expected.shape)}")
    value = (ours.detach().double() - expected.double()).abs().max().item()
    return Difference(group=group, name=name, value=value, tolerance=TOLERANCE)


def statistics_rows(name: str, ours: Tensor, expected: Mapping[str, Any]) -> list[Difference]:
    """Mean, SD (population), smallest and largest of a tensor that is too large to be stored."""
    if list(ours.shape) != list(expected["shape"]):
        raise GoldenError(f"{name}: ours has shape {list(ours.shape)}, the case {expected['shape']}")
    values = ours.detach().double()
    own = dict(zip(STATISTICS, (values.mean(), values.std(correction=0), values.min(), values.max()), strict=True))
    return [
        Difference(
            group="statistics",
            name=f"{name} {statistic}",
            value=abs(own[statistic].item() - expected[statistic]),
            tolerance=TOLERANCE,
        )
        for statistic in STATISTICS
    ]


def gradient_rows(norms: Mapping[str, float | None], model: nn.Module, *, prefix: str = "") -> list[Difference]:
    """Norms relative to the published ones; a parameter without a gradient there must have none here."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [
        Difference(
            group="gradients (relative)",
            name=f"{prefix}{name}",
            value=_norm_difference(ours.get(name), norm),
            tolerance=GRADIENT_TOLERANCE,
        )
        for name, norm in norms.items()
    ]


def count_row(name: str, ours: int, expected: int) -> Difference:
    """Two whole numbers that must be equal."""
    return Difference(group="counts", name=name, value=abs(ours - expected), tolerance=0)


def uncompared_rows(stored: Collection[str], known: Collection[str]) -> list[Difference]:
    """A stored tensor that nothing here computes is said to be so."""
    return [
        Difference(group="not compared", name=name, value=0, tolerance=0) for name in sorted(set(stored) - set(known))
    ]


def formula_tensors(seed: int, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a description that follow from the closed formula."""
    return {
        name: formula_tensor(
            seed, entry.get("key", name), shape=entry["shape"], scale=entry["scale"], offset=entry["offset"]
        )
        for name, entry in entries.items()
        if entry.get("formula", True)
    }


def _norm_difference(gradient: Tensor | None, expected: float | None) -> float:
    if gradient is None or expected is None:
        return 0.0 if gradient is None and expected is None else float("inf")
    return abs(torch.linalg.vector_norm(gradient.double()).item() - expected) / max(expected, 1e-3)
