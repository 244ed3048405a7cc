"""The three digests: of a run, of a dataset's content, and of a generation. See FORMAT.md, section "Digests"."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fmristream.catalog.run import StoredArray
from fmristream.shards import FORMAT_VERSION
from fmristream.shards.hashing import bulk_hash

PREFIX = "sha256:"


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only, floats in their shortest form that reads back equal, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def sha256(data: bytes | memoryview) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a value's canonical JSON."""
    return sha256(canonical_json(value))


class RunDigest:
    """Digest of one run: its header and space, then the logical values of each frame in stored dtype and order."""

    def __init__(self, *, header: Mapping[str, Any], space_digest: str, bulk_digest: str) -> None:
        self._hash = bulk_hash(bulk_digest)
        self._hash.update(canonical_json({"header": dict(header), "space": space_digest}))

    def add(self, values: memoryview) -> None:
        """Count one frame, little-endian bytes."""
        self._hash.update(values)

    def hexdigest(self) -> str:
        """The digest of what was counted."""
        return self._hash.hexdigest()


def run_header(
    *,
    frames: int,
    shape: tuple[int, ...],
    dtype: str,
    slope: float,
    inter: float,
    affine: Iterable[float],
    tr_s: float | None,
) -> dict[str, Any]:
    """The part of a run's header that is data: what enters its digest and its Zarr attributes."""
    return {
        "affine": [float(number) for number in affine],
        "dtype": dtype,
        "frames": frames,
        "inter": float(inter),
        "shape": list(shape),
        "slope": float(slope),
        "tr_s": None if tr_s is None else float(tr_s),
    }


def content_digest(identities: Iterable[tuple[str, ...]], *, parameters: Mapping[str, Any]) -> str:
    """What the dataset says, whoever wrote it, whenever, with whatever codec, library or number of workers.

    Args:
        identities: `Run.identity` of every run, in base order.
        parameters: of the conversion, those that change samples.
    """
    # Piece by piece: the JSON of 100,000 runs at once would be the largest thing in memory.
    whole = hashlib.sha256(canonical_json({"format": FORMAT_VERSION, "parameters": dict(parameters), "runs": []})[:-2])
    before: tuple[str, ...] = ()
    for identity in identities:
        assert before <= identity, "runs come in base order"
        whole.update((b"," if before else b"") + canonical_json(identity))
        before = identity
    whole.update(b"]}")
    return whole.hexdigest()


def objects_digest(arrays: Iterable[StoredArray]) -> str:
    """Digest over key, size and digest of every object of a run: with it the runs table pins them all."""
    return digest_of_objects(
        (file.key_in(array.object), file.bytes, file.digest) for array in arrays for file in array.files
    )


def digest_of_objects(objects: Iterable[tuple[str, int, str]]) -> str:
    """The same from (key, size, digest) of each object, in any order."""
    return sha256_json(sorted(objects))


def matches(pinned: str, *digests: str) -> bool:
    """Whether a pin (with or without `sha256:`, at least 8 hex digits) is the beginning of one of the digests."""
    text = pinned.removeprefix(PREFIX).lower()
    return len(text) >= 8 and any(digest.startswith(text) for digest in digests)
