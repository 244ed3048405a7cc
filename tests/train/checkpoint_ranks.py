"""What one rank does in the tests of sharded checkpoints: `python checkpoint_ranks.py DUTY OUT` is RANKS ranks.

Each writes OUT/DUTY-<rank>.json.
"""

import json
import os
import resource
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # optimisers import it in their first step: here once for all forks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fmristream.errors import FmriStreamError
from train.checkpoint import gather_rng
from train.checkpoint_async import Saver, shared_token
from train.checkpoint_writing import Keep, take
from train.config import Recipe
from train.launch import World, join_world
from train.log import Log
from train.optim import optimizer_tensors, restore_optimizer
from train.resuming import find_newest, restore_weights

# Of 4 ranks the first layer's 5 rows are 2, 2, 1 and 0, and of the last layer's one row three ranks have nothing.
SIZES = (6, 5, 1)


def network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.Tanh(), nn.Linear(SIZES[1], SIZES[2]))
    model.register_buffer("seen", torch.tensor(0))
    return model


def sharded(model: nn.Module, world: World) -> nn.Module:
    if world.size > 1:
        mesh = init_device_mesh("cpu", (world.size,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    generator = torch.Generator().manual_seed(int(model.seen))
    for _ in range(steps):
        model(torch.randn(7, SIZES[0], generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 1


def whole(tensors) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()
        for name, tensor in tensors.items()
    }


def save(saver: Saver, world: World, model, optimizer, *, step: int, is_best: bool = False) -> None:
    token = shared_token(world)
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer), "rng": gather_rng(world)}
    state = {"loader": {}, "made_by": world.size}
    saver.start(take(tensors, state, step=step, token=token, rank=world.rank, ranks=world.size, is_best=is_best))


def remember(out: Path, world: World, model, optimizer, *, step: int) -> None:
    """The same as one process has it, put together by torch."""
    found = whole(model.state_dict()) | {f"o/{k}": v for k, v in whole(optimizer_tensors(model, optimizer)).items()}
    if world.is_main:
        save_file(found, out / f"reference-{step}.safetensors")


def write(world: World, out: Path) -> object:
    """Two checkpoints, the second while training goes on; then a rank whose disk is full."""
    model = sharded(network(), world)
    optimizer = optimizer_of(model)
    with Saver(out / "checkpoints", world, keep=Keep(last=2)) as saver:
        for step in (3, 6):
            learn(model, optimizer, steps=3)
            remember(out, world, model, optimizer, step=step)
            save(saver, world, model, optimizer, step=step)
            learn(model, optimizer, steps=3)  # what is written must not see this
            saver.settle()
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size // 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with Saver(out / "checkpoints", world, keep=Keep(last=2)) as saver:
            save(saver, world, model, optimizer, step=9)
            learn(model, optimizer, steps=2)
            saver.settle()
        failed = ""
    except FmriStreamError as error:
        failed = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    return {"failed": failed}


def read(world: World, out: Path) -> object:
    """Resume into sharded and unsharded networks, from whole, damaged and differing places."""
    found = {}
    for place in ("checkpoints", "damaged"):
        reports: list[dict] = []
        log = Log(None)
        log.event = lambda name, facts, kept=reports: kept.append({"event": name, **facts})  # type: ignore[method-assign]
        stored = find_newest(recipe_for(out / place), out=out, world=world, log=log)
        assert stored is not None
        reference = load_file(out / f"reference-{stored.step}.safetensors")
        same = {}
        for order in ("weights, then cut", "cut, then weights"):
            model = network()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            if order == "weights, then cut":
                restore_weights(stored, model, world=world)
            sharded(model, world)
            if order == "cut, then weights":
                restore_weights(stored, model, world=world)
            optimizer = optimizer_of(model)
            parameters = dict(model.named_parameters())
            like = (
                (lambda key, own=parameters: own.get(key.partition("/")[2])) if order.startswith("cut") else no_tensor
            )
            restore_optimizer(model, optimizer, stored.section("optimizer", like))
            now = whole(model.state_dict()) | {
                f"o/{k}": v for k, v in whole(optimizer_tensors(model, optimizer)).items()
            }
            same[order] = set(now) == set(reference) and all(torch.equal(now[k], reference[k]) for k in reference)
            learn(model, optimizer, steps=2)  # what was put back is usable
        found[place] = {"step": stored.step, "same": same, "reports": reports}
    try:
        find_newest(recipe_for(out / f"seen-by-{world.rank}"), out=out, world=world, log=Log(None))
        found["differ"] = ""
    except FmriStreamError as error:
        found["differ"] = str(error)
    return found


def no_tensor(key: str) -> None:
    return None


def recipe_for(place: Path) -> Recipe:
    return replace(Recipe(), train=replace(Recipe().train, checkpoints=str(place)))


DUTIES = {duty.__name__: duty for duty in (write, read)}


def rank_of(size: int) -> int:
    """Become each rank in a fork of this process, which has imported torch for all, and has no threads yet."""
    ranks = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            return rank
        ranks.append(child)
    print("ranks", *ranks, flush=True)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in ranks)
    os._exit(min(failed, 1))


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    rank_of(int(os.environ["RANKS"]))
    status = 1
    try:
        with join_world(timeout_s=30) as world:
            (out / f"{name}-{world.rank}.json").write_text(json.dumps(DUTIES[name](world, out)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
