"""The producer: POST /process → validate → publish → 200 after the broker's confirm. Wires settings, broker and HTTP.

The way of an event: Connection.data_received (common/http_server.py) → Api.handle (common/api.py) → Publisher.publish
(common/publisher.py) → FastLane.send … FastLane.data_received (common/fast_lane.py) → Publisher.confirms →
Api's waiter → Exchange.answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from common import __version__, workers
from common.amqp.link import Link, keep_up
from common.amqp.topology import QUEUE_ARGUMENTS, declare
from common.api import Api, Counters
from common.config import ProducerSettings, describe, parse
from common.errors import Fatal, StartupError
from common.http.parser import Limits
from common.http.server import HttpServer, ServerLimits
from common.logs import set_up_logging
from common.process import end, fail, first_of, on_stop, raise_file_limit, run
from common.publisher import Publisher

log = logging.getLogger("predlog.producer")

SWEEP_SECONDS = 0.1
REPLACEMENT_LISTENS_SECONDS = 5.0  # after its start at the latest
FILES_BESIDE_CONNECTIONS = 64
BUFFERED_BYTES = 256 * 1024 * 1024  # of all requests that are still arriving


def _no_passphrase() -> str:
    raise OSError("the key has a passphrase, and nobody to ask for it: store it without one")


def _tls(settings: ProducerSettings) -> ssl.SSLContext | None:
    """The TLS context; raises StartupError. TLS 1.2 and 1.3 with Python's default ciphers."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, _no_passphrase)
    except OSError as error:  # ssl.SSLError is one
        raise StartupError(
            f"cannot use TLS_CERT {settings.tls_cert} with TLS_KEY {settings.tls_key}: {error}"
        ) from None
    return context


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
    stop = on_stop()
    if alive_fd is not None:

        def orphaned() -> None:
            loop.remove_reader(alive_fd)
            stop.set()

        loop.add_reader(alive_fd, orphaned)
    most_connections = raise_file_limit() - FILES_BESIDE_CONNECTIONS
    if most_connections < settings.max_connections:
        log.warning(
            "the limit on open files allows %d connections, not %d (ulimit -n)",
            most_connections,
            settings.max_connections,
        )
    tls = _tls(settings)
    publisher = Publisher(
        settings.queue_name,
        settings.max_unconfirmed,
        settings.max_unconfirmed_bytes,
        settings.confirm_timeout_ms / 1000,
        time.monotonic,
        time.time,
    )
    api = Api(settings, publisher, counters, rows or (counters.metrics.values,))
    server = HttpServer(_limits(settings, most_connections), api.handle, api.check, api.on_answer, api.on_refusal)
    api.attach(server)

    def reload_certificate() -> None:
        if tls is None:
            return
        try:
            _tls(settings)  # first into another context: OpenSSL takes a certificate before it looks at the key
            tls.load_cert_chain(settings.tls_cert, settings.tls_key, _no_passphrase)
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
            api.tick()

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
        publisher.draining = True
        server.stop_listening()
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


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    try:
        what = "Takes events over HTTP, answers 200 once RabbitMQ has them on disk."
        settings = parse(ProducerSettings, "producer.py", what, argv, environ)
        set_up_logging("producer", settings.log_level, settings.log_format)
        log.info("predlog %s producer: %s", __version__, describe(settings))
        counters = Counters()
        if settings.workers == 1:
            return run("producer", lambda: serve(settings, counters))
        _tls(settings)
        port = workers.reserve_port(settings.http_host, settings.http_port)
    except Fatal as error:
        return fail("producer", error)
    rows = workers.shared_rows(settings.workers, counters.metrics.size)

    def work(index: int, alive_fd: int, replaces: bool) -> int:
        counters.metrics.bind(rows[index])
        shared_port = port.getsockname()[1]
        return run("producer", lambda: serve(settings, counters, rows, shared_port, alive_fd, replaces))

    return workers.supervise(settings.workers, work, settings.shutdown_timeout_ms / 1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
