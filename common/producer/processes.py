"""One producer in this process, or several workers on one port under a supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence

from common import workers
from common.config import ProducerSettings
from common.http.tokens import parse_tokens
from common.process import on_stop, run
from common.producer.metrics import Counters
from common.producer.service import Producer
from common.producer.tls import Certificate

log = logging.getLogger("predlog.producer")

WORKER = "PREDLOG_WORKER"
"""The environment variable that tells a replacement worker which descriptors it has inherited."""


async def serve(
    settings: ProducerSettings,
    counters: Counters,
    rows: Sequence[Sequence[float]] = (),
    shared_port: int | None = None,
    alive_fd: int | None = None,
    replaces: bool = False,
    inherited: socket.socket | None = None,
    ready_fd: int | None = None,
) -> None:
    """Run one producer until a signal, or until the supervisor at `alive_fd` is gone; then drain.

    `ready_fd` is written to once it listens. Whoever reads it keeps an old worker until then.
    """
    stop = on_stop(alive_fd)
    producer = Producer(settings, counters, rows, shared_port, inherited)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, producer.reload_certificate)
    try:
        await producer.start(replaces, takes_over=ready_fd is not None)
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)
        await producer.run(stop)
        await producer.drain()
    finally:
        await producer.close()


def serve_all(settings: ProducerSettings, inherited: socket.socket | None, command: Sequence[str]) -> int:
    """Run WORKERS producers until a signal; return the exit code. On SIGHUP, `command` starts a replacement of each."""
    counters = Counters(settings.partitions, parse_tokens(settings.api_token))
    Certificate.load(settings.tls_cert, settings.tls_key)  # so that a bad one is reported once, not by each worker
    port = inherited or workers.reserve_port(settings.http_host, settings.http_port)
    rows_fd = workers.rows_file(settings.workers, counters.metrics.size)
    rows = workers.shared_rows(settings.workers, counters.metrics.size, rows_fd)
    shared_port = port.getsockname()[1]

    def work(index: int, alive_fd: int, replaces: bool) -> int:
        counters.metrics.bind(rows[index])
        return run("producer", lambda: serve(settings, counters, rows, shared_port, alive_fd, replaces, inherited))

    def replacement(index: int, alive_fd: int, ready_fd: int) -> None:
        fds = (alive_fd, ready_fd, rows_fd, -1 if inherited is None else inherited.fileno())
        for fd in fds:
            if fd >= 0:
                os.set_inheritable(fd, True)
        told = " ".join(map(str, (index, shared_port, *fds)))
        os.execve(command[0], list(command), {**os.environ, WORKER: told})

    stop_seconds = (settings.drain_delay_ms + settings.shutdown_timeout_ms) / 1000
    return workers.supervise(settings.workers, work, stop_seconds, replacement)


def serve_as_replacement(settings: ProducerSettings, told: str) -> int:
    """Run in the place of a worker; return the exit code. `told` is the value of PREDLOG_WORKER."""
    index, shared_port, alive_fd, ready_fd, rows_fd, listener_fd = map(int, told.split())
    counters = Counters(settings.partitions, parse_tokens(settings.api_token))
    rows: list[Sequence[float]] = []
    if os.fstat(rows_fd).st_size == settings.workers * counters.metrics.size * 8:
        # Until the old worker has ended, both count in one row: a count in a million may be lost.
        shared = workers.shared_rows(settings.workers, counters.metrics.size, rows_fd)
        counters.metrics.bind(shared[index])
        rows += shared
    else:
        log.warning("its metrics are not those of the supervisor: /metrics has only this worker until a restart")
    inherited = None if listener_fd < 0 else socket.socket(fileno=listener_fd)
    return run("producer", lambda: serve(settings, counters, rows, shared_port, alive_fd, True, inherited, ready_fd))
