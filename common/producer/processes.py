"""One producer in this process, or several workers on one port under a supervisor."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Sequence

from common import workers
from common.config import ProducerSettings
from common.errors import SettingError
from common.http.tokens import parse_tokens
from common.process import on_stop, run
from common.producer.metrics import Counters
from common.producer.service import Producer
from common.producer.tls import Certificate


async def serve(
    settings: ProducerSettings,
    counters: Counters,
    rows: Sequence[Sequence[float]] = (),
    shared_port: int | None = None,
    alive_fd: int | None = None,
    replaces: bool = False,
    inherited: socket.socket | None = None,
) -> None:
    """Run one producer until a signal, or until the supervisor at `alive_fd` is gone; then drain."""
    stop = on_stop(alive_fd)
    producer = Producer(settings, counters, rows, shared_port, inherited)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, producer.reload)
    if replaces:
        producer.reload()  # a SIGHUP that the supervisor passed on before has not reached this process
    try:
        await producer.start(replaces)
        await producer.run(stop)
        await producer.drain()
    finally:
        await producer.close()


def serve_all(settings: ProducerSettings, inherited: socket.socket | None) -> int:
    """Run WORKERS producers until a signal; return the exit code."""
    counters = Counters(settings.partitions, parse_tokens(settings.api_token))
    if settings.tls_cert:
        Certificate(settings.tls_cert, settings.tls_key)  # so that a bad one is reported once, not by each worker
    if settings.health_port:
        if not inherited and (settings.health_host, settings.health_port) == (settings.http_host, settings.http_port):
            raise SettingError("HEALTH_PORT is the same as HTTP_PORT: set another one")
        _held = workers.reserve_port(settings.health_host, settings.health_port, "HEALTH_PORT")
    port = inherited or workers.reserve_port(settings.http_host, settings.http_port)
    rows = workers.shared_rows(settings.workers, counters.metrics.size)

    def work(index: int, alive_fd: int, replaces: bool) -> int:
        counters.metrics.bind(rows[index])
        shared_port = port.getsockname()[1]
        return run("producer", lambda: serve(settings, counters, rows, shared_port, alive_fd, replaces, inherited))

    return workers.supervise(settings.workers, work, (settings.drain_delay_ms + settings.shutdown_timeout_ms) / 1000)
