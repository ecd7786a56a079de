"""The producer as a service: its parts wired, started, drained and closed."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

from common.amqp.link import Link, keep_up
from common.amqp.topology import QUEUE_ARGUMENTS, declare
from common.config import ProducerSettings
from common.errors import StartupError
from common.http.parser import Limits
from common.http.server import HttpServer, ServerLimits
from common.process import end, first_of, on_stop, raise_file_limit
from common.producer.api import Api
from common.producer.metrics import Counters
from common.producer.publisher import Publisher
from common.producer.tls import no_passphrase, tls_context

log = logging.getLogger("predlog.producer")

SWEEP_SECONDS = 0.1
REPLACEMENT_LISTENS_SECONDS = 5.0  # after its start at the latest
FILES_BESIDE_CONNECTIONS = 64
BUFFERED_BYTES = 256 * 1024 * 1024  # of all requests that are still arriving


def _limits(settings: ProducerSettings, most_connections: int) -> ServerLimits:
    request = Limits(
        target_bytes=settings.max_target_bytes,
        head_bytes=settings.max_head_bytes,
        headers=settings.max_headers,
        body_bytes=settings.max_body_bytes,
        chunk_overhead_bytes=settings.max_chunk_overhead_bytes,
    )
    return ServerLimits(
        request=request,
        connections=min(settings.max_connections, most_connections),
        pipelined=settings.max_pipelined,
        buffered_bytes=max(BUFFERED_BYTES, 2 * settings.max_body_bytes),
        head_seconds=settings.head_timeout_ms / 1000,
        body_seconds=settings.body_timeout_ms / 1000,
        idle_seconds=settings.idle_timeout_ms / 1000,
        write_seconds=settings.write_timeout_ms / 1000,
    )


async def serve(
    settings: ProducerSettings,
    counters: Counters,
    rows: Sequence[Sequence[float]] = (),
    port: int | None = None,
    alive_fd: int | None = None,
    replaces: bool = False,
) -> None:
    """Run one producer until a signal, then drain. `port` is one reserved for several workers to share.

    One that `replaces` another listens once it has its broker: the other workers are there for the clients.
    """
    counters.metrics.values[counters.start_time] = time.time()
    loop = asyncio.get_running_loop()
    stop = on_stop(alive_fd)
    most_connections = raise_file_limit() - FILES_BESIDE_CONNECTIONS
    if most_connections < settings.max_connections:
        log.warning(
            "the limit on open files allows %d connections, not %d (ulimit -n)",
            most_connections,
            settings.max_connections,
        )
    tls = tls_context(settings)
    publisher = Publisher(
        settings.queue_name,
        settings.max_unconfirmed,
        settings.max_unconfirmed_bytes,
        settings.confirm_timeout_ms / 1000,
        time.monotonic,
        time.time,
    )
    api = Api(settings, publisher, counters, rows or (counters.metrics.values,))
    server = HttpServer(_limits(settings, most_connections), api)

    def reload_certificate() -> None:
        if tls is None:
            return
        try:
            tls_context(settings)  # first into another context: OpenSSL takes a certificate before it looks at the key
            tls.load_cert_chain(settings.tls_cert, settings.tls_key, no_passphrase)
            log.info("TLS certificate loaded again")
        except (OSError, StartupError) as error:
            log.error("%s; the old one stays", error)

    is_up = asyncio.Event()

    async def prepare(link: Link) -> None:
        await declare(link.channel, settings.queue_name, QUEUE_ARGUMENTS)
        link.lane.on_confirms = publisher.confirms
        link.lane.on_blocked = on_blocked
        publisher.link_up(link.lane, link.frame_max)
        is_up.set()

    def on_blocked(reason: str) -> None:
        publisher.blocked = reason
        if reason:
            log.warning("the broker takes no messages: %s", reason)
        else:
            log.info("the broker takes messages again")

    def on_down(reason: str) -> None:
        publisher.link_down(reason)
        counters.metrics.values[counters.reconnects] += 1.0

    def on_trouble(reason: str) -> None:
        publisher.down = reason

    async def tick() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            api.tick(len(server.connections))

    loop.add_signal_handler(signal.SIGHUP, reload_certificate)
    ticker = asyncio.create_task(tick())
    link = asyncio.create_task(
        keep_up(settings.amqp_url, "producer", prepare, on_down, on_trouble, settings.max_unconfirmed_bytes)
    )
    try:
        if replaces:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPLACEMENT_LISTENS_SECONDS):
                    await first_of(is_up, ticker, link)
        bound = await server.listen(
            settings.http_host, settings.http_port if port is None else port, tls, reuse_port=port is not None
        )
        host = f"[{settings.http_host}]" if ":" in settings.http_host else settings.http_host
        log.info("POST to %s://%s:%d/process, pages at /docs", "https" if tls else "http", host, bound)
        await first_of(stop, ticker, link)
        log.info("stopping: %d event(s) under way", publisher.unconfirmed)
        api.announce_stop()
        if settings.drain_delay_ms:  # a load balancer looks at /readyz, and sends no more
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_delay_ms / 1000):
                    await first_of(asyncio.Event(), ticker, link)
        await server.stop_listening()
        try:
            await asyncio.wait_for(server.drained(), settings.shutdown_timeout_ms / 1000)
        except TimeoutError:
            if publisher.unconfirmed:
                log.warning("%d event(s) had no confirm in time; answered 504", publisher.unconfirmed)
            publisher.fail_all()
            await asyncio.sleep(0.1)  # for those answers to leave
    finally:
        server.abort()
        await end(ticker, link)
    log.info("stopped")
