"""The weights' exponential running mean, which often generalises better than where the last step left them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmristream.errors import ResumeError
from train.checkpoint_sharded import distributed_like
from train.parallel import own_part


class Ema:
    """The mean of those parameters of a model that learn, in float32; under FSDP of this rank's shards. A `Keeper`.

    The decay of update n is min(decay, (n + 1) / (n + 10)): a long mean would else hold on to the weights that the run
    began with.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._parameters = learning
        self._means = {name: one.detach().float().clone() for name, one in learning.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        weight = 1 - min(self.decay, (self.updates + 1) / (self.updates + 10))
        means = [own_part(mean) for mean in self._means.values()]
        weights = [own_part(one.detach()).float() for one in self._parameters.values()]
        torch._foreach_lerp_(means, weights, weight)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean as its weights while in here, and its own again after it, whatever happens."""
        kept = [own_part(one.detach()).clone() for one in self._parameters.values()]
        try:
            self._set([own_part(mean) for mean in self._means.values()])
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for one, value in zip(self._parameters.values(), values, strict=True):
            own_part(one.detach()).copy_(value)

    def tensors(self) -> Mapping[str, Tensor]:
        return self._means

    def facts(self) -> Mapping[str, Any]:
        return {"updates": self.updates}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if wrong := sorted(set(tensors) ^ set(self._means)):
            raise ResumeError(
                f"the checkpoint's mean of weights and the network differ in {', '.join(wrong[:5])}; freeze what was frozen "
                "then, or leave train.ema out"
            )
        for name, mean in self._means.items():
            own_part(mean).copy_(own_part(distributed_like(tensors[name].to(mean.device), mean)))
        self.updates = int(facts["updates"])
