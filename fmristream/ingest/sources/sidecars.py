"""The repetition time of BIDS runs, by the inheritance principle: the nearest JSON sidecar that applies and tells it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fmristream.errors import SourceError
from fmristream.ingest.sources.listing import BidsName, parse_bids_name
from fmristream.ingest.sources.texts import read_json_object

_PLAUSIBLE_TR_S = (0.05, 30.0)
# Sidecars are small: over a network, waiting for them is all the cost, and waits overlap.
_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A sidecar of bold runs."""

    key: str
    entities: frozenset[tuple[str, str]]


SidecarIndex = dict[str, list[Sidecar]]  # by folder


def index_sidecars(keys: Iterable[str]) -> SidecarIndex:
    """The `*bold.json` files, by folder; within one, the more specific come first."""
    index: SidecarIndex = defaultdict(list)
    for key in keys:
        if not key.endswith("bold.json"):  # taking every name apart would cost more than the rest of a listing
            continue
        name = parse_bids_name(key)
        if name.suffix == "bold" and name.extension == ".json":
            index[key.rpartition("/")[0]].append(Sidecar(key=key, entities=frozenset(name.entities.items())))
    for sidecars in index.values():
        sidecars.sort(key=lambda sidecar: (-len(sidecar.entities), sidecar.key))
    return dict(index)


def applicable(index: SidecarIndex, key: str, name: BidsName) -> list[str]:
    """Sidecars that apply to a run, nearest first: in its folder or above, with no entity that the run lacks."""
    entities = set(name.entities.items())
    found = []
    folder = key.rpartition("/")[0]
    while True:
        found += [sidecar.key for sidecar in index.get(folder, ()) if sidecar.entities <= entities]
        if not folder:
            return found
        folder = folder.rpartition("/")[0]


def repetition_times(root: str, candidates: Sequence[list[str]]) -> tuple[list[float | None], tuple[str, ...]]:
    """For each run's sidecars, nearest first, the first repetition time that they tell; and notes about bad ones.

    Raises:
        StorageError: a sidecar cannot be read.
    """
    times: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    open_ones = [list(keys) for keys in candidates]
    while wanted := sorted({keys[0] for keys in open_ones if keys} - times.keys()):
        with ThreadPoolExecutor(min(_READERS, len(wanted)), thread_name_prefix="sidecar") as readers:
            for key, (time_s, note) in zip(wanted, readers.map(lambda key: _read(root, key), wanted), strict=True):
                times[key] = time_s
                if note:
                    notes[key] = note
        for keys in open_ones:
            while keys and keys[0] in times and times[keys[0]] is None:
                keys.pop(0)
    return [times[keys[0]] if keys else None for keys in open_ones], tuple(notes[key] for key in sorted(notes))


def _read(root: str, key: str) -> tuple[float | None, str]:
    try:
        found = read_json_object(root, key).get("RepetitionTime")
    except SourceError as error:
        return None, f"{error}; it is not used"
    if found is None:
        return None, ""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found <= 0:
        return None, f"{key}: RepetitionTime is {found!r}, a positive number of seconds is expected; it is not used"
    if not _PLAUSIBLE_TR_S[0] <= found <= _PLAUSIBLE_TR_S[1]:
        return float(found), f"{key}: RepetitionTime is {found:g} s, which is not plausible"
    return float(found), ""
