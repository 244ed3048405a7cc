"""Archives made by the standard library, and damaged or lying ones made from them byte by byte."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping


def zip_bytes(files: Mapping[str, bytes], *, method: int = zipfile.ZIP_DEFLATED, streamed: bool = False) -> bytes:
    """A zip archive; `streamed` writes it as to a pipe, with sizes behind the data."""
    sink = _Pipe() if streamed else io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data, compress_type=method)
    return sink.getvalue()


def tar_bytes(files: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT, compressed: bool = False) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(sink.getvalue(), 6, mtime=0) if compressed else sink.getvalue()


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar archive of entries as they are given, however odd."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for entry, data in entries:
            archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


class ZipEntry:
    """One member of a hand-made zip; what the directory claims may differ from what is there."""

    def __init__(
        self, name: bytes, data: bytes, *, method: int = 0, flags: int = 0, mode: int = 0, **claims: int
    ) -> None:
        packer = zlib.compressobj(6, wbits=-15)
        self.name = name
        self.packed = data if method != 8 else packer.compress(data) + packer.flush()
        self.local = {
            "flags": flags,
            "method": method,
            "crc": zlib.crc32(data),
            "stored": len(self.packed),
            "size": len(data),
        }
        self.claimed = {**self.local, "mode": mode, "offset": -1, **claims}


def hand_made_zip(entries: list[ZipEntry], *, comment: bytes = b"", **end: int) -> bytes:
    body = b""
    directory = b""
    for entry in entries:
        offset = len(body)
        local, claimed = entry.local, entry.claimed
        body += b"PK\3\4" + struct.pack(
            "<5H3I2H",
            20,
            local["flags"],
            local["method"],
            0,
            0,
            local["crc"],
            local["stored"],
            local["size"],
            len(entry.name),
            0,
        )
        body += entry.name + entry.packed
        directory += b"PK\1\2" + struct.pack(
            "<6H3I5H2I", 3 << 8 | 20, 20, claimed["flags"], claimed["method"], 0, 0, claimed["crc"], claimed["stored"],
            claimed["size"], len(entry.name), 0, 0, 0, 0, claimed["mode"] << 16,
            offset if claimed["offset"] < 0 else claimed["offset"],
        ) + entry.name  # fmt: skip
    says = {"count": len(entries), "bytes": len(directory), "start": len(body), "disk": 0} | end
    return body + directory + b"PK\5\6" + struct.pack(
        "<4H2IH", says["disk"], 0, says["count"], says["count"], says["bytes"], says["start"], len(comment)
    ) + comment  # fmt: skip


class _Pipe(io.RawIOBase):
    """A sink that cannot seek."""

    def __init__(self) -> None:
        self._data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._data += data
        return len(data)

    def getvalue(self) -> bytes:
        return bytes(self._data)
