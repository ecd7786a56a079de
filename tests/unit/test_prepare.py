"""Messages handed straight to the consumer's handler, without a broker."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from common.amqp.codec import Delivery, FrameDecoder, PublishEncoder, packed_seconds
from common.consumer.prepare import prepare_batch
from common.event.document import write_json
from common.event.rows import CSV_HEADER
from common.event.schema import validate_event
from common.storage.store import Store
from tests.support.cells import split_tags


def message(tag: int, body: bytes, message_id: bytes) -> Delivery:
    """A delivery as the broker would make it of what our producer publishes."""
    encoder = PublishEncoder("predictions", 131072)
    published = b"".join(encoder.encode(body, message_id, packed_seconds(0)))
    deliver = b"\x01\x00\x01\x00\x00\x00\x11\x00\x3c\x00\x3c\x01t" + tag.to_bytes(8, "big") + b"\x00\x00\x01q"
    decoder = FrameDecoder()
    decoder.feed(
        deliver[:6] + bytes([len(deliver) - 7]) + deliver[7:] + b"\xce" + published[published.index(b"\xce") + 1 :]
    )
    return decoder.deliveries[0]


def random_event(rng: random.Random, number: int) -> dict[str, Any]:
    def tag() -> str:
        return rng.choice(["cat", "animal", "a,b", 'q"q', "", "ü;ö", "line\nbreak"])

    preds = [
        {
            "image_frame": f"frame;{n}",
            "prob": rng.choice([0.1, 0.25, 0.9, rng.random()]),
            "tags": [tag() for _ in range(rng.randrange(4))],
        }
        for n in range(rng.randint(1, 10))
    ]
    return {
        "device_id": f"device-{number}",
        "client_id": 'c"lient',
        "created_at": "2024-05-01\r\n10:00",
        "data": {"license_id": "l", "preds": preds},
    }


def expected_rows(document: dict[str, Any]) -> list[list[str]]:
    ids = [document["device_id"], document["client_id"], document["created_at"], document["data"]["license_id"]]
    return [
        [
            *ids,
            pred["image_frame"],
            repr(float(pred["prob"])),
            *pred["tags"],
            *(["low_prob"] if pred["prob"] < 0.25 else []),
        ]
        for pred in document["data"]["preds"]
    ]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = Store.open(str(tmp_path / "data.csv"), 1000, 1000, logging.getLogger("test"))
    yield opened
    opened.close()


def read(store: Store) -> list[list[str]]:
    header, *rows = csv.reader(io.StringIO(Path(store.path).read_bytes().decode(), newline=""), delimiter=";")
    assert ";".join(header).encode() + b"\r\n" == CSV_HEADER
    return [[*row[:6], *split_tags(row[6])] for row in rows]


def test_a_thousand_messages_become_exactly_their_rows(store: Store) -> None:
    rng = random.Random(7)
    events = [random_event(rng, number) for number in range(1000)]
    messages = [
        message(tag, write_json(validate_event(document)), b"%032x" % rng.getrandbits(128))
        for tag, document in enumerate(events, 1)
    ]
    for start in range(0, 1000, 100):
        prepared = prepare_batch(messages[start : start + 100], store.seen, 0.25)
        assert prepared.stored == list(range(start + 1, start + 101))
        store.append(prepared.data, prepared.ids)
    assert read(store) == [row for document in events for row in expected_rows(document)]

    # The broker delivers them all again: nothing is written, and everything can be acked.
    again = prepare_batch(messages, store.seen, 0.25)
    assert (again.data, again.ids, again.duplicates, len(again.stored)) == (b"", [], 1000, 1000)


def test_twice_in_one_batch_is_one_row(store: Store) -> None:
    body = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch([message(1, body, b"a" * 32), message(2, body, b"a" * 32)], store.seen, 0.25)
    assert (prepared.stored, prepared.duplicates, len(prepared.ids)) == ([1, 2], 1, 1)


def test_messages_of_others_without_an_id_are_stored_each_time(store: Store) -> None:
    body = json.dumps(random_event(random.Random(1), 1)).encode()
    bare = Delivery(1, False, b"\x00\x3c\x00\x00" + len(body).to_bytes(8, "big") + b"\x00\x00", body)
    prepared = prepare_batch([bare, bare], store.seen, 0.25)
    assert (prepared.duplicates, prepared.ids) == (0, [])
    assert prepared.rows == 2 * body.count(b'"prob"')


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"device_id":"d"}', b"\xff", b'{"device_id":null}'])
def test_poison_takes_no_good_message_with_it(store: Store, body: bytes) -> None:
    """What can never become rows is poison and takes no good message with it."""
    good = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch(
        [message(1, good, b"a" * 32), message(2, body or b"x", b"b" * 32), message(3, good, b"c" * 32)],
        store.seen,
        0.25,
    )
    assert prepared.stored == [1, 3]
    [(delivery, kind, reason)] = prepared.poison
    assert delivery.delivery_tag == 2
    assert kind == ("not_an_event" if body[:1] in (b"[", b"{") else "not_json")
    assert reason
    assert "\n" not in reason
    assert len(prepared.ids) == 2, "a dead letter's id is not remembered: its replay must make rows"


def test_a_message_with_a_broken_header_is_poison(store: Store) -> None:
    broken = Delivery(1, False, b"\x00\x3c\x00\x00" + bytes(8) + b"\x00\x80", b"{}")
    assert [poison.reason for poison in prepare_batch([broken], store.seen, 0.25).poison] == [
        "a content header that ends too early"
    ]


def test_what_is_not_an_event_is_poison_though_its_id_is_known(store: Store) -> None:
    """What is not an event is poison although its id is known."""
    good = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch([message(1, good, b"a" * 32), message(2, b"not json", b"a" * 32)], store.seen, 0.25)
    assert (prepared.stored, prepared.duplicates, len(prepared.poison)) == ([1], 0, 1)


def test_ids_that_differ_in_case_are_two(store: Store) -> None:
    good = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch([message(1, good, b"ab" * 16), message(2, good, b"AB" * 16)], store.seen, 0.25)
    assert (prepared.duplicates, len(set(prepared.ids))) == (0, 2)


def test_an_event_without_predictions_is_remembered(store: Store) -> None:
    """An event without predictions is remembered though it has no row."""
    empty = {**random_event(random.Random(1), 1), "data": {"license_id": "l", "preds": []}}
    prepared = prepare_batch([message(1, write_json(empty), b"a" * 32)], store.seen, 0.25)
    assert (prepared.data, prepared.rows, len(prepared.ids)) == (b"", 0, 1)
    store.append(prepared.data, prepared.ids)
    assert prepare_batch([message(2, write_json(empty), b"a" * 32)], store.seen, 0.25).duplicates == 1
