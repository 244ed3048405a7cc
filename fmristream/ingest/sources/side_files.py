"""Which tables belong to a run: confounds, events, recordings.

In BIDS datasets by the inheritance principle; elsewhere tables that are named after the run: `scan.nii.gz` has
`scan_confounds.tsv`, `scan_events.tsv`, `scan_physio.tsv.gz` with `scan_physio.json`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fmristream.ingest.sources.listing import BidsName, SideFile, parse_bids_name, without_suffix
from fmristream.storage.urls import join_url

# fMRIPrep's confounds: `timeseries` since 20.2, `regressors` before.
_CONFOUNDS = ("timeseries", "regressors")
# `eeg`: features as a table; what is recorded beside a run under any other suffix has a label, `recording-<label>`.
RECORDINGS = ("physio", "stim", "eyetrack", "eeg")
_OF_ANY_KIND = "recording"
_TABLES = (".tsv", ".tsv.gz")
# What a table beside a run is called, in a folder that is no BIDS dataset.
_NAMED_AFTER = {
    "confounds": ("confounds", *(f"desc-confounds_{suffix}" for suffix in _CONFOUNDS)),
    "events": ("events",),
    **{kind: (kind,) for kind in RECORDINGS},
}
# Entities that a table has and a run need not have: which form of the run it is about does not matter to it.
_OWN = frozenset({"desc", "recording"})


@dataclass(frozen=True, slots=True)
class _Found:
    key: str
    entities: frozenset[tuple[str, str]]
    name: BidsName


class SideFiles:
    """The tables of a dataset, found again for each run.

    Args:
        keys: files of the dataset.
        of_subjects: only tables whose names say a subject; elsewhere than in BIDS datasets nobody promises that others
            are meant for all.
    """

    def __init__(self, keys: Iterable[str], *, of_subjects: bool = False) -> None:
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

    def of(self, root: str, key: str, name: BidsName) -> tuple[SideFile, ...]:
        """The tables that apply to a run: of each kind the nearest, in its folder the most specific."""
        entities = frozenset(name.entities.items())
        chosen: dict[str, _Found] = {}
        unclear: set[str] = set()
        for folder in _upwards(key):
            here: dict[str, list[_Found]] = defaultdict(list)
            for found in self._tables.get(folder, ()):
                if _general(found.entities) <= entities:
                    here[_name_of(found.name)].append(found)
            for table, candidates in here.items():
                if table not in chosen and table not in unclear:
                    candidates.sort(key=lambda found: (-len(found.entities), found.name.suffix != "timeseries"))
                    if _are_equal(candidates[:2]):
                        unclear.add(table)
                    else:
                        chosen[table] = candidates[0]
        files = [
            SideFile(name=table, url=join_url(root, found.key), sidecar_urls=self._sidecars_of(root, found))
            for table, found in sorted(chosen.items())
        ]
        return (*files, *(SideFile(name=table, url="") for table in sorted(unclear)))

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

    Args:
        keys: files that are there.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(key for key in keys if key.endswith((*_TABLES, ".json")))
        self._by_names = SideFiles(self._keys, of_subjects=True)

    def of(self, root: str, key: str) -> tuple[SideFile, ...]:
        """The tables of a run."""
        found = {file.name: file for file in self._by_stem(root, key)}
        name = parse_bids_name(key)
        if "sub" in name.entities:
            found = {file.name: file for file in self._by_names.of(root, key, name)} | found
        return tuple(found[name] for name in sorted(found))

    def _by_stem(self, root: str, key: str) -> Iterator[SideFile]:
        if not self._keys:
            return
        stem = without_suffix(key)
        for name, suffixes in _NAMED_AFTER.items():
            stems = [f"{base}_{suffix}" for base in {stem, stem.removesuffix("_bold")} for suffix in suffixes]
            there = sorted(place + ext for place in stems for ext in _TABLES if place + ext in self._keys)
            if len(there) == 1:
                yield table_at(name, join_url(root, there[0]))
            elif there:
                yield SideFile(name=name, url="")


def table_at(name: str, url: str) -> SideFile:
    """A table of which nothing but its place is known; a sidecar has its name and ends in `.json`."""
    bare = url.removesuffix(".gz").removesuffix(".tsv")
    return SideFile(name=name, url=url, sidecar_urls=(f"{bare}.json",) if bare != url and name in RECORDINGS else ())


def _may_be_table(key: str) -> bool:
    if not key.endswith((*_TABLES, ".json")):
        return False
    suffix = key.rpartition("/")[2].rpartition("_")[2].partition(".")[0]
    return suffix in (*_CONFOUNDS, "events", *RECORDINGS) or "_recording-" in key


def _found(key: str, name: BidsName) -> _Found:
    return _Found(key, frozenset(name.entities.items()), name)


def _is_confounds(name: BidsName) -> bool:
    return name.entities.get("desc") == "confounds"


def _general(entities: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
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
