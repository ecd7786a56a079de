"""What an event costs the broker, `python -m tests.bench.broker_cost`: docs/scaling.md has its figures.

CPU and bytes are those of the nodes themselves, from /proc, so that a busy machine changes them little; no rate is
measured. There is one node, or a cluster of three whose queues have a member on every node and spread leaders; and one
queue, or four. All clients are on the first node: of three leaders, two are elsewhere.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.rabbitmq import BrokerError
from tests.bench import events
from tests.bench.bare_amqp import BLOB_MESSAGES, BareConnection, blobs
from tests.bench.process import TICKS_PER_SECOND
from tests.bench.report import text_table
from tests.cluster import Cluster
from tests.rabbitmq import RabbitMQ

SETTLE_SECONDS = 3.0  # in which the nodes write their segments and compact
UNCONFIRMED_BYTES = 16 << 20


def _shared(bodies: Sequence[bytes]) -> list[list[bytes]]:
    return [list(bodies[at : at + SHARED]) for at in range(0, len(bodies), SHARED)]


SHARED = 16  # events in a message; a producer under load has 5 at 32 connections and about 30 at 256
CASES = (  # name, the events of each message, messages
    ("small events, one per message", [[body] for body in events.small().bodies], 120_000),
    (f"small events, {SHARED} a message", _shared(events.small().bodies), 120_000 // SHARED),
    ("5 images of 20 KB", [[body] for body in events.with_frames().bodies], 2_400),
)


class Spent(NamedTuple):
    """What all nodes together have spent so far."""

    cpu_seconds: float
    written_bytes: int  # handed to the file system


def spent(nodes: Sequence[RabbitMQ]) -> Spent:
    cpu_ticks = written = 0
    for node in nodes:
        assert node.process is not None
        process = Path(f"/proc/{node.process.pid}")
        fields = (process / "stat").read_text().rpartition(") ")[2].split()
        cpu_ticks += int(fields[11]) + int(fields[12])
        written += int((process / "io").read_text().split("write_bytes: ")[1].split()[0])
    return Spent(cpu_ticks / TICKS_PER_SECOND, written)


def pass_through(url: str, queue: str, bodies: Sequence[bytes], count: int) -> None:
    """Publish `count` messages, with no more unconfirmed than a producer has, and consume them meanwhile."""
    with BareConnection(url) as publisher, BareConnection(url) as consumer:
        publisher.declare(queue)
        consuming = threading.Thread(target=consumer.consume, args=(queue, count), daemon=True)
        consuming.start()
        window = max(BLOB_MESSAGES, min(4096, UNCONFIRMED_BYTES // len(bodies[0])))
        publisher.publish(blobs(queue, bodies, count, publisher.frame_max), count, window)
        consuming.join(60)
        if consuming.is_alive():
            raise RuntimeError(f"not all of {count:,} messages came back")


def costs(nodes: Sequence[RabbitMQ], queues: int) -> list[list[str]]:
    """A row for each case: µs of CPU and bytes written for an event that comes, is confirmed, delivered and acked."""
    rows = []
    for name, groups, messages in CASES:
        bodies = [b"\n".join(group) for group in groups]
        names = [f"cost-{queues}-{index}" for index in range(queues)]
        share = messages // queues
        for queue in names:
            pass_through(nodes[0].url, queue, bodies, share // 20)  # warm
        time.sleep(SETTLE_SECONDS)
        before = spent(nodes)
        for queue in names:
            pass_through(nodes[0].url, queue, bodies, share)
        time.sleep(SETTLE_SECONDS)
        after = spent(nodes)
        event_count = share * queues * sum(map(len, groups)) / len(groups)
        event_bytes = sum(map(len, bodies)) / sum(map(len, groups))
        written = (after.written_bytes - before.written_bytes) / event_count
        rows.append(
            [
                f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {queues} queue{'s' * (queues > 1)}",
                name,
                f"{(after.cpu_seconds - before.cpu_seconds) * 1e6 / event_count:,.0f}",
                f"{event_bytes:,.0f}",
                f"{written:,.0f}",
                f"{written / event_bytes:.1f}",
            ]
        )
    return rows


def main() -> None:
    rows = [["", "", "CPU of all nodes, µs per event", "bytes", "written bytes", "written / bytes"]]
    with tempfile.TemporaryDirectory(prefix="predlog-cost-", dir="/var/tmp") as folder:
        with Cluster(Path(folder) / "single", 1) as single:
            for queues in (1, 4):
                rows += costs(single.nodes, queues)
        with Cluster(Path(folder) / "cluster") as cluster:
            for queues in (1, 4):
                rows += costs(cluster.nodes, queues)
    print(text_table(rows))


if __name__ == "__main__":
    try:
        main()
    except (BrokerError, RuntimeError) as error:
        sys.exit(f"broker_cost: {error}")
