"""Checkpoints for tests, whole and in parts, and ways to spoil them wherever they lie."""

import threading
from pathlib import Path

import torch

from fmristream.storage import open_store
from train.checkpoint import Checkpoint, save_checkpoint
from train.checkpoint_sharded import Piece
from train.checkpoint_shelf import open_shelf
from train.checkpoint_writing import Keep, Snapshot, new_token, take, write


def checkpoint_at(step, *, is_best=False):
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        model={"weight": torch.randn(40, 30, generator=generator).T, "count": torch.tensor(step)},
        optimizer={
            "step/weight": torch.tensor(float(step)),
            "exp_avg/weight": torch.randn(30, 40, generator=generator),
        },
        rng={"cpu": torch.randint(0, 256, (2, 64), dtype=torch.uint8, generator=generator)},
        state={"loader": {"position": 8 * step, "selection": "ab12"}, "world_size": 2},
        is_best=is_best,
    )


def assert_same(found, expected):
    assert found is not None
    assert found.step == expected.step
    for name in ("model", "optimizer", "rng"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor)
    assert found.state["loader"] == expected.state["loader"]


def save_whole(place, checkpoint, *, keep_last=5, keep_best=0):
    save_checkpoint(place, checkpoint, keep_last=keep_last, keep_best=keep_best)


def save_sharded(place, checkpoint, *, keep_last=5, keep_best=0, ranks=3):
    """The same as so many ranks write it, each a thread here with its rows."""
    gate, texts, errors, token = threading.Barrier(ranks), [""] * ranks, [], new_token()

    def run(rank):
        def exchange(text):
            texts[rank] = text
            gate.wait()
            return list(texts)

        try:
            write(
                open_shelf(place),
                snapshot_of(checkpoint, rank=rank, ranks=ranks, token=token),
                keep=Keep(last=keep_last, best=keep_best),
                exchange=exchange,
            )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def snapshot_of(checkpoint, *, rank, ranks, token):
    """What a rank would copy out of a network that is cut by rows."""
    plain = take(
        {name: getattr(checkpoint, name) for name in ("model", "optimizer", "rng")},
        checkpoint.state,
        step=checkpoint.step,
        token=token,
    )
    sections = {"rng": plain.sections["rng"] if rank == 0 else {}}
    for name in ("model", "optimizer"):
        sections[name] = {
            key: part
            for key, piece in plain.sections[name].items()
            if (part := rows_of(piece, rank=rank, ranks=ranks)) is not None
        }
    return Snapshot(
        step=plain.step,
        token=token,
        rank=rank,
        ranks=ranks,
        is_best=checkpoint.is_best,
        sections=sections,
        sharded=frozenset({"model", "optimizer"}),
        state=plain.state,
    )


def rows_of(piece, *, rank, ranks):
    if not piece.shape:
        return piece if rank == 0 else None
    first, last = (piece.shape[0] * r // ranks for r in (rank, rank + 1))
    offsets = (first, *(0,) * (len(piece.shape) - 1))
    return Piece(tensor=piece.tensor[first:last].contiguous(), offsets=offsets, shape=piece.shape)


class Files:
    """Files of a checkpoint, on a disk or in a bucket, to be looked at and spoiled."""

    def __init__(self, place, step):
        base, _, name = str(place).rpartition("/")
        self._store, self._prefix = open_store(base), f"{name}/step-{step}"

    def names(self):
        return [key.removeprefix(f"{self._prefix}/") for key in self._store.list(self._prefix)]

    def damage(self, name, how, rng):
        key = f"{self._prefix}/{name}"
        data = bytearray(self._store.read(key))
        self._store.delete(key)
        if how == "missing":
            return
        if how == "truncated":
            data = data[: rng.randrange(len(data))]
        elif how == "longer":
            data += b"\0"
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        self._store.put_new(key, bytes(data))


def all_names(place):
    """Every file below a place, relative to it."""
    base, _, name = str(place).rpartition("/")
    if "://" not in base:
        return sorted(path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file())
    return [key.removeprefix(f"{name}/") for key in open_store(base).list(name)]
