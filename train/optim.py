"""AdamW and how its learning rate moves; the rate is a function of the step alone, so that a resumed run is the same run."""

import math
from typing import Any

import torch
from torch import nn

from fmristream.errors import ResumeError
from train.checkpoint_sharded import distributed_like
from train.models.depth import layer_depths
from train.parallel import whole
from train.sections import OptimConfig


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """The rate of step 0, 1, …: a linear rise to `lr` over the warm-up, then the schedule, not below `final_lr_ratio` of it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.decay is not None and config.decay_every is not None:
        return config.lr * max(
            config.final_lr_ratio, config.decay ** ((step - config.warmup_steps) // config.decay_every)
        )
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    floor = config.lr * config.final_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; biases, norm weights and other vectors are not decayed, and each layer has its share of the rate.

    Raises:
        UsageError: layers are to differ, and the model does not tell them.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    shares = rate_shares(model, config.layer_decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((shares.get(name, 1.0), parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[key], "lr_scale": key[0], "weight_decay": config.weight_decay if key[1] else 0.0}
            for key in sorted(groups, reverse=True)
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def rate_shares(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """What each parameter's rate is multiplied by, by name; empty where all have the same."""
    if layer_decay == 1:
        return {}
    depths, top = layer_depths(model)
    return {name: layer_decay ** (top - depth) for name, depth in depths.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate for every group, times its layer's share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def clip_gradients(model: nn.Module, *, max_norm: float) -> torch.Tensor:
    """The gradients' norm before clipping (fp32, on the device), of all ranks' shards; 0 clips nothing."""
    return whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else math.inf))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state, each tensor under `<kind>/<parameter name>`."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put saved state back in place; parameters that never had a gradient have none.

    Raises:
        ResumeError: a tensor belongs to no parameter of this model, or has another shape.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise ResumeError(
                f"the checkpoint's optimiser state {key} {tuple(value.shape)} fits no parameter of this model; "
                f"train with the recipe that made it, or give another --out"
            )
        # The step count stays on the CPU, where a plain AdamW keeps it.
        place = parameters[name].device if value.ndim else torch.device("cpu")
        states.setdefault(name, {})[kind] = distributed_like(value, parameters[name]).to(place, copy=True)
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
