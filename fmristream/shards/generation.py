"""Versions of a dataset: immutable documents, created exclusively; the only moment at which anything becomes visible."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fmristream._version import __version__
from fmristream.errors import (
    ConflictError,
    CorruptDataError,
    FormatError,
    ObjectExistsError,
    ObjectMissingError,
    StorageError,
)
from fmristream.shards import FORMAT_VERSION
from fmristream.shards.digest import canonical_json, sha256_json
from fmristream.shards.hashing import SHA256, require_known, required_for
from fmristream.storage import Store
from fmristream.storage.store import is_denied

HINT = "dataset.json"
FOLDER = "generations"

# Features that this reader understands; a generation that requires another is refused.
FEATURES = frozenset({"blake3"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One committed version: its number, its digest (hex) and its document."""

    number: int
    digest: str
    document: Mapping[str, Any]

    @property
    def bulk_digest(self) -> str:
        """Name of the digest that values and objects of runs have."""
        return str(self.document.get("bulk_digest", SHA256))


def key_of(number: int) -> str:
    """Object name of a generation."""
    return f"{FOLDER}/{number}.json"


def newest_generation(store: Store) -> Generation:
    """The newest committed version.

    The hint says where to start; whatever it says, the generation after the last one found is probed for, so a stale
    hint costs a request and never an old answer.

    Raises:
        FormatError: there is no dataset, or it needs a newer reader.
        CorruptDataError: the newest generation is damaged or lost.
    """
    number = hinted_number(store)
    # The hint is nearly always right: its generation and the look behind it are one round trip.
    with ThreadPoolExecutor(1) as ahead:
        probed = ahead.submit(_probed, store, number + 1) if number else None
        found = _load(store, number or max(_listed(store), default=1))
    if found is None and number and (highest := max(_listed(store), default=0)) > number:
        found = _load(store, highest)  # the hint came late, when what it names had been removed
    if found is None and number:  # it was committed before the hint was written; an older one is not what was asked for
        raise CorruptDataError(
            f"{store.name}/{key_of(number)}: is named by {HINT} and missing; restore it from a copy, or delete {HINT} "
            "to open the newest version that is left"
        )
    if found is None:
        raise FormatError(
            f"{store.name}: no dataset here ({FOLDER}/ holds no committed generation); "
            "check the URL, or run `fmristream convert SOURCE URL` (again, if it was interrupted)"
        )
    later = probed.result() if probed is not None and found.number == number else _probed(store, found.number + 1)
    while later is not None:
        found = later
        later = _probed(store, found.number + 1)
    return found


def holds_dataset(store: Store) -> bool:
    """Whether some version of a dataset was committed there, readable or not."""
    return hinted_number(store) > 0 or bool(_listed(store))


def listed_generations(store: Store) -> list[Generation]:
    """Every version that is there, the newest first."""
    return [load_generation(store, number) for number in sorted(_listed(store), reverse=True)]


def load_generation(store: Store, number: int) -> Generation:
    """A version by its number.

    Raises:
        ObjectMissingError: there is none, or none any more.
        CorruptDataError: it is damaged.
    """
    found = _load(store, number)
    if found is None:
        raise ObjectMissingError(f"{store.name}/{key_of(number)}: there is no such version; open the newest one")
    return found


def commit(store: Store, *, number: int, parent: str | None, write_id: str, content: Mapping[str, Any]) -> Generation:
    """Create generation `number`; afterwards every reader sees it, before nobody sees anything of it.

    A reply that got lost is recognised by the write id: the generation is ours, and all is well.

    Raises:
        ConflictError: somebody else committed this generation first.
        StorageError: the store failed.
    """
    document: dict[str, Any] = {
        **content,
        "format": "fmristream",
        "generation": number,
        "parent": parent,
        "requires": required_for(str(content.get("bulk_digest", SHA256))),
        "tool": f"fmristream {__version__}",
        "version": FORMAT_VERSION,
        "write_id": write_id,
    }
    digest = sha256_json(document)
    try:
        store.put_new(key_of(number), canonical_json({**document, "digest": digest}))
    except StorageError as error:
        present = _load(store, number)
        is_ours = present is not None and present.document.get("write_id") == write_id
        if not is_ours and not isinstance(error, ObjectExistsError):
            raise
        if not is_ours:
            raise ConflictError(
                f"{store.name}: another writer committed generation {number} meanwhile; nothing of it was changed, "
                "run the command again to see what is there"
            ) from error
    store.replace_hint(HINT, _hint(number))
    return Generation(number=number, digest=digest, document=document)


def repair_hint(store: Store, number: int) -> None:
    """Let the hint name this generation, which is the newest; a writer that finds it stale or damaged does so."""
    if hinted_number(store) != number:
        store.replace_hint(HINT, _hint(number))


def parse(data: bytes, *, number: int, where: str) -> Generation:
    """Check and read a generation's document.

    Raises:
        CorruptDataError: it is not what was committed.
        FormatError: it needs a newer reader.
    """
    try:
        document = json.loads(data)
        whole = canonical_json(document) == data
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{where}: not readable as JSON; restore the object from a copy") from error
    digest = document.pop("digest", None) if isinstance(document, dict) else None
    if not whole or digest is None or digest != sha256_json(document) or document.get("generation") != number:
        raise CorruptDataError(f"{where}: the document does not have its own digest; restore the object from a copy")
    version, requires = document.get("version"), set(document.get("requires", ()))
    if version != FORMAT_VERSION or requires - FEATURES:
        needs = ", ".join(sorted(requires - FEATURES)) or f"format version {version}"
        raise FormatError(f"{where}: needs {needs}, this is fmristream {__version__}; install a newer release")
    found = Generation(number=number, digest=digest, document=document)
    require_known(found.bulk_digest, where=where)
    return found


def _load(store: Store, number: int) -> Generation | None:
    try:
        data = store.read(key_of(number))
    except ObjectMissingError:
        return None
    return parse(data, number=number, where=f"{store.name}/{key_of(number)}")


def _probed(store: Store, number: int) -> Generation | None:
    """A generation that need not be there, in a store that may not say so: without listing, S3 answers 403 for 404."""
    try:
        return _load(store, number)
    except StorageError as error:
        if is_denied(error):
            return None
        raise


def _hint(number: int) -> bytes:
    body = {"format": "fmristream", "generation": number, "version": FORMAT_VERSION}
    return canonical_json({**body, "check": sha256_json(body)[:16]})


def hinted_number(store: Store) -> int:
    """The generation that the hint names; 0 where the hint is missing or damaged: it is only a hint."""
    try:
        data = store.read(HINT)
        number = int(json.loads(data)["generation"])
    except (ObjectMissingError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0
    return number if number > 0 and data == _hint(number) else 0


def _listed(store: Store) -> list[int]:
    try:
        names = store.list(FOLDER)
    except (StorageError, NotImplementedError):  # a store that cannot list, or nothing there
        return []
    stems = [name.removeprefix(f"{FOLDER}/").removesuffix(".json") for name in names if name.endswith(".json")]
    return [int(stem) for stem in stems if stem.isdecimal()]
