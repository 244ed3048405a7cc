"""Digests of what is large: the values and the objects of runs. The generation names which one; see FORMAT.md, section 10.

Everything small (documents, tables, spaces, identities) has sha256, which every tool can check.
"""

import hashlib
from typing import Any, Protocol

from fmristream.errors import FormatError

SHA256 = "sha256"  # what a generation has that names none
BLAKE3 = "blake3"  # one core does three times as many bytes a second
# Of new datasets; one that is there keeps its own.
NEW_BULK_DIGEST = BLAKE3

# What a reader has to know for each: the names that a generation has in `requires`.
_REQUIRES = {SHA256: (), BLAKE3: ("blake3",)}


class Hash(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def bulk_hash(name: str) -> Hash:
    """A digest of nothing yet, by the name that a generation has for it."""
    require_known(name, where="a run")
    return hashlib.sha256() if name == SHA256 else _Blake3()


def bulk_hexdigest(data: bytes, name: str) -> str:
    """The digest of an object of a run, 64 hex digits."""
    digest = bulk_hash(name)
    digest.update(data)
    return digest.hexdigest()


def bulk_record(name: str) -> dict[str, Any]:
    """What generations and groups of runs say of it."""
    return {} if name == SHA256 else {"bulk_digest": name}


def required_for(name: str) -> list[str]:
    """What a generation with this digest requires of its readers."""
    return list(_REQUIRES[name])


def require_known(name: str, *, where: str) -> None:
    """Raise FormatError unless this release knows the digest."""
    if name not in _REQUIRES:
        known = " and ".join(sorted(_REQUIRES))
        raise FormatError(
            f"{where}: bulk data have the digest {name!r}, this release knows {known}; install a newer release"
        )


class _Blake3:
    """On this thread alone: conversions keep the other cores busy with other runs."""

    def __init__(self) -> None:
        # Imported here: whoever lists or describes a dataset digests no bulk data.
        from blake3 import blake3

        self._hash = blake3(max_threads=1)

    def update(self, data: bytes | memoryview, /) -> None:
        # It takes bytes only, whatever the values are.
        self._hash.update(data if isinstance(data, bytes) else data.cast("B"))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
