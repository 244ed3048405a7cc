"""One optimiser step: gradients of the global batch, and one message between all ranks before it is taken."""

import math
from typing import TYPE_CHECKING

import torch

from train import evaluate
from train.evaluate import NonFiniteError
from train.launch import World
from train.state import Run, StepFacts

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch


def backward(run: Run, packed: "Batch") -> torch.Tensor:
    """Add the global batch's gradients to the parameters; return this rank's part of its mean loss."""
    batch = packed.to(run.world.device, augment=run.augment)
    network = evaluate.under_autocast(run.network, device=run.world.device, bf16=run.bf16)
    losses = run.task.losses(network, batch)
    return weighted_backward(losses, global_size=batch.global_size, world=run.world)


def weighted_backward(losses: torch.Tensor, *, global_size: int, world: World) -> torch.Tensor:
    """Gradients of the mean over the global batch, whatever the ranks' shares of it.

    DDP takes the mean over ranks: each rank divides the sum of its losses by the global number, and undoes DDP's
    division by the number of ranks. Missing targets count as loss 0, so no rank needs to know the others' labels.
    """
    part = losses.sum() / global_size
    torch.autograd.backward(part * world.size)
    return part.detach()


def exchange(
    run: Run, batch: "Batch", *, loss: torch.Tensor, norm: torch.Tensor, waited_s: float, stopping: bool
) -> StepFacts:
    """One message from each rank to all before the step is taken.

    Raises:
        NonFiniteError: a loss or the gradient is not finite; every rank raises, and the weights are still good.
    """
    part, gradient_norm = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one wait for the device
    width = -(-batch.global_size // run.world.size) if run.recipe.train.log_windows else 0
    row = torch.full((3 + width,), -1.0, dtype=torch.float64)
    row[:3] = torch.tensor([part, waited_s, float(stopping)], dtype=torch.float64)
    if width:
        own = own_windows(batch)
        row[3 : 3 + len(own)] = own.double()  # exact below 2^53
    rows = run.world.stack(row)
    parts = rows[:, 0].tolist()
    total = math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan
    if not (math.isfinite(total) and math.isfinite(gradient_norm)):
        refuse(run, batch, finite=math.isfinite(part), loss=total, norm=gradient_norm)
    windows = rows[:, 3:].long().flatten()
    return StepFacts(
        loss=total,
        gradient_norm=gradient_norm,
        stopping=bool(rows[:, 2].any()),
        wait_s=float(rows[:, 1].max()),
        windows=windows[windows >= 0].tolist(),
    )


def own_windows(batch: "Batch") -> torch.Tensor:
    """Window numbers of this rank's samples, one for the views of each."""
    return batch.window[: len(batch) // batch.views].cpu()


def refuse(run: Run, batch: "Batch", *, finite: bool, loss: float, norm: float) -> None:
    """Name the windows that a non-finite loss or gradient came from."""
    own = own_windows(batch)
    mine = torch.stack([own, torch.full_like(own, int(finite))], dim=1)
    rows = run.world.gather(mine)
    guilty = rows[rows[:, 1] == 0] if bool((rows[:, 1] == 0).any()) else rows
    raise NonFiniteError(
        f"step {run.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}, the step is not taken; "
        f"windows {guilty[:, 0].tolist()} of split {run.recipe.data.train_split!r}; "
        f"look at them, or lower optim.lr and go on from the last checkpoint"
    )
