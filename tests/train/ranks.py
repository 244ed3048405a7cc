"""What one rank does in the tests of several processes: `python ranks.py DUTY OUT`. Writes OUT/DUTY-<rank>.json."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from train.config import load_recipe
from train.contrastive import nt_xent
from train.evaluate import Windows
from train.launch import AskedToStop, World, join_world
from train.log import read_history
from train.loop import train, weighted_backward
from train.models.synced_norm import SyncedBatchNorm1d
from train.objectives import Objective
from train.parallel import spread
from train.targets import summed_losses


def exchange(world: World) -> object:
    """Every exchange once, with ranks that differ in what they have."""
    rank = world.rank
    world.wait_for_all()
    return {
        "gather": world.gather(torch.arange(rank * 2).reshape(rank, 2) + 10 * rank).tolist(),
        "gather_none": world.gather(torch.zeros((0, 3))).shape,
        "stack": world.stack(torch.tensor([rank, -rank])).tolist(),
        "from_main": world.from_main(7 - rank),
        "heed_stop": [heeds(world, asked=()), heeds(world, asked=(world.size - 1,))],
    }


def heeds(world: World, *, asked: tuple[int, ...]) -> bool:
    """Whether work is left when these ranks are asked to end."""
    world.stop.is_asked = world.rank in asked
    try:
        world.heed_stop()
    except AskedToStop:
        return True
    return False


def network() -> nn.Module:
    """Small, with a parameter that the outputs do not depend on, as SwiFT has."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


def gradient(world: World) -> object:
    """Gradients of three global batches of 7, dealt as the loader deals them, one target missing."""
    model = network()
    running = spread(model, world)
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(3):
        inputs, targets = torch.randn(7, 6, generator=generator), torch.randn(7, generator=generator)
        targets[3] = torch.nan
        mine = slice(7 * world.rank // world.size, 7 * (world.rank + 1) // world.size)
        resumed = network()
        part, gradients = step(running, model, inputs[mine], targets[mine], world)
        _, again = step(spread(resumed, world), resumed, inputs[mine], targets[mine], world)
        loss = world.stack(part.double()).sum().item()
        found.append({"loss": loss, "gradient": gradients.tolist(), "resumed_is_same": torch.equal(gradients, again)})
    return found


def step(running, model, inputs, targets, world):
    """(this rank's part of the loss, all gradients in a row)."""
    model.zero_grad()
    losses = Objective(kind="regression", target="age").losses(running(inputs), targets)
    part = weighted_backward(losses, global_size=7, world=world)
    return part, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def contrast(world: World) -> object:
    """Loss and gradients of a global batch of 7 pairs, dealt unevenly, two subjects with pairs on several ranks."""
    generator = torch.Generator().manual_seed(3)
    pairs, subjects = torch.randn(7, 2, 6, generator=generator), torch.tensor([5, 2, 9, 5, 1, 2, 5])
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    running = spread(model, world)
    mine = slice(7 * world.rank // world.size, 7 * (world.rank + 1) // world.size)
    losses = nt_xent(running(pairs[mine].flatten(0, 1)).view(-1, 2, 4), subjects[mine], 0.5)
    part = weighted_backward(losses, global_size=7, world=world)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"loss": world.stack(part.double()).sum().item(), "gradient": gradients.tolist()}


def several_targets(world: World) -> object:
    """Loss and gradients of a global batch of 7 with three targets, dealt unevenly; one rank may have no label at all."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(7, 6, generator=generator)
    objectives = (
        Objective(kind="regression", target="age", offset=1.0, scale=2.0, loss="huber", weight=0.5),
        Objective(kind="classification", target="hand", classes=(0.0, 1.0, 3.0), class_weights=(2.0, 0.5, 1.0)),
        Objective(kind="classification", target="sex", class_weights=(0.7, 1.3)),
    )
    lacking = torch.nan
    targets = {
        "age": torch.tensor([lacking, 2.5, 0.1, 4.0, lacking, 1.0, lacking]),
        "hand": torch.tensor([3.0, lacking, 0.0, 1.0, lacking, lacking, lacking]),
        "sex": torch.tensor([1.0, 0.0, lacking, 1.0, lacking, 0.0, lacking]),
    }
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
    mine = slice(7 * world.rank // world.size, 7 * (world.rank + 1) // world.size)
    running = spread(model, world)
    losses = summed_losses(objectives, running(inputs[mine]), {name: own[mine] for name, own in targets.items()})
    part = weighted_backward(losses, global_size=7, world=world)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"loss": world.stack(part.double()).sum().item(), "gradient": gradients.tolist()}


def norm(world: World) -> object:
    """Gradients and statistics of a normalisation over 7 rows, dealt unevenly, with targets that make each row count."""
    generator = torch.Generator().manual_seed(4)
    rows, weights = 5 + torch.randn(7, 3, generator=generator), torch.randn(7, 3, generator=generator)
    model = SyncedBatchNorm1d(3)
    running = spread(model, world)
    mine = slice(7 * world.rank // world.size, 7 * (world.rank + 1) // world.size)
    own = rows[mine].clone().requires_grad_()
    part = weighted_backward((running(own).sigmoid() * weights[mine]).sum(1), global_size=7, world=world)
    return {
        "loss": world.stack(part.double()).sum().item(),
        "gradient": [model.weight.grad.tolist(), model.bias.grad.tolist()],
        "of_rows": world.gather(own.grad / world.size).tolist(),
        "running": [model.running_mean.tolist(), model.running_var.tolist(), model.num_batches_tracked.item()],
    }


def learn(world: World) -> object:
    """Losses of every step, and of validation at the end, of each recipe in a folder."""
    found = {}
    for path in sorted(Path(os.environ["RECIPES"]).glob("*.toml")):
        out = Path(sys.argv[2]) / "ranks" / path.stem
        outcome = train(load_recipe(str(path)), out=out, world=world)
        assert outcome is not None
        assert isinstance(outcome.val, Windows)
        world.wait_for_all()  # until rank 0 has written its log
        steps = read_history(out / "log.jsonl").steps
        found[path.stem] = {
            "losses": [step["loss"] for step in steps],
            "norms": [step["gradient_norm"] for step in steps],
            "val": outcome.val.numbers["loss"],
        }
    return found


def several(world: World) -> object:
    """What each recipe in a folder came to: every step's loss and norm, and what was scored; `-again`: after an interruption."""
    found = {}
    for path in sorted(Path(os.environ["RECIPES"]).glob("*.toml")):
        recipe, out = load_recipe(str(path)), Path(sys.argv[2]) / "ranks" / path.stem
        whole = told(train(recipe, out=out, world=world), out, world)
        found[path.stem] = whole
        if path.stem.endswith("-again"):
            if world.is_main:
                shutil.rmtree(out / "checkpoints" / f"step-{recipe.train.steps}")
            world.wait_for_all()
            found[path.stem] = {"whole": whole, "again": told(train(recipe, out=out, world=world), out, world)}
    return found


def twice(world: World) -> object:
    """Scores of each recipe's network at the end of its training, and again from its last checkpoint."""
    found = {}
    for path in sorted(Path(os.environ["RECIPES"]).glob("*.toml")):
        recipe, out = load_recipe(str(path)), Path(sys.argv[2]) / "ranks" / path.stem
        found[path.stem] = [told(train(recipe, out=out, world=world), out, world)["val"] for _ in range(2)]
    return found


def told(outcome, out, world):
    """Losses and norms of the steps that led to the end, and its scores."""
    world.wait_for_all()  # until rank 0 has written its log
    steps = read_history(out / "log.jsonl").steps
    scored = outcome.val.numbers["loss"] if isinstance(outcome.val, Windows) else outcome.val.score.tolist()
    return {
        "losses": [step["loss"] for step in steps],
        "norms": [step["gradient_norm"] for step in steps],
        "val": scored,
    }


def hang(world: World) -> object:
    """The last rank stops without ending; the others wait for it."""
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.wait_for_all()
    return {}


def die_once(world: World) -> object:
    """In the first attempt the last rank dies between two exchanges."""
    world.wait_for_all()
    attempt, port = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["MASTER_PORT"]
    (Path(sys.argv[2]) / f"port-{attempt}-{world.rank}").write_text(port)
    if attempt == "0" and world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.wait_for_all()
    return {"attempt": attempt}


def streams(url: str) -> dict[str, object]:
    """Selections that use everything that decides about samples."""
    from fmristream import Mixture, StreamingDataset

    chosen = {"source": url, "window": 6, "seed": 3, "where": "age > 0 and sex in ('F', 'M')", "random_phase": True}
    balanced = StreamingDataset(**chosen, weights="column:sex", locality=2)
    views = StreamingDataset(**chosen, views="same-subject", stride=4)
    return {
        "balanced": balanced,
        "views": views,
        "mixed": Mixture([(balanced, 0.7), (StreamingDataset(**chosen), 0.3)]),
    }


def deal(world: World) -> object:
    """The first batches of each stream, as the process group deals them; the last ones after a resume."""
    from fmristream import StreamingLoader

    found: dict[str, list] = {}
    for name, clips in streams(os.environ["DATASET"]).items():
        rows = found[name] = []
        state = None
        for _ in range(2):  # the second time goes on where the first one stopped
            with StreamingLoader(clips, batch_size=7, threads=1 + world.rank % 2) as loader:
                if state is not None:
                    loader.load_state_dict(state)
                for _, batch in zip(range(3), loader.forever(), strict=False):
                    rows.append(
                        [batch.views, batch.run, batch.start.tolist(), batch.packed.double().sum((1, 2, 3)).tolist()]
                    )
                state = loader.state_dict()
    return found


DUTIES = {
    duty.__name__: duty
    for duty in (exchange, gradient, contrast, several, several_targets, twice, norm, learn, hang, die_once, deal)
}


def main() -> None:
    """Do the duties named in the command line, comma-separated."""
    names, out = sys.argv[1].split(","), Path(sys.argv[2])
    seconds, assemble_s = (float(os.environ.get(name, "30")) for name in ("TEST_TIMEOUT_S", "TEST_ASSEMBLE_S"))
    with join_world(timeout_s=seconds, assemble_s=assemble_s) as world:
        for name in names:
            (out / f"{name}-{world.rank}.json").write_text(json.dumps(DUTIES[name](world)))


if __name__ == "__main__":
    main()
