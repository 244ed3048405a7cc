"""Ranks that write checkpoints are killed at random moments: `python checkpoint_kills.py PLACE RANKS ROUNDS SEED`.

Every process is a fork of this one, which imports torch once and has no threads. After each kill a fork of its own looks
at what is there, and the next ranks go on from that.
"""

import os
import random
import select
import signal
import socket
import sys
import traceback

import torch

from train.checkpoint import load_checkpoint, newest_whole
from train.checkpoint_async import Saver
from train.checkpoint_writing import Keep
from train.launch import join_world

from tests.train.checkpoint_ranks import learn, network, optimizer_of, save, sharded  # isort: skip


def train_until_killed(place: str, start: int, told: int) -> None:
    """Save after every step; tell the parent of each checkpoint that is there."""
    with join_world(timeout_s=30) as world:
        model = network()
        model.seen.fill_(start)
        sharded(model, world)
        optimizer = optimizer_of(model)
        with Saver(place, world, keep=Keep(last=2)) as saver:
            for step in range(start + 1, start + 100_000):
                learn(model, optimizer, steps=1)
                saver.settle()
                if world.is_main and saver.saved_step is not None:
                    os.write(told, b"%d\n" % saver.saved_step)
                save(saver, world, model, optimizer, step=step)


def look(place: str, at_least: int) -> int:
    """The step of the newest checkpoint, after a look that it is what was written."""
    found, damaged = newest_whole(place)
    for fault in damaged:  # in a bucket, what was not finished is seen, and said to be so
        assert "manifest.json: is not there" in fault.reason, fault
        assert "://" in place, fault
    step = found.step if found else 0
    assert step >= at_least, (step, at_least, damaged)
    if found:
        assert int(found.model["seen"]) == step
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert f"exp_avg/{name}" in found.optimizer
        assert torch.isfinite(found.model["0.weight"]).all()
        assert load_checkpoint(f"{place}/step-{step}").state["made_by"] == found.state["made_by"]
    return step


def fork(action) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def killed_once(place: str, ranks: int, newest: int, chance: random.Random) -> int:
    """Start the ranks, kill them some time after a checkpoint; the newest that they told of."""
    reader, writer = os.pipe()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(ranks))

    def rank_at(rank: int) -> int:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.close(reader)
        train_until_killed(place, newest, writer)
        return 0

    children = [fork(lambda rank=rank: rank_at(rank)) for rank in range(ranks)]
    os.close(writer)
    told = b""
    for _ in range(chance.randrange(1, 4)):
        piece = os.read(reader, 4096)
        assert piece, "the ranks ended by themselves"
        told += piece
    # A random moment of the writing: a read that nobody answers ends it.
    poller = select.poll()
    poller.poll(chance.uniform(0, 60))
    for child in chance.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    while piece := os.read(reader, 4096):
        told += piece
    os.close(reader)
    return int(told.split(b"\n")[-2])


def main() -> None:
    place, ranks, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(int(sys.argv[4]))
    torch.set_num_threads(1)
    newest = 0
    for _ in range(rounds):
        told = killed_once(place, ranks, newest, chance)
        reader, writer = os.pipe()

        def report(told: int = told, writer: int = writer) -> int:
            os.write(writer, b"%d" % look(place, told))
            return 0

        _, status = os.waitpid(fork(report), 0)
        assert status == 0
        newest = int(os.read(reader, 100))
        os.close(reader)
        os.close(writer)
    print(rounds, newest)


if __name__ == "__main__":
    main()
