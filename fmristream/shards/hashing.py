"""SHA-256 as hashlib computes it, and of two streams at once where the processor gains by that."""

import hashlib
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = bytes | memoryview

_BLOCK_BYTES = 64


class Hash(Protocol):
    """What hashlib's objects do."""

    def update(self, data: Bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def new_hash() -> Hash:
    """A SHA-256 of nothing yet."""
    return _Sha256() if _is_usable() else hashlib.sha256()


def update_both(one: Hash, data: Bytes, other: Hash, others: Bytes) -> None:
    """Add to two hashes, in the time of the longer addition where that is possible."""
    if not isinstance(one, _Sha256) or not isinstance(other, _Sha256):
        one.update(data)
        other.update(others)
        return
    first, start = one.begin(data)
    second, begin = other.begin(others)
    blocks = min(len(first) - start, len(second) - begin) // _BLOCK_BYTES
    _kernels().hash_blocks_of_two(one.state, first, start, other.state, second, begin, blocks)
    one.end(first, start + blocks * _BLOCK_BYTES)
    other.end(second, begin + blocks * _BLOCK_BYTES)


class _Sha256:
    """A hash whose blocks are compressed by our own kernel; what is left of a block waits for the next addition."""

    def __init__(self) -> None:
        self.state = np.array(_kernels().INITIAL, dtype=np.uint32)
        self._rest = b""
        self._length = 0

    def update(self, data: Bytes, /) -> None:
        self.end(*self.begin(data))

    def begin(self, data: Bytes) -> tuple[NDArray[np.uint8], int]:
        """Complete the block that waits; the data, and from where on they still have to be added with `end`."""
        view = memoryview(data).cast("B")
        self._length += len(view)
        array = np.frombuffer(view, dtype=np.uint8) if view else np.empty(0, dtype=np.uint8)
        if not self._rest:
            return array, 0
        taken = min(_BLOCK_BYTES - len(self._rest), len(view))
        self._rest += bytes(view[:taken])
        if len(self._rest) == _BLOCK_BYTES:
            _kernels().hash_blocks(self.state, np.frombuffer(self._rest, dtype=np.uint8), 0, 1)
            self._rest = b""
        return array, taken

    def end(self, data: NDArray[np.uint8], start: int) -> None:
        """Add whole blocks from `start` on, and keep the rest."""
        blocks = (len(data) - start) // _BLOCK_BYTES
        if blocks:
            _kernels().hash_blocks(self.state, data, start, blocks)
        self._rest += data[start + blocks * _BLOCK_BYTES :].tobytes()

    def hexdigest(self) -> str:
        zeros = (55 - self._length) % _BLOCK_BYTES
        last = self._rest + b"\x80" + bytes(zeros) + (8 * self._length).to_bytes(8, "big")
        state: NDArray[Any] = self.state.copy()
        _kernels().hash_blocks(state, np.frombuffer(last, dtype=np.uint8), 0, len(last) // _BLOCK_BYTES)
        return state.astype(">u4").tobytes().hex()


@cache
def _is_usable() -> bool:
    """Whether the processor has the instructions, and what they give here is what hashlib gives."""
    if not _kernels().is_available():
        return False
    one, other = _Sha256(), _Sha256()
    data = bytes(range(250)) * 12
    update_both(one, memoryview(bytearray(data)), other, data[:1000])
    found = one.hexdigest(), other.hexdigest()
    return found == (hashlib.sha256(data).hexdigest(), hashlib.sha256(data[:1000]).hexdigest())


@cache
def _kernels() -> Any:
    # Imported here: reading a dataset hashes nothing that is worth loading a compiler for.
    from fmristream.signal import sha256

    return sha256
