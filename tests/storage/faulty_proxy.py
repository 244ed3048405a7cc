"""An HTTP proxy in front of an S3 server that counts what is asked and does to answers what networks do."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args
from urllib.parse import parse_qs, urlsplit

Fault = Literal[
    "503",  # asked to come back later, without saying when
    "503 retry-after",
    "silent",  # the connection stays, no answer comes
    "reset",  # the server never hears of it
    "lost",  # the server does it, nobody hears of that
    "short",  # half a body, then the connection ends
    "stall",  # half a body, then silence
    "slow",  # the body comes in ten pieces
    "flip",  # one bit of the body is another one
]
FAULTS: tuple[Fault, ...] = get_args(Fault)

_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: the verb of the S3 API, and of which object."""

    number: int  # from 1
    verb: str
    path: str

    @classmethod
    def of(cls, number: int, method: str, target: str) -> "Request":
        split = urlsplit(target)
        return cls(number, _verb(method, split.path, parse_qs(split.query, keep_blank_values=True)), split.path)


def _verb(method: str, path: str, query: dict[str, list[str]]) -> str:
    if "uploads" in query:
        return "LIST uploads" if method == "GET" else "POST begin upload"
    if "uploadId" in query:
        return {"PUT": "PUT part", "POST": "POST complete", "DELETE": "DELETE upload"}[method]
    if method == "GET" and ("list-type" in query or "prefix" in query):
        return "LIST"
    return method


@dataclass(slots=True)
class Proxy:
    """Counts per verb; `choose` says what happens to a request, None for nothing."""

    endpoint: str
    choose: Callable[[Request], Fault | tuple[int, bytes] | None] = lambda request: None
    asked: list[Request] = field(default_factory=list)
    stall_s: float = 3.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def counts(self) -> Counter[str]:
        return Counter(request.verb for request in self.asked)

    def next(self, method: str, target: str) -> tuple[Request, Fault | tuple[int, bytes] | None]:
        with self._lock:
            request = Request.of(len(self.asked) + 1, method, target)
            self.asked.append(request)
            return request, self.choose(request)

    def forget(self) -> None:
        with self._lock:
            self.asked.clear()


def sometimes(rate: float, *faults: Fault, seed: int = 0) -> Callable[[Request], Fault | None]:
    """One of the faults for a share of all requests."""
    draw = random.Random(seed)
    return lambda request: draw.choice(faults) if draw.random() < rate else None


def once(
    fault: Fault | tuple[int, bytes], verb: str, *, times: int = 1
) -> Callable[[Request], Fault | tuple[int, bytes] | None]:
    """The fault for the first requests with this verb."""
    left = [times]

    def choose(request: Request) -> Fault | tuple[int, bytes] | None:
        if request.verb != verb or not left[0]:
            return None
        left[0] -= 1
        return fault

    return choose


@contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    """A running proxy in front of `upstream`."""
    host, port = urlsplit(upstream).hostname, urlsplit(upstream).port

    class Handler(_Handler):
        address = (host, port)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True  # clients keep connections open
    Handler.proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="faulty-proxy")
    thread.start()
    try:
        yield Handler.proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Hands one connection's requests on, headers as they came: they are signed."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy
    address: tuple[str | None, int | None]

    def _serve(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, fault = self.proxy.next(self.command, self.path)
        if fault in ("silent", "reset"):
            time.sleep(self.proxy.stall_s if fault == "silent" else 0)
            self._reset()
        elif isinstance(fault, tuple):
            self._answer(fault[0], [("Content-Type", "application/xml")], fault[1])
        elif fault in ("503", "503 retry-after"):
            later = [("Retry-After", "1")] if fault == "503 retry-after" else []
            self._answer(503, [("Content-Type", "application/xml"), *later], _BUSY)
        else:
            status, headers, body = self._upstream(sent)
            if fault == "lost":
                self._reset()
            else:
                self._answer(status, headers, _flipped(body) if fault == "flip" else body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _upstream(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(str(self.address[0]), self.address[1], timeout=120)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
            length = answer.getheader("Content-Length")
            if self.command == "HEAD" and length is not None:
                kept.append(("Content-Length", length))
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("short", "stall") and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(self.proxy.stall_s)
            self._reset()
        elif fault == "slow" and body:
            step = -(-len(body) // 10)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)

    def _reset(self) -> None:
        # With this option closing sends a reset instead of the rest.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError, OSError):  # the client went away, or a fault closed the connection
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (ConnectionError, ValueError, OSError):
            return

    def log_message(self, format: str, *args: object) -> None:
        return


def _flipped(body: bytes) -> bytes:
    if not body:
        return body
    changed = bytearray(body)
    changed[len(body) // 2] ^= 1
    return bytes(changed)
