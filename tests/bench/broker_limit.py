"""What RabbitMQ itself accepts and delivers: pre-encoded frames from a bare socket, the same queue type and safety."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.bench.bare_amqp import BareConnection, blobs


def publish_rate(url: str, queue: str, bodies: Sequence[bytes], count: int) -> float:
    """Confirmed messages/s into a quorum queue, encoded before the clock starts."""
    with BareConnection(url) as connection:
        connection.declare(queue)
        encoded = list(blobs(queue, bodies, count, connection.frame_max))
        start = time.perf_counter()
        connection.publish(encoded, count)
        return count / (time.perf_counter() - start)


def consume_rate(url: str, queue: str, count: int) -> float:
    """Acked messages/s of a backlog of at least `count`."""
    with BareConnection(url) as connection:
        start = time.perf_counter()
        connection.consume(queue, count)
        return count / (time.perf_counter() - start)
