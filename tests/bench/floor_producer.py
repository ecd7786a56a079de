"""The floor: the smallest program on uvloop and orjson that reads a request, publishes its event and echoes it.

It is for the benchmark only: what predlog needs beyond it is the price of all that predlog does. It checks neither HTTP
nor the event, and handles no errors. A large body is not copied where it need not be, and what came in one turn of the
loop goes to the broker in one write.
"""

from __future__ import annotations

import asyncio
import os
import time
from itertools import takewhile
from typing import cast

import orjson
import uvloop

from common.amqp.codec import FrameDecoder, Part, PublishEncoder, packed_seconds
from common.process import Collector, keep_freed_memory
from tests.bench.bare_amqp import BareConnection

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
JOINED_BYTES = 16 * 1024  # a smaller body costs less to join to what is before it


class Broker(asyncio.Protocol):
    """The publishing connection, and which client waits for which confirm."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: str, frame_max: int) -> None:
        self._loop = loop
        self._encoder = PublishEncoder(queue, frame_max)
        self._decoder = FrameDecoder()
        self._out: list[Part] = []
        self._waiting: dict[int, tuple[Client, bytes]] = {}
        self._tag = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class

    def publish(self, client: Client, body: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush, len(body) < JOINED_BYTES)
        self._out += self._encoder.encode(body, b"%032x" % self._tag, packed_seconds(int(time.time())))
        self._tag += 1
        self._waiting[self._tag] = client, body

    def _flush(self, joined: bool) -> None:
        self._transport.writelines([b"".join(self._out)] if joined else self._out)
        self._out = []

    def data_received(self, data: bytes) -> None:
        self._decoder.feed(data)
        for tag, multiple, _ in self._decoder.confirms:
            for each in [*takewhile(tag.__gt__, self._waiting), tag] if multiple else (tag,):
                client, body = self._waiting.pop(each)
                client.answer(body)
        self._decoder.confirms.clear()


class Client(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._data = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET"):  # the harness asks whether it is ready
            self.answer(b"{}")
            return
        self._data = data = self._data + data if self._data else data
        start = data.find(b"\r\n\r\n") + 4
        length_at = data.find(b"Content-Length: ") + 16
        if len(data) - start == int(data[length_at : data.find(b"\r", length_at)]):
            self._data = b""
            self._broker.publish(self, orjson.dumps(orjson.loads(memoryview(data)[start:])))

    def answer(self, body: bytes) -> None:
        head = ANSWER % len(body)
        if self._transport.is_closing():
            return
        if len(body) < JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))


async def serve(url: str, queue: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    Collector(loop)
    with BareConnection(url) as connection:
        broker = Broker(loop, queue, connection.frame_max)
        await loop.create_connection(lambda: broker, sock=connection.detach())
        server = await loop.create_server(lambda: Client(broker), "127.0.0.1", port)
        await server.serve_forever()


if __name__ == "__main__":
    keep_freed_memory()
    uvloop.run(serve(os.environ["AMQP_URL"], os.environ["QUEUE_NAME"], int(os.environ["HTTP_PORT"])))
