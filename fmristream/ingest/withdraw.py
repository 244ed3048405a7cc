"""Take subjects out of a dataset: a new version without a byte of them. Older versions go by `gc --purge`."""

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fmristream.catalog.tables import Participant, encode_participants, encode_skipped
from fmristream.errors import ConflictError, UsageError
from fmristream.ingest.commit import carried, optional_table
from fmristream.ingest.pseudonyms import is_pseudonym, read_key, require_same_key
from fmristream.shards.dataset import Dataset
from fmristream.shards.digest import content_digest
from fmristream.shards.generation import Generation, commit, listed_generations, newest_generation
from fmristream.shards.segments import kept_segments
from fmristream.shards.withdrawn import is_withdrawn, with_withdrawn
from fmristream.storage import open_store

# How often a version that another writer committed first is taken as the new start.
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawReport:
    """What a withdrawal did, or with `dry_run` would do."""

    url: str
    dry_run: bool
    subjects: tuple[str, ...]
    runs: int  # taken out
    frames: int
    participants: int  # rows taken out
    skipped: int  # rows about inputs of these subjects that had not been converted, taken out
    runs_left: int
    generation: int  # the version without them; 0 in a dry run
    generation_digest: str
    content_digest: str
    older: tuple[str, ...]  # digests of the versions that still hold them, until `gc --purge`


def withdraw(
    url: str, subjects: Iterable[str], *, dry_run: bool = False, pseudonyms: str | None = None
) -> WithdrawReport:
    """Commit a version of a dataset that holds nothing of these subjects.

    Rows of all tables, blocks of the index and references to their objects are left out; a keyed hash of each label is
    kept, by which a later update refuses to take the subject in again. Masks stay: they belong to all subjects of a grid.

    Args:
        url: the dataset.
        subjects: labels without `sub-`.
        dry_run: say what would be done, write nothing.
        pseudonyms: path of the key file of a dataset with pseudonyms: labels are those of the source; without it, pseudonyms.

    Raises:
        UsageError: a subject is not in the dataset and was not withdrawn before (which changes nothing), or the key is not the
            one that it was made with.
        StorageError: the store failed, or cannot be written; nothing is half done.
    """
    wanted = tuple(sorted({subject.removeprefix("sub-") for subject in subjects}))
    if not wanted:
        raise UsageError("no subject was named; give --subject LABEL")
    store = open_store(url)
    if pseudonyms is not None:
        key = read_key(pseudonyms, target=url)
        require_same_key(newest_generation(store).document, key, store.name)
        wanted = tuple(sorted({subject if is_pseudonym(subject) else key.of(subject) for subject in wanted}))
    for attempts_left in reversed(range(_ATTEMPTS)):
        base = Dataset(url, store, newest_generation(store))
        leaving = _Leaving.of(base, wanted)
        if dry_run:
            return _report(base, leaving, None, ())
        if leaving.is_done(base):
            return _report(base, leaving, base.generation, tuple(one.digest for one in listed_generations(store)[1:]))
        older = tuple(one.digest for one in listed_generations(store))
        try:
            return _report(base, leaving, _commit_without(base, leaving), older)
        except ConflictError:
            if not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaving:
    """What goes, and what stays."""

    subjects: tuple[str, ...]
    runs: frozenset[str]
    frames: int
    participants: list[Participant]  # that stay
    skipped: list[tuple[str, str]]  # that stay

    @classmethod
    def of(cls, base: Dataset, subjects: tuple[str, ...]) -> "_Leaving":
        columns = zip(*(base.runs.column(name) for name in ("name", "subject", "frames")), strict=True)
        gone = [(name, frames) for name, subject, frames in columns if subject in subjects]
        leaving = cls(
            subjects=subjects,
            runs=frozenset(name for name, _ in gone),
            frames=sum(frames for _, frames in gone),
            participants=[_without_names(row, subjects) for row in base.participants if row["subject"] not in subjects],
            skipped=[row for row in base.skipped if not _names_one_of(row, subjects)],
        )
        held = {*base.runs.column("subject"), *(str(row["subject"]) for row in base.participants)}
        for subject in subjects:
            is_named = subject in held or any(_names_one_of(row, [subject]) for row in base.skipped)
            if not is_named and not is_withdrawn(base.generation, subject):
                hint = (
                    "; a label of the source needs --pseudonyms KEYFILE"
                    if "pseudonyms" in base.generation.document
                    else ""
                )
                raise UsageError(
                    f"{base.store.name}: no subject is called {subject!r}; `fmristream info --runs` lists the labels{hint}"
                )
        return leaving

    def is_done(self, base: Dataset) -> bool:
        """Whether all of them were withdrawn before."""
        stay = self.participants == list(base.participants) and len(self.skipped) == len(base.skipped)
        return not self.runs and stay and all(is_withdrawn(base.generation, subject) for subject in self.subjects)


def _without_names(row: Participant, subjects: Sequence[str]) -> Participant:
    """Somebody else's row; cells of text that name a subject are empty."""
    return {
        name: None if isinstance(value, str) and name != "subject" and _names_one_of((value,), subjects) else value
        for name, value in row.items()
    }


def _names_one_of(texts: tuple[str, ...], subjects: Sequence[str]) -> bool:
    """Whether texts (a row of the skipped table, a cell) name a subject; they may name others as well, and go all the same."""
    text = " ".join(texts)
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(subject)}(?![A-Za-z0-9])", text) for subject in subjects)


def _commit_without(base: Dataset, leaving: _Leaving) -> Generation:
    store, document = base.store, base.generation.document
    columns = zip(base.runs.column("name"), base.runs.column("space_digest"), base.runs.identities(), strict=True)
    kept = [(digest, identity) for name, digest, identity in columns if name not in leaving.runs]
    used = {digest for digest, _ in kept}
    content = {
        **carried(base.generation),
        "content_digest": content_digest([identity for _, identity in kept], parameters=base.parameters),
        **({"contents": document["contents"]} if "contents" in document else {}),
        "headers": document.get("headers", {}),
        "mask": document["mask"],
        "parameters": document["parameters"],
        "participants": optional_table(store, encode_participants(leaving.participants), len(leaving.participants)),
        "segments": kept_segments(base, without=leaving.runs),
        "skipped": optional_table(store, encode_skipped(leaving.skipped), len(leaving.skipped)),
        "spaces": {
            digest: space
            for digest, space in document["spaces"].items()
            if digest in used or space.get("of") in used  # parcels go with the voxels that they are made of
        },
        "split": document["split"],
        "withdrawn": with_withdrawn(base.generation, leaving.subjects),
    }
    number = base.generation.number + 1
    return commit(store, number=number, parent=base.generation_digest, write_id=secrets.token_hex(16), content=content)


def _report(base: Dataset, leaving: _Leaving, made: Generation | None, older: tuple[str, ...]) -> WithdrawReport:
    return WithdrawReport(
        url=base.url,
        dry_run=made is None,
        subjects=leaving.subjects,
        runs=len(leaving.runs),
        frames=leaving.frames,
        participants=len(base.participants) - len(leaving.participants),
        skipped=len(base.skipped) - len(leaving.skipped),
        runs_left=len(base.runs) - len(leaving.runs),
        generation=0 if made is None else made.number,
        generation_digest="" if made is None else made.digest,
        content_digest="" if made is None else str(made.document["content_digest"]),
        older=older,
    )
