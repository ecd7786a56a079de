"""What a content header says about its message, as bytes for the hot path and as text for people."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from common.amqp.codec import JSON, NDJSON, FrameError
from common.amqp.properties import content_type_of, message_id_of, readable_properties


def header(**properties: object) -> bytes:
    content = ContentHeader(body_size=1, properties=Basic.Properties(**properties))  # type: ignore[arg-type]
    return bytes(marshal(content, 1))[7:-1]


@pytest.mark.parametrize(
    ("given", "media_type"),
    [
        ("application/json", JSON),
        ("application/x-ndjson", NDJSON),
        ("Application/X-NDJSON ; charset=utf-8", NDJSON),
        ("", b""),
        (None, b""),
    ],
)
def test_a_content_type_is_read_in_any_spelling(given: str | None, media_type: bytes) -> None:
    assert content_type_of(header(content_type=given, message_id="x", delivery_mode=2)) == media_type


def test_properties_are_readable_whatever_is_in_them() -> None:
    noon = datetime(2026, 11, 29, 12, tzinfo=UTC)
    headers = {"x": [1, {"y": bytearray(b"\xff")}, None], "price": Decimal("1.5"), "at": noon}
    read = readable_properties(header(message_id="m", priority=0, timestamp=noon, headers=headers))
    assert json.loads(json.dumps(read, allow_nan=False)) == {
        "message_id": "m",
        "priority": 0,
        "timestamp": "2026-11-29T12:00:00+00:00",
        "headers": {
            "x": [1, {"y": {"hex": "ff"}}, None],
            "price": "1.5",
            "at": "2026-11-29T12:00:00+00:00",
        },
    }


@pytest.mark.parametrize("depth", [40, 2000])
def test_tables_nested_too_deep_stay_bytes(depth: int) -> None:
    table = b""
    for _ in range(depth):
        table = b"\x01tF" + len(table).to_bytes(4, "big") + table
    nested = b"\x00\x3c" + bytes(10) + b"\x20\x00" + len(table).to_bytes(4, "big") + table
    assert ("headers" in readable_properties(nested)) == (depth == 40)


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda rest: header(message_id="m")[:12] + rest))
def test_any_header_is_readable_or_kept_as_bytes(raw: bytes) -> None:
    read = readable_properties(raw)
    json.dumps(read, allow_nan=False)
    assert "undecoded" not in read or bytes.fromhex(read["undecoded"]) == raw
    content_type_of(raw)
    with contextlib.suppress(FrameError):
        message_id_of(raw)
