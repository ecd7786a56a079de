"""When a batch is due, and what is in it."""

from __future__ import annotations

from math import inf

import pytest

from common.amqp.codec import Delivery
from common.consumer.pending import FULL_BYTES, LEAST_WAIT_SECONDS, Pending
from tests.support.deliveries import event_line, group


def deliveries(*bodies: bytes) -> list[Delivery]:
    return [Delivery(number, False, b"", body) for number, body in enumerate(bodies, 1)]


def test_the_disk_sets_the_pace_of_the_batches() -> None:
    """A batch waits as long as the one before took the disk, 6 ms at least and FLUSH_INTERVAL_MS at most."""
    pending = Pending(batch_max_rows=10, prefetch_count=100, flush_interval_seconds=0.05)
    assert pending.due_in(0.0) is None
    for seconds, wait in ((0.0, LEAST_WAIT_SECONDS), (0.02, 0.02), (3.0, 0.05), (0.001, LEAST_WAIT_SECONDS)):
        pending.stored(seconds)
        pending.add(deliveries(b'{"prob":1}'), 1.0)
        pending.add(deliveries(b'{"prob":1}'), 1.002)  # what comes later does not put it off
        assert pending.due_in(1.002) == pytest.approx(wait - 0.002)
        assert pending.due_in(1.06) == 0.0
        pending.take()


def test_a_flush_interval_of_zero_waits_for_nothing() -> None:
    pending = Pending(10, 100, 0.0)
    pending.add(deliveries(b'{"prob":1}'), 1.0)
    assert pending.due_in(1.0) == 0.0


def test_what_is_redelivered_does_not_wait_again() -> None:
    """If the connection is cut while a batch waits (consumer_timeout), its wait must not begin again each time."""
    pending = Pending(10, 100, 9.0)
    pending.stored(9.0)
    pending.add(deliveries(b'{"prob":1}'), 1.0)
    assert pending.due_in(5.0) == pytest.approx(5.0)
    pending.take()  # the connection is lost
    pending.add([Delivery(1, True, b"", b'{"prob":1}')], 5.3)
    assert pending.due_in(5.3) == 0.0


def test_a_full_batch_does_not_wait() -> None:
    pending = Pending(batch_max_rows=4, prefetch_count=100, flush_interval_seconds=60)
    pending.add(deliveries(b'"prob":1 "prob":2 "prob":3'), 0.0)
    assert not pending.full
    pending.add(deliveries(b'"prob":1'), 0.0)
    assert pending.due_in(0.0) == 0.0
    large = Pending(batch_max_rows=4, prefetch_count=100, flush_interval_seconds=60)
    large.add(deliveries(bytes(FULL_BYTES)), 0.0)
    assert large.due_in(0.0) == 0.0


def test_a_batch_does_not_wait_for_what_cannot_come() -> None:
    pending = Pending(batch_max_rows=100, prefetch_count=3, flush_interval_seconds=60)
    pending.add(deliveries(b"", b""), 0.0)
    assert not pending.full
    pending.add(deliveries(b""), 0.0)
    assert pending.due_in(0.0) == 0.0


def test_rows_are_counted_however_the_document_is_spaced() -> None:
    pending = Pending(batch_max_rows=2, prefetch_count=100, flush_interval_seconds=60)
    pending.add(deliveries(b'"prob" : 1', b'"prob":\n1'), 0.0)
    assert pending.full


def test_rows_of_groups_are_counted() -> None:
    """They fill a batch, although one message is far larger than one event."""
    pending = Pending(batch_max_rows=300, prefetch_count=100, flush_interval_seconds=60)
    lines = [event_line(f"{number:032x}", "d" * 300) for number in range(100)]
    for tag, full in enumerate((False, False, True)):
        pending.add([group(tag, *lines)], 0.0)
        assert (pending.full, pending.rows) == (full, 100 * (tag + 1))


def test_a_batch_of_groups_is_bounded_in_rows() -> None:
    pending = Pending(batch_max_rows=10, prefetch_count=100, flush_interval_seconds=60)
    groups = [group(tag, *[event_line(f"{number:032x}") for number in range(4)]) for tag in range(1, 7)]
    pending.add(groups, 1.0)
    assert (pending.take(), pending.rows, pending.since) == (groups[:3], 12, 1.0)
    assert (pending.take(), pending.rows, pending.since) == (groups[3:], 0, inf)


def test_one_message_beyond_the_bound_is_a_batch() -> None:
    pending = Pending(10, 100, 60)
    large = deliveries(bytes(3 * FULL_BYTES))
    pending.add(large, 1.0)
    assert (pending.take(), pending.bytes, pending.since) == (large, 0, inf)


def test_headers_count_as_bytes() -> None:
    pending = Pending(10, 100, 60)
    pending.add([Delivery(1, False, bytes(FULL_BYTES), b"x")], 0.0)
    assert pending.full


def test_taking_leaves_nothing() -> None:
    pending = Pending(4, 100, 60)
    pending.add(deliveries(b'"prob":1', b""), 0.0)
    assert len(pending.take()) == 2
    assert (pending.take(), pending.rows, pending.bytes, pending.due_in(9.0)) == ([], 0, 0, None)


def test_a_batch_of_large_events_is_bounded() -> None:
    """It is bounded in bytes. The rest becomes the next one, in order and at once."""
    pending = Pending(5000, 2000, 60)
    large = deliveries(*[bytes(FULL_BYTES // 4)] * 11)
    pending.add(large, 1.0)
    first = pending.take()
    assert (first, pending.since, pending.due_in(1.0)) == (large[:4], 1.0, 0.0)
    assert pending.bytes == 7 * (FULL_BYTES // 4)
    assert first + pending.take() == large
    assert (pending.deliveries, pending.bytes, pending.since) == ([], 0, inf)
