"""Clients: wrk for the highest rate, an asyncio client for a given rate, and plain sockets that stay idle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop

from tests.bench.events import Load, post_request

POST_LUA = Path(__file__).with_name("post.lua")
TICK_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class WrkResult:
    """`requests` counts every answer, `refused` those of status 400 and above, `broken` failed connections."""

    requests: int
    seconds: float
    p50_us: int
    p99_us: int
    max_us: int
    refused: int
    broken: int
    timeouts: int
    statuses: dict[int, int]

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def write_bodies(load: Load, path: Path) -> Path:
    """The file that post.lua reads: one body per line."""
    path.write_bytes(b"\n".join(load.bodies) + b"\n")
    return path


class Wrk:
    """A running wrk: one thread, and connections that each send the next request upon the answer to the last."""

    def __init__(
        self, port: int, bodies_file: Path, connections: int, seconds: int, count_statuses: bool = False
    ) -> None:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(POST_LUA)]
        command += [f"http://127.0.0.1:{port}/process", "--", str(bodies_file)]
        if count_statuses:
            command.append("statuses")
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def stop(self) -> WrkResult:
        """Return the result up to now."""
        self._popen.send_signal(signal.SIGINT)
        return self.result()

    def result(self) -> WrkResult:
        """Wait for the end. Raise RuntimeError when wrk failed."""
        output, _ = self._popen.communicate()
        line = re.search(r"^RESULT (.*)$", output, re.M)
        if line is None:
            raise RuntimeError(f"wrk gave no result:\n{output}")
        values = dict(word.split("=") for word in line[1].split())
        seconds = float(values.pop("seconds"))
        statuses = {int(status): int(count) for status, count in re.findall(r"^STATUS (\d+)=(\d+)$", output, re.M)}
        return WrkResult(seconds=seconds, statuses=statuses, **{name: int(value) for name, value in values.items()})


@dataclass(frozen=True, slots=True)
class Answer:
    """When request `index` should have left (`due`) and its answer came (`at`), by time.perf_counter()."""

    index: int
    status: int
    due: float
    at: float


def drive(
    port: int,
    bodies: Sequence[bytes],
    connections: int,
    rate: float | None = None,
    count: int | None = None,
    request: Callable[[bytes], bytes] = post_request,
) -> list[Answer]:
    """POST `bodies` in rotation (`count` of them; by default each once) over keep-alive connections; all answers.

    With a `rate` (requests/s) it is an open loop: a slow answer does not delay the requests after it, and latency
    counts from the moment a request was due, so that no wait is hidden. Without a rate, all are due at once.
    """
    requests = [request(body) for body in bodies]
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(_drive(port, requests, connections, rate, len(bodies) if count is None else count))
    finally:
        gc.enable()


async def _drive(
    port: int, requests: Sequence[bytes], connections: int, rate: float | None, count: int
) -> list[Answer]:
    loop = asyncio.get_running_loop()
    client = _Client(requests)
    for _ in range(connections):
        _, connection = await loop.create_connection(lambda: _Connection(client), "127.0.0.1", port)
        client.idle.append(connection)
    start = time.perf_counter()
    client.due = [start + i / rate if rate else start for i in range(count)]
    sent_all = False
    while not sent_all:
        sent_all = client.send_due(time.perf_counter())
        await asyncio.sleep(TICK_SECONDS)
    await client.finished.wait()
    for connection in client.idle:
        connection.close()
    return client.answers


class _Client:
    """Requests in order of their due time; each goes to the connection that has been idle for longest."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self.due: list[float] = []
        self.answers: list[Answer] = []
        self.idle: deque[_Connection] = deque()
        self.finished = asyncio.Event()
        self._requests = requests
        self._next = 0

    def send_due(self, now: float) -> bool:
        """Send what is due, as far as connections are idle; return True when nothing is left to send."""
        while self.idle and self._next < len(self.due) and self.due[self._next] <= now:
            self.idle.popleft().send(self._next, self._requests[self._next % len(self._requests)])
            self._next += 1
        return self._next == len(self.due)

    def answered(self, connection: _Connection, index: int, status: int) -> None:
        now = time.perf_counter()
        self.answers.append(Answer(index, status, self.due[index], now))
        self.idle.append(connection)
        self.send_due(now)
        if len(self.answers) == len(self.due):
            self.finished.set()


class _Connection(asyncio.Protocol):
    def __init__(self, client: _Client) -> None:
        self._client = client
        self._index = -1
        self._head = b""  # of the answer that is arriving, until it is whole
        self._status = 0
        self._missing = 0  # bytes of its body that are still to come
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class

    def send(self, index: int, request: bytes) -> None:
        self._index = index
        self._status = 0
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._head += data
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            if length is None:
                raise RuntimeError("an answer without Content-Length")
            self._status, self._missing, self._head = int(head[9:12]), int(length[1]), b""
            data = body
        self._missing -= len(data)
        if self._missing <= 0:
            self._client.answered(self, self._index, self._status)


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """`count` keep-alive connections that have had one answer each and stay open."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            sockets.append(connection)
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            connection.recv(4096)
        yield
    finally:
        for connection in sockets:
            connection.close()


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile, in ms."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000
