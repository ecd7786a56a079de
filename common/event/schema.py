"""Validation: from a JSON document to an event in normal form, or to its faults. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, cast

import orjson

from common.errors import InvalidEvent
from common.event.document import UNBOUNDED_BYTES, Stages, bound_values, finish, read_json
from common.event.faults import Fault, make_fault

Event = dict[str, Any]
MAX_EVENTS = 10_000  # in one batch
# The bound on the values and names of an event. A prediction with `n` tags has 7 + n, so each may have 8 tags.
VALUES_PER_PRED = 15
SPARE_VALUES = 10_000
# The same for an array of events, which is parsed in one stage: 5,000 with 5 predictions of 2 tags each have 290,000.
BATCH_VALUES = 300_000
MAX_NUMBER_CHARS = 1000
MAX_ID_CHARS = 16 * 1024 * 1024  # of all rows of an event: each repeats the four ids
MAX_FAULTS = 2_000  # that are listed in an answer
_NUL = rb"\u0000"  # as JSON writes it
_BACKSLASH = ord("\\")


def _string(value: object) -> str:
    if type(value) is not str:
        raise ValueError("string_type")
    return value


def _identifier(value: object) -> str:
    return str(value) if type(value) is int else _string(value)


def _number(value: object) -> float:
    if type(value) is str:
        number = _parse_number(value)
    elif type(value) is float or type(value) is int:
        number = float(value)
    else:
        raise ValueError("float_type")
    if number - number != 0.0:  # true for infinities and NaN; faster than math.isfinite
        raise ValueError("finite_number")
    return number


# Unicode's White_Space, as Rust trims it; str.strip() would also take the separators U+001C to U+001F.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def _parse_number(text: str) -> float:
    """Parse a float as pydantic does: by Rust's grammar, which in ASCII is Python's except for underscores."""
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
    """A walk through a document by its shape that collects every fault, up to `most_faults`."""

    def __init__(self, max_preds: int | None, most_faults: int, takes_nul: bool) -> None:
        self.max_preds = max_preds
        self.most_faults = most_faults
        self.takes_nul = takes_nul
        self.loc: list[str | int] = ["body"]
        self.faults: list[Fault] = []

    def read(self, value: Any, shape: Shape) -> Any:
        if isinstance(shape, dict):
            return self.read_object(value, shape) if type(value) is dict else self.fault("model_attributes_type")
        if isinstance(shape, list):
            return self.read_list(value, shape) if type(value) is list else self.fault("list_type")
        try:
            result = shape(value)
        except ValueError as error:
            return self.fault(str(error))
        if type(result) is str and "\0" in result and not self.takes_nul:
            return self.fault("string_nul")
        return result

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
        strings = shape[0] is _string  # then the list stays as it is
        result = value if strings else []
        self.loc.append(0)
        for self.loc[-1], item in enumerate(value):
            if not strings:
                result.append(self.read(item, shape[0]))
            elif type(item) is not str or "\0" in item:
                self.read(item, _string)
        self.loc.pop()
        return result

    def fault(self, kind: str, message: str | None = None) -> Any:
        """Note a fault at `loc`; return a placeholder for the faulty value. Raise InvalidEvent beyond `most_faults`."""
        if len(self.faults) == self.most_faults:
            message = f"Only the first {MAX_FAULTS} faults are listed"
            raise InvalidEvent([*self.faults, make_fault(["body"], "too_many_faults", message)])
        self.faults.append(make_fault(self.loc, kind, message))


def _too_long(limit: int, length: int) -> str:
    return f"List should have at most {limit} item{'' if limit == 1 else 's'} after validation, not {length}"


def _validate_quickly(document: Any, max_preds: int | None) -> Event | None:
    """Return the event in normal form; None if that takes a `_Walk`. U+0000 is accepted.

    `document` comes from orjson, so none of its floats is an infinity or NaN.
    """
    try:
        data = document["data"]
        device_id, client_id, created_at = document["device_id"], document["client_id"], document["created_at"]
        license_id, preds = data["license_id"], data["preds"]
        if not (str is type(device_id) is type(client_id) is type(created_at) is type(license_id)):
            ids = device_id, client_id, created_at, license_id
            device_id, client_id, created_at, license_id = map(_identifier, ids)
        if type(preds) is not list or (max_preds is not None and len(preds) > max_preds):
            return None
        normal = []
        for pred in preds:
            image_frame, prob, tags = pred["image_frame"], pred["prob"], pred["tags"]
            if type(image_frame) is not str or type(tags) is not list:
                return None
            if type(prob) is not float:
                prob = _number(prob)
            for tag in tags:
                if type(tag) is not str:
                    return None
            normal.append({"image_frame": image_frame, "prob": prob, "tags": tags})
        if len(device_id + client_id + created_at + license_id) * len(normal) > MAX_ID_CHARS:
            message = f"The ids should have at most {MAX_ID_CHARS} characters in all rows, which repeat them"
            raise InvalidEvent([make_fault(["body"], "json_too_large", message)])
    except (KeyError, TypeError, ValueError):
        return None
    return {
        "device_id": device_id,
        "client_id": client_id,
        "created_at": created_at,
        "data": {"license_id": license_id, "preds": normal},
    }


def validate_event(
    document: object, max_preds: int | None = None, most_faults: int = MAX_FAULTS, *, takes_nul: bool = True
) -> Event:
    """Return the event in normal form. `document` comes from `read_json`; its lists of tags are shared, not copied.

    Raise InvalidEvent with every fault, up to `most_faults`.
    """
    event = _validate_quickly(document, max_preds) if takes_nul else None
    if event is None:
        walk = _Walk(max_preds, most_faults, takes_nul)
        event = walk.read(document, _EVENT)
        if walk.faults:
            raise InvalidEvent(walk.faults)
        event = _validate_quickly(event, None) or event  # it has the bound on the ids
    return event


def read_event(body: bytes) -> Event:
    """Return the event in `body`, of any size, in normal form. Raise InvalidEvent.

    U+0000 is accepted, because the producer of 1.0 accepted it.
    """
    return validate_event(read_json(body))


class NormalEvent(NamedTuple):
    """An event in normal form as bytes, with its device_id for routing and its number of rows for the metrics."""

    body: bytes
    device_id: str
    rows: int


_tuple: Any = tuple.__new__  # a NamedTuple's own constructor takes three times as long


def _normal_event(event: Event) -> NormalEvent:
    normal: NormalEvent = _tuple(NormalEvent, (orjson.dumps(event), event["device_id"], len(event["data"]["preds"])))
    return normal


def _normalise_quickly(body: bytes, max_preds: int) -> NormalEvent | None:
    # A search for one byte is quick: nearly all events, with images too, have no backslash.
    if len(body) > UNBOUNDED_BYTES or (_BACKSLASH in body and _NUL in body):
        return None
    try:
        event = _validate_quickly(orjson.loads(body), max_preds)
    except orjson.JSONDecodeError:
        return None
    return _normal_event(event) if event is not None else None


def normalise_event(body: bytes, max_preds: int) -> NormalEvent:
    """Return the event in `body` in normal form, without U+0000. Raise InvalidEvent."""
    return _normalise_quickly(body, max_preds) or finish(normalise_in_stages(body, max_preds))


def normalise_in_stages(body: bytes, max_preds: int, most_faults: int = MAX_FAULTS) -> Stages[NormalEvent]:
    """Do `normalise_event` in stages. The time of each is bounded for any `body` of 8 MiB."""
    if (quick := _normalise_quickly(body, max_preds)) is not None:
        return quick
    yield
    yield from bound_values(body, VALUES_PER_PRED * max_preds + SPARE_VALUES)
    yield
    document = read_json(body)
    yield
    event = validate_event(document, max_preds, most_faults, takes_nul=_NUL not in body)
    yield
    return _normal_event(event)


def normalise_batch(body: bytes, lines: bool, max_preds: int) -> Iterator[NormalEvent | InvalidEvent | None]:
    """Yield each event of a JSON array, or of NDJSON when `lines`, in normal form, or an InvalidEvent in its place.

    Yield None after a stage that gave no event. A fault's `loc` begins with body and the position. Once MAX_FAULTS were
    found, each further refused event has one fault, `too_many_faults`. An array is parsed whole, so bad JSON in one
    event refuses all of them; NDJSON is parsed line by line. Raise InvalidEvent before the first event when the whole
    body cannot be read or is too large.
    """
    items: list[Any] = yield from (_lines(body) if lines else _array(body))
    if len(items) > MAX_EVENTS:
        raise InvalidEvent([make_fault(["body"], "too_long", _too_long(MAX_EVENTS, len(items)))])
    yield None
    takes_nul = lines or _NUL not in body
    left = MAX_FAULTS
    items.reverse()
    for position in range(len(items)):
        item = items.pop()  # so that each is freed once it is done
        try:
            if lines:
                yield (yield from normalise_in_stages(item, max_preds, left))
            else:
                yield _normal_event(validate_event(item, max_preds, left, takes_nul=takes_nul))
        except InvalidEvent as error:
            for fault in error.faults:
                fault["loc"] = ["body", position, *cast(list[Any], fault["loc"])[1:]]
            left = max(0, left - len(error.faults))
            yield InvalidEvent(error.faults)  # without the traceback, whose frames would all stay alive


def _array(body: bytes) -> Stages[list[Any]]:
    if body[:100].lstrip().startswith(b"{"):
        message = "Input should be a valid list; for one event per line, send Content-Type application/x-ndjson"
        raise InvalidEvent([make_fault(["body"], "list_type", message)])
    yield from bound_values(body, BATCH_VALUES)
    yield
    items = read_json(body)
    if type(items) is not list:
        raise InvalidEvent([make_fault(["body"], "list_type")])
    return items


def _lines(body: bytes) -> Stages[list[Any]]:
    """Return the lines that are not blank. Raise InvalidEvent if there are too many, blank ones included."""
    if body.count(b"\n") > 2 * MAX_EVENTS:
        message = f"Body should hold at most {2 * MAX_EVENTS} lines"
        raise InvalidEvent([make_fault(["body"], "json_too_large", message)])
    yield
    return [line for line in body.split(b"\n") if line.strip()]
