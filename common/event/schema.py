"""Validation: a JSON document to an event in normal form, or every fault of it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import orjson

from common.errors import InvalidEvent
from common.event.document import (
    DIGITS_TO_ZERO,
    NINETEEN_DIGITS,
    SPARE_VALUES,
    VALUES_PER_PRED,
    array_items,
    bound_values,
    read_exactly,
    read_json,
)
from common.event.faults import Fault, make_fault

Event = dict[str, Any]
MAX_NUMBER_CHARS = 1000
# The answer to a document with more faults names this many, and says so.
MAX_FAULTS = 2_000


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
        self.faults.append(make_fault(self.loc, kind, message))
        if len(self.faults) == MAX_FAULTS:
            self.faults.append(
                make_fault(["body"], "too_many_faults", f"Only the first {MAX_FAULTS} faults are listed")
            )
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


def validate_event(document: object, max_preds: int | None = None) -> Event:
    """The event in normal form. `document` is as `loads` gives it; its lists of tags are shared, not copied.

    Raises InvalidEvent with every fault (the first MAX_FAULTS of them).
    """
    event = _validate_quickly(document, max_preds)
    return event if event is not None else _validate_carefully(document, max_preds)


def read_event(body: bytes, max_preds: int | None = None) -> Event:
    """`loads` and `validate`, with a bound on the work when `max_preds` is given. Raises InvalidEvent with every fault.

    What orjson cannot tell is read a second time, as FastAPI would (up to EXACT_READING_BYTES outside of strings): so
    an integer id of more than 64 bits keeps its digits, and NaN, 1e999 or a lone surrogate is named by where it is.
    What `loads` cannot read is never accepted, though.
    """
    if max_preds is not None:
        bound_values([body], VALUES_PER_PRED * max_preds + SPARE_VALUES)
    try:
        document = read_json(body)
    except InvalidEvent as refusal:
        exact = read_exactly(body, otherwise=None) if body else None
        if exact is not None:
            _validate_carefully(exact, max_preds)
        raise refusal from None
    event = _validate_quickly(document, max_preds)
    if event is not None:
        return event
    if NINETEEN_DIGITS in body.translate(DIGITS_TO_ZERO):
        document = read_exactly(body, otherwise=document)
    return _validate_carefully(document, max_preds)


def normalise_event(body: bytes, max_preds: int) -> bytes:
    """The event in `body` in normal form, as bytes. Bounded work, whatever `body` is. Raises InvalidEvent."""
    event = None
    if len(body) <= SPARE_VALUES:  # it cannot hold more
        try:
            event = _validate_quickly(orjson.loads(body), max_preds)
        except orjson.JSONDecodeError:
            event = None  # decode knows more
    return orjson.dumps(read_event(body, max_preds) if event is None else event)


def normalise_batch(body: bytes, lines: bool, max_preds: int) -> list[bytes | InvalidEvent]:
    """The events of a JSON array, or of NDJSON when `lines`: each in normal form, or its faults.

    A fault's `loc` is body, position, …. `max_preds` bounds the events, and the predictions of each; beyond MAX_FAULTS
    an event has one fault that stands for its own. Raises InvalidEvent when the whole cannot be read, or is too much.
    """
    limit = VALUES_PER_PRED * max_preds + SPARE_VALUES
    if lines:
        items: list[Any] = [line for line in body.split(b"\n") if line.strip()]
        bound_values(items, limit)
    else:
        bound_values([body], limit)
        items = array_items(body)
    if len(items) > max_preds:
        raise InvalidEvent([make_fault(["body"], "too_long", _too_long(max_preds, len(items)))])
    normal: list[bytes | InvalidEvent] = []
    faults = 0
    for position, item in enumerate(items):
        try:
            event = read_event(item, max_preds) if type(item) is bytes else validate_event(item, max_preds)
            normal.append(orjson.dumps(event))
        except InvalidEvent as error:
            own = error.faults
            for fault in own:
                fault["loc"] = ["body", position, *cast(list[Any], fault["loc"])[1:]]
            faults += len(own)
            if faults > MAX_FAULTS:
                message = f"Only the first {MAX_FAULTS} faults are listed"
                own = [make_fault(["body", position], "too_many_faults", message)]
            normal.append(InvalidEvent(own))  # without the traceback, whose frames would all stay alive
    return normal
