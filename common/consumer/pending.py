"""When to store, and what to acknowledge, decided without a clock or I/O."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from math import inf

from common.amqp.codec import Delivery
from common.event.rows import count_rows

FULL_BYTES = 16 * 1024 * 1024  # a batch of large events is full long before it has many rows
COUNTED_BYTES = 8 * 1024  # rows are counted in smaller bodies only: a search through images costs more than it tells
# Group commit: a batch waits for as long as the last one took, so that the disk is busy with us for half of the time at
# most; and this long in any case, which bounds the batches to 330 a second (two fsyncs each).
LEAST_WAIT_SECONDS = 0.003


class Pending:
    """Deliveries that wait for the next batch. Times are seconds of any one clock."""

    def __init__(self, batch_max_rows: int, prefetch_count: int, flush_interval_seconds: float) -> None:
        self.deliveries: list[Delivery] = []
        self.bytes = 0
        self.rows = 0  # exact for small events of our producer
        self.since = inf  # when the oldest of them came; inf: there is none
        self._batch_max_rows = batch_max_rows
        self._prefetch_count = prefetch_count
        self._flush_interval = flush_interval_seconds
        self._wait = min(LEAST_WAIT_SECONDS, flush_interval_seconds)

    def add(self, deliveries: Sequence[Delivery], now: float) -> None:
        if not self.deliveries:
            self.since = now
        self.deliveries += deliveries
        for delivery in deliveries:
            body = delivery.body
            self.bytes += len(body)
            if len(body) <= COUNTED_BYTES:
                self.rows += count_rows(body)

    def stored(self, seconds: float) -> None:
        """Set the pace: the last batch took the disk so long."""
        self._wait = min(max(LEAST_WAIT_SECONDS, seconds), self._flush_interval)

    @property
    def full(self) -> bool:
        """No need to wait for more, or nothing more will come before an ack."""
        return (
            self.rows >= self._batch_max_rows
            or self.bytes >= FULL_BYTES
            or len(self.deliveries) >= self._prefetch_count
        )

    def due_in(self, now: float) -> float | None:
        """Seconds until the batch must be stored; 0 at once, None while there is nothing to store.

        A message that comes again has waited before: a connection that the broker cuts (its consumer_timeout) while a
        batch waits must not make it wait from the beginning, for ever.
        """
        if not self.deliveries:
            return None
        if self.deliveries[0].redelivered or self.full:
            return 0.0
        return max(0.0, self.since + self._wait - now)

    def take(self) -> list[Delivery]:
        """What came while the last batch was stored: all of it, or as much of large events as makes a batch full.

        `prefetch_count` bounds the former. The latter is written from several copies, so its bytes are bounded as well.
        """
        taken, since = self.deliveries, self.since
        rest: list[Delivery] = []
        if self.bytes > 2 * FULL_BYTES:
            ends = accumulate(len(delivery.body) for delivery in taken)
            count = next(count for count, end in enumerate(ends, 1) if end >= FULL_BYTES)
            taken, rest = taken[:count], taken[count:]
        self.clear()
        if rest:
            self.add(rest, since)
        return taken

    def clear(self) -> None:
        """Forget all of them."""
        self.deliveries = []
        self.bytes = self.rows = 0
        self.since = inf


def ack_ranges(stored: Sequence[int], held: Collection[int]) -> list[tuple[int, bool]]:
    """The acks for `stored` delivery tags, ascending, as (tag, multiple), that cover no tag in `held`.

    One ack with multiple=True covers every tag up to its own that is not settled yet; above the lowest held tag each is
    acked by itself. Every lower tag must be stored already, or be in `held`.
    """
    lowest_held = min(held, default=None)
    if lowest_held is None:
        return [(stored[-1], True)] if stored else []
    below = [tag for tag in stored if tag < lowest_held]
    return [(tag, True) for tag in below[-1:]] + [(tag, False) for tag in stored[len(below) :]]


def rotation_due(csv_bytes: int, age_seconds: float, rotate_bytes: int, rotate_interval_seconds: int) -> bool:
    """Whether the CSV is to be rotated away; a limit of 0 is off."""
    return (0 < rotate_bytes <= csv_bytes) or (0 < rotate_interval_seconds <= age_seconds)
