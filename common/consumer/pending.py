"""The deliveries that wait, and the decision when to store them. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from common.amqp.codec import NDJSON, Delivery
from common.amqp.properties import content_type_of
from common.event.rows import count_rows

FULL_BYTES = 16 * 1024 * 1024  # fills a batch of large events long before it has many rows
COUNTED_BYTES = 8 * 1024  # rows are counted only up to this size: searching images costs too much
COUNTED_NDJSON_BYTES = 64 * 1024  # the largest message of several events that our producer sends
# Group commit: a batch waits for as long as the last one took, so that the disk is busy for half of the time at most.
# It waits for at least this long, which limits batches to 160 per second, with two fsyncs each.
LEAST_WAIT_SECONDS = 0.006


class Pending:
    """Deliveries that wait for the next batch. Times are in seconds of one monotonic clock."""

    def __init__(self, batch_max_rows: int, prefetch_count: int, flush_interval_seconds: float) -> None:
        self.deliveries: list[Delivery] = []
        self.bytes = 0  # of headers and bodies
        self.rows = 0  # exact for small events of our producer
        self.since = inf  # when the oldest delivery came; inf if there is none
        self._batch_max_rows = batch_max_rows
        self._prefetch_count = prefetch_count
        self._flush_interval = flush_interval_seconds
        self._wait = min(LEAST_WAIT_SECONDS, flush_interval_seconds)

    def add(self, deliveries: Sequence[Delivery], now: float) -> None:
        if not self.deliveries:
            self.since = now
        self.deliveries += deliveries
        for _, _, header, body in deliveries:
            size = len(body)
            self.bytes += len(header) + size
            if size <= COUNTED_BYTES or (size <= COUNTED_NDJSON_BYTES and content_type_of(header) == NDJSON):
                self.rows += count_rows(body)

    def stored(self, seconds: float) -> None:
        """Note that the last batch took the disk `seconds`, which sets how long the next one waits."""
        self._wait = min(max(LEAST_WAIT_SECONDS, seconds), self._flush_interval)

    @property
    def full(self) -> bool:
        """Whether the batch need not grow, or cannot before an ack."""
        return (
            self.rows >= self._batch_max_rows
            or self.bytes >= FULL_BYTES
            or len(self.deliveries) >= self._prefetch_count
        )

    def due_in(self, now: float) -> float | None:
        """Return the seconds until the batch must be stored: 0 for at once, None while there is nothing to store.

        A redelivered message has waited before. If the broker cuts the connection while a batch waits (its
        consumer_timeout), the messages must not wait from the beginning again and again.
        """
        if not self.deliveries:
            return None
        if self.deliveries[0].redelivered or self.full:
            return 0.0
        return max(0.0, self.since + self._wait - now)

    def take(self) -> list[Delivery]:
        """Take all that came while the last batch was stored, or only as much as fills a batch if that is too much.

        Writing a batch makes several copies of it, so its bytes and rows are bounded.
        """
        waiting, since, all_bytes, all_rows = self.deliveries, self.since, self.bytes, self.rows
        self.clear()
        if all_bytes <= 2 * FULL_BYTES and all_rows <= 2 * self._batch_max_rows:
            return waiting
        for delivery in waiting:
            self.add((delivery,), since)
            if self.bytes >= FULL_BYTES or self.rows >= self._batch_max_rows:
                break
        taken = self.deliveries
        self.deliveries = waiting[len(taken) :]
        self.bytes, self.rows = all_bytes - self.bytes, all_rows - self.rows
        self.since = since if self.deliveries else inf
        return taken

    def clear(self) -> None:
        """Forget all deliveries."""
        self.deliveries = []
        self.bytes = self.rows = 0
        self.since = inf
