import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from common.amqp.codec import Delivery, FrameError
from common.amqp.properties import message_id_of, split_properties
from common.consumer.dead_letters.message import Copy, dead_copy, json_line, live_copy, table_row

NOW = datetime(2026, 5, 4, 3, 2, 1, 987654, UTC)
ID = "0123456789abcdef0123456789abcdef"
NEW_ID = b"f" * 32


def delivery(body: bytes = b"{}", **properties: Any) -> Delivery:
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(**properties))
    return Delivery(1, False, header.marshal(), body)


def raw_delivery(properties: bytes, body: bytes = b"{}") -> Delivery:
    return Delivery(1, False, b"\x00\x3c\x00\x00" + len(body).to_bytes(8, "big") + properties, body)


def read(header: bytes) -> Basic.Properties:
    content = ContentHeader()
    content.unmarshal(header)
    return content.properties


def dead_letter(original: Delivery, reason: str = "not JSON", new_id: bytes = NEW_ID) -> Delivery:
    return Delivery(1, False, dead_copy(original, "q", reason, NOW, new_id).header, original.body)


EVERY_PROPERTY = {
    "content_type": "application/json",
    "content_encoding": "gzip",
    "headers": {"a": "b"},
    "priority": 7,
    "correlation_id": "c",
    "reply_to": "r",
    "message_id": ID,
    "timestamp": NOW,
    "message_type": "t",
    "app_id": "a",
}


def test_a_dead_letter_keeps_its_body_and_says_why() -> None:
    """A dead letter keeps body and properties and says why when and from where."""
    original = delivery(b"\xff not JSON", **EVERY_PROPERTY)
    copy = dead_copy(original, "predictions", "not JSON", NOW, NEW_ID)
    properties = read(copy.header)
    assert copy.body == original.body
    assert {name: getattr(properties, name) for name in EVERY_PROPERTY} == EVERY_PROPERTY | {
        "timestamp": NOW.replace(microsecond=0),
        "headers": {
            "a": "b",
            "x-predlog-reason": "not JSON",
            "x-predlog-time": "2026-05-04T03:02:01.987Z",
            "x-predlog-queue": "predictions",
        },
    }
    assert properties.delivery_mode == 2


def test_the_time_is_utc_whatever_zone_it_is_given_in() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    assert b"2026-05-04T03:02:01.987Z" in dead_copy(delivery(), "q", "", elsewhere, NEW_ID).header


# Each with the type octet that pamqp would change on its way: a double, milliseconds in a timestamp, text that is not
# UTF-8, an unsigned octet, and one of every other type.
VALUES = (
    b"d\x3f\xb9\x99\x99\x99\x99\x99\x9a",
    b"T\x00\x00\x01\x8e\x00\x00\x00\x01",
    b"S\x00\x00\x00\x02\xff\xfe",
    b"B\xff",
    b"t\x01",
    b"b\xff",
    b"s\x00\x01",
    b"u\xff\xff",
    b"I\x00\x00\x00\x01",
    b"i\xff\xff\xff\xff",
    b"l\x00\x00\x00\x00\x00\x00\x00\x01",
    b"L\x00\x00\x00\x00\x00\x00\x00\x01",
    b"f\x00\x00\x00\x01",
    b"D\x02\x00\x00\x00\x01",
    b"V",
    b"x\x00\x00\x00\x01\x00",
    b"A\x00\x00\x00\x02t\x01",
    b"F\x00\x00\x00\x04\x01at\x01",
)


@given(st.dictionaries(st.binary(min_size=1, max_size=40).map(lambda name: b"." + name), st.sampled_from(VALUES)))
def test_headers_go_to_the_dead_letters_and_back_octet_by_octet(headers: dict[bytes, bytes]) -> None:
    table = b"".join(bytes([len(name)]) + name + value for name, value in headers.items())
    flags = b"\x30\x80" if table else b"\x10\x80"
    field = len(table).to_bytes(4, "big") + table if table else b""
    original = raw_delivery(flags + field + b"\x02" + b"\x20" + ID.encode())
    assert live_copy(dead_letter(original)).header == original.header


def test_a_replayed_message_is_the_original_again() -> None:
    original = delivery(b"x", delivery_mode=2, **EVERY_PROPERTY)
    assert live_copy(dead_letter(original)) == Copy(original.header, original.header, b"x")


def test_a_message_without_an_id_gets_a_lasting_one() -> None:
    """A message without an id gets one that stays the same through replays."""
    letter = dead_letter(delivery())
    assert message_id_of(letter.header) == NEW_ID
    back = live_copy(letter)
    assert message_id_of(back.header) == NEW_ID
    again = dead_letter(Delivery(1, False, back.header, back.body), new_id=b"e" * 32)
    assert message_id_of(again.header) == NEW_ID


def test_a_copy_never_expires_nor_goes_elsewhere() -> None:
    """A copy never expires nor goes elsewhere nor claims another user."""
    headers = {"CC": ["predictions"], "BCC": ["x"], "x-delivery-count": 3, "kept": True}
    letter = dead_letter(delivery(expiration="1", user_id="camera", headers=headers))
    properties = read(letter.header)
    assert properties.expiration is None
    assert properties.user_id is None
    assert properties.headers is not None
    assert set(properties.headers) == {
        "kept",
        "x-predlog-reason",
        "x-predlog-time",
        "x-predlog-queue",
        "x-predlog-user-id",
    }
    assert properties.headers["x-predlog-user-id"] == "camera"
    assert read(live_copy(letter).header).headers == {"kept": True}


@pytest.mark.parametrize(
    "reason", ["a\r\nb\x00\x1b[31m\x7f\u2028", "\ud800", "\u20ac" * 999, "x" * 251, ""], ids=range(5)
)
def test_a_reason_is_bounded_and_free_of_control_characters(reason: str) -> None:
    headers = read(dead_letter(delivery(), reason).header).headers
    assert headers is not None
    shown = headers["x-predlog-reason"]
    assert isinstance(shown, str)
    assert len(shown) == min(len(reason), 250)
    assert shown.isprintable()


@given(st.binary(max_size=60))
def test_any_header_can_be_buried_listed_exported_and_replayed(garbage: bytes) -> None:
    original = raw_delivery(garbage)
    for letter in (original, dead_letter(original)):
        live_copy(letter)
        json.loads(json_line(letter))
        table_row(letter)


@pytest.mark.parametrize(
    "garbage", [b"", b"\x80\x00", b"\x80\x00\x05ab", b"\x00\x01", b"\x20\x00\x00\x00\x00\x02\x01a", b"\x00\x00x"]
)
def test_a_header_that_does_not_add_up_is_recognised(garbage: bytes) -> None:
    with pytest.raises(FrameError):
        split_properties(raw_delivery(garbage).header)


# What people and programs read


def test_a_table_line_is_aligned_and_cannot_drive_a_terminal() -> None:
    letters = [
        dead_letter(delivery(b"\x1b[2J\n'\"\xff" * 20, message_id="\x1b]0;x"), "r" * 99),
        dead_letter(delivery(message_id=ID)),
    ]
    lines = [table_row(letter).decode() for letter in letters]
    assert all(line.endswith("\n") and line[:-1].isprintable() for line in lines)
    assert lines[0].index("2026-05-04") == lines[1].index("2026-05-04")
    assert lines[0][: lines[0].index("\\x1b[2J")].rstrip().endswith(" 160")
    assert ID in lines[1]


def test_a_json_line_tells_everything_as_text_or_base64() -> None:
    headers = {
        "n": 1.5,
        "when": NOW.replace(microsecond=0),
        "deep": {"list": [1, bytearray(b"\xff"), Decimal("1.5"), None]},
    }
    text = json.loads(json_line(dead_letter(delivery("é\n".encode(), message_id=ID, headers=headers), "why")))
    assert (text["id"], text["reason"], text["time"]) == (ID, "why", "2026-05-04T03:02:01.987Z")
    assert (text["body"], text["size"]) == ("é\n", 3)
    assert text["headers"]["deep"] == {"list": [1, "ff", "1.5", None]}
    assert text["headers"]["when"].startswith("2026-05-04T03:02:01")
    binary = json.loads(json_line(dead_letter(delivery(b"\xff\x00"))))
    assert binary["body_base64"] == "/wA="
    assert "body" not in binary


def test_a_header_that_json_cannot_hold_does_not_stop_an_export() -> None:
    value = b"V"
    for _ in range(2000):
        value = b"A" + len(value).to_bytes(4, "big") + value
    table = b"\x04deep" + value + b"\x04year" + b"T" + b"\xff" * 8
    letter = raw_delivery(b"\x20\x00" + len(table).to_bytes(4, "big") + table)
    headers = json.loads(json_line(letter))["headers"]
    assert headers == {"deep": value.hex(), "year": (b"T" + b"\xff" * 8).hex()}
