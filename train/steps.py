"""One optimiser step: gradients of the global batch, and one message between all ranks before it is taken."""

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from fmristream.errors import UsageError
from train import evaluate
from train.config import Recipe
from train.evaluate import NonFiniteError
from train.launch import World
from train.optim import clip_gradients
from train.parallel import autocast_type, exchanging_gradients
from train.profiling import COPY, EXCHANGE, OPTIMISER, NoProfile
from train.state import Run, StepFacts

if TYPE_CHECKING:
    from fmristream.stream.batch import Batch

NO_PROFILE = NoProfile()


def take_gradients(
    run: Run, packed: "Batch", *, waited_s: float, stopping: bool, profile: NoProfile = NO_PROFILE
) -> StepFacts:
    """Give the parameters the clipped gradients of the global batch; what all ranks know of it.

    Where they overflow float16, the same batch is taken again at half the loss scale: no window is passed over.

    Raises:
        NonFiniteError: a loss or the gradient is not finite; every rank raises, and the weights are still good.
    """
    scale = run.loss_scale
    while True:
        loss = backward(run, packed, profile)
        profile.mark(OPTIMISER)
        if scale is not None:
            scale.unscale(parameter.grad for parameter in run.model.parameters())
        norm = clip_gradients(run.model, max_norm=run.recipe.train.clip)
        profile.mark(EXCHANGE)
        facts = exchange(run, packed, loss=loss, norm=norm, waited_s=waited_s, stopping=stopping)
        if not facts.overflows:
            return facts
        assert scale is not None
        scale.shrink()
        run.optimizer.zero_grad()


def take_step(run: Run) -> None:
    """Move the weights by the gradients that are there, and all that follows the weights."""
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    if run.loss_scale is not None:
        run.loss_scale.grow()
    if run.ema is not None:
        run.ema.update()


def backward(run: Run, packed: "Batch", profile: NoProfile = NO_PROFILE) -> torch.Tensor:
    """Add the global batch's gradients to the parameters; return this rank's part of its mean loss.

    Of several pieces, one is on the device at a time, and the ranks exchange gradients in the last one's backward pass alone.
    """
    device, scale = run.world.device, 1.0 if run.loss_scale is None else run.loss_scale.value
    dtype = autocast_type(run.recipe.train, device)
    network = evaluate.under_autocast(run.network, device=device, bf16=dtype is not None, dtype=dtype)
    pieces = cut_into(packed, number_of_pieces(packed, run.recipe.train.accumulate, world=run.world))
    parts = []
    for number, piece in enumerate(pieces, start=1):
        profile.mark(COPY)
        with exchanging_gradients(run.network, exchanges=number == len(pieces)):
            losses = run.task.losses(network, piece.to(device, augment=run.augment))
            parts.append(weighted_backward(losses, global_size=packed.global_size, world=run.world, scale=scale))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def number_of_pieces(packed: "Batch", asked: int, *, world: World) -> int:
    """How many pieces every rank cuts its share into: as many as asked for, but none is empty on any rank.

    Each piece is a pass of collectives, so a rank with another number would be waited for in vain. The smallest share
    follows from the size of the batch: nobody needs to ask.
    """
    return min(asked, packed.global_size // world.size)


def cut_into(packed: "Batch", count: int) -> list["Batch"]:
    """Consecutive pieces whose samples differ in number by one at most."""
    samples = len(packed) // packed.views
    cuts = [samples * number // count for number in range(count + 1)]
    return [packed] if count == 1 else [packed.samples(*ends) for ends in itertools.pairwise(cuts)]


def require_batch(recipe: Recipe, windows: int) -> None:
    """Raise UsageError where a batch would hold windows twice."""
    if recipe.train.batch_size > windows:
        raise UsageError(
            f"train.batch_size {recipe.train.batch_size}: split {recipe.data.train_split!r} has {windows} windows, of which a "
            "batch holds each once; give as many at most, or a smaller data.stride"
        )


def require_divisible(recipe: Recipe, model: nn.Module) -> None:
    """Raise UsageError where a batch in pieces would teach something else than the whole batch."""
    if recipe.train.accumulate == 1:
        return
    why = ""
    if recipe.objective.kind == "contrastive":
        why = "objective.kind 'contrastive' compares all windows of a batch with each other"
    elif any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        why = f"model.name {recipe.model.name!r} normalises by the whole batch"
    if why:
        raise UsageError(
            f"train.accumulate {recipe.train.accumulate} cuts a batch into pieces, and {why}, so pieces would teach something "
            "else; set train.accumulate = 1, and use more ranks or activation checkpointing (model.checkpointing) to save memory"
        )


def weighted_backward(losses: torch.Tensor, *, global_size: int, world: World, scale: float = 1.0) -> torch.Tensor:
    """Gradients of the mean over the global batch, whatever the ranks' shares of it.

    DDP and FSDP take the mean over ranks: each rank divides the sum of its losses by the global number, and undoes the
    division by the number of ranks. Missing targets count as loss 0, so no rank needs to know the others' labels.

    Args:
        losses: of this rank's samples, or of some of them.
        global_size: samples of the batch over all ranks.
        world: the ranks.
        scale: what gradients are multiplied by beside.
    """
    part = losses.sum() / global_size
    torch.autograd.backward(part * (world.size * scale))
    return part.detach()


def exchange(
    run: Run, batch: "Batch", *, loss: torch.Tensor, norm: torch.Tensor, waited_s: float, stopping: bool
) -> StepFacts:
    """One message from each rank to all before the step is taken.

    Raises:
        NonFiniteError: a loss or the gradient is not finite; every rank raises, and the weights are still good.
    """
    part, own_norm = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one wait for the device
    width = -(-batch.global_size // run.world.size) if run.recipe.train.log_windows else 0
    row = torch.full((4 + width,), -1.0, dtype=torch.float64)
    row[:4] = torch.tensor([part, own_norm, waited_s, float(stopping)], dtype=torch.float64)
    if width:
        own = own_windows(batch)
        row[4 : 4 + len(own)] = own.double()  # exact below 2^53
    rows = run.world.stack(row)
    parts, norms = rows[:, 0].tolist(), rows[:, 1].tolist()
    total = math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan
    is_finite = all(map(math.isfinite, norms))
    # A larger number than float16 has is the loss scale's fault, if the loss itself is a number and the scale can be less.
    overflows = not is_finite and math.isfinite(total) and run.loss_scale is not None and run.loss_scale.can_shrink
    if not (math.isfinite(total) and (is_finite or overflows)):
        refuse(run, batch, finite=math.isfinite(part), loss=total, norm=own_norm)
    windows = rows[:, 4:].long().flatten()
    return StepFacts(
        loss=total,
        gradient_norm=own_norm,
        stopping=bool(rows[:, 3].any()),
        wait_s=float(rows[:, 2].max()),
        windows=windows[windows >= 0].tolist(),
        overflows=overflows,
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
        f"`python -m train.windows OUT N` says which run and frames; look at them, or lower optim.lr and go on from the last "
        "checkpoint"
    )
