"""What a message costs the broker, `python -m tests.bench.broker_cost`: docs/scaling.md has its figures.

CPU and bytes are those of the nodes themselves, from /proc, so that a busy machine changes them little; no rate is
measured. One node and a cluster of three, whose queues have a member on every node and their leaders spread; one, and
four queues. All clients are on the first node: of three leaders, two are elsewhere.
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
CASES = (("small events", events.small(), 120_000), ("5 images of 20 KB", events.with_frames(), 2_400))


class Spent(NamedTuple):
    """By all nodes together, so far."""

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
    """A row for each case: µs of CPU and bytes written for a message that comes, is confirmed, delivered and acked."""
    rows = []
    for name, load, messages in CASES:
        names = [f"cost-{queues}-{index}" for index in range(queues)]
        share = messages // queues
        for queue in names:
            pass_through(nodes[0].url, queue, load.bodies, share // 20)  # warm
        time.sleep(SETTLE_SECONDS)
        before = spent(nodes)
        for queue in names:
            pass_through(nodes[0].url, queue, load.bodies, share)
        time.sleep(SETTLE_SECONDS)
        after = spent(nodes)
        body = sum(map(len, load.bodies)) / len(load.bodies)
        written = (after.written_bytes - before.written_bytes) / messages
        rows.append(
            [
                f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {queues} queue{'s' * (queues > 1)}",
                name,
                f"{(after.cpu_seconds - before.cpu_seconds) * 1e6 / messages:,.0f}",
                f"{body:,.0f}",
                f"{written:,.0f}",
                f"{written / body:.1f}",
            ]
        )
    return rows


def main() -> None:
    rows = [["", "", "CPU of all nodes, µs", "body bytes", "written bytes", "written / body"]]
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
