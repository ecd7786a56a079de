"""The preparation of messages, without a broker."""

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
from common.consumer.prepare import Prepared, prepare_batch
from common.event.document import write_json
from common.event.ids import line_id
from common.event.rows import CSV_HEADER
from common.event.schema import validate_event
from common.storage.store import Store
from tests.support.cells import split_tags
from tests.support.deliveries import delivery, event, group


def message(tag: int, body: bytes, message_id: bytes) -> Delivery:
    """A delivery of what our producer publishes."""
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
        store.append(prepared.data, prepared.ids)
    assert read(store) == [row for document in events for row in expected_rows(document)]

    # The broker delivers them all again: nothing is written, and everything can be acked.
    again = prepare_batch(messages, store.seen, 0.25)
    assert (again.data, again.ids, again.duplicates) == (b"", [], 1000)


def test_twice_in_one_batch_is_one_row(store: Store) -> None:
    body = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch([message(1, body, b"a" * 32), message(2, body, b"a" * 32)], store.seen, 0.25)
    assert (prepared.duplicates, len(prepared.ids)) == (1, 1)


def test_messages_of_others_without_an_id_are_stored_each_time(store: Store) -> None:
    body = json.dumps(random_event(random.Random(1), 1)).encode()
    bare = Delivery(1, False, b"\x00\x3c\x00\x00" + len(body).to_bytes(8, "big") + b"\x00\x00", body)
    prepared = prepare_batch([bare, bare], store.seen, 0.25)
    assert (prepared.duplicates, prepared.ids) == (0, [])
    assert prepared.rows == 2 * body.count(b'"prob"')


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"device_id":"d"}', b"\xff", b'{"device_id":null}'])
def test_poison_takes_no_good_message_with_it(store: Store, body: bytes) -> None:
    good = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch(
        [message(1, good, b"a" * 32), message(2, body or b"x", b"b" * 32), message(3, good, b"c" * 32)],
        store.seen,
        0.25,
    )
    [poison] = prepared.poison
    assert (poison.body, poison.id, poison.line) == (body or b"x", b"b" * 32, 0)
    assert poison.kind == ("not_an_event" if body[:1] in (b"[", b"{") else "not_json")
    assert poison.why
    assert "\n" not in poison.why
    assert len(prepared.ids) == 2, "a dead letter's id is not remembered: its replay must make rows"


def test_a_message_with_a_broken_header_is_poison(store: Store) -> None:
    broken = Delivery(1, False, b"\x00\x3c\x00\x00" + bytes(8) + b"\x00\x80", b"{}")
    assert [poison.why for poison in prepare_batch([broken], store.seen, 0.25).poison] == [
        "a content header that ends too early"
    ]


def test_what_is_not_an_event_is_poison_though_its_id_is_known(store: Store) -> None:
    good = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch([message(1, good, b"a" * 32), message(2, b"not json", b"a" * 32)], store.seen, 0.25)
    assert (prepared.rows > 0, prepared.duplicates, len(prepared.poison)) == (True, 0, 1)


def test_ids_that_differ_in_case_are_two(store: Store) -> None:
    good = json.dumps(random_event(random.Random(1), 1)).encode()
    prepared = prepare_batch([message(1, good, b"ab" * 16), message(2, good, b"AB" * 16)], store.seen, 0.25)
    assert (prepared.duplicates, len(set(prepared.ids))) == (0, 2)


def test_an_event_without_predictions_is_remembered(store: Store) -> None:
    empty = {**random_event(random.Random(1), 1), "data": {"license_id": "l", "preds": []}}
    prepared = prepare_batch([message(1, write_json(empty), b"a" * 32)], store.seen, 0.25)
    assert (prepared.data, prepared.rows, len(prepared.ids)) == (b"", 0, 1)
    store.append(prepared.data, prepared.ids)
    assert prepare_batch([message(2, write_json(empty), b"a" * 32)], store.seen, 0.25).duplicates == 1


# Messages of several events


def lines_of(*documents: dict[str, Any], first_id: int = 1) -> list[bytes]:
    """Events as lines, each with an id as its first member."""
    return [
        b'{"message_id":"%032x",' % number + write_json(validate_event(document))[1:]
        for number, document in enumerate(documents, first_id)
    ]


def test_a_group_becomes_the_rows_of_its_lines_once(store: Store) -> None:
    rng = random.Random(7)
    events = [random_event(rng, number) for number in range(64)]
    prepared = prepare_batch([group(1, *lines_of(*events))], store.seen, 0.25)
    assert (prepared.most_events, len(prepared.ids), prepared.poison) == (64, 64, [])
    store.append(prepared.data, prepared.ids)
    assert read(store) == [row for document in events for row in expected_rows(document)]
    # Published again in other groups and alone, they are known.
    again = [*lines_of(*events[:3]), *lines_of(*events[40:], first_id=41)]
    alone = message(2, write_json(events[5]), b"%032x" % 6)
    prepared = prepare_batch([group(1, *again), alone], store.seen, 0.25)
    assert (prepared.data, prepared.duplicates) == (b"", 28)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n  \r\n"])
@pytest.mark.parametrize("between", [b"\n", b"\r\n", b"\n\n", b" \n\t\n "])
@pytest.mark.parametrize("kind", ["application/x-ndjson", "Application/X-NDJSON; charset=utf-8"])
def test_lines_of_others_end_as_they_like(between: bytes, end: bytes, kind: str) -> None:
    body = between.join(lines_of(*[random_event(random.Random(n), n) for n in range(3)])) + end
    prepared = prepare_batch([delivery(1, body, content_type=kind)], lambda _: False, 0.25)
    assert (len(prepared.ids), prepared.poison, prepared.most_events) == (3, [], 3)


def test_a_group_without_lines_is_settled(store: Store) -> None:
    assert prepare_batch([group(1, b" ", b"\r")], store.seen, 0.25) == Prepared(b"", 0, [], 0, [], 0, 1)


def test_lines_without_an_id_are_stored_each_time(store: Store) -> None:
    """The AMQP message_id names the message, not its lines."""
    prepared = prepare_batch([group(1, event("d"), event("d"))], store.seen, 0.25)
    assert (prepared.rows, prepared.ids, prepared.duplicates) == (2, [], 0)


def test_a_bad_line_has_its_number_and_its_header(store: Store) -> None:
    first, second = lines_of(*[random_event(random.Random(n), n) for n in range(2)])
    bad = b'{"message_id":"%032x","device_id":7}' % 9
    delivered = group(1, first, b"", b"[\r", bad, second, app_id="a")
    prepared = prepare_batch([delivered], store.seen, 0.25)
    assert [(each.kind, each.line, each.id, each.body) for each in prepared.poison] == [
        ("not_json", 3, None, b"["),
        ("not_an_event", 4, b"%032x" % 9, bad),
    ]
    assert [each.header for each in prepared.poison] == [delivered.header, b""]
    assert len(prepared.ids) == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"message_id":"0123456789abcdef0123456789abcdef","x":1}', b"0123456789abcdef0123456789abcdef"),
        (b'{"x":1,"message_id":"short"}', b"short"),
        (b' {"message_id" : "\\u00e9"}', "é".encode()),
        (b'{"message_id":"0123456789abcdef\\"123456789abcdef","x":1}', b'0123456789abcdef"123456789abcdef'),
        *((text, None) for text in (b"{}", b"[]", b'"message_id"', b'{"message_id":7}', b'{"message_id":""}', b"{")),
        (b'{"data":{"message_id":"x"}}', None),
        (b'{"message_id":', None),
    ],
)
def test_a_line_has_the_id_that_its_member_says(line: bytes, expected: bytes | None) -> None:
    assert line_id(line) == expected
