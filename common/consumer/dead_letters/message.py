"""The format of a dead letter: the copies that are published, and the lines in which it is shown. Pure.

Nothing here validates or moves a message. Copies keep the original's properties octet by octet. pamqp decodes them with
loss (doubles, timestamps beyond the year 2106, text that is not UTF-8) and cannot read all that a broker takes.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from pamqp import decode

from common.amqp.codec import Delivery, FrameError
from common.amqp.properties import Headers, Properties, content_header, long_string, split_properties
from common.event.document import write_json

REASON_CHARS = 250
_PERSISTENT = b"\x02"

# What a copy must not repeat. A user_id other than our own closes the channel (406), an expiration would delete a dead
# letter; CC and BCC would also send the copy elsewhere, even to the queue it was taken from.
_DROPPED_PROPERTIES = frozenset({"user_id", "expiration", "cluster_id"})
_DROPPED_HEADERS = frozenset({b"CC", b"BCC", b"x-delivery-count", b"x-acquired-count"})
_LEAST = frozenset({"content_type", "message_id", "delivery_mode"})
_OURS = b"x-predlog-"
_REASON, _TIME, _QUEUE, _USER = (_OURS + name for name in (b"reason", b"time", b"queue", b"user-id"))


class Copy(NamedTuple):
    """A message to publish. `bare` is a header with the fewest properties, for a broker that refuses `header`."""

    header: bytes
    bare: bytes
    body: bytes


def dead_copy(delivery: Delivery, queue_name: str, reason: str, now: datetime, new_id: bytes) -> Copy:
    """Return the copy of a message of `queue_name` for its dead letters.

    A message without message_id gets `new_id` (32 random hex digits), so that a replay can recognise its double.
    """
    theirs = _tolerant(delivery.header)
    properties, headers = _repeatable(*theirs)
    if properties.get("message_id", b"\0") == b"\0":
        properties["message_id"] = bytes([len(new_id)]) + new_id
    ours = {
        _REASON: long_string(printable(reason)[:REASON_CHARS].encode()),
        _TIME: long_string(now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()),
        _QUEUE: long_string(queue_name.encode()),
    }
    if user := theirs[0].get("user_id"):
        ours[_USER] = long_string(user[1:])
    least = {name: value for name, value in properties.items() if name in _LEAST}
    size = len(delivery.body)
    return Copy(content_header(properties, headers | ours, size), content_header(least, ours, size), delivery.body)


def live_copy(letter: Delivery) -> Copy:
    """Return the copy of a dead letter for its original queue."""
    properties, headers = _repeatable(*_tolerant(letter.header))
    header = content_header(properties, headers, len(letter.body))
    return Copy(header, header, letter.body)


def _tolerant(header: bytes) -> tuple[Properties, Headers]:
    """Do `split_properties`, but return nothing for what it refuses: any message can become a dead letter."""
    try:
        return split_properties(header)
    except FrameError:
        return {}, {}


def _repeatable(properties: Properties, headers: Headers) -> tuple[Properties, Headers]:
    kept = {name: value for name, value in properties.items() if name not in _DROPPED_PROPERTIES}
    theirs = {k: v for k, v in headers.items() if k not in _DROPPED_HEADERS and not k.startswith(_OURS)}
    return kept | {"delivery_mode": _PERSISTENT}, theirs


_FIRST_BYTES = 40


def printable(text: str) -> str:
    """Replace what could forge a line, drive a terminal, or is not valid Unicode."""
    return "".join([char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text])


def _row(message_id: str, reason: str, when: str, size: str, first: str) -> bytes:
    return f"{_cut(message_id, 32):32}  {_cut(reason, 40):40}  {_cut(when, 24):24}  {size:>9}  {first}\n".encode()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


TABLE_HEAD = _row("ID", "REASON", "WHEN", "SIZE", "FIRST BYTES")


def table_row(letter: Delivery) -> bytes:
    """Return a dead letter as one line of a table, under TABLE_HEAD."""
    message_id, reason, when = (printable(value or "-") for value in _account(letter)[:3])
    first = repr(letter.body[:_FIRST_BYTES])[2:-1][:_FIRST_BYTES]
    return _row(message_id, reason, when, str(len(letter.body)), first)


def json_line(letter: Delivery) -> bytes:
    """Return a dead letter as one line of JSON: {id, reason, time, size (bytes), headers, body}.

    A body that is not UTF-8 is in body_base64 instead. id, reason and time are null if the publisher set none.
    """
    message_id, reason, when, headers = _account(letter)
    entry = {"id": message_id, "reason": reason, "time": when, "size": len(letter.body), "headers": headers}
    try:
        entry["body"] = letter.body.decode()
    except UnicodeDecodeError:
        entry["body_base64"] = base64.b64encode(letter.body).decode()
    return write_json(entry) + b"\n"


def _account(letter: Delivery) -> tuple[str | None, str | None, str | None, dict[str, Any]]:
    """Return a dead letter's id, reason, time and headers, as its publishers wrote them."""
    properties, headers = _tolerant(letter.header)
    message_id = properties.get("message_id", b"")[1:].decode("utf-8", "replace")
    shown = {name.decode("utf-8", "replace"): _for_json(value) for name, value in headers.items()}
    return message_id or None, _string(headers, _REASON), _string(headers, _TIME), shown


def _string(headers: Headers, name: bytes) -> str | None:
    value = headers.get(name, b"")
    return value[5:].decode("utf-8", "replace") if value[:1] == b"S" else None


def _for_json(value: bytes) -> Any:
    """Return a header's value, or its octets in hexadecimal if pamqp or JSON cannot represent it."""
    try:
        plain = _plain(decode.embedded_value(value)[1])
        write_json(plain)
    except Exception:  # a publisher can put anything there, for example tables a thousand deep
        return value.hex()
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return str(value) if isinstance(value, Decimal) else value
