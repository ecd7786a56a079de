"""The consumer: predictions from RabbitMQ into CSV, each exactly once.

The path of a message, from the socket to the row and the ack:

    FastLane.data_received     common/amqp/lane.py                deliveries out of the byte stream
    Worker.deliveries          common/consumer/worker.py          added to those that wait
    Pending.add                common/consumer/pending.py         until a batch is due
    Worker._run                common/consumer/worker.py          batch after batch
    prepare_batch              common/consumer/prepare.py         decoded, without known ids, as rows or as dead letters
    append                     common/consumer/dead_letters.py    what is not an event: write, fsync
    Store.append               common/storage/store.py            rows: write, fsync, journal
    Worker._ack                common/consumer/worker.py          one ack for the batch
"""

from __future__ import annotations

import common.first  # noqa: F401

# isort: split
import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from common import __version__
from common.config import FORMER_WARNING, ConsumerSettings, describe, former_settings, load, parser_for
from common.consumer import partitions, replay
from common.consumer.metrics import Counters
from common.consumer.service import ConsumerService, serve
from common.errors import Fatal, StartupError
from common.event.rows import CSV_HEADER
from common.logs import set_up_logging
from common.process import fail, read_file, run
from common.storage.files import explain_os_error
from common.storage.reader import committed_rows

log = logging.getLogger("predlog.consumer")


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    """Run the consumer, with a process for each partition, or one of its commands; return the exit code."""
    parser = parser_for(ConsumerSettings, "consumer.py", "Write events from RabbitMQ to CSV, each exactly once.")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument("--read", action="store_true", help="write the committed rows to stdout, and exit")
    commands.add_argument("--dead-letters", action="store_true", help="list the dead letters, and exit")
    commands.add_argument("--replay-dead-letters", action="store_true", help="publish the dead letters again, and exit")
    flags: argparse.Namespace = parser.parse_args(argv)
    try:
        settings = load(ConsumerSettings, flags, environ, read_file)
        served = partitions.served(settings)
        set_up_logging("consumer", settings.log_level, settings.log_format)
        if flags.read:
            return _to_stdout(lambda: read(settings.csv_file for settings in served.values()))
        if flags.dead_letters:
            return _to_stdout(lambda: replay.show(list(served.values())))
        if flags.replay_dead_letters:
            return run("consumer", lambda: _replay(served.values()))
        log.info("predlog %s consumer: %s", __version__, describe(settings))
        if former := former_settings(flags, environ):
            log.warning(FORMER_WARNING, former)
        if len(served) > 1:
            return partitions.serve_all(settings, served)
    except Fatal as error:
        return fail("consumer", error)
    ((number, own),) = served.items()
    name = "consumer" if settings.partitions == 1 else f"consumer-{number}"
    set_up_logging(name, settings.log_level, settings.log_format)
    return run(name, lambda: serve(lambda: ConsumerService(own, Counters(), name, base_queue_name=settings.queue_name)))


def read(csv_files: Iterable[str]) -> int:
    """Write the committed rows of all `csv_files` to stdout, under one header. Raise StartupError."""
    skipped_bytes = 0
    for path in csv_files:
        for block in committed_rows(path):
            sys.stdout.buffer.write(block[skipped_bytes:])
            skipped_bytes = max(0, skipped_bytes - len(block))
        skipped_bytes = len(CSV_HEADER)
    return 0


async def _replay(served: Iterable[ConsumerSettings]) -> int:
    """Replay the dead letters of each partition; return the highest exit code."""
    return max([await replay.replay(settings) for settings in served])


def _to_stdout(command: Callable[[], int]) -> int:
    """Run a command that writes to stdout. A reader that closes the pipe, such as `head`, ends it without an error."""
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        raise StartupError(explain_os_error(error, "stdout")) from None
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
