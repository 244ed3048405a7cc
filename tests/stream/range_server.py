"""A web server of ranges, on an event loop of its own, that does to answers what a script says."""

import asyncio
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Fault = Literal[
    "503", "503 retry-after", "429", "429 retry-after", "500",
    "401", "403",  # credentials that are no good any more
    "stall",  # half a body, then nothing
    "silent",  # no answer
    "trickle",  # some bytes a second
    "reset",  # half a body, then a reset
    "short",  # half a body, announced as that
    "cut",  # half a body, announced as all of it
    "whole",  # 200 with everything
    "shifted",  # another range, said in its header
    "mislabelled",  # another range under the right header
    "flip",  # one bit
    "replaced",  # another version of the object, with its ETag
]  # fmt: skip
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass
class RangeServer:
    """Files below a folder. `choose` says what happens to a request for frames, given its number."""

    root: Path
    choose: Callable[[int], Fault | None] = lambda number: None
    applies: Callable[[str], bool] = lambda path: True
    latency_s: float = 0.0
    stall_s: float = 3.0
    url: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)  # path, start, stop
    sent_bytes: int = 0  # asked for
    now: int = 0  # answers being sent, and the most there were
    most: int = 0
    held_bytes: int = 0
    most_held_bytes: int = 0

    def forget(self) -> None:
        self.asked.clear()
        self.sent_bytes = self.most = self.most_held_bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head.decode(), writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> bool:
        path = head.split(" ", 2)[1].lstrip("/")
        file = self.root / path
        if not file.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return True
        data = _File(file)
        found = re.search(r"[Rr]ange: bytes=(\d+)-(\d+)", head)
        start, stop = (int(found[1]), min(int(found[2]) + 1, len(data))) if found else (0, len(data))
        if not self.applies(path):
            return await self._send(writer, data, start, stop, bool(found), None)
        self.asked.append((path, start, stop))
        fault = self.choose(len(self.asked))
        self.sent_bytes += stop - start
        self.now += 1
        self.held_bytes += stop - start
        self.most, self.most_held_bytes = max(self.most, self.now), max(self.most_held_bytes, self.held_bytes)
        try:
            await asyncio.sleep(self.latency_s)
            return await self._send(writer, data, start, stop, bool(found), fault)
        finally:
            self.now -= 1
            self.held_bytes -= stop - start

    async def _send(  # noqa: C901 - one branch a fault
        self, writer: asyncio.StreamWriter, data: "_File", start: int, stop: int, is_range: bool, fault: Fault | None
    ) -> bool:
        if fault is not None and fault[:3].isdecimal():
            later = "Retry-After: 1\r\n" if "retry-after" in fault else ""
            writer.write(f"HTTP/1.1 {fault[:3]} Busy\r\n{later}Content-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return True
        if fault == "silent":
            await asyncio.sleep(self.stall_s)
            return False
        tag, body, begin = '"one"', data[start:stop], start
        if fault == "replaced":
            tag, body = '"two"', bytes(byte ^ 0x55 for byte in body)
        elif fault == "flip":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 4]) + body[len(body) // 2 + 1 :]
        elif fault in ("shifted", "mislabelled"):
            by = -8 if start >= 8 else 8
            body = data[start + by : stop + by]
            begin = start + by if fault == "shifted" else start
        elif fault == "short":
            body = body[: len(body) // 2]
        elif fault == "whole":
            body, is_range = data[0 : len(data)], False
        status, place = (
            "206 Partial Content",
            f"Content-Range: bytes {begin}-{begin + (stop - start) - 1}/{len(data)}\r\n",
        )
        if not is_range:
            status, place = "200 OK", ""
        head = f"HTTP/1.1 {status}\r\nETag: {tag}\r\n{place}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode())
        if fault in ("stall", "reset", "cut", "trickle"):
            writer.write(body[: len(body) // 2])
            await writer.drain()
            if fault == "stall":
                await asyncio.sleep(self.stall_s)
            for byte in body[len(body) // 2 :] if fault == "trickle" else b"":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
            if fault == "reset":
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        writer.write(body)
        await writer.drain()
        return True


class _File:
    """A file's bytes, read as they are sliced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            file.seek(place.start)
            return file.read(max(0, place.stop - place.start))


def sometimes(rate: float, *faults: Fault, seed: int = 0) -> Callable[[int], Fault | None]:
    """One of the faults for a share of all requests."""
    draw = random.Random(seed)
    return lambda number: draw.choice(faults) if draw.random() < rate else None


def frames_only(path: str) -> bool:
    """Whether an object holds frames."""
    return "/residual/c/" in f"/{path}" or "/bold/c/" in f"/{path}"


@contextmanager
def range_server(root: Path) -> Iterator[RangeServer]:
    """A running server of the files below a folder."""
    server = RangeServer(root)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=2**16)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        listening.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close one turn later

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), name="range-server")
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
