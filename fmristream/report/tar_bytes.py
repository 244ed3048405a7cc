"""Bytes of tar members and of .npy headers that depend on nothing but what is in them: no clock, no user, no library version."""

from collections.abc import Sequence

import numpy as np

BLOCK = 512  # bytes; members and headers of a tar begin at multiples of it
RECORD = 20 * BLOCK  # a tar's length is a multiple of it

# What eleven octal digits hold.
MAX_MEMBER_BYTES = 8**11 - 1

_NPY_ALIGN = 64


def member_header(name: str, size: int) -> bytes:
    """The header of a regular file in POSIX ustar: mode 644, nobody's, of 1970.

    Args:
        name: at most 100 ASCII characters.
        size: of the content in bytes, at most MAX_MEMBER_BYTES.
    """
    assert len(name) <= 100, name
    assert 0 <= size <= MAX_MEMBER_BYTES, size
    before = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0%011o\0" % (size, 0)
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167)
    checksum = sum(before) + 8 * ord(" ") + sum(after)  # of the header with blanks where the sum will stand
    return before + b"%06o\0 " % checksum + after


def padding(size: int) -> bytes:
    """Zeros from the end of a member of this size to the next block."""
    return bytes(-size % BLOCK)


def end_of_tar(size: int) -> bytes:
    """What ends a tar whose members take `size` bytes: two blocks of zeros, and zeros up to a whole record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % RECORD)


def npy_header(dtype: "np.dtype[np.generic]", shape: Sequence[int]) -> bytes:
    """What a .npy file of version 1.0 has before its C-ordered values."""
    sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({sizes}), }}"
    length = -(-(10 + len(text) + 1) // _NPY_ALIGN) * _NPY_ALIGN - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.encode("ascii").ljust(length - 1) + b"\n"
