"""Message properties in their wire format (AMQP 0-9-1, 4.2.6). Pure: bytes in, values out."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import Any

from pamqp.header import ContentHeader

from common.amqp.codec import JSON, FrameError

# As PublishEncoder writes them, up to the length of the message-id.
_OUR_JSON = b"\x90\xc0\x10" + JSON + b"\x02\x20"
# The kinds of the properties before the message-id, in the order of their flags (4.2.6.1): short string, table, octet.
_BEFORE_ID = "sstoosss"


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
                if kind == "s":
                    at += 1 + header[at]
                else:
                    at += 1 if kind == "o" else 4 + int.from_bytes(header[at : at + 4], "big")
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

    A time is in ISO 8601, a decimal number is a string, and bytes are {"hex": …}. A content header that cannot be
    decoded is returned as {"undecoded": "<hex of its payload>"}.
    """
    content = ContentHeader()
    try:
        content.unmarshal(header)
        properties = {name: value for name, value in content.properties if value not in (None, "")}
        # With a level around it, so that the caller can write and read it as a member of something.
        text = json.dumps({"": properties}, default=_readable, allow_nan=False)
        readable: dict[str, dict[str, Any]] = json.loads(text)
        return readable[""]
    except Exception:  # of any kind: pamqp decodes what other publishers wrote
        return {"undecoded": header.hex()}


def _readable(value: Decimal | datetime | bytes | bytearray) -> object:
    if isinstance(value, Decimal):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else {"hex": value.hex()}
