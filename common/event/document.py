"""JSON documents within bounds: what one may cost, and what orjson's reading leaves out. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from common.errors import InvalidEvent
from common.event.faults import make_fault

# What a document may cost before anything is known about it. A prediction with `n` tags has 4 + n values (counted as
# commas, brackets and braces that open), so a full batch of `max_preds` predictions may have 8 tags in each.
VALUES_PER_PRED = 12
SPARE_VALUES = 10_000
# The second, exact reading of a refused document is many times slower than the first where numbers are long: strings
# aside, it reads no more than this.
EXACT_READING_BYTES = 1 << 18

_VALUE_CHARS = (b",", b"[", b"{")
_WINDOW_BYTES = 1 << 16
_RARE_HITS = 16  # in a window
_BOM = b"\xef\xbb\xbf"


def write_json(value: object) -> bytes:
    """Compact JSON, UTF-8."""
    return orjson.dumps(value)


def read_json(body: bytes) -> Any:
    """The JSON document in `body`: UTF-8, one byte order mark allowed, the last of equal keys wins, depth up to 1024.

    Integers beyond 64 bits come as floats; `decode` knows better. Raises InvalidEvent with one fault for an empty body
    and for what RFC 8259 does not allow (NaN, lone surrogates and numbers beyond a double included).
    """
    try:
        return orjson.loads(body.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        if not body:
            raise InvalidEvent([make_fault(("body",), "missing")]) from None
        raise unreadable(error.pos) from None


def unreadable(position: int) -> InvalidEvent:
    return InvalidEvent([make_fault(("body", position), "json_invalid")])


# The shortest integer of more than 64 bits.
NINETEEN_DIGITS = b"0" * 19
DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")


def read_exactly(body: bytes, otherwise: object) -> object:
    if len(body) > EXACT_READING_BYTES:
        outside = _outside_strings(body, EXACT_READING_BYTES)
        if outside is None or len(outside) > EXACT_READING_BYTES:
            return otherwise
    try:
        return json.loads(body.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise unreadable(error.pos) from None
    except UnicodeDecodeError as error:
        raise unreadable(error.start) from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep document
        return otherwise


def bound_values(bodies: Sequence[bytes], limit: int) -> None:
    """Refuse documents with more than `limit` values in all, at a fraction of what parsing them would cost."""
    if sum(map(len, bodies)) <= limit:
        return
    count = 0
    for body in bodies:
        count += _count_values(body, limit - count)
        if count > limit:
            break
    else:
        return
    count = 0
    for body in bodies:
        outside = _outside_strings(body, limit)  # a frame may be the text of an array of pixels
        count += limit + 1 if outside is None else _count_values(outside, limit - count)
        if count > limit:
            message = f"Body should hold at most {limit} JSON values"
            raise InvalidEvent([make_fault(["body"], "json_too_large", message)])


def _count_values(text: bytes, limit: int) -> int:
    """Count the values of a document; beyond `limit`, stop soon."""
    count = 0
    for start in range(0, len(text), _WINDOW_BYTES):
        for char in _VALUE_CHARS:
            count += _count_char(text, char, start, start + _WINDOW_BYTES)
        if count > limit:
            break
    return count


def _count_char(text: bytes, char: bytes, start: int, end: int) -> int:
    """Count `char` in text[start:end].

    Where hits are rare, as in images, `find` passes over them with the processor's own search, ten times faster than
    `count`, which looks at every byte. Where they are not, `count` is faster.
    """
    for hits in range(_RARE_HITS):
        start = text.find(char, start, end) + 1
        if not start:
            return hits
    return _RARE_HITS + text.count(char, start, end)


def _outside_strings(body: bytes, most_strings: int) -> bytes | None:
    """Return a JSON document without what is in its strings; None when they are too many."""
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(body.split(b'"')[::2]) if body.count(b'"') <= 2 * most_strings else None


def array_items(body: bytes) -> list[Any]:
    """Return the items of a JSON array. Raises InvalidEvent for what is none.

    Unlike an event alone, an array is read once: where orjson refuses one item, it refuses the array. NDJSON is read
    item by item.
    """
    items = read_json(body)
    if type(items) is not list:
        raise InvalidEvent([make_fault(["body"], "list_type")])
    return items


def line_items(body: bytes, limit: int) -> list[bytes]:
    """Return the lines of NDJSON that are not blank. Raises InvalidEvent above `limit` lines of any kind."""
    if body.count(b"\n") > limit:
        raise InvalidEvent([make_fault(["body"], "json_too_large", f"Body should hold at most {limit} lines")])
    return [line for line in body.split(b"\n") if line.strip()]
