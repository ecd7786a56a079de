"""Validation: from a JSON document to an event in normal form, or to its faults. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, cast

import orjson

from common.errors import InvalidEvent
from common.event.document import (
    DIGITS_TO_ZERO,
    NINETEEN_DIGITS,
    SPARE_VALUES,
    VALUES_PER_PRED,
    Steps,
    array_items,
    bound_values,
    finish,
    line_items,
    read_exactly,
    read_json,
)
from common.event.faults import Fault, make_fault

Event = dict[str, Any]
MAX_NUMBER_CHARS = 1000
# The answer to a document with more faults names this many, and says so.
MAX_FAULTS = 2_000
# Some 3 ms of work, whatever is in them.
_PREDS_PER_STEP = 500
_TOO_MANY_FAULTS = f"Only the first {MAX_FAULTS} faults are listed"


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
        except OverflowError:  # an integer beyond a double; pydantic calls it so
            raise ValueError("float_type") from None
    else:
        raise ValueError("float_type")
    if number - number != 0.0:  # true for infinities and NaN; faster than math.isfinite
        raise ValueError("finite_number")
    return number


# Unicode's White_Space, as Rust trims it; str.strip() would also take the separators U+001C to U+001F.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def _parse_number(text: str) -> float:
    """Parse a float as pydantic does: by Rust's grammar, which in ASCII is Python's but for underscores."""
    if len(text) <= MAX_NUMBER_CHARS:
        text = text.strip(_WHITE_SPACE)
        if text.isascii() and text.isprintable() and "__" not in text and "_" not in (text[:1], text[-1:]):
            with suppress(ValueError):
                return float(text.replace("_", ""))
    raise ValueError("float_parsing")


# The shape of a document: a dict for an object, a list of one for an array, a function for a value.
Shape = dict[str, Any] | list[Any] | Callable[[object], object]

_PRED: Shape = {"image_frame": _string, "prob": _number, "tags": [_string]}
_PREDS: Shape = [_PRED]
_EVENT: dict[str, Shape] = {
    "device_id": _identifier,
    "client_id": _identifier,
    "created_at": _identifier,
    "data": {"license_id": _identifier, "preds": _PREDS},
}


class _Walk:
    """A walk through a document by its shape that collects every fault."""

    def __init__(self, max_preds: int | None, most_faults: int) -> None:
        self.max_preds = max_preds
        self.most_faults = most_faults
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
        return self.read_items(value, shape[0])

    def read_items(self, items: list[Any], shape: Shape, first: int = 0) -> list[Any]:
        result = []
        self.loc.append(first)
        for self.loc[-1], item in enumerate(items, first):
            # What _string would return: nearly all that a tag list holds, and there may be 120,000 of them.
            plain = shape is _string and type(item) is str and item.isascii()
            result.append(item if plain else self.read(item, shape))
        self.loc.pop()
        return result

    def fault(self, kind: str, message: str | None = None) -> Any:
        """Note a fault at `loc`; return a placeholder for the faulty value."""
        self.faults.append(make_fault(self.loc, kind, message))
        if len(self.faults) == self.most_faults:
            self.faults.append(make_fault(["body"], "too_many_faults", _TOO_MANY_FAULTS))
            raise InvalidEvent(self.faults)
        return None


def _too_long(limit: int, length: int) -> str:
    return f"List should have at most {limit} item{'' if limit == 1 else 's'} after validation, not {length}"


def _large_preds(document: Any) -> list[Any] | None:
    """Return the predictions of a document that has too many for one step."""
    try:
        preds = document["data"]["preds"]
    except (KeyError, TypeError):
        return None
    return preds if type(preds) is list and len(preds) > _PREDS_PER_STEP else None


def _with_preds(document: dict[str, Any], preds: list[Any]) -> dict[str, Any]:
    """Return the document with these predictions, and without unknown members."""
    known = {name: value for name, value in document.items() if name in _EVENT}
    known["data"] = {name: value for name, value in document["data"].items() if name == "license_id"} | {"preds": preds}
    return known


def _carefully(document: Any, max_preds: int | None, most_faults: int) -> Steps[Event]:
    """Return the event in normal form. Raise InvalidEvent with every fault, up to `most_faults`."""
    walk = _Walk(max_preds, most_faults)
    preds = _large_preds(document)
    if preds is None or (max_preds is not None and len(preds) > max_preds):
        event: Event = walk.read(document, _EVENT)
    else:
        event = walk.read(_with_preds(document, []), _EVENT)
        walk.loc += ["data", "preds"]
        for start in range(0, len(preds), _PREDS_PER_STEP):
            yield
            event["data"]["preds"] += walk.read_items(preds[start : start + _PREDS_PER_STEP], _PRED, start)
    if walk.faults:
        raise InvalidEvent(walk.faults)
    return event


def _quickly(document: Any, max_preds: int | None) -> Steps[Event | None]:
    """Do `_validate_quickly` in steps."""
    preds = _large_preds(document)
    if preds is None or (max_preds is not None and len(preds) > max_preds):
        return _validate_quickly(document, max_preds)
    event = None
    normal: list[Any] = []
    for start in range(0, len(preds), _PREDS_PER_STEP):
        event = _validate_quickly(_with_preds(document, preds[start : start + _PREDS_PER_STEP]), None)
        if event is None:
            return None
        normal += event["data"]["preds"]
        yield
    assert event is not None
    event["data"]["preds"] = normal
    return event


def _validate_quickly(document: Any, max_preds: int | None) -> Event | None:
    """Return the event in normal form; None if only `_carefully` can tell.

    `document` comes from orjson, so none of its floats is an infinity or NaN.
    """
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
            if type(prob) is not float:
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


def validate_event(document: object, max_preds: int | None = None, most_faults: int = MAX_FAULTS) -> Event:
    """Return the event in normal form. `document` comes from `read_json`; its lists of tags are shared, not copied.

    Raise InvalidEvent with every fault, up to `most_faults`.
    """
    return finish(_validating(document, max_preds, most_faults))


def _validating(document: object, max_preds: int | None, most_faults: int) -> Steps[Event]:
    event = yield from _quickly(document, max_preds)
    if event is None:
        yield
        event = yield from _carefully(document, max_preds, most_faults)
    return event


class NormalEvent(NamedTuple):
    """An event in normal form as bytes, with its device_id for routing and its number of rows for the metrics."""

    body: bytes
    device_id: str
    rows: int


_tuple: Any = tuple.__new__  # a NamedTuple's own constructor takes three times as long


def _normal_event(event: Event) -> NormalEvent:
    normal: NormalEvent = _tuple(NormalEvent, (orjson.dumps(event), event["device_id"], len(event["data"]["preds"])))
    return normal


def read_event(body: bytes, max_preds: int | None = None, most_faults: int = MAX_FAULTS) -> Event:
    """Read and validate the event in `body`; the work is bounded when `max_preds` is given.

    What orjson cannot represent is read a second time, as FastAPI would (up to EXACT_READING_BYTES outside strings). So
    an integer id of more than 64 bits keeps its digits, and NaN, 1e999 or a lone surrogate is reported with its path.
    What `read_json` refuses is never accepted. Raise InvalidEvent with every fault, up to `most_faults`.
    """
    return finish(_reading(body, max_preds, most_faults))


def _reading(body: bytes, max_preds: int | None, most_faults: int) -> Steps[Event]:
    """Do `read_event` in steps. The longest are orjson's, which cannot be interrupted: 25 ms for the worst of 8 MiB."""
    if max_preds is not None:
        yield from bound_values(body, False, VALUES_PER_PRED * max_preds + SPARE_VALUES)
    try:
        document = read_json(body)
    except InvalidEvent as refusal:
        yield
        exact = (yield from read_exactly(body, otherwise=None)) if body else None
        if exact is not None:
            yield
            yield from _carefully(exact, max_preds, most_faults)
        raise refusal from None
    yield
    event = yield from _quickly(document, max_preds)
    if event is None:
        yield
        if NINETEEN_DIGITS in body.translate(DIGITS_TO_ZERO):
            document = yield from read_exactly(body, otherwise=document)
            yield
        event = yield from _carefully(document, max_preds, most_faults)
    return event


def normalise_event(body: bytes, max_preds: int) -> NormalEvent:
    """Return the event in `body` in normal form. The work is bounded for any `body`. Raise InvalidEvent."""
    event = None
    if len(body) <= SPARE_VALUES:  # so few bytes hold no more values
        try:
            event = _validate_quickly(orjson.loads(body), max_preds)
        except orjson.JSONDecodeError:
            event = None  # read_event finds the fault
    return _normal_event(read_event(body, max_preds) if event is None else event)


def normalise_in_steps(body: bytes, max_preds: int) -> Steps[NormalEvent]:
    """Do `normalise_event` in steps."""
    event = yield from _reading(body, max_preds, MAX_FAULTS)
    yield
    return _normal_event(event)


def normalise_batch(body: bytes, lines: bool, max_preds: int) -> Iterator[NormalEvent | InvalidEvent | None]:
    """Yield each event of a JSON array, or of NDJSON when `lines`, in normal form, or the InvalidEvent that it is.

    Yield None after a step of work that gave no event. A fault's `loc` begins with body and the position. `max_preds`
    bounds the events, and the predictions of each. Once MAX_FAULTS were found, each further refused event has one
    fault, `too_many_faults`. Raise InvalidEvent before the first event when the whole body cannot be read or is too
    large.
    """
    limit = VALUES_PER_PRED * max_preds + SPARE_VALUES
    items: list[Any] = line_items(body, limit) if lines else []
    yield from bound_values(body, lines, limit)
    if not lines:
        items = array_items(body)
    if len(items) > max_preds:
        raise InvalidEvent([make_fault(["body"], "too_long", _too_long(max_preds, len(items)))])
    yield None
    left = MAX_FAULTS
    for position, item in enumerate(items):
        try:
            event = _read_small_item(item, max_preds)
            if event is None:
                event = yield from _read_item(item, max_preds, left)
                yield None
            yield _normal_event(event)
        except InvalidEvent as error:
            faults = error.faults
            for fault in faults:
                fault["loc"] = ["body", position, *cast(list[Any], fault["loc"])[1:]]
            left -= len(faults)
            if left < 0:
                left = 0
                faults = [make_fault(["body", position], "too_many_faults", _TOO_MANY_FAULTS)]
            yield InvalidEvent(faults)  # without the traceback, whose frames would all stay alive


def _read_small_item(item: Any, max_preds: int) -> Event | None:
    """Return an event of a batch in normal form; None if it takes steps, or if only `_read_item` can tell."""
    try:
        if type(item) is bytes:
            if len(item) > SPARE_VALUES:
                return None
            item = orjson.loads(item)
        elif len(item["data"]["preds"]) > _PREDS_PER_STEP:
            return None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return _validate_quickly(item, max_preds)


def _read_item(item: Any, max_preds: int, most_faults: int) -> Steps[Event]:
    if most_faults:
        read = _reading if type(item) is bytes else _validating
        return (yield from read(item, max_preds, most_faults + 1))
    try:
        document = orjson.loads(item) if type(item) is bytes else item
    except orjson.JSONDecodeError:
        event = None
    else:
        event = yield from _quickly(document, max_preds)
    if event is None:
        raise InvalidEvent([make_fault(["body"], "too_many_faults", _TOO_MANY_FAULTS)])
    return event
