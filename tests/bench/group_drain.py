"""The drain of a backlog of messages with several events: `python -m tests.bench.group_drain [EVENTS] [PREFETCH ...]`.

Prints events a second, CPU for an event and the most memory of the consumer, for each PREFETCH_COUNT and for groups of
several sizes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from common.amqp.codec import NDJSON, PublishEncoder, packed_seconds
from common.event.document import write_json
from common.event.schema import validate_event
from tests.bench import events
from tests.bench.bare_amqp import BareConnection
from tests.bench.report import text_table
from tests.bench.stage import PREDLOG, QUICK, Stage
from tests.rabbitmq import RabbitMQ

GROUPS = (1, 8, 64)
BLOB_MESSAGES = 64


def blobs(queue: str, normal: list[bytes], size: int, messages: int, frame_max: int) -> Iterator[bytes]:
    """The frames of `messages` messages with `size` events each, a few at a time. Each event has an id of its own."""
    alone = PublishEncoder(queue, frame_max)
    together = PublishEncoder(queue, frame_max, NDJSON)
    numbers, now = count(), packed_seconds(int(time.time()))

    def message() -> bytes:
        picked = [(b"%032x" % number, normal[number % len(normal)]) for number in islice(numbers, size)]
        event_id, body = picked[0]
        if size == 1:
            return b"".join(alone.encode(body, event_id, now))
        lines = b"\n".join([b'{"message_id":"%b",%b' % (each_id, text[1:]) for each_id, text in picked])
        return b"".join(together.encode(lines, event_id, now))

    for start in range(0, messages, BLOB_MESSAGES):
        yield b"".join(message() for _ in range(min(BLOB_MESSAGES, messages - start)))


def drain(stage: Stage, normal: list[bytes], rows: int, size: int, total: int, prefetch: str) -> list[str]:
    """Return a row of the table. `rows`: of one turn through `normal`."""
    messages = total // size
    csv_file = stage.folder / f"drain-{size}-{prefetch}.csv"
    with stage.queue(f"groups-{size}-{prefetch}") as queue:
        with BareConnection(stage.amqp_url) as connection:
            connection.publish(blobs(queue, normal, size, messages, connection.frame_max), messages)
        began = time.monotonic()
        with stage.consumer(PREDLOG, queue, csv_file, PREFETCH_COUNT=prefetch) as running:
            start_cpu, first = 0.0, 0.0
            wanted = rows * (messages * size // len(normal))
            while True:
                running.process.check()
                lines = csv_file.read_bytes().count(b"\r\n") if csv_file.exists() else 0
                if lines > 1 and not first:
                    start_cpu, first = running.process.cpu_seconds(), time.monotonic()
                if lines > wanted or time.monotonic() - began > 120:
                    break
                time.sleep(0.1)
            seconds = time.monotonic() - first
            cpu_us = (running.process.cpu_seconds() - start_cpu) * 1e6 / (messages * size)
            return [
                f"{size}",
                prefetch,
                f"{messages * size / seconds:,.0f}",
                f"{cpu_us:.1f}",
                f"{running.process.peak_memory_mb():.0f}",
            ]


def main(total: int, prefetches: list[str]) -> None:
    small = events.small()
    normal = [write_json(validate_event(events.json.loads(body))) for body in small.bodies]
    table = [["events in a message", "PREFETCH_COUNT", "events/s", "CPU, µs an event", "peak memory, MB"]]
    with tempfile.TemporaryDirectory(prefix="predlog-groups-", dir="/var/tmp") as folder:
        node = RabbitMQ(Path(folder) / "broker")
        node.start()
        try:
            stage = Stage(node.url, node.ctl, Path(folder), QUICK)
            for prefetch in prefetches:
                for size in GROUPS:
                    table.append(drain(stage, normal, sum(small.predictions), size, total, prefetch))
                    print(table[-1], file=sys.stderr, flush=True)
        finally:
            node.kill()
            node.stop()
    print(text_table(table))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, sys.argv[2:] or ["500"])
