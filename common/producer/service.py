"""The producer as a service: its parts built, started, drained and closed."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress

from common.amqp.link import keep_up
from common.amqp.topology import queue_names
from common.config import ProducerSettings, read_again
from common.errors import SettingError
from common.health import HEALTH_LIMITS, Health
from common.http.parser import Limits
from common.http.phases import ServerLimits
from common.http.pool import MOST_LEAVING
from common.http.server import HttpServer
from common.http.turns import Turns
from common.process import end, first_of, raise_file_limit, read_file
from common.producer.api import Api
from common.producer.intake import PARSED_FACTOR
from common.producer.metrics import Counters
from common.producer.publisher import Publisher, PublisherLimits
from common.producer.tls import Certificate

log = logging.getLogger("predlog.producer")

SWEEP_SECONDS = 0.1
ALL_UP_SECONDS = 5.0  # for every partition to get its connection; after that, the start waits no longer
FILES_BESIDES_CONNECTIONS = 64 + MOST_LEAVING
MAX_UNCONFIRMED_BYTES = 64 * 1024 * 1024  # of events without a confirm: what a blocked broker can cost in memory
BUFFERED_BYTES = 256 * 1024 * 1024  # of incomplete requests and unread answers, over all connections, at least
LAST_ANSWERS_SECONDS = 0.1  # for sending the answers that end a drain


def limits_of(settings: ProducerSettings, most_connections: int) -> ServerLimits:
    return ServerLimits(
        request=Limits(body_bytes=settings.max_body_bytes),
        connections=min(settings.max_connections, most_connections),
        # Room for the largest batch while it is read, and for two bodies that arrive meanwhile.
        buffered_bytes=max(BUFFERED_BYTES, (PARSED_FACTOR + 2) * settings.max_body_bytes),
        idle_seconds=settings.idle_timeout_ms / 1000,
    )


def publisher_limits_of(settings: ProducerSettings) -> PublisherLimits:
    """Return the limits of one partition's publisher, its share of all."""
    return PublisherLimits(
        max(1, settings.max_unconfirmed // settings.partitions),
        max(1, MAX_UNCONFIRMED_BYTES // settings.partitions),
        settings.confirm_timeout_ms / 1000,
        settings.events_per_message,
    )


def _most_connections(settings: ProducerSettings) -> int:
    links = 2 * settings.partitions  # while a partition reconnects, it can have two
    most = raise_file_limit() - FILES_BESIDES_CONNECTIONS - links
    if most < settings.max_connections:
        log.warning("the limit on open files allows %d connections, not %d (ulimit -n)", most, settings.max_connections)
    return most


class Producer:
    """One producer process. Call `start`, `run` until something ends it, `drain` and `close`.

    `rows` are the metrics of every worker, its own among them. `shared_port` is one reserved for several workers.
    `inherited` is a listening socket that outlives the process.
    """

    def __init__(
        self,
        settings: ProducerSettings,
        counters: Counters,
        rows: Sequence[Sequence[float]] = (),
        shared_port: int | None = None,
        inherited: socket.socket | None = None,
    ) -> None:
        self._settings = settings
        self._shared_port = shared_port
        self._inherited = inherited
        self._certificate = Certificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        call_soon, limits = asyncio.get_running_loop().call_soon, publisher_limits_of(settings)
        several = settings.partitions > 1
        self._publishers = [
            Publisher(name, limits, time.monotonic, time.time, call_soon, counters, k if several else None)
            for k, name in enumerate(queue_names(settings.queue_name, settings.partitions))
        ]
        turns = Turns(call_soon, time.monotonic)
        self._api = Api(settings, self._publishers, counters, turns, rows or (counters.metrics.values,))
        self._server = HttpServer(limits_of(settings, _most_connections(settings)), self._api, turns)
        self._health = HttpServer(HEALTH_LIMITS, Health(self._api.not_ready, self._api.render_metrics))
        self._tasks: list[asyncio.Task[None]] = []
        counters.metrics.values[counters.start_time] = time.time()

    async def start(self, replaces: bool = False) -> int:
        """Connect and listen; return the port. Raise StartupError.

        A worker that `replaces` another waits up to ALL_UP_SECONDS for its broker before it listens, as others
        serve the clients meanwhile. So does one with an inherited socket, whose clients wait in the queue.
        """
        settings = self._settings
        self._tasks = [
            asyncio.create_task(self._tick()),
            *map(asyncio.create_task, map(self._keep_up, self._publishers)),
        ]
        asyncio.get_running_loop().call_later(ALL_UP_SECONDS, self._api.end_start)
        if settings.health_port:
            await self._health.listen(settings.health_host, settings.health_port, reuse_port=settings.workers > 1)
        if replaces or self._inherited is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(ALL_UP_SECONDS):
                    for publisher in self._publishers:
                        await first_of(publisher.was_up, *self._tasks)
        tls = self._certificate.context if self._certificate is not None else None
        wanted = settings.http_port if self._shared_port is None else self._shared_port
        port = await self._server.listen(settings.http_host, wanted, tls, settings.workers > 1, self._inherited)
        host = f"[{settings.http_host}]" if ":" in settings.http_host else settings.http_host
        log.info("POST to %s://%s:%d/process, pages at /docs", "https" if tls else "http", host, port)
        return port

    async def run(self, stop: asyncio.Event) -> None:
        """Wait for `stop`. Raise StartupError if the first connection fails for a reason that waiting does not fix."""
        await first_of(stop, *self._tasks)

    async def drain(self) -> None:
        """Stop listening, finish what was accepted, and answer what is late. The health port answers until `close`."""
        settings = self._settings
        log.info("stopping: %d event(s) in flight", self._unconfirmed())
        self._api.announce_stop()
        if settings.drain_delay_ms:  # a load balancer sees /readyz fail, and sends no more
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_delay_ms / 1000):
                    await first_of(asyncio.Event(), *self._tasks)
        await self._server.stop_listening()
        try:
            await asyncio.wait_for(self._server.drained(), settings.shutdown_timeout_ms / 1000)
        except TimeoutError:
            if self._unconfirmed():
                log.warning("%d event(s) had no confirm in time; answered 504", self._unconfirmed())
            for publisher in self._publishers:
                publisher.close()
            await asyncio.sleep(LAST_ANSWERS_SECONDS)

    async def close(self) -> None:
        """End everything, in any state."""
        self._server.abort()
        await end(*self._tasks)
        self._health.abort()
        log.info("stopped")

    def reload(self) -> None:
        """Load certificate and secrets again, or keep the old ones. A new AMQP_URL is for the next connection."""
        if self._certificate is not None:
            self._certificate.reload()
        try:
            settings = read_again(self._settings, read_file)
            self._api.reload_tokens(settings.api_token)
        except SettingError as error:
            log.error("%s; the old secrets stay", error)
        else:
            self._settings = settings

    def _keep_up(self, publisher: Publisher) -> Coroutine[object, object, None]:
        return keep_up(lambda: self._settings.amqp_url, publisher.name, publisher, publisher.limits.unconfirmed_bytes)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._api.tick(len(self._server.connections))

    def _unconfirmed(self) -> int:
        return sum(publisher.unconfirmed for publisher in self._publishers)
