"""Objects of statistics that were fitted to training runs: safetensors, numbers only, named by their digest. See FORMAT.md.

No version of a dataset names them: each says itself which content it was fitted to.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmristream.errors import CorruptDataError
from fmristream.shards.digest import canonical_json, sha256

FOLDER = "fitted"
SUFFIX = ".safetensors"
_FORMAT = "fmristream-fitted-1"
_DIGITS = 16


def encode_object(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Float64 arrays in order of their names; what they are of as JSON in the header."""
    text = canonical_json({**about, "format": _FORMAT}).decode("ascii")
    header: dict[str, Any] = {"__metadata__": {"fmristream": text}}
    body, at = [], 0
    for name, values in sorted(arrays.items()):
        data = np.ascontiguousarray(values, dtype="<f8").tobytes()
        header[name] = {"data_offsets": [at, at + len(data)], "dtype": "F64", "shape": list(values.shape)}
        body.append(data)
        at += len(data)
    encoded = canonical_json(header)
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(body)


def object_key(name: str, data: bytes) -> str:
    """Where an object of this name and these bytes lies."""
    return f"{FOLDER}/{name}-{sha256(data)[:_DIGITS]}{SUFFIX}"


def decode_object(data: bytes, *, key: str, where: str) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """(what it is of, arrays) of the object under a key.

    Raises:
        CorruptDataError: it is damaged, or not what its name says.
    """
    digest = key.removesuffix(SUFFIX).rpartition("-")[2]
    if len(digest) != _DIGITS or not sha256(data).startswith(digest):
        raise CorruptDataError(
            f"{where}: sha256 {sha256(data)[:_DIGITS]}, its name says {digest}; it was changed or renamed: restore it"
        )
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        about = dict(json.loads(header.pop("__metadata__")["fmristream"]))
        arrays = {name: _array(data[8 + length :], entry) for name, entry in header.items()}
        if about.pop("format") != _FORMAT or not isinstance(about["content_digest"], str):
            raise CorruptDataError(f"{where}: no statistics of the format {_FORMAT!r}; install a newer release")
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptDataError(f"{where}: no statistics that this release wrote ({error})") from error
    return about, arrays


def _array(body: bytes, entry: Mapping[str, Any]) -> NDArray[np.float64]:
    start, stop = entry["data_offsets"]
    return np.frombuffer(body[start:stop], dtype="<f8").reshape(entry["shape"]).astype(np.float64)
