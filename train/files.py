"""Small JSON documents in a run's folder: whole or not there, whatever ends the process."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmristream.errors import CorruptDataError


def write_json(path: Path, document: Any) -> None:
    """Write a document beside its place, flush it and rename it: a kill leaves the one before, or this one."""
    write_whole(path, json_text(document))


def json_text(document: Any) -> str:
    """As documents are written."""
    return json.dumps(for_json(document), indent=1, allow_nan=False) + "\n"


def write_whole(path: Path, content: str | bytes) -> None:
    """The same for any text, or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """A document; None where there is none.

    Raises:
        CorruptDataError: it is not the JSON object that was written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptDataError(
            f"{path}: is not the JSON that was written: {error}; remove it, it is made anew"
        ) from error
    if not isinstance(found, dict):
        raise CorruptDataError(
            f"{path}: expected a JSON object, got {type(found).__name__}; remove it, it is made anew"
        )
    return found


def for_json(value: Any) -> Any:
    """The same with null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
