"""Remove what no version of a dataset names; on request older versions, and whatever names a withdrawn subject.

A conversion that runs at the same time is never robbed. Removing is itself a commit: it lists what is unused, commits a
version that says "unused objects from before me are removed" (`barrier`), and removes only what it had listed. Whoever
started before then fails to commit, sees the barrier and does his work again under new names; whoever starts after it
trusts no record from before. Spaces, whose names are not new each time, go only with whole versions, and a second such
commit follows. No clock is asked.

Uploads to a bucket that were begun and not completed are listed before the barrier and aborted after it, likewise: the
conversion that one belongs to would not be able to commit, or was killed.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fmristream.errors import (
    ConflictError,
    CorruptDataError,
    ObjectExistsError,
    ObjectMissingError,
    StorageError,
    UsageError,
)
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import canonical_json
from fmristream.shards.fitted import FOLDER as FITTED
from fmristream.shards.fitted import decode_object
from fmristream.shards.generation import FOLDER, Generation, commit, key_of, listed_generations, newest_generation
from fmristream.shards.side import SIDE_FOLDERS
from fmristream.shards.spaces import FOLDER as SPACES
from fmristream.shards.withdrawn import is_withdrawn, last_withdrawal
from fmristream.storage import Store, Unfinished, open_store
from fmristream.storage.store import is_key

# Where a dataset has objects; nothing else below the root is looked at, let alone removed.
FOLDERS = ("runs", "stats", *SIDE_FOLDERS, "tables", "index", "pending", FOLDER)
# Looked at only where versions are dropped: a conversion under way may be writing to the first and counting on the second.
DROPPED_FOLDERS = ("tmp", SPACES)
RECEIPTS = "receipts"

_ATTEMPTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadVersion:
    """A version that can no longer be opened, so that who pinned it finds out."""

    generation: int
    generation_digest: str
    content_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    """What was removed, or with `dry_run` would be."""

    url: str
    dry_run: bool
    objects: int
    bytes: int
    versions: tuple[DeadVersion, ...]  # whose pins are dead now
    versions_left: int
    generation: int  # the newest version
    receipt: str  # key of the receipt, "" where nothing was removed
    uploads: int = 0  # that were begun and never completed
    warnings: tuple[str, ...] = ()


def gc(url: str, *, keep: int | None = None, purge: bool = False, dry_run: bool = False) -> GcReport:
    """Remove the objects that no kept version of a dataset names.

    Args:
        url: the dataset.
        keep: how many versions stay, the newest ones; None for all.
        purge: older versions that name a withdrawn subject go, with every object that only they name; so do those from
            before the last withdrawal that can no longer be read.
        dry_run: say what would be done, remove nothing.

    Raises:
        UsageError: `keep` is not positive.
        StorageError: the store failed; run the command again.
        CorruptDataError: a version that stays is damaged, so that nobody knows what it needs; nothing was removed.
    """
    if keep is not None and keep < 1:
        raise UsageError(f"--keep {keep}: expected 1 or more versions")
    store = open_store(url)
    for attempts_left in reversed(range(_ATTEMPTS)):
        plan = _Plan.of(store, keep=keep, purge=purge)
        warnings = tuple(_what_remains(store, plan, purge=purge))
        if dry_run or not (plan.keys or plan.uploads):
            return _report(url, plan, newest=None, removed=0, receipt="", warnings=warnings, dry_run=dry_run)
        try:
            newest = _commit_barrier(store, plan.newest)
        except ConflictError:
            if not attempts_left:
                raise
            continue
        receipt = _write_receipt(store, newest, plan)  # before anything goes: it says what was to go
        spaces = {key: store.read(key) for key in plan.keys if key.startswith(f"{SPACES}/")}
        removed = _remove(store, plan)
        if spaces:
            # Names of spaces are not new each time: who began after the barrier may count on one that went.
            newest = _commit_barrier_on_top(store)
            _put_back(store, spaces, newest)  # who committed in between may name one, nobody after this barrier does
        return _report(url, plan, newest=newest, removed=removed, receipt=receipt, warnings=warnings)
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What there was before the barrier."""

    newest: Generation
    kept: tuple[Generation, ...]
    dropped: tuple[Generation, ...]
    keys: tuple[str, ...]  # to remove, versions first: nobody shall open one whose objects are going
    uploads: tuple[Unfinished, ...]

    @classmethod
    def of(cls, store: Store, *, keep: int | None, purge: bool) -> "_Plan":
        folders = FOLDERS if keep is None and not purge else (*FOLDERS, *DROPPED_FOLDERS)
        listed = {key for folder in folders for key in store.list(folder) if is_key(key)}
        uploads = tuple(one for one in store.unfinished() if one.key.partition("/")[0] in FOLDERS)
        newest = newest_generation(store)
        versions = [one for one in listed_generations(store) if one.number <= newest.number]
        dropped = [
            one
            for age, one in enumerate(versions)
            if one.number != newest.number
            and ((keep is not None and age >= keep) or (purge and _names_withdrawn(store, one, newest)))
        ]
        kept = [one for one in versions if one not in dropped]
        needed = {key for one in kept for key in _keys_of(store, one)}
        unused = sorted(listed - needed - {key_of(one.number) for one in versions})
        if keep is not None or purge:
            unused += _unusable_statistics(store, kept)
        return cls(
            newest=newest,
            kept=tuple(kept),
            dropped=tuple(dropped),
            keys=(*(key_of(one.number) for one in dropped), *unused),
            uploads=uploads,
        )


def _names_withdrawn(store: Store, version: Generation, newest: Generation) -> bool:
    """Whether a version names a subject that the newest one says is withdrawn, or may do so."""
    is_older = version.number < last_withdrawal(newest)
    dataset = Dataset(store.name, store, version)
    try:
        labels = {*dataset.runs.column("subject"), *(str(row["subject"]) for row in dataset.participants)}
        skipped = set(dataset.skipped)
    except (CorruptDataError, ObjectMissingError):
        if is_older:
            return True  # nobody can tell, and nobody can use it
        raise
    if any(is_withdrawn(newest, label) for label in labels):
        return True
    # Names of files that were left out hold labels in any form: rows that are gone may be those of a withdrawn subject.
    return is_older and not skipped <= set(Dataset(store.name, store, newest).skipped)


def _keys_of(store: Store, version: Generation) -> Iterator[str]:
    """Every object that a version needs."""
    document, dataset = version.document, Dataset(store.name, store, version)
    yield key_of(version.number)
    entries = [document["participants"], document["skipped"]]
    for segment in document["segments"]:
        entries += [segment["runs"], segment["arrays"], segment["index"]]
    yield from (entry["key"] for entry in entries if entry is not None)
    for space in document["spaces"].values():
        yield from (file["name"] for file in space["objects"])
    for table in dataset.array_tables:
        yield from table.keys()


def _unusable_statistics(store: Store, kept: Sequence[Generation]) -> list[str]:
    """Objects of statistics that were fitted to the runs of no version that stays: they may be of withdrawn subjects."""
    contents = {str(one.document["content_digest"]) for one in kept}
    unusable = []
    for key in store.list(FITTED):
        try:
            about, _ = decode_object(store.read(key), key=key, where=f"{store.name}/{key}")
        except CorruptDataError:  # nobody can use it
            unusable.append(key)
            continue
        if about["content_digest"] not in contents:
            unusable.append(key)
    return unusable


def _commit_barrier(store: Store, newest: Generation) -> Generation:
    own = {"digest", "format", "generation", "parent", "requires", "tool", "version", "write_id"}
    content = {name: value for name, value in newest.document.items() if name not in own}
    number = newest.number + 1
    return commit(
        store,
        number=number,
        parent=newest.digest,
        write_id=secrets.token_hex(16),
        content={**content, "barrier": number},
    )


def _commit_barrier_on_top(store: Store) -> Generation:
    """The same on whatever is newest now."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            return _commit_barrier(store, newest_generation(store))
        except ConflictError:
            if not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")


def _named_spaces(version: Generation) -> set[str]:
    """Keys of the spaces' objects that a version names."""
    return {file["name"] for space in version.document["spaces"].values() for file in space["objects"]}


def _put_back(store: Store, spaces: Mapping[str, bytes], newest: Generation) -> None:
    for key in sorted(_named_spaces(newest) & set(spaces)):
        with contextlib.suppress(ObjectExistsError):  # it was not removed, or whoever names it wrote it again
            store.put_new(key, spaces[key])


def _remove(store: Store, plan: _Plan) -> int:
    """Remove what was planned, but spaces that a version names by now; returns the size."""
    needed = _named_spaces(newest_generation(store))
    for upload in plan.uploads:
        store.discard_unfinished(upload)
    return sum(_remove_one(store, key) for key in plan.keys if key not in needed)


def _remove_one(store: Store, key: str) -> int:
    try:
        size = store.size(key)
    except ObjectMissingError:  # a conversion that ended took its own records with it
        return 0
    store.delete(key)
    if key.startswith("pending/"):  # may be made again under the same name at any time
        return size
    try:
        store.size(key)
    except ObjectMissingError:
        return size
    raise StorageError(f"{store.name}/{key}: is still there after it was deleted; check the store's permissions")


def _what_remains(store: Store, plan: _Plan, *, purge: bool) -> Iterator[str]:
    """What removing objects does not remove."""
    if not (plan.keys or purge):
        return
    keeps = store.keeps_removed()
    whose = ", among them those of withdrawn subjects" if purge else ""
    if keeps:
        yield (
            f"{store.name}: the bucket keeps old versions of removed objects{whose}; remove them with the provider's own "
            "tools, or let a lifecycle rule expire noncurrent versions"
        )
    elif keeps is None and purge:
        yield (
            f"{store.name}: the store does not say whether it keeps old versions of removed objects; look there, and at "
            "copies and snapshots"
        )


def _write_receipt(store: Store, newest: Generation, plan: _Plan) -> str:
    """What went, for whoever has to prove it: keys and digests, which tell nothing about anybody."""
    key = f"{RECEIPTS}/{newest.number}.json"
    body: dict[str, Any] = {
        "generation": newest.number,
        "objects": list(plan.keys),
        "versions": [
            {"content_digest": one.document["content_digest"], "digest": one.digest, "generation": one.number}
            for one in plan.dropped
        ],
    }
    store.put_new(key, canonical_json(body))
    return key


def _report(
    url: str,
    plan: _Plan,
    *,
    newest: Generation | None,
    removed: int,
    receipt: str,
    warnings: tuple[str, ...],
    dry_run: bool = False,
) -> GcReport:
    return GcReport(
        url=url,
        dry_run=dry_run,
        objects=len(plan.keys),
        bytes=removed,
        versions=tuple(
            DeadVersion(
                generation=one.number,
                generation_digest=one.digest,
                content_digest=str(one.document["content_digest"]),
            )
            for one in plan.dropped
        ),
        versions_left=len(plan.kept) + (0 if newest is None else newest.number - plan.newest.number),
        generation=plan.newest.number if newest is None else newest.number,
        receipt=receipt,
        uploads=len(plan.uploads),
        warnings=warnings,
    )
