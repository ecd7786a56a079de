"""The consumer: predictions from RabbitMQ into CSV, each exactly once.

The way of a message, from the socket to the row and the ack:

    FastLane.data_received     common/amqp/lane.py            deliveries out of the byte stream
    Worker.deliveries          common/consumer/worker.py      to those that wait
    Pending.add                common/consumer/pending.py     until a batch is due
    Worker.run                 common/consumer/worker.py      batch after batch, in the thread of the store
    prepare_batch              common/consumer/prepare.py     decoded, without known ids, as rows
    Store.append               common/storage/store.py        write, fsync, journal
    Worker._ack                common/consumer/worker.py      one ack for the batch

A message that is not an event leaves prepare_batch as Poison. Outgoing (common/consumer/dead_letters/outgoing.py) has
it acked once it is a dead letter.
"""

from __future__ import annotations

import common.first  # noqa: F401

# isort: split
import argparse
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence

from common import __version__
from common.config import ConsumerSettings, describe, load, parser_for
from common.consumer import partitions, processes
from common.consumer.dead_letters import commands as dead_letters
from common.consumer.metrics import Counters
from common.errors import Fatal
from common.logs import set_up_logging
from common.process import fail, run

log = logging.getLogger("predlog.consumer")


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    """Run the consumer, one for each partition, or a command on its dead letters; return the exit code."""
    parser = parser_for(ConsumerSettings, "consumer.py", "Write events from RabbitMQ to CSV, each exactly once.")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument("--dead-letters", action="store_true", help="list the dead letters, and end")
    commands.add_argument("--replay-dead-letters", action="store_true", help="move the dead letters back, and end")
    commands.add_argument("--export-dead-letters", metavar="FILE", help="write the dead letters as JSON lines, and end")
    flags: argparse.Namespace = parser.parse_args(argv)
    try:
        settings = load(ConsumerSettings, flags, environ)
        served = partitions.served(settings)
        set_up_logging("consumer", settings.log_level, settings.log_format)
        if flags.dead_letters:
            return run("consumer", lambda: _each(dead_letters.show, served.values()))
        if flags.replay_dead_letters:
            return run("consumer", lambda: _each(dead_letters.replay, served.values()))
        if flags.export_dead_letters is not None:
            return run("consumer", lambda: dead_letters.export(list(served.values()), flags.export_dead_letters))
        log.info("predlog %s consumer: %s", __version__, describe(settings))
        if len(served) > 1:
            return processes.serve_all(settings, served)
    except Fatal as error:
        return fail("consumer", error)
    ((number, own),) = served.items()
    name = "consumer" if settings.partitions == 1 else f"consumer-{number}"
    set_up_logging(name, settings.log_level, settings.log_format)
    return run(name, lambda: processes.serve(own, Counters(), name, base_queue_name=settings.queue_name))


async def _each(command: Callable[[ConsumerSettings], Awaitable[int]], served: Iterable[ConsumerSettings]) -> int:
    """Run a command on each partition; return the highest exit code."""
    return max([await command(settings) for settings in served])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
