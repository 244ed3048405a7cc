"""The factor that keeps float16's gradients from vanishing: as large as they bear, the same on every rank.

torch's own scaler lets a step go where gradients overflow, and with it a batch that nobody then learns from. Here the
batch is taken again at half the factor, so that every window still counts once per epoch. Ranks agree because all decide
by the same exchanged numbers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from train.parallel import own_part

# As torch.amp.GradScaler has them.
FIRST, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
# Beyond this a factor is no float32 any more that leaves room for a loss.
LARGEST = 2.0**24


class LossScale:
    """A power of two that losses are multiplied by; a `Keeper`."""

    def __init__(self, value: float = FIRST) -> None:
        self.value = value
        self.steps = 0  # since it changed

    def unscale(self, gradients: Iterable[Tensor | None]) -> None:
        """Gradients of the loss itself, in place; exact but for those that vanish."""
        found = [own_part(gradient) for gradient in gradients if gradient is not None]
        if found:
            torch._foreach_mul_(found, 1 / self.value)

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the factor's fault: at 1 it is not."""
        return self.value > 1

    def shrink(self) -> None:
        """After an overflow."""
        self.value, self.steps = self.value * BACKOFF, 0

    def grow(self) -> None:
        """After a step; every so many in a row it is worth a try."""
        self.steps += 1
        if self.steps == INTERVAL:
            self.value, self.steps = min(LARGEST, self.value * GROWTH), 0

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {"value": self.value, "steps": self.steps}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.value, self.steps = float(facts["value"]), int(facts["steps"])
