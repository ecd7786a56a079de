"""Events: bytes to a validated event in normal form, and events to CSV rows. Pure: no clock, no randomness, no I/O.

Normal form: the contract's members in the contract's order, nothing else; ids are strings, `prob` is a float, all
strings are valid Unicode; as bytes it is compact JSON. The producer publishes it, and an event in normal form
validates to an equal one.

Faults are what FastAPI answers (pydantic 2, lax mode): `loc`, `msg` and `type`, every fault at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, cast

import orjson

from common.errors import InvalidEvent

Event = dict[str, Any]
Fault = dict[str, object]

HEADER = b"device_id;client_id;created_at;license_id;image_frame;prob;tags\r\n"
LOW_PROB_TAG = "low_prob"

# What a document may cost before anything is known about it. A prediction with `n` tags has 4 + n values (counted as
# commas, brackets and braces that open), so a full batch of `max_preds` predictions may have 8 tags in each.
VALUES_PER_PRED = 12
SPARE_VALUES = 10_000
# The second, exact reading of a refused document is many times slower than the first where numbers are long: strings
# aside, it reads no more than this.
EXACT_READING_BYTES = 1 << 18
EXACT_ARRAY_BYTES = 1 << 20  # an array is then also written, and read, item by item
MAX_NUMBER_CHARS = 1000
# The answer to a document with more faults names this many, and says so.
MAX_FAULTS = 2_000

_BOM = b"\xef\xbb\xbf"

_MESSAGES = {
    "missing": "Field required",
    "json_invalid": "JSON decode error",
    "model_attributes_type": "Input should be a valid dictionary or object to extract fields from",
    "list_type": "Input should be a valid list",
    "string_type": "Input should be a valid string",
    "string_unicode": "Input should be a valid string, unable to parse raw data as a unicode string",
    "float_type": "Input should be a valid number",
    "float_parsing": "Input should be a valid number, unable to parse string as a number",
    "finite_number": "Input should be a finite number",
}


def _fault(loc: Iterable[str | int], kind: str, message: str | None = None) -> Fault:
    return {"loc": list(loc), "msg": message or _MESSAGES[kind], "type": kind}


# --- JSON ---


def dumps(value: object) -> bytes:
    """Compact JSON, UTF-8."""
    return orjson.dumps(value)


def loads(body: bytes) -> Any:
    """The JSON document in `body`: UTF-8, one byte order mark allowed, the last of equal keys wins, depth up to 1024.

    Integers beyond 64 bits come as floats; `decode` knows better. Raises InvalidEvent with one fault for an empty body
    and for what RFC 8259 does not allow (NaN, lone surrogates and numbers beyond a double included).
    """
    try:
        return orjson.loads(body.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        if not body:
            raise InvalidEvent([_fault(("body",), "missing")]) from None
        raise _unreadable(error.pos) from None


def _unreadable(position: int) -> InvalidEvent:
    return InvalidEvent([_fault(("body", position), "json_invalid")])


# --- validation ---


def _string(value: object) -> str:
    if type(value) is not str:
        raise ValueError("string_type")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("string_unicode") from None
    return value


def _identifier(value: object) -> str:
    return str(value) if type(value) is int else _string(value)


def _number(value: object) -> float:
    if type(value) is str:
        number = _parse_number(value)
    elif type(value) is float or type(value) is int:
        try:
            number = float(value)
        except OverflowError:  # an integer beyond a double: pydantic's name for it
            raise ValueError("float_type") from None
    else:
        raise ValueError("float_type")
    if number - number != 0.0:
        raise ValueError("finite_number")
    return number


# Unicode's White_Space, as Rust trims it; str.strip() would also take the separators U+001C to U+001F.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def _parse_number(text: str) -> float:
    """A float as pydantic reads one from a string: Rust's grammar, which is Python's in ASCII but for underscores."""
    if len(text) <= MAX_NUMBER_CHARS:
        text = text.strip(_WHITE_SPACE)
        if text.isascii() and text.isprintable() and "__" not in text and "_" not in (text[:1], text[-1:]):
            with suppress(ValueError):
                return float(text.replace("_", ""))
    raise ValueError("float_parsing")


# A document's shape: an object by its members, a list by its only item, a value by what reads it.
Shape = dict[str, Any] | list[Any] | Callable[[object], object]

_PREDS: Shape = [{"image_frame": _string, "prob": _number, "tags": [_string]}]
_EVENT: Shape = {
    "device_id": _identifier,
    "client_id": _identifier,
    "created_at": _identifier,
    "data": {"license_id": _identifier, "preds": _PREDS},
}


class _Walk:
    """Reads a document by its shape, and collects every fault on the way."""

    def __init__(self, max_preds: int | None) -> None:
        self.max_preds = max_preds
        self.loc: list[str | int] = ["body"]
        self.faults: list[Fault] = []

    def read(self, value: Any, shape: Shape) -> Any:
        if isinstance(shape, dict):
            return self.read_object(value, shape) if type(value) is dict else self.fault("model_attributes_type")
        if isinstance(shape, list):
            return self.read_list(value, shape) if type(value) is list else self.fault("list_type")
        try:
            return shape(value)
        except ValueError as error:
            return self.fault(str(error))

    def read_object(self, value: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
        result = {}
        for name, member in shape.items():
            self.loc.append(name)
            result[name] = self.read(value[name], member) if name in value else self.fault("missing")
            self.loc.pop()
        return result

    def read_list(self, value: list[Any], shape: list[Any]) -> Any:
        if shape is _PREDS and self.max_preds is not None and len(value) > self.max_preds:
            return self.fault("too_long", _too_long(self.max_preds, len(value)))
        result = []
        self.loc.append(0)
        for self.loc[-1], item in enumerate(value):
            result.append(self.read(item, shape[0]))
        self.loc.pop()
        return result

    def fault(self, kind: str, message: str | None = None) -> Any:
        """Notes a fault at `loc`, and gives the value that stands for the faulty one."""
        self.faults.append(_fault(self.loc, kind, message))
        if len(self.faults) == MAX_FAULTS:
            self.faults.append(_fault(["body"], "too_many_faults", f"Only the first {MAX_FAULTS} faults are listed"))
            raise InvalidEvent(self.faults)
        return None


def _too_long(limit: int, length: int) -> str:
    return f"List should have at most {limit} item{'' if limit == 1 else 's'} after validation, not {length}"


def _validate_carefully(document: object, max_preds: int | None) -> Event:
    walk = _Walk(max_preds)
    event: Event = walk.read(document, _EVENT)
    if walk.faults:
        raise InvalidEvent(walk.faults)
    return event


def _validate_quickly(document: Any, max_preds: int | None) -> Event | None:
    """The event in normal form; None when somebody has to look closer."""
    try:
        data = document["data"]
        ids = document["device_id"], document["client_id"], document["created_at"], data["license_id"]
        device_id, client_id, created_at, license_id = ids
        if not (str is type(device_id) is type(client_id) is type(created_at) is type(license_id)):
            device_id, client_id, created_at, license_id = map(_identifier, ids)
        preds = data["preds"]
        if type(preds) is not list or (max_preds is not None and len(preds) > max_preds):
            return None
        normal = []
        for pred in preds:
            image_frame = pred["image_frame"]
            prob = pred["prob"]
            tags = pred["tags"]
            if type(image_frame) is not str or type(tags) is not list:
                return None
            if type(prob) is not float or prob - prob != 0.0:
                prob = _number(prob)
            for tag in tags:
                if type(tag) is not str:
                    return None
            normal.append({"image_frame": image_frame, "prob": prob, "tags": tags})
    except (KeyError, TypeError, ValueError):
        return None
    return {
        "device_id": device_id,
        "client_id": client_id,
        "created_at": created_at,
        "data": {"license_id": license_id, "preds": normal},
    }


def validate(document: object, max_preds: int | None = None) -> Event:
    """The event in normal form. `document` is as `loads` gives it; its lists of tags are shared, not copied.

    Raises InvalidEvent with every fault (the first MAX_FAULTS of them).
    """
    event = _validate_quickly(document, max_preds)
    return event if event is not None else _validate_carefully(document, max_preds)


def decode(body: bytes, max_preds: int | None = None) -> Event:
    """`loads` and `validate`, with a bound on the work when `max_preds` is given. Raises InvalidEvent with every fault.

    What orjson cannot tell is read a second time, as FastAPI would (up to EXACT_READING_BYTES outside of strings): so
    an integer id of more than 64 bits keeps its digits, and NaN, 1e999 or a lone surrogate is named by where it is.
    What `loads` cannot read is never accepted, though.
    """
    if max_preds is not None:
        _bound_values([body], VALUES_PER_PRED * max_preds + SPARE_VALUES)
    try:
        document = loads(body)
    except InvalidEvent as refusal:
        exact = _read_exactly(body, otherwise=None) if body else None
        if exact is not None:
            _validate_carefully(exact, max_preds)
        raise refusal from None
    event = _validate_quickly(document, max_preds)
    if event is not None:
        return event
    if _NINETEEN_DIGITS in body.translate(_DIGITS_TO_ZERO):
        document = _read_exactly(body, otherwise=document)
    return _validate_carefully(document, max_preds)


# The shortest integer of more than 64 bits.
_NINETEEN_DIGITS = b"0" * 19
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")


def _read_exactly(body: bytes, otherwise: object) -> object:
    if len(body) > EXACT_READING_BYTES:
        outside = _outside_strings(body, EXACT_READING_BYTES)
        if outside is None or len(outside) > EXACT_READING_BYTES:
            return otherwise
    try:
        return json.loads(body.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise _unreadable(error.pos) from None
    except UnicodeDecodeError as error:
        raise _unreadable(error.start) from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep document
        return otherwise


def _bound_values(bodies: Sequence[bytes], limit: int) -> None:
    """Refuses documents with more than `limit` values in all, at a fraction of what parsing them would cost."""
    if sum(map(len, bodies)) <= limit or sum(map(_count_values, bodies)) <= limit:
        return
    count = 0
    for body in bodies:
        outside = _outside_strings(body, limit)  # a frame may be the text of an array of pixels
        count += limit + 1 if outside is None else _count_values(outside)
        if count > limit:
            raise InvalidEvent([_fault(["body"], "json_too_large", f"Body should hold at most {limit} JSON values")])


def _count_values(text: bytes) -> int:
    return len(text) - len(text.translate(None, b",[{"))


def _outside_strings(body: bytes, most_strings: int) -> bytes | None:
    """A JSON document without what is in its strings; None when they are too many. Right up to the first fault."""
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(body.split(b'"')[::2]) if body.count(b'"') <= 2 * most_strings else None


def normalise(body: bytes, max_preds: int) -> bytes:
    """The event in `body` in normal form, as bytes. Bounded work, whatever `body` is. Raises InvalidEvent."""
    event = None
    if len(body) <= SPARE_VALUES:  # it cannot hold more
        try:
            event = _validate_quickly(orjson.loads(body), max_preds)
        except orjson.JSONDecodeError:
            event = None  # decode knows more
    return orjson.dumps(decode(body, max_preds) if event is None else event)


def normalise_batch(body: bytes, lines: bool, max_preds: int) -> list[bytes | InvalidEvent]:
    """The events of a JSON array, or of NDJSON when `lines`: each in normal form, or its faults.

    A fault's `loc` is body, position, …. `max_preds` bounds the events, and the predictions of each; beyond MAX_FAULTS
    an event has one fault that stands for its own. Raises InvalidEvent when the whole cannot be read, or is too much.
    """
    limit = VALUES_PER_PRED * max_preds + SPARE_VALUES
    if lines:
        items: list[Any] = [line for line in body.split(b"\n") if line.strip()]
        _bound_values(items, limit)
    else:
        _bound_values([body], limit)
        items = _array_items(body)
    if len(items) > max_preds:
        raise InvalidEvent([_fault(["body"], "too_long", _too_long(max_preds, len(items)))])
    normal: list[bytes | InvalidEvent] = []
    faults = 0
    for position, item in enumerate(items):
        try:
            event = decode(item, max_preds) if type(item) is bytes else validate(item, max_preds)
            normal.append(orjson.dumps(event))
        except InvalidEvent as error:
            own = error.faults
            for fault in own:
                fault["loc"] = ["body", position, *cast(list[Any], fault["loc"])[1:]]
            faults += len(own)
            if faults > MAX_FAULTS:
                message = f"Only the first {MAX_FAULTS} faults are listed"
                own = [_fault(["body", position], "too_many_faults", message)]
            normal.append(InvalidEvent(own))  # without the traceback, whose frames would all stay alive
    return normal


def _array_items(body: bytes) -> list[Any]:
    """The items of a JSON array; as texts, for `decode` to judge one by one, when orjson's reading is not exact.

    Raises InvalidEvent for what is no array.
    """
    try:
        items = loads(body)
    except InvalidEvent:
        texts = _exact_texts(body) if body else None
        if texts is None:
            raise
        return texts
    if type(items) is not list:
        raise InvalidEvent([_fault(["body"], "list_type")])
    if _NINETEEN_DIGITS in body.translate(_DIGITS_TO_ZERO):
        return _exact_texts(body) or items
    return items


def _exact_texts(body: bytes) -> list[Any] | None:
    if len(body) > EXACT_ARRAY_BYTES:
        return None
    exact = _read_exactly(body, otherwise=None)
    if type(exact) is not list:
        return None
    try:
        return [json.dumps(item).encode() for item in exact]
    except RecursionError:
        return None


def is_no_json(faults: list[Fault]) -> bool:
    """Whether these are the faults of a document that is not JSON, or empty."""
    first = faults[0]
    return first["type"] == "json_invalid" or (first["type"], first["loc"]) == ("missing", ["body"])


def reason(faults: list[Fault]) -> str:
    """One short line for a person: the first fault, and how many there are. It holds nothing of the document's text."""
    first = faults[0]
    loc = first["loc"]
    where = ".".join(map(str, loc)) if isinstance(loc, list) else ""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}: {first['msg']}{more}"


# --- identity ---


def message_id(key: bytes, normalised: bytes) -> bytes:
    """The AMQP message id for an event sent with an idempotency key: 32 hex digits, a 128-bit digest of both.

    The same key with another event gives another id.
    """
    head = len(key).to_bytes(4, "big") + key
    return blake2b(head + normalised, digest_size=16, person=b"predlog-msg-id").hexdigest().encode()


def digest(message_id: str | bytes) -> bytes:
    """The 16 bytes a message id is remembered by: its own when it is 32 hex digits, else a digest of it."""
    text = message_id.encode(errors="surrogateescape") if isinstance(message_id, str) else message_id
    if len(text) == 32:
        with suppress(ValueError):
            own = bytes.fromhex(text.decode())
            if own.hex().encode() == text:  # fromhex passes over white space, and takes capitals
                return own
    return blake2b(text, digest_size=16, person=b"predlog-digest").digest()


# --- rows ---


def row_count(body: bytes) -> int:
    """How many rows the event in `body` makes: exact for normal form, where a quote in a string is escaped."""
    return body.count(b'"prob":') or body.count(b'"prob"')


def rows_of(body: bytes, low_prob_threshold: float) -> tuple[str, int]:
    """The CSV rows of the event in `body`, one for each prediction, and how many. Raises InvalidEvent.

    They are what `csv.writer(delimiter=";")` writes. `tags` is a CSV record of its own (delimiter ","), with `low_prob`
    appended when `prob < low_prob_threshold`. csv.writer itself looks at every character in turn: more than twice the
    cost for a short row, 13 times for a 20 KB frame.
    """
    try:
        rows = _rows_quickly(orjson.loads(body), low_prob_threshold)
    except orjson.JSONDecodeError:
        rows = None
    if rows is None:
        event = decode(body)
        return _rows(event, low_prob_threshold), len(event["data"]["preds"])
    return rows


def _rows_quickly(document: Any, low_prob_threshold: float) -> tuple[str, int] | None:
    """`rows_of` for a document in normal form (but for unknown members) with nothing to quote; None for any other."""
    try:
        data = document["data"]
        device_id, client_id, created_at = document["device_id"], document["client_id"], document["created_at"]
        license_id, preds = data["license_id"], data["preds"]
        if not (str is type(device_id) is type(client_id) is type(created_at) is type(license_id)):
            return None
        if type(preds) is not list:
            return None
        prefix = f"{device_id};{client_id};{created_at};{license_id};"
        rows, texts, all_tags = [], [device_id, client_id, created_at, license_id], []
        for pred in preds:
            frame, prob, tags = pred["image_frame"], pred["prob"], pred["tags"]
            if type(frame) is not str or type(prob) is not float or prob - prob != 0.0 or type(tags) is not list:
                return None
            if prob < low_prob_threshold:
                tags = [*tags, LOW_PROB_TAG]
            cell = ",".join(tags)  # a TypeError unless all are strings
            if tags and not cell:  # one empty tag is quoted
                return None
            rows.append(f"{prefix}{frame};{prob!r};{cell}\r\n")
            texts.append(frame)
            all_tags += tags
    except (KeyError, TypeError):
        return None
    # One look at all of it, each with the processor's own search.
    tag_text = "".join(all_tags)
    text = "".join(texts) + tag_text
    if '"' in text or ";" in text or "\n" in text or "\r" in text or "," in tag_text:
        return None
    return "".join(rows), len(rows)


def _rows(event: Event, low_prob_threshold: float) -> str:
    data = event["data"]
    ids = event["device_id"], event["client_id"], event["created_at"], data["license_id"]
    prefix = ";".join([_quote(text, ";") for text in ids])
    rows = []
    for pred in data["preds"]:
        prob, tags = pred["prob"], pred["tags"]
        if prob < low_prob_threshold:
            tags = [*tags, LOW_PROB_TAG]
        rows.append(f"{prefix};{_quote(pred['image_frame'], ';')};{prob!r};{_quote(_join_tags(tags), ';')}\r\n")
    return "".join(rows)


def _quote(text: str, delimiter: str) -> str:
    """A cell as csv.writer's QUOTE_MINIMAL writes it in Python 3.11 to 3.13 (not for a row of one empty cell)."""
    if delimiter in text or '"' in text or "\n" in text or "\r" in text:
        return '"' + text.replace('"', '""') + '"'
    return text


def _join_tags(tags: list[str]) -> str:
    return '""' if tags == [""] else ",".join([_quote(tag, ",") for tag in tags])


_TAG = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^,]*)),')


def split_tags(cell: str) -> list[str]:
    """The tags of a row, from its last cell (as text, the row's own quotes taken off already)."""
    return [quoted.replace('""', '"') or plain for quoted, plain in _TAG.findall(cell + ",")] if cell else []
