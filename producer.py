"""The producer: POST /process → validate → publish → 200 after the broker's confirm.

The way of an event, from the socket to the broker and back:

    Connection.data_received   common/http/server.py        bytes to requests, by RequestParser
    Api.check, Api.handle      common/producer/api.py       who may, and what it means
    normalise_event            common/event/schema.py       JSON to an event in normal form
    Publisher.publish          common/producer/publisher.py into the confirm window of its partition
    FastLane.send              common/amqp/transport.py     one write a turn of the loop
    FastLane.data_received     common/amqp/transport.py     the broker's confirm
    Publisher.confirms         common/producer/publisher.py whose it is
    _Post.confirmed            common/producer/api.py       200
    Exchange.answer            common/http/server.py        in the order of the requests
"""

from __future__ import annotations

import common.first  # noqa: F401

# isort: split
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from common import __version__, workers
from common.config import ProducerSettings, describe, parse
from common.errors import Fatal
from common.logs import set_up_logging
from common.process import fail, inherited_socket, on_stop, run
from common.producer.metrics import Counters
from common.producer.service import Producer
from common.producer.tls import Certificate

log = logging.getLogger("predlog.producer")

WHAT = "Takes events over HTTP, answers 200 once RabbitMQ has them on disk."


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
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, producer.reload_certificate)
    try:
        await producer.start(replaces)
        await producer.run(stop)
        await producer.drain()
    finally:
        await producer.close()


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    """Run the producer, or several workers of it; return the exit code."""
    try:
        settings = parse(ProducerSettings, "producer.py", WHAT, argv, environ)
        set_up_logging("producer", settings.log_level, settings.log_format)
        log.info("predlog %s producer: %s", __version__, describe(settings))
        counters = Counters(settings.partitions)
        inherited = inherited_socket(environ, os.getpid())
        if settings.workers == 1:
            return run("producer", lambda: serve(settings, counters, inherited=inherited))
        Certificate.load(settings.tls_cert, settings.tls_key)  # a bad one is said once, not by each worker
        port = inherited or workers.reserve_port(settings.http_host, settings.http_port)
    except Fatal as error:
        return fail("producer", error)
    rows = workers.shared_rows(settings.workers, counters.metrics.size)

    def work(index: int, alive_fd: int, replaces: bool) -> int:
        counters.metrics.bind(rows[index])
        shared_port = port.getsockname()[1]
        return run("producer", lambda: serve(settings, counters, rows, shared_port, alive_fd, replaces, inherited))

    return workers.supervise(settings.workers, work, settings.shutdown_timeout_ms / 1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
