"""What a checkpoint consists of: its files with size and sha256, signed by a sha256 of its own, written last."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fmristream.errors import CorruptDataError

MANIFEST = "manifest.json"
# 2 may hold sharded tensors, files of other names, and says which is the best; 1 is what the first releases wrote.
FORMAT = 2
READABLE = (1, 2)


class Folder(Protocol):
    """One checkpoint, to be read."""

    @property
    def where(self) -> str:
        """Its path or URL, as it may be shown."""

    def read(self, name: str) -> bytes:
        """A whole file; CorruptDataError where it is not there."""

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """The same, `size` bytes, a piece at a time; CorruptDataError where it is not there or shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A file of a checkpoint, and where in its folder it lies."""

    at: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was written, and whether it was the best so far when it was."""

    step: int
    files: Mapping[str, Listed]
    is_best: bool = False
    attempt: str = ""  # that wrote it (train/fence.py); empty where none is said
    digest: str = ""  # the sha256 that it is signed with, of one that was read

    def encoded(self) -> bytes:
        """As it is stored."""
        files = {
            name: {"bytes": listed.size, "sha256": listed.sha256} | ({"at": listed.at} if listed.at != name else {})
            for name, listed in self.files.items()
        }
        by = {"attempt": self.attempt} if self.attempt else {}
        facts = {"format": FORMAT, "step": self.step, "is_best": self.is_best, **by, "files": files}
        return json_bytes(_signed(facts))


def read_manifest(folder: Folder) -> Manifest:
    """What a checkpoint should consist of.

    Raises:
        CorruptDataError: it is not there, or not what was written.
    """
    path = f"{folder.where}/{MANIFEST}"
    data = folder.read(MANIFEST)
    try:
        found = json.loads(data)
        if _signed({key: value for key, value in found.items() if key != "sha256"}) != found:
            raise CorruptDataError(f"{path}: does not match its own checksum")
        if found["format"] not in READABLE:
            raise CorruptDataError(f"{path}: checkpoint format {found['format']}, this trainer reads {READABLE}")
        files = {
            name: Listed(at=entry.get("at", name), size=entry["bytes"], sha256=entry["sha256"])
            for name, entry in found["files"].items()
        }
        return Manifest(
            step=found["step"],
            files=files,
            is_best=found.get("is_best", False),
            attempt=str(found.get("attempt", "")),
            digest=found["sha256"],
        )
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{path}: is not the JSON that was written: {error}") from error


def read_listed(folder: Folder, listed: Listed) -> bytes:
    """A file of a checkpoint.

    Raises:
        CorruptDataError: it is missing, or not what was written.
    """
    data = folder.read(listed.at)
    path = f"{folder.where}/{listed.at}"
    if len(data) != listed.size:
        raise CorruptDataError(f"{path}: has {len(data)} bytes, {listed.size} were written")
    if hashlib.sha256(data).hexdigest() != listed.sha256:
        raise CorruptDataError(f"{path}: its sha256 is not that of what was written")
    return data


def check_listed(folder: Folder, listed: Listed) -> None:
    """The same without keeping it: CorruptDataError where it is not what was written."""
    digest, size = hashlib.sha256(), 0
    for piece in folder.pieces(listed.at, listed.size):
        digest.update(piece)
        size += len(piece)
    path = f"{folder.where}/{listed.at}"
    if size != listed.size:
        raise CorruptDataError(f"{path}: has {size} bytes, {listed.size} were written")
    if digest.hexdigest() != listed.sha256:
        raise CorruptDataError(f"{path}: its sha256 is not that of what was written")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON for people too."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of its own canonical JSON."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    return {**manifest, "sha256": hashlib.sha256(canonical).hexdigest()}
