"""A raw HTTP/1.1 client: keep-alive, pipelining, bounded waits, and no exception in place of an answer."""

import asyncio
import time
from collections import deque
from typing import NamedTuple, cast
from urllib.parse import urlsplit

from scripts.load.ledger import CUT

CONNECT_TIMEOUT_SECONDS = 5.0


class Answer(NamedTuple):
    status: int  # CUT when the connection ended first
    body: bytes
    seconds: float


class Target(NamedTuple):
    host: str
    port: int
    path: str
    token: str = ""

    @classmethod
    def parse(cls, url: str, token: str = "") -> "Target":
        """Parse `http://host:port[/path]`; the path is /process unless given. Raise ValueError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url: {url!r} is not http://HOST:PORT")
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/") or "/process", token)

    def request(self, body: bytes, key: bytes | None = None, content_type: str = "application/json") -> bytes:
        lines = [
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {content_type}".encode(),
            *([b"Authorization: Bearer " + self.token.encode()] if self.token else []),
            *([b"Idempotency-Key: " + key] if key is not None else []),
            b"Content-Length: %d\r\n\r\n" % len(body),
        ]
        return b"\r\n".join(lines) + body


class Connection(asyncio.Protocol):
    """One connection; answers belong to requests in order, and every request gets one."""

    def __init__(self, answer_timeout_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = answer_timeout_seconds
        self._waiting: deque[tuple[asyncio.Future[Answer], float]] = deque()
        self._received = bytearray()
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, target: Target, answer_timeout_seconds: float) -> "Connection":
        """Connect. Raise OSError, of which TimeoutError is one."""
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: cls(answer_timeout_seconds), target.host, target.port
            )
        return connection

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> "asyncio.Future[Answer]":
        """Send a request; return the future of its answer, which is CUT if the connection ends."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_result(Answer(CUT, b"", 0.0))
            return future
        self._waiting.append((future, time.monotonic()))
        self._transport.write(request)
        return future

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        self._check_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._watch is not None:
            self._watch.cancel()
        while self._waiting:
            self._settle(CUT, b"")

    def data_received(self, data: bytes) -> None:
        self._received += data
        start = 0
        while (end := self._received.find(b"\r\n\r\n", start)) >= 0:
            head = bytes(self._received[start:end])
            status = int(head[9:12])
            length = 0
            if (at := head.lower().find(b"\r\ncontent-length:")) >= 0:
                length = int(head[at + 17 :].split(b"\r\n", 1)[0])
            if len(self._received) < end + 4 + length:
                break
            if status >= 200:  # 1xx is not the answer yet
                self._settle(status, bytes(self._received[end + 4 : end + 4 + length]))
            start = end + 4 + length
        del self._received[:start]

    def _settle(self, status: int, body: bytes) -> None:
        if not self._waiting:
            return  # an answer nobody asked for, such as 408 on an idle connection
        future, started = self._waiting.popleft()
        if not future.done():
            future.set_result(Answer(status, body, time.monotonic() - started))

    def _check_timeout(self) -> None:
        if self._waiting and time.monotonic() - self._waiting[0][1] > self._timeout:
            self.close()
        self._watch = self._loop.call_later(min(0.25, self._timeout / 4), self._check_timeout)
