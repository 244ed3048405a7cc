"""Which tables belong to a run: confounds, events, recordings.

In BIDS datasets by the inheritance principle; elsewhere tables that are named after the run: `scan.nii.gz` has
`scan_confounds.tsv`, `scan_events.tsv`, `scan_physio.tsv.gz` with `scan_physio.json`.

These are measurements. One that has exactly the labels of a run in its folder is that run's: runs with more labels
(`run-2`, `rec-moco`, `echo-1`) do not inherit it, whatever the principle says of metadata.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fmristream.ingest.sources.listing import (
    BidsName,
    SideFile,
    imaging_suffix,
    is_dense_series,
    is_hidden,
    parse_bids_name,
    without_suffix,
)
from fmristream.storage.urls import join_url

# fMRIPrep's confounds: `timeseries` since 20.2, `regressors` before.
_CONFOUNDS = ("timeseries", "regressors")
# `eeg`: features as a table; what is recorded beside a run under any other suffix has a label, `recording-<label>`.
RECORDINGS = ("physio", "stim", "eyetrack", "eeg")
_OF_ANY_KIND = "recording"
_TABLES = (".tsv", ".tsv.gz")
_SERIES = ".dtseries"
# What a table beside a run is called, in a folder that is no BIDS dataset.
_NAMED_AFTER = {
    "confounds": ("confounds", *(f"desc-confounds_{suffix}" for suffix in _CONFOUNDS)),
    "events": ("events",),
    **{kind: (kind,) for kind in RECORDINGS},
}
# Entities that a table has and a run need not have: which form of the run it is about does not matter to it.
_OWN = frozenset({"desc", "recording"})
# Entities that tell forms of one scan apart, which share what was measured during it.
_FORMS = frozenset({"space", "res", "den", "desc", "hemi", "cohort", "part", "recording"})
# BIDS indexes are numbers with any zeros before them.
_INDEXES = frozenset({"run", "echo"})
# Images beside runs, in folders where any image may be a run.
_NO_RUNS = frozenset({"T1w", "T2w", "T2starw", "FLAIR", "mask", "dseg", "probseg", "sbref", "boldref", "epi", "dwi"})

OF_ANOTHER_RUN = "the table that would apply is called after another run"
_OF_SEVERAL_RUNS = "the table may be called after any of several runs"

_Labels = frozenset[tuple[str, str]]
_Spelled = tuple[_Labels, str]  # labels of a scan as they stand in its name, and its suffix


@dataclass(frozen=True, slots=True)
class _Found:
    key: str
    entities: _Labels
    name: BidsName

    @property
    def folder(self) -> str:
        return self.key.rpartition("/")[0]


class SideFiles:
    """The tables of a dataset, found again for each run.

    Args:
        keys: files of the dataset.
        runs: those of them that are runs, in any form, taken or not.
        of_subjects: only tables whose names say a subject; elsewhere than in BIDS datasets nobody promises that others
            are meant for all.
    """

    def __init__(self, keys: Iterable[str], *, runs: Iterable[str], of_subjects: bool = False) -> None:
        self._scans: dict[tuple[str, _Labels], set[_Spelled]] = defaultdict(set)
        for key in runs:
            name = _name_of_run(key)
            self._scans[key.rpartition("/")[0], _scan(_entities(name))].add(_spelled(name))
        self._tables: dict[str, list[_Found]] = defaultdict(list)
        self._sidecars: dict[str, list[_Found]] = defaultdict(list)
        for key in keys:
            if not _may_be_table(key):  # taking every name apart would cost more than the rest of a listing
                continue
            name = parse_bids_name(key)
            folder = key.rpartition("/")[0]
            if name.extension == ".json":
                self._sidecars[folder].append(_found(key, name))
            elif (name.suffix not in _CONFOUNDS or _is_confounds(name)) and ("sub" in name.entities or not of_subjects):
                self._tables[folder].append(_found(key, name))

    def of(self, root: str, key: str) -> tuple[SideFile, ...]:
        """The tables that apply to a run: of each kind the nearest, in its folder the most specific."""
        run = _name_of_run(key)
        entities = _entities(run)
        chosen: dict[str, _Found] = {}
        unclear: dict[str, str] = {}
        withheld: dict[str, str] = {}
        for folder in _upwards(key):
            here: dict[str, list[_Found]] = defaultdict(list)
            for found in self._tables.get(folder, ()):
                if _general(found.entities) <= entities:
                    if reason := self._why_not(found, run):
                        withheld[_name_of(found.name)] = reason
                    else:
                        here[_name_of(found.name)].append(found)
            for table, candidates in here.items():
                if table not in chosen and table not in unclear:
                    candidates.sort(key=lambda found: (-len(found.entities), found.name.suffix != "timeseries"))
                    if _are_equal(candidates[:2]):
                        unclear[table] = ""
                    else:
                        chosen[table] = candidates[0]
        files = [
            SideFile(name=table, url=join_url(root, found.key), sidecar_urls=self._sidecars_of(root, found))
            for table, found in sorted(chosen.items())
        ]
        unclear = {table: why for table, why in (withheld | unclear).items() if table not in chosen}
        return (*files, *(SideFile(name=table, url="", reason=unclear[table]) for table in sorted(unclear)))

    def _why_not(self, table: _Found, run: BidsName) -> str:
        """Why a run does not get a table that BIDS would let it inherit; "" where it does."""
        there = self._scans.get((table.folder, _scan(table.entities)), set())
        # What else has a scan's labels is made of it; `run-1` and `run-01` side by side: the one that is spelled likewise.
        owners = {one for one in there if one[1] == "bold"} or there
        alike = {one for one in owners if one[0] == _spelled(table.name)[0]} or owners
        if not alike:
            return ""
        if _spelled(run) not in alike:
            return OF_ANOTHER_RUN
        return _OF_SEVERAL_RUNS if len(alike) > 1 else ""

    def _sidecars_of(self, root: str, table: _Found) -> tuple[str, ...]:
        """JSON files that apply to a recording, nearest first."""
        found: list[str] = []
        for folder in _upwards(table.key):
            here = [
                one
                for one in self._sidecars.get(folder, ())
                if one.name.suffix == table.name.suffix and one.entities <= table.entities
            ]
            here.sort(key=lambda one: (-len(one.entities), one.key))
            found += [join_url(root, one.key) for one in here]
        return tuple(found)


class NamedAfter:
    """Tables that are named after runs, in folders of any layout.

    Where several runs may have given a table its name, it is that of the run whose whole name stands in it:
    `scan_confounds.tsv` is about `scan.nii.gz` rather than `scan_bold.nii.gz`.

    Args:
        keys: files that are there, images among them.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        self._keys = frozenset(key for key in keys if key.endswith((*_TABLES, ".json")))
        runs = [key for key in keys if imaging_suffix(key) and not is_hidden(key)] if self._keys else []
        named = (key for key in runs if "sub-" in key and _suffix(key) not in _NO_RUNS)
        self._by_names = SideFiles(self._keys, runs=named, of_subjects=True)
        self._called: dict[str, list[str]] = defaultdict(list)
        for key in runs:
            for stem in _stems(key):
                self._called[stem].append(key)

    def of(self, root: str, key: str) -> tuple[SideFile, ...]:
        """The tables of a run."""
        if not self._keys:
            return ()
        found = {file.name: file for file in self._by_stem(root, key)}
        if "sub-" in key:  # taking every name apart would cost more than the rest of a listing
            found = {file.name: file for file in self._by_names.of(root, key)} | found
        return tuple(found[name] for name in sorted(found))

    def _by_stem(self, root: str, key: str) -> Iterator[SideFile]:
        claims = {stem: self._claim(stem, key) for stem in _stems(key)}
        for name, suffixes in _NAMED_AFTER.items():
            there = {
                f"{stem}_{suffix}{ext}": claim
                for stem, claim in claims.items()
                for suffix in suffixes
                for ext in _TABLES
                if f"{stem}_{suffix}{ext}" in self._keys
            }
            own = [place for place, claim in there.items() if not claim]
            if len(own) == 1:
                yield table_at(name, join_url(root, own[0]))
            elif there:
                yield SideFile(name=name, url="", reason="" if own else min(there.values()))

    def _claim(self, stem: str, key: str) -> str:
        """Why a table that is called after this stem is not about this image; "" where it is."""
        rank = _stems(key)[stem]
        others = [(_stems(other)[stem], other) for other in self._called[stem] if other != key]
        if any(other < rank for other, _ in others):
            return OF_ANOTHER_RUN
        # Volumes and grayordinates of one name are two forms of one scan.
        equal = [other for one, other in others if one == rank and is_dense_series(other) == is_dense_series(key)]
        return _OF_SEVERAL_RUNS if equal else ""


def table_at(name: str, url: str) -> SideFile:
    """A table of which nothing but its place is known; a sidecar has its name and ends in `.json`."""
    bare = url.removesuffix(".gz").removesuffix(".tsv")
    return SideFile(name=name, url=url, sidecar_urls=(f"{bare}.json",) if bare != url and name in RECORDINGS else ())


def _may_be_table(key: str) -> bool:
    if not key.endswith((*_TABLES, ".json")):
        return False
    return _suffix(key) in (*_CONFOUNDS, "events", *RECORDINGS) or "_recording-" in key


def _suffix(key: str) -> str:
    return key.rpartition("/")[2].rpartition("_")[2].partition(".")[0]


def _found(key: str, name: BidsName) -> _Found:
    return _Found(key, _entities(name), name)


def _spelled(name: BidsName) -> _Spelled:
    return _scan(frozenset(name.entities.items())), name.suffix


def _entities(name: BidsName) -> _Labels:
    return frozenset(
        (entity, str(int(label)) if entity in _INDEXES and label.isdecimal() else label)
        for entity, label in name.entities.items()
    )


def _scan(entities: _Labels) -> _Labels:
    """Labels of the scan, without those of its form."""
    return frozenset(pair for pair in entities if pair[0] not in _FORMS)


def _name_of_run(key: str) -> BidsName:
    """A file name taken apart; in plain folders the last part may be a label as well, `sub-1_run-2.nii`."""
    name = parse_bids_name(key)
    if "-" not in name.suffix:
        return name
    last = parse_bids_name(f"{name.suffix}_bold").entities
    return replace(name, entities={**name.entities, **last}, suffix="")


def _stems(key: str) -> dict[str, int]:
    """What tables of an image may be called after: its whole name is 0, less comes behind."""
    stem = without_suffix(key)
    whole = {stem, stem[: -len(_SERIES)] if is_dense_series(key) else stem}
    return {one.removesuffix("_bold"): 1 for one in whole} | dict.fromkeys(whole, 0)


def _is_confounds(name: BidsName) -> bool:
    return name.entities.get("desc") == "confounds"


def _general(entities: _Labels) -> _Labels:
    return frozenset(pair for pair in entities if pair[0] not in _OWN)


def _name_of(name: BidsName) -> str:
    if name.suffix in _CONFOUNDS:
        return "confounds"
    if name.suffix == "events":
        return "events"
    kind = name.suffix if name.suffix in RECORDINGS else _OF_ANY_KIND
    recording = name.entities.get("recording", "")
    return f"{kind}-{recording}" if recording else kind


def _are_equal(candidates: list[_Found]) -> bool:
    """Whether nothing tells which of two applies."""
    return (
        len(candidates) == 2
        and len(candidates[0].entities) == len(candidates[1].entities)
        and candidates[0].name.suffix == candidates[1].name.suffix
    )


def _upwards(key: str) -> Iterator[str]:
    folder = key.rpartition("/")[0]
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""
