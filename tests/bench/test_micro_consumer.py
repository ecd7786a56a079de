"""What the consumer does for one batch of small events, step by step: 500 messages, about 2,700 rows.

`pytest tests/bench` times it; `make test` only runs it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import pytest
from pamqp import body, commands, frame, header
from pytest_benchmark.fixture import BenchmarkFixture

from common.amqp.codec import HOT_CHANNEL, Delivery, FrameDecoder
from common.amqp.properties import message_id_of
from common.event.ids import id_digest
from common.event.rows import csv_rows
from common.storage.store import Store
from tests.bench import events

MESSAGES = 500
SMALL = events.small(count=MESSAGES)
ROWS = b"".join(SMALL.rows)


def _delivery_frames(tag: int, text: bytes) -> bytes:
    properties = commands.Basic.Properties(content_type="application/json", delivery_mode=2, message_id=f"{tag:032x}")
    frames = (
        commands.Basic.Deliver("consumer-1", tag, False, "", "predictions"),
        header.ContentHeader(0, len(text), properties),
        body.ContentBody(text),
    )
    return b"".join(frame.marshal(value, HOT_CHANNEL) for value in frames)


STREAM = b"".join(_delivery_frames(tag, text) for tag, text in enumerate(SMALL.bodies, 1))


def _deliveries() -> list[Delivery]:
    decoder = FrameDecoder()
    assert decoder.feed(STREAM) == b""
    return decoder.deliveries


def test_decode_deliveries(benchmark: BenchmarkFixture) -> None:
    assert [delivery.body for delivery in benchmark(_deliveries)] == SMALL.bodies


def test_read_message_ids(benchmark: BenchmarkFixture) -> None:
    headers = [delivery.header for delivery in _deliveries()]
    ids = benchmark(lambda: [id_digest(message_id_of(h) or b"") for h in headers])
    assert len(set(ids)) == MESSAGES


def test_events_to_rows(benchmark: BenchmarkFixture) -> None:
    rows = benchmark(lambda: "".join(chain.from_iterable([csv_rows(text, 0.25)[0] for text in SMALL.bodies])).encode())
    assert rows == ROWS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(str(tmp_path / "data.csv"), 200_000, 2000, logging.getLogger("bench"))
    yield opened
    opened.close()


def test_store_a_batch(benchmark: BenchmarkFixture, store: Store) -> None:
    """write + fsync + journal"""
    numbers = count()

    def batch() -> tuple[tuple[bytes, list[bytes]], dict[str, object]]:
        return (ROWS, [hashlib.md5(next(numbers).to_bytes(8, "big")).digest() for _ in range(MESSAGES)]), {}

    benchmark.pedantic(store.append, setup=batch, rounds=20)  # type: ignore[no-untyped-call]
    assert (store.committed_bytes - len(events.HEADER)) % len(ROWS) == 0
    assert store.has_rows
