"""Writing a checkpoint: what is copied out of a run between two steps, and how it becomes visible, whole or not at all."""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes

from fmristream.errors import CorruptDataError, StorageError
from train.checkpoint_manifest import FORMAT, Listed, Manifest, check_listed, json_bytes, read_manifest
from train.checkpoint_sharded import Piece, describe, is_sharded, joined, pieces_of
from train.checkpoint_shelf import Shelf
from train.fence import Attempt, Fence, SupersededError, attempts_at, counts

LAYOUT = "layout.json"
STATE = "state.json"

# Sends one text to all ranks, and gives those of all in rank order.
Exchange = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many of the newest checkpoints stay, and how many of the best ones beside them."""

    last: int
    best: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A rank's part of a checkpoint, copied, so that training goes on while it is written."""

    step: int
    token: str  # the same on all ranks, of this attempt alone
    rank: int
    ranks: int
    is_best: bool
    sections: Mapping[str, Mapping[str, Piece]]
    sharded: frozenset[str]  # sections of which several ranks write a part
    state: bytes

    @property
    def is_shared(self) -> bool:
        """Whether ranks beside the first one have something to write."""
        return self.ranks > 1 and bool(self.sharded)


def new_token() -> str:
    """A name for one attempt to write a checkpoint."""
    return secrets.token_hex(4)


def take(
    sections: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    step: int,
    token: str,
    rank: int = 0,
    ranks: int = 1,
    is_best: bool = False,
) -> Snapshot:
    """Copy what this rank has to write of model, optimiser, ... into this process's memory."""
    return Snapshot(
        step=step,
        token=token,
        rank=rank,
        ranks=ranks,
        is_best=is_best,
        sections={name: pieces_of(tensors, is_main=rank == 0) for name, tensors in sections.items()},
        sharded=frozenset(name for name, tensors in sections.items() if is_sharded(tensors)),
        state=json_bytes({"format": FORMAT, "step": step, **state}),
    )


def alone(text: str) -> list[str]:
    """The exchange of a process that is the only one."""
    return [text]


def write(
    shelf: Shelf, snapshot: Snapshot, *, keep: Keep, exchange: Exchange = alone, fence: Fence | None = None
) -> None:
    """Write this rank's files and read them back; when all ranks have done so, the first one publishes the manifest.

    Args:
        shelf: where to.
        snapshot: this rank's part.
        keep: which ones stay.
        exchange: with the other ranks.
        fence: rank 0's, where other attempts may be at it.

    Raises:
        SupersededError: a newer attempt has begun; nothing of it, and nothing of what it needs, is touched.
        StorageError: a file cannot be written, on any rank. What was visible before still is.
        CorruptDataError: what was written reads back as something else.
    """
    try:
        if fence is not None:
            fence.check()
        share = _write_own(shelf, snapshot)
        answer: dict[str, Any] = {"share": share}
    except SupersededError as error:
        failure: Exception | None = error
        answer = {"superseded": str(error)}
    except (OSError, CorruptDataError) as error:
        failure = error
        answer = {"failed": said(error)}
    else:
        failure = None
    answers = [json.loads(text) for text in exchange(json.dumps(answer))]
    if "superseded" in answers[0]:
        raise SupersededError(answers[0]["superseded"]) from failure
    failed = [f"rank {rank}: {found['failed']}" for rank, found in enumerate(answers) if "failed" in found]
    if failed:
        if snapshot.rank == 0:
            _clear(shelf, fence)
        reason = "; ".join(failed) if snapshot.ranks > 1 else answers[0]["failed"]
        raise StorageError(
            f"{shelf.where}: the checkpoint of step {snapshot.step} could not be written: {reason}; the one before it is "
            "still there: make room or look at the store, and give the same command again"
        ) from failure
    if snapshot.rank == 0:
        _finish(shelf, snapshot, [found["share"] for found in answers], keep, fence)


def said(error: Exception) -> str:
    """What is told of an error: the system's own words name no file."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)


def _write_own(shelf: Shelf, snapshot: Snapshot) -> dict[str, Any]:
    """Files of this rank, each read back; what they are, as JSON."""
    if snapshot.rank == 0:
        shelf.remove_unfinished(keep=snapshot.token)
    files: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    for section, pieces in snapshot.sections.items():
        is_sharded_section = section in snapshot.sharded
        ending = f"-{snapshot.rank:05d}-of-{snapshot.ranks:05d}" if is_sharded_section else ""
        file = f"{section}{ending}.safetensors"
        if is_sharded_section:
            layout[section] = describe(pieces, file)
        if pieces or (snapshot.rank == 0 and not is_sharded_section):
            data = bytes(tensors_to_bytes({name: piece.tensor for name, piece in pieces.items()}))
            files[file] = _put(shelf, snapshot, file, data)
    if snapshot.rank == 0:
        files[STATE] = _put(shelf, snapshot, STATE, snapshot.state)
    return {"files": files, "layout": layout}


def _put(shelf: Shelf, snapshot: Snapshot, name: str, data: bytes) -> dict[str, Any]:
    """Write a file and compare what is there with what was given."""
    shelf.write(snapshot.step, snapshot.token, name=name, data=data)
    listed = Listed(at=shelf.place(snapshot.token, name), size=len(data), sha256=hashlib.sha256(data).hexdigest())
    try:
        check_listed(shelf.unfinished(snapshot.step, snapshot.token), listed)
    except CorruptDataError as error:
        raise CorruptDataError(f"{error}, right after it was written; look at the disk or the store") from error
    return {"at": listed.at, "size": listed.size, "sha256": listed.sha256}


def _finish(shelf: Shelf, snapshot: Snapshot, shares: list[dict[str, Any]], keep: Keep, fence: Fence | None) -> None:
    files = {name: Listed(**entry) for share in shares for name, entry in share["files"].items()}
    where = f"{shelf.where}/step-{snapshot.step}"
    if snapshot.sharded:
        layout = {
            section: joined([share["layout"].get(section, {}) for share in shares], where=where)
            for section in sorted(snapshot.sharded)
        }
        files[LAYOUT] = Listed(**_put(shelf, snapshot, LAYOUT, json_bytes(layout)))
        _require_seen(shelf, snapshot, files)
    by = "" if fence is None else fence.attempt.id
    manifest = Manifest(step=snapshot.step, files=files, is_best=snapshot.is_best, attempt=by)
    if fence is None:
        shelf.publish(snapshot.step, snapshot.token, manifest.encoded())
    else:
        shelf.publish(snapshot.step, snapshot.token, manifest.encoded(), may=fence.check)
        fence.check()
    prune(shelf, snapshot.step, keep=keep)


def _require_seen(shelf: Shelf, snapshot: Snapshot, files: Mapping[str, Listed]) -> None:
    """Look at the other ranks' files from here: each has read back its own, where this rank perhaps cannot look."""
    folder = shelf.unfinished(snapshot.step, snapshot.token)
    for listed in files.values():
        try:
            check_listed(folder, listed)
        except CorruptDataError as error:
            raise StorageError(
                f"{error}, as rank 0 sees it; --out or train.checkpoints must be a place that all ranks see"
            ) from error


def prune(shelf: Shelf, step: int, *, keep: Keep) -> None:
    """Remove what is neither among the newest nor among the best, as of the checkpoint of `step`, which stays.

    Newer ones are damaged ones that the run fell back from: they count for nothing, and are replaced when it gets there.
    """
    shelf.remove_unfinished()
    steps = [found for found in shelf.steps() if found <= step]
    attempts = attempts_at(shelf)
    undone = [found for found in steps if is_undone(shelf, found, attempts)]
    for found in undone:
        shelf.remove(found)
    steps = [found for found in steps if found not in undone]
    spare = steps[keep.last :]
    best = [found for found in steps if _is_best(shelf, found)][: keep.best] if spare and keep.best else []
    for found in spare:
        if found not in best:
            shelf.remove(found)


def is_undone(shelf: Shelf, step: int, attempts: Sequence[Attempt]) -> bool:
    """Whether a superseded attempt wrote a checkpoint that the run did not go on from."""
    if all(attempt.step >= step for attempt in attempts):
        return False  # whoever wrote it
    try:
        by = read_manifest(shelf.folder(f"step-{step}")).attempt
    except CorruptDataError:
        return False  # its own trouble
    return not counts(step=step, attempt=by, attempts=attempts)


def mark_best(shelf: Shelf, step: int, *, keep: Keep, fence: Fence | None = None) -> None:
    """Say afterwards that a checkpoint is the best one so far."""
    if fence is not None:
        fence.check()
    manifest = read_manifest(shelf.folder(f"step-{step}"))
    shelf.replace_manifest(step, replace(manifest, is_best=True).encoded())
    prune(shelf, step, keep=keep)


def _is_best(shelf: Shelf, step: int) -> bool:
    try:
        return read_manifest(shelf.folder(f"step-{step}")).is_best
    except CorruptDataError:
        return False


def _clear(shelf: Shelf, fence: Fence | None) -> None:
    """Make room again after a failure, where that is possible, and nobody else's room."""
    try:
        if fence is not None:
            fence.check()
        shelf.remove_unfinished()
    except OSError:  # the failure itself is what people have to know; the next checkpoint cleans up
        return
