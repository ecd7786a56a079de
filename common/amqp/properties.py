"""Message properties in their wire format (AMQP 0-9-1, 4.2.6). Pure: bytes in, values out."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from struct import Struct
from typing import Any

from pamqp.header import ContentHeader

from common.amqp.codec import JSON, FrameError

Properties = dict[str, bytes]  # by name; each value with its length in front, if it has one
Headers = dict[bytes, bytes]  # by name; each value with its type octet in front

# In the order of their flags from bit 15 down (4.2.6.1): short string, table, octet, or a timestamp of 8 octets.
_PROPERTIES = (
    ("content_type", "s"),
    ("content_encoding", "s"),
    ("headers", "t"),
    ("delivery_mode", "o"),
    ("priority", "o"),
    ("correlation_id", "s"),
    ("reply_to", "s"),
    ("expiration", "s"),
    ("message_id", "s"),
    ("timestamp", "T"),
    ("type", "s"),
    ("user_id", "s"),
    ("app_id", "s"),
    ("cluster_id", "s"),
)
# What a table may hold (4.2.5.5, and RabbitMQ's errata page), with its size; -1: a length of 4 octets says it.
_SIZES = dict(zip(b"tbBsuIilLfdDTVSAFx", (1, 1, 1, 2, 2, 4, 4, 8, 8, 4, 8, 5, 8, 0, -1, -1, -1, -1), strict=True))
_CONTENT = Struct(">HHQ")


def _size(kind: str, header: bytes, at: int) -> int:
    """Return the size of the value at `at`, in octets. Raise IndexError behind the end."""
    if kind == "s":
        return 1 + header[at]
    if kind == "t":
        return 4 + int.from_bytes(header[at : at + 4], "big")
    return 1 if kind == "o" else 8


def split_properties(header: bytes) -> tuple[Properties, Headers]:
    """Return the properties of a content header's payload, and separately its headers. Raise FrameError."""
    flags, at = int.from_bytes(header[12:14], "big"), 14
    properties: Properties = {}
    try:
        for index, (name, kind) in enumerate(_PROPERTIES):
            if flags & 0x8000 >> index:
                size = _size(kind, header, at)
                properties[name] = header[at : at + size]
                at += size
    except IndexError:
        at = -1
    if at != len(header) or flags & 3:
        raise FrameError("a content header whose properties do not add up")
    return properties, _split_table(properties.pop("headers", bytes(4))[4:])


def _split_table(table: bytes) -> Headers:
    headers: Headers = {}
    at = 0
    try:
        while at < len(table):
            start = at + 1 + table[at]
            name, size = table[at + 1 : start], _SIZES[table[start]]
            at = start + 1 + (size if size >= 0 else 4 + int.from_bytes(table[start + 1 : start + 5], "big"))
            headers[name] = table[start:at]
    except (IndexError, KeyError):
        at = -1
    if at != len(table):
        raise FrameError("a table of headers that does not add up")
    return headers


def _table(headers: Headers) -> bytes:
    table = b"".join([bytes([len(name)]) + name + value for name, value in headers.items()])
    return len(table).to_bytes(4, "big") + table


def content_header(properties: Properties, headers: Headers, body_bytes: int) -> bytes:
    """Return the payload of a content header; the inverse of `split_properties`."""
    have = properties | {"headers": _table(headers)} if headers else properties
    flags, values = 0, []
    for index, (name, _) in enumerate(_PROPERTIES):
        if name in have:
            flags |= 0x8000 >> index
            values.append(have[name])
    return _CONTENT.pack(60, 0, body_bytes) + flags.to_bytes(2, "big") + b"".join(values)


def long_string(value: bytes) -> bytes:
    """Return a long string as the value of a header."""
    return b"S" + len(value).to_bytes(4, "big") + value


# As PublishEncoder writes them, up to the length of the message-id.
_OUR_JSON = b"\x90\xc0\x10" + JSON + b"\x02\x20"
_BEFORE_ID = "sstoosss"  # the kinds of the properties before the message-id, in the order of their flags


def message_id_of(header: bytes) -> bytes | None:
    """Return the message-id property of a content header's payload; None if the publisher set none. Raise FrameError.

    Only what stands before the message-id must be readable.
    """
    if header[12:33] == _OUR_JSON:
        return header[33:65]
    try:
        flags, at = int.from_bytes(header[12:14], "big"), 14
        if not flags & 0x8000 >> len(_BEFORE_ID):
            return None
        for index, kind in enumerate(_BEFORE_ID):
            if flags & 0x8000 >> index:
                at += _size(kind, header, at)
        return header[at + 1 : at + 1 + header[at]] or None  # an empty one names nothing
    except IndexError:
        raise FrameError("a content header that ends too early") from None


def content_type_of(header: bytes) -> bytes:
    """Return the media type of a message in lower case, without parameters; empty if the publisher set none."""
    if header[12:33] == _OUR_JSON:
        return JSON
    if len(header) < 15 or not header[12] & 0x80:
        return b""
    return header[15 : 15 + header[14]].partition(b";")[0].strip().lower()


def readable_properties(header: bytes) -> dict[str, Any]:
    """Return the properties that a publisher set, by name, as values for JSON.

    A time is in ISO 8601, a decimal number a string, and bytes are {"hex": …}. What cannot be decoded is the payload of
    the content header itself: {"undecoded": "<hex>"}.
    """
    content = ContentHeader()
    try:
        content.unmarshal(header)
        properties = {name: value for name, value in content.properties if value not in (None, "")}
        readable: dict[str, Any] = json.loads(json.dumps(properties, default=_readable, allow_nan=False))
        return readable
    except Exception:  # of many kinds: pamqp reads what strangers wrote
        return {"undecoded": header.hex()}


def _readable(value: Decimal | datetime | bytes | bytearray) -> object:
    if isinstance(value, Decimal):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else {"hex": value.hex()}
