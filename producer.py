"""The producer: POST /process → validate → publish → 200 after the broker's confirm.

The way of an event: Connection.data_received (common/http/server.py) → Api.handle (common/producer/api.py) →
Publisher.publish (common/producer/publisher.py) → FastLane.send … FastLane.data_received (common/amqp/transport.py) →
Publisher.confirms → Publication.confirmed → Exchange.answer.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from common import __version__, workers
from common.config import ProducerSettings, describe, parse
from common.errors import Fatal
from common.logs import set_up_logging
from common.process import fail, run
from common.producer.metrics import Counters
from common.producer.service import serve
from common.producer.tls import tls_context

log = logging.getLogger("predlog.producer")


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    try:
        what = "Takes events over HTTP, answers 200 once RabbitMQ has them on disk."
        settings = parse(ProducerSettings, "producer.py", what, argv, environ)
        set_up_logging("producer", settings.log_level, settings.log_format)
        log.info("predlog %s producer: %s", __version__, describe(settings))
        counters = Counters()
        if settings.workers == 1:
            return run("producer", lambda: serve(settings, counters))
        tls_context(settings)
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
