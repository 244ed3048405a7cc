"""A web server for one folder that is as far away as one likes: latency per request, bandwidth per connection, counts.

    python tools/shaping_server.py FOLDER [--port 8000] [--latency-ms 50] [--megabytes-per-s 80]

GET (whole or one range) and HEAD of files on the loopback interface. `GET /-/counts` says what was asked for since the
last `POST /-/reset`; neither waits nor counts. The latency is waited once before every answer, also of names that are
not there; what a connection sends never exceeds its bandwidth. Setting up a connection costs nothing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PIECE = 256 * 2**10  # bytes: 3 ms at 80 MB/s, above what asyncio's clock resolves
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_REASONS = {
    200: "OK",
    206: "Partial Content",
    404: "Not Found",
    405: "Method Not Allowed",
    416: "Range Not Satisfiable",
}
_CONTROL = "/-/"


@dataclass(kw_only=True)
class Counts:
    """What was asked for and sent."""

    requests: int = 0
    not_found: int = 0
    bytes: int = 0  # of bodies that were sent
    connections: int = 0
    in_flight: int = 0
    most_in_flight: int = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How far away the server is."""

    latency_s: float = 0.0
    bytes_per_s: float | None = None  # of one connection; None: as fast as it goes


class ShapingServer:
    """Serves a folder; made and closed inside one event loop."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = folder.resolve()
        self.shape = shape
        self.counts = Counts()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self, port: int = 0) -> int:
        """Listen on the loopback interface; the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Listen no more, and hang up."""
        if self._server is not None:
            self._server.close()
        for writer in self._connections.values():
            writer.transport.abort()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        self.counts.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while await self._answer(reader, writer):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        del self._connections[task]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether another may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        await reader.readexactly(int(headers.get("content-length", 0)))
        path = urllib.parse.unquote(target.partition("?")[0])
        if path.startswith(_CONTROL):
            await self._control(path, writer)
            return True
        self.counts.requests += 1
        self.counts.in_flight += 1
        self.counts.most_in_flight = max(self.counts.most_in_flight, self.counts.in_flight)
        try:
            await asyncio.sleep(self.shape.latency_s)
            await self._file(method, path, headers.get("range"), writer)
        finally:
            self.counts.in_flight -= 1
        return headers.get("connection", "").lower() != "close"

    async def _control(self, path: str, writer: asyncio.StreamWriter) -> None:
        told = asdict(self.counts)
        if path == f"{_CONTROL}reset":
            self.counts = Counts(in_flight=self.counts.in_flight, most_in_flight=self.counts.in_flight)
        body = json.dumps(told).encode()
        writer.write(_head(200, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]) + body)
        await writer.drain()

    async def _file(self, method: str, path: str, wanted: str | None, writer: asyncio.StreamWriter) -> None:
        found = self._found(path) if method in ("GET", "HEAD") else None
        if found is None:
            self.counts.not_found += 1
            writer.write(_head(404 if method in ("GET", "HEAD") else 405, [("Content-Length", "0")]))
            await writer.drain()
            return
        about = found.stat()
        facts = [("Accept-Ranges", "bytes"), ("ETag", f'"{about.st_mtime_ns:x}-{about.st_size:x}"')]
        part = _part(wanted, about.st_size)
        if part is None:
            writer.write(_head(416, [*facts, ("Content-Range", f"bytes */{about.st_size}"), ("Content-Length", "0")]))
            await writer.drain()
            return
        start, stop = part
        if wanted:
            facts.append(("Content-Range", f"bytes {start}-{stop - 1}/{about.st_size}"))
        writer.write(_head(206 if wanted else 200, [*facts, ("Content-Length", str(stop - start))]))
        if method == "GET":
            await self._send(found, start, stop, writer)
        await writer.drain()

    def _found(self, path: str) -> Path | None:
        """A file inside the folder."""
        found = (self.folder / path.lstrip("/")).resolve()
        return found if found.is_file() and found.is_relative_to(self.folder) else None

    async def _send(self, path: Path, start: int, stop: int, writer: asyncio.StreamWriter) -> None:
        began, sent = asyncio.get_running_loop().time(), 0
        with open(path, "rb") as file:
            while start + sent < stop:
                data = os.pread(file.fileno(), min(_PIECE, stop - start - sent), start + sent)
                if not data:
                    raise ConnectionError(f"{path} was cut short while it was sent")
                sent += len(data)
                if self.shape.bytes_per_s is not None:  # a piece arrives when its last byte does
                    due = began + sent / self.shape.bytes_per_s
                    await asyncio.sleep(max(due - asyncio.get_running_loop().time(), 0))
                writer.write(data)
                await writer.drain()
                self.counts.bytes += len(data)


def _head(status: int, headers: Sequence[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _part(wanted: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of what is asked for; None where no byte of it exists."""
    if wanted is None:
        return 0, size
    match = _RANGE.fullmatch(wanted)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":  # the last so many
        return (max(size - int(match[2]), 0), size) if int(match[2]) else None
    start = int(match[1])
    stop = min(int(match[2]) + 1, size) if match[2] else size
    return (start, stop) if start < stop else None


# Around it


@contextlib.contextmanager
def in_thread(folder: Path, shape: Shape) -> Iterator[tuple[str, ShapingServer]]:
    """(URL, server) of a server in a thread of this process, for tests."""
    loop = asyncio.new_event_loop()
    server = ShapingServer(folder, shape)
    thread = threading.Thread(target=loop.run_forever, name="shaping-server")
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield f"http://127.0.0.1:{port}", server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def in_process(folder: Path, *, latency_ms: float, megabytes_per_s: float) -> Iterator[str]:
    """URL of a server in a process of its own, so that its work is not the client's."""
    words = [str(folder), "--latency-ms", str(latency_ms), "--megabytes-per-s", str(megabytes_per_s)]
    with subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def counts_of(url: str, *, reset: bool = False) -> Counts:
    """What the server at the URL counted so far."""
    with urllib.request.urlopen(f"{url}{_CONTROL}{'reset' if reset else 'counts'}") as answer:
        return Counts(**json.load(answer))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; the first line of output is the URL."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="any free one where not given")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--megabytes-per-s", type=float, default=80.0, help="of one connection; 0: no limit")
    chosen = parser.parse_args(arguments)
    limit = chosen.megabytes_per_s * 1e6 or None
    server = ShapingServer(chosen.folder, Shape(latency_s=chosen.latency_ms / 1000, bytes_per_s=limit))

    async def serve() -> None:
        port = await server.start(chosen.port)
        print(f"http://127.0.0.1:{port}", flush=True)
        await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
