"""How long a client's bytes keep the event loop from everyone else, measured inside a server of the whole API.

The measure is the CPU time between two rounds of the loop, since wall-clock time includes what other programs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import uvloop

from common.config import ProducerSettings
from common.http.connection import Connection
from common.http.parser import Limits
from common.http.phases import ServerLimits
from common.http.server import HttpServer
from common.http.turns import Turns
from common.process import Collector
from common.producer.api import Api
from common.producer.metrics import Counters
from common.producer.publisher import Publication, Publisher, PublisherLimits

_READ_BYTES = 1 << 18  # what uvloop reads at once
_KEPT_BYTES = 1 << 20  # of an answer: a large bytearray that grows would be a delay of our own
MOST_SECONDS = 0.05  # the contract: no request delays another connection's answer by more
_LIMITS = ServerLimits(
    request=Limits(),
    connections=1000,
    pipelined=32,
    buffered_bytes=2**28,
    head_seconds=60.0,
    body_seconds=60.0,
    idle_seconds=60.0,
    write_seconds=60.0,
)


class ConfirmingPublisher(Publisher):
    """A publisher without a broker: each event is confirmed in the next round of the loop."""

    def publish(self, event: Publication) -> None:
        asyncio.get_running_loop().call_soon(event.confirmed)

    def has_room_for_batch(self) -> bool:
        return True


class Delay(NamedTuple):
    """The effect of the bytes."""

    seconds: float  # of CPU, the longest round of the loop
    answers: bytes


def delay_of(streams: Sequence[bytes], timeout_seconds: float = 60.0) -> Delay:
    """Send each stream on a connection of its own, all at once, and wait for the answers."""
    gc.collect()
    try:
        return uvloop.run(_measure(streams, timeout_seconds))
    finally:
        gc.enable()


async def _measure(streams: Sequence[bytes], timeout_seconds: float) -> Delay:
    loop = asyncio.get_running_loop()
    Collector(loop)
    settings, counters = ProducerSettings(), Counters()
    limits = PublisherLimits(4096, 2**26, 10.0, 64)
    publisher = ConfirmingPublisher("q", limits, time.monotonic, time.time, loop.call_soon, counters)
    publisher.health.up(time.monotonic())
    turns = Turns(loop.call_soon, time.monotonic)
    api = Api(settings, [publisher], counters, turns, (counters.metrics.values,))
    server = HttpServer(_LIMITS, api, turns)
    longest = 0.0
    last: float | None = None
    over = False

    def probe() -> None:
        nonlocal longest, last
        now = time.thread_time()
        if last is not None:
            longest = max(longest, now - last)
        last = now
        if not over:
            loop.call_soon(probe)

    loop.call_soon(probe)
    try:
        async with asyncio.timeout(timeout_seconds):
            answers = await asyncio.gather(*(_exchange(server, stream) for stream in streams))
    finally:
        over = True
        server.abort()
    return Delay(longest, b"".join(answers))


async def _exchange(server: HttpServer, stream: bytes) -> bytes:
    """Return what a client gets that sends a stream, closes its side, and reads to the end."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours:
        for each in (ours, theirs):
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _READ_BYTES)
        await loop.connect_accepted_socket(lambda: Connection(server.state), theirs)
        sending = asyncio.create_task(_send(ours, stream))
        answer = bytearray()
        with contextlib.suppress(ConnectionError):
            while piece := await loop.sock_recv(ours, 1 << 16):
                answer += piece[: _KEPT_BYTES - len(answer)]
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await sending
        return bytes(answer)


async def _send(client: socket.socket, stream: bytes) -> None:
    loop, view = asyncio.get_running_loop(), memoryview(stream)
    for start in range(0, len(view), _READ_BYTES):
        await loop.sock_sendall(client, view[start : start + _READ_BYTES])
    client.shutdown(socket.SHUT_WR)
