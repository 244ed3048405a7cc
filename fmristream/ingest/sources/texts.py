"""Small text files that lie beside the runs: sidecars, dataset_description.json, participants.tsv."""

import json
from typing import Any

from fmristream.errors import ObjectMissingError, SourceError
from fmristream.storage.sources import read_source_range
from fmristream.storage.urls import join_url

# fMRIPrep's longest sidecars are some 100 kB, the largest cohorts' participants.tsv some 10 MB.
_MAX_TEXT_BYTES = 64 * 2**20


def read_text(root: str, key: str) -> str:
    """A small text file; bytes that are not UTF-8 become replacement characters.

    Raises:
        SourceError: it is not there, or too large to be what its name says.
        StorageError: it cannot be read.
    """
    try:
        raw = read_source_range(join_url(root, key), 0, _MAX_TEXT_BYTES + 1)
    except ObjectMissingError as error:
        raise SourceError(f"{key}: the file is not there (a link that leads nowhere?)") from error
    if len(raw) > _MAX_TEXT_BYTES:
        raise SourceError(f"{key}: larger than {_MAX_TEXT_BYTES} bytes, which no such text file is")
    return raw.decode("utf-8-sig", errors="replace")


def read_json_object(root: str, key: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        SourceError: it is not there, not JSON, or no object.
        StorageError: it cannot be read.
    """
    try:
        found = json.loads(read_text(root, key))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{key}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise SourceError(f"{key}: holds a JSON {type(found).__name__}, an object is expected")
    return found
