"""A network on several ranks: whole on each (DDP), or in shards (FSDP2); compiled, where the recipe asks for it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fmristream.errors import UsageError
from train.launch import World
from train.sections import TrainConfig


def spread(model: nn.Module, world: World, config: TrainConfig | None = None) -> nn.Module:
    """The model as a step calls it: its gradients are the mean over ranks, summed in the same order in every step.

    Under `fsdp` the model's own parameters become DTensors, of which each rank holds a shard: make the optimiser after this,
    and give the model its weights before.

    Raises:
        UsageError: there is no such compiler.
    """
    config = config or TrainConfig()
    if config.compile:
        _require_backend(config.compile_backend)
    if world.size > 1 and config.parallel == "fsdp":
        return _sharded(model, world, config)
    network = _compiled(model, config) if config.compile else model
    return network if world.size == 1 else _replicated(network, world)


def _replicated(model: nn.Module, world: World) -> nn.Module:
    """The model in DDP.

    By default (and with static_graph) DDP rearranges its buckets after the first step, so a run resumed on 3 or 4 ranks
    differs from an uninterrupted one in the last bits. Where it looks for unused parameters it leaves the buckets alone.
    """
    devices = [world.device.index] if world.device.type == "cuda" else None
    network = WithBystander(model).to(world.device)
    return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=True)


class WithBystander(nn.Module):
    """A model beside a parameter that it does not use, so that DDP never warns of having looked for such in vain."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.bystander = nn.Parameter(torch.zeros(()))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.model(*inputs, **named)


def _sharded(model: nn.Module, world: World, config: TrainConfig) -> nn.Module:
    """The model itself, its blocks and what is left of it sharded over all ranks.

    What is gathered for a forward pass is let go after it, the root's parameters too: evaluation would leave them whole, and
    a checkpoint or an average would then take them for shards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # Blocks compute in low precision under autocast anyway; gathered so, they take half the traffic. Not on a CPU, whose
    # normalisations refuse weights of another type than their input, and not the root, whose heads compute in float32.
    low = autocast_type(config, world.device) if world.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        if config.compile:  # outside of what FSDP does before and after it
            block.forward = torch.compile(block.forward, backend=config.compile_backend)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered and let go at a time: what the model calls its `blocks_to_shard`, or the items of its innermost lists.

    A block must be called as a module; what is left is gathered for the whole forward pass.
    """
    told: Iterable[nn.Module] | None = getattr(model, "blocks_to_shard", None)
    if told is not None:
        return list(told)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    items = [item for part in lists for item in part if not _has_list(item) and any(True for _ in item.parameters())]
    return list(dict.fromkeys(items))


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


def _compiled(model: nn.Module, config: TrainConfig) -> nn.Module:
    """The model, compiled; inside DDP, so that no graph depends on the buckets."""
    network: nn.Module = torch.compile(model, backend=config.compile_backend)  # type: ignore[assignment]
    return network


def _require_backend(name: str) -> None:
    from torch.compiler import list_backends

    known = sorted({*list_backends(), "aot_eager"})  # the latter needs no C++ compiler
    if name not in {*known, *list_backends(exclude_tags=())}:
        raise UsageError(f"train.compile_backend: torch has no compiler {name!r}; it has {', '.join(known)}")


def autocast_type(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What the network computes in where autocast lets it; None for float32."""
    if config.precision == "fp16":
        return torch.float16
    is_bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if is_bf16 else None


@contextmanager
def exchanging_gradients(network: nn.Module, *, exchanges: bool) -> Iterator[None]:
    """Whether the backward pass in here sends gradients, or leaves them on this rank to be added to."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(exchanges)
        yield
    elif isinstance(network, DistributedDataParallel) and not exchanges:
        with network.no_sync():
            yield
    else:
        yield


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank, in its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks' shards; every rank must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
