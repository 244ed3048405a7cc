"""Whether a split tests on what it trains on: asked before the first step, so that no leak becomes a number.

Certain are a run, a subject or a family (what a split must never divide) on both sides; they end the run. Runs whose
fingerprints agree as copies do are told. Neither log, error nor file names a subject: runs go by the opaque name of
their object, and `fmristream audit` says who they are.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fmristream.errors import CorruptDataError, FmriStreamError, SplitError
from fmristream.report.leaks import ALIKE, CERTAIN, SAME_LABEL, SAME_RUN, SAME_SUBJECT, Leak, find_leaks
from fmristream.storage.urls import display_url
from train.config import Recipe, recipe_from
from train.data import open_clips, training_part
from train.files import read_json, write_json
from train.launch import main_first
from train.participants import FAMILY_COLUMNS, words_of

if TYPE_CHECKING:
    from fmristream.stream.clips import StreamingDataset
    from train.state import Run

LEAKS_FILE = "leaks.json"

# Pairs of runs whose fingerprints are compared; more take longer than some minutes, and are left out and said.
MOST_PAIRS = 20_000_000
# How long the other ranks wait for rank 0, which reads one small object of each run.
_AUDIT_S = 86400.0
# Pairs that are named; all are counted.
_NAMED = 20
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAudit:
    """What two parts of a split have in common.

    Attributes:
        one: name of a part.
        other: of another, which must share nothing with it.
        one_runs: how many there are.
        other_runs: of the other.
        same_run: runs with equal values on both sides.
        same_subject: subjects on both sides.
        same_family: families (or sites, whatever a split was told to keep whole) on both sides without such a subject.
        alike: pairs of runs whose fingerprints agree as copies do.
        same_label: subjects of two datasets with one label, which may be chance.
        without_fingerprint: runs that could not be compared by one.
        fingerprints: whether they were compared; not where there are more pairs than `MOST_PAIRS`.
        named: opaque names of runs of the first pairs, what they share, and the correlation that fingerprints tell.
    """

    one: str
    other: str
    one_runs: int
    other_runs: int
    same_run: int
    same_subject: int
    same_family: int
    alike: int
    same_label: int
    without_fingerprint: int
    fingerprints: bool
    named: tuple[Mapping[str, Any], ...] = ()

    @property
    def certain(self) -> int:
        """How much leaves no doubt."""
        return self.same_run + self.same_subject + self.same_family

    @property
    def suspected(self) -> int:
        """How much is to be looked at."""
        return self.alike + self.same_label


def audit_pair(
    one: "StreamingDataset", other: "StreamingDataset", *, names: tuple[str, str], most_pairs: int = MOST_PAIRS
) -> PairAudit:
    """What two selections share, of the same dataset or of two.

    Args:
        one: what is trained on.
        other: what is tested on.
        names: of the two.
        most_pairs: of runs whose fingerprints are compared.

    Raises:
        CorruptDataError: a fingerprint is not what was committed.
    """
    fingerprints = len(one.runs) * len(other.runs) <= most_pairs
    found = find_leaks(one, other, fingerprints=fingerprints)
    same_dataset = one.dataset.content_digest == other.dataset.content_digest
    counts = {
        kind: sum(leak.kind == kind for leak in found.leaks) for kind in (SAME_RUN, SAME_SUBJECT, ALIKE, SAME_LABEL)
    }
    return PairAudit(
        one=names[0],
        other=names[1],
        one_runs=found.train_runs,
        other_runs=found.test_runs,
        same_run=counts[SAME_RUN],
        same_subject=counts[SAME_SUBJECT],
        same_family=len(_shared_families(one, other)) if same_dataset else 0,
        alike=counts[ALIKE],
        same_label=counts[SAME_LABEL],
        without_fingerprint=found.without_fingerprint,
        fingerprints=fingerprints,
        named=_named(found.leaks, one, other),
    )


def audit_run(run: "Run") -> None:
    """Ask it of every two parts of a run, once: a start that finds the answer for the same data takes it.

    Raises:
        SplitError: something is certainly on both sides and `data.audit` is "fail"; on every rank.
    """
    mode = run.recipe.data.audit
    if mode == "off":
        if run.world.is_main:
            write_json(run.out / LEAKS_FILE, {"format": _FORMAT, "audit": mode, "pairs": []})
            run.log.event("audit", {"audit": "off: nothing was compared"})
        return
    certain = 0
    with main_first(run.world, timeout_s=_AUDIT_S):
        if run.world.is_main:
            pairs = _audited(run)
            certain = sum(pair.certain for pair in pairs)
    certain = run.world.from_main(certain)
    if certain and mode == "fail":
        raise SplitError(_refusal(pairs, run.recipe.data.url) if run.world.is_main else _refusal_elsewhere(certain))


def audit_start(run: "Run", origin: Mapping[str, Any] | None) -> None:
    """Ask whether the weights that a run begins with were trained on its validation or test subjects; it goes on all the same.

    Learning without labels from people who are tested later is no certain leak, but readers must know of it: `start` in the
    file, a line in the log, a sentence in the report.

    Args:
        run: that begins.
        origin: what the checkpoint says of the run that trained them; None for an import or a bare file.
    """
    if run.recipe.data.audit == "off":
        return
    with main_first(run.world, timeout_s=_AUDIT_S):
        if run.world.is_main:
            found = _start_facts(run, origin)
            write_json(run.out / LEAKS_FILE, {**(read_json(run.out / LEAKS_FILE) or {}), "start": found})
            run.log.event("audit of start.from", {"known": found["known"], "says": found["says"]})


def _start_facts(run: "Run", origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of the data behind the weights, and what these share with validation and test."""
    unknown = "whether the weights that it began with saw validation or test subjects is not known: "
    if origin is None:
        return {"known": False, "says": f"{unknown}they do not say what they were trained on", "pairs": []}
    dataset, clips = origin.get("dataset", {}), run.train.clips
    here = (clips.content_digest, clips.generation_digest)
    if (dataset.get("content_digest"), dataset.get("generation_digest")) != here:
        return {
            "known": False,
            "says": f"{unknown}they were trained on other data, or another state of them",
            "pairs": [],
        }
    try:
        before = _training_of(recipe_from(origin["recipe"]), run.recipe.data.url)
        parts = {name: part.clips for name, part in (("val", run.val), ("test", run.test)) if part is not None}
        pairs = [audit_pair(before, part, names=("start.from", name)) for name, part in parts.items()]
    except (FmriStreamError, KeyError) as error:
        return {
            "known": False,
            "says": f"{unknown}their selection cannot be made again ({type(error).__name__})",
            "pairs": [],
        }
    shared = [f"{pair.certain} runs, subjects or families of {pair.other}" for pair in pairs if pair.certain]
    says = f"the weights that it began with were trained on {' and '.join(shared) or 'nobody of validation and test'}"
    if origin["recipe"].get("start", {}).get("from"):
        says += "; those began with other weights, whose data are not looked at"
    return {"known": True, "says": says, "pairs": [dataclasses.asdict(pair) for pair in pairs]}


def _training_of(recipe: Recipe, url: str) -> "StreamingDataset":
    """The runs that a recipe learns from, read where the data lie now."""
    here = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, url=url))
    source, chosen = training_part(here)
    return open_clips(here, source=source, split=chosen, normalize="none", window=None)


def read_audit(out: Path) -> Mapping[str, Any] | None:
    """What a run's folder says of its audit; None where there was none."""
    return read_json(out / LEAKS_FILE)


def _audited(run: "Run") -> list[PairAudit]:
    """By rank 0: found, written and logged."""
    parts = {"train": run.train, "val": run.val, "test": run.test}
    clips = {name: part.clips for name, part in parts.items() if part is not None}
    key = _key(clips)
    kept = _kept(run.out / LEAKS_FILE, key)
    if kept is not None:
        run.log.event("audit", {**_counts(kept), "seconds": 0.0, "kept": True})
        return kept
    began = time.perf_counter()
    names = list(clips)
    found = [
        audit_pair(clips[one], clips[other], names=(one, other))
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]
    seconds = round(time.perf_counter() - began, 3)
    try:
        before = read_json(run.out / LEAKS_FILE) or {}
    except CorruptDataError:
        before = {}
    document = {
        **{name: before[name] for name in ("start",) if name in before},  # of the first start, which alone asks it
        "format": _FORMAT,
        "audit": run.recipe.data.audit,
        "key": key,
        "seconds": seconds,
        "pairs": [dataclasses.asdict(pair) for pair in found],
    }
    write_json(run.out / LEAKS_FILE, document)
    run.log.event("audit", {**_counts(found), "seconds": seconds})
    for pair in found:
        for row in pair.named:
            if row["kind"] not in CERTAIN:  # which the error or the file tells
                run.log.event("leak", {"between": f"{pair.one} and {pair.other}", **row})
    return found


def _counts(pairs: Sequence[PairAudit]) -> dict[str, Any]:
    total = {
        name: sum(getattr(pair, name) for pair in pairs)
        for name in ("same_run", "same_subject", "same_family", "alike", "same_label", "without_fingerprint")
    }
    left_out = [f"{pair.one}/{pair.other}" for pair in pairs if not pair.fingerprints]
    return total | {"fingerprints_not_compared": ", ".join(left_out) or None}


def _key(clips: Mapping[str, "StreamingDataset"]) -> str:
    """What the answer depends on."""
    known = [
        (name, one.generation_digest, one.selection_digest, one.dataset.content_digest) for name, one in clips.items()
    ]
    return hashlib.sha256(json.dumps([_FORMAT, MOST_PAIRS, known]).encode()).hexdigest()


def _kept(path: Path, key: str) -> list[PairAudit] | None:
    try:
        document = read_json(path)
    except CorruptDataError:  # asked again
        return None
    if document is None or document.get("key") != key or document.get("format") != _FORMAT:
        return None
    return [PairAudit(**{**pair, "named": tuple(pair["named"])}) for pair in document["pairs"]]


def _shared_families(one: "StreamingDataset", other: "StreamingDataset") -> set[tuple[str, str]]:
    """What a split must keep whole and is on both sides, but that of a subject who is, which is told already."""
    members = [_families(side) for side in (one, other)]
    told = {family for subject in members[0].keys() & members[1].keys() for family in members[0][subject]}
    sides = [{family for families in side.values() for family in families} for side in members]
    return (sides[0] & sides[1]) - told


def _families(clips: "StreamingDataset") -> dict[str, set[tuple[str, str]]]:
    """Of each subject, what its conversion was told to keep whole, and what a column of participants calls its family."""
    columns = zip(clips.runs.column("subject"), clips.runs.column("group"), strict=True)
    found = {subject: {("group", group)} for subject, group in columns if group != subject}
    related = words_of(clips.dataset, FAMILY_COLUMNS)
    for subject in set(clips.runs.column("subject")) & related.keys():
        found.setdefault(subject, set()).add(("family", related[subject]))
    return found


def _named(leaks: Sequence[Leak], one: "StreamingDataset", other: "StreamingDataset") -> tuple[Mapping[str, Any], ...]:
    """The first pairs by the opaque names of the runs' objects."""
    shown = leaks[:_NAMED]
    wanted = {leak.train for leak in shown} | {leak.test for leak in shown}
    objects: list[dict[str, str]] = [
        {
            name: key
            for name, key in zip(side.runs.column("name"), side.runs.column("object"), strict=True)
            if name in wanted
        }
        if shown
        else {}
        for side in (one, other)
    ]
    return tuple(
        {
            "kind": leak.kind,
            "one": objects[0][leak.train],
            "other": objects[1][leak.test],
            "time": None if leak.time is None else round(leak.time, 4),
        }
        for leak in shown
    )


def _refusal(pairs: Sequence[PairAudit], url: str) -> str:
    told = []
    for pair in pairs:
        what: list[tuple[int, Literal["runs", "subjects", "families"]]] = [
            (pair.same_run, "runs"), (pair.same_subject, "subjects"), (pair.same_family, "families")
        ]  # fmt: skip
        counts = ", ".join(f"{number} {name}" for number, name in what if number)
        if counts:
            shown = [f"{row['one']} / {row['other']}" for row in pair.named if row["kind"] in (SAME_RUN, SAME_SUBJECT)]
            told.append(f"{pair.one} and {pair.other} share {counts}" + (f" ({', '.join(shown[:3])})" if shown else ""))
    return (
        f"{display_url(url)}: the splits leak: {'; '.join(told)}; split anew by subject and family (fmristream.split, or convert "
        "--group-by), or leave the runs out of one side with data.where; `fmristream audit` names them, and data.audit = 'warn' "
        "goes on all the same and says so in the report"
    )


def _refusal_elsewhere(certain: int) -> str:
    return f"the splits leak ({certain} runs, subjects or families on both sides); rank 0 says which"
