"""The producer: POST /process → validate → publish → 200 after the broker's confirm.

The path of an event, from the socket to the broker and back:

    Connection.data_received   common/http/connection.py      bytes into requests, by RequestParser
    Api.check, Api.handle      common/producer/api.py         permission, then the route
    normalise_event            common/event/schema.py         JSON into an event in normal form
    Publisher.publish          common/producer/publisher.py   to its partition, with the others of this turn
    FastLane.send              common/amqp/lane.py            the frames of all of them in one write
    FastLane.data_received     common/amqp/lane.py            the broker's confirms
    Publisher.confirms         common/producer/publisher.py   from delivery tag to event
    _Post.confirmed            common/producer/intake.py      200
    Exchange.answer            common/http/exchange.py        answers in the order of the requests
"""

from __future__ import annotations

import common.first  # noqa: F401

# isort: split
import logging
import os
import sys
from collections.abc import Sequence

from common import __version__
from common.config import FORMER_WARNING, ProducerSettings, describe, former_settings, load, parser_for
from common.errors import Fatal
from common.http.tokens import parse_tokens
from common.logs import set_up_logging
from common.process import fail, inherited_socket, read_file, run
from common.producer import processes
from common.producer.metrics import Counters

log = logging.getLogger("predlog.producer")

WHAT = "Take events over HTTP; answer 200 once RabbitMQ has them on disk."


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    """Run the producer, or several workers of it; return the exit code."""
    flags = parser_for(ProducerSettings, "producer.py", WHAT).parse_args(argv)
    try:
        settings = load(ProducerSettings, flags, environ, read_file)
        set_up_logging("producer", settings.log_level, settings.log_format)
        log.info("predlog %s producer: %s", __version__, describe(settings))
        if former := former_settings(flags, environ):
            log.warning(FORMER_WARNING, former)
        inherited = inherited_socket(environ, os.getpid())
        if settings.workers > 1:
            return processes.serve_all(settings, inherited)
        counters = Counters(settings.partitions, parse_tokens(settings.api_token))
        return run("producer", lambda: processes.serve(settings, counters, inherited=inherited))
    except Fatal as error:
        return fail("producer", error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
