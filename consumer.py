"""The consumer: predictions from RabbitMQ into CSV, each exactly once. Wires settings, broker, batch, store and acks.

The way of a message: FastLane.data_received (common/amqp/transport.py) → Consumer.on_deliveries → Pending
(common/consumer/pending.py) → Consumer.run (common/consumer/worker.py) → prepare_batch (common/consumer/prepare.py) →
Store.append (common/storage/store.py: write, fsync, remember) → ack.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from common import __version__
from common.config import ConsumerSettings, describe, load, parser_for
from common.consumer.dead_letters import commands as dead_letters
from common.consumer.service import serve
from common.errors import Fatal
from common.logs import set_up_logging
from common.process import fail, run

log = logging.getLogger("predlog.consumer")


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    parser = parser_for(ConsumerSettings, "consumer.py", "Messages from RabbitMQ into CSV, each exactly once.")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument("--dead-letters", action="store_true", help="list the dead letters, and end")
    commands.add_argument("--replay-dead-letters", action="store_true", help="move the dead letters back, and end")
    commands.add_argument("--export-dead-letters", metavar="FILE", help="write the dead letters as JSON lines, and end")
    flags: argparse.Namespace = parser.parse_args(argv)
    try:
        settings = load(ConsumerSettings, flags, environ)
    except Fatal as error:
        return fail("consumer", error)
    set_up_logging("consumer", settings.log_level, settings.log_format)
    if flags.dead_letters:
        return run("consumer", lambda: dead_letters.show(settings))
    if flags.replay_dead_letters:
        return run("consumer", lambda: dead_letters.replay(settings))
    if flags.export_dead_letters is not None:
        return run("consumer", lambda: dead_letters.export(settings, flags.export_dead_letters))
    log.info("predlog %s consumer: %s", __version__, describe(settings))
    return run("consumer", lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
