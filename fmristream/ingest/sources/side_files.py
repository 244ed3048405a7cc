"""Which tables belong to a run of a BIDS dataset: confounds, events, recordings, by the inheritance principle."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fmristream.ingest.sources.listing import BidsName, SideFile, parse_bids_name
from fmristream.storage.urls import join_url

# fMRIPrep's confounds: `timeseries` since 20.2, `regressors` before.
_CONFOUNDS = ("timeseries", "regressors")
_RECORDINGS = ("physio", "stim")
_TABLES = frozenset({(suffix, ".tsv") for suffix in (*_CONFOUNDS, "events")} | {(s, ".tsv.gz") for s in _RECORDINGS})
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
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._tables: dict[str, list[_Found]] = defaultdict(list)
        self._sidecars: dict[str, list[_Found]] = defaultdict(list)
        for key in keys:
            name = parse_bids_name(key)
            if (name.suffix, name.extension) in _TABLES and (name.suffix not in _CONFOUNDS or _is_confounds(name)):
                self._tables[key.rpartition("/")[0]].append(_found(key, name))
            elif name.suffix in _RECORDINGS and name.extension == ".json":
                self._sidecars[key.rpartition("/")[0]].append(_found(key, name))

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


def _found(key: str, name: BidsName) -> _Found:
    return _Found(key, frozenset(name.entities.items()), name)


def _is_confounds(name: BidsName) -> bool:
    return name.entities.get("desc") == "confounds"


def _general(entities: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    return frozenset(pair for pair in entities if pair[0] not in _OWN)


def _name_of(name: BidsName) -> str:
    kind = "confounds" if name.suffix in _CONFOUNDS else name.suffix
    recording = name.entities.get("recording", "") if kind in _RECORDINGS else ""
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
