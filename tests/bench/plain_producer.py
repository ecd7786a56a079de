"""predlog's producer without its fast lane: the same HTTP server and API, but each event is a `channel.basic_publish`.

For the benchmark only: it shows what the fast lane buys. It has no reconnect, no window and no drain.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import UTC, datetime
from typing import cast

import aiormq
from aiormq.channel import Channel
from pamqp.commands import Basic

from common.amqp.topology import QUEUE_ARGUMENTS, declare
from common.config import ProducerSettings, load, parser_for
from common.errors import Unavailable
from common.http.parser import Limits
from common.http.phases import ServerLimits
from common.http.server import HttpServer
from common.http.turns import Turns
from common.process import on_stop, read_file, run
from common.producer.api import Api
from common.producer.metrics import Counters
from common.producer.publisher import Publication, Publisher


class PlainPublisher:
    """What the API needs of a publisher."""

    connected = True
    is_blocked = is_stalled = False
    links_lost = 0
    unconfirmed_bytes = 0

    def __init__(self, channel: Channel, queue_name: str) -> None:
        self._channel = channel
        self._queue_name = queue_name
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def unconfirmed(self) -> int:
        return len(self._tasks)

    def trouble(self) -> None:
        return None

    def sweep(self) -> None: ...

    def publish(self, event: Publication) -> None:
        task = asyncio.create_task(self._publish(event))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, event: Publication) -> None:
        began = time.monotonic()
        properties = Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            message_id=event.message_id.decode(),
            timestamp=datetime.now(UTC),
        )
        # wait=False does not wait until the socket has taken the frames: faster. The confirm is awaited in either case.
        confirm = await self._channel.basic_publish(
            event.body, routing_key=self._queue_name, properties=properties, mandatory=True, wait=False
        )
        if isinstance(confirm, Basic.Ack):
            event.confirmed(time.monotonic() - began)
        else:
            event.failed(Unavailable("nacked", "the broker could not take the event"))


async def serve(settings: ProducerSettings) -> None:
    stop = on_stop()
    connection = await aiormq.connect(settings.amqp_url)
    channel = await connection.channel()
    await declare(channel, settings.queue_name, QUEUE_ARGUMENTS)
    counters = Counters()
    publisher = cast(Publisher, PlainPublisher(cast(Channel, channel), settings.queue_name))
    turns = Turns(asyncio.get_running_loop().call_soon, time.monotonic)
    api = Api(settings, [publisher], counters, turns, (counters.metrics.values,))
    limits = ServerLimits(
        request=Limits(body_bytes=settings.max_body_bytes),
        connections=20_000,
        pipelined=8,
        buffered_bytes=2**28,
        head_seconds=10.0,
        body_seconds=30.0,
        idle_seconds=75.0,
        write_seconds=30.0,
    )
    server = HttpServer(limits, api, turns)
    await server.listen(settings.http_host, settings.http_port)
    while not stop.is_set():
        api.tick(len(server.connections))
        await asyncio.sleep(0.1)
    server.abort()
    await connection.close()


if __name__ == "__main__":
    flags = parser_for(ProducerSettings, "plain_producer", "predlog's producer on plain aiormq").parse_args([])
    settings = load(ProducerSettings, flags, dict(os.environ), read_file)
    sys.exit(run("plain_producer", lambda: serve(settings)))
