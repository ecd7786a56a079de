"""No body of 8 MiB, whatever is in it, holds the event loop for long. Large honest bodies are accepted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidEvent
from common.event.document import UNBOUNDED_BYTES, bound_values, finish
from common.event.schema import (
    BATCH_VALUES,
    MAX_EVENTS,
    MAX_FAULTS,
    NormalEvent,
    normalise_batch,
    normalise_event,
    normalise_in_stages,
    read_event,
)
from tests.support.least import least

MAX_PREDS = 4_000
BODY_BYTES = 8 << 20
# What the contract grants one client to delay another. Measured: 30 ms for the worst of them.
STAGE_SECONDS = 0.05

PRED = b'{"image_frame":"f","prob":0.5,"tags":["a"]}'


def an_event(preds: bytes, device_id: bytes = b'"d"', other: bytes = b"") -> bytes:
    data = b'{"license_id":"l","preds":[' + preds + b"]}"
    return b'{"device_id":' + device_id + b',"client_id":"c","created_at":"t","data":' + data + other + b"}"


def list_of(item: bytes, count: int) -> bytes:
    return b",".join([item] * count)


def filled(template: bytes, filler: bytes) -> bytes:
    """`template` with as many fillers in place of its `?` as a body can have."""
    return template.replace(b"?", filler * ((BODY_BYTES - len(template)) // len(filler)))


def with_frame(frame: bytes, prob: bytes = b"0.5") -> bytes:
    return an_event(PRED.replace(b'"f"', frame).replace(b"0.5", prob))


def with_tags(tags: bytes) -> bytes:
    return an_event(PRED.replace(b'"a"', tags))


def kind_of(make: Callable[[], Iterator[object]]) -> str:
    """Return the type of the fault with which a body is refused whole, or "ok". No stage may be long."""
    kind = ""

    def longest() -> float:
        nonlocal kind
        stages, kind, seconds = make(), "", 0.0
        while not kind:
            began = time.thread_time()
            try:
                next(stages)
            except StopIteration:
                kind = "ok"
            except InvalidEvent as error:
                kind = str(error.faults[0]["type"])
            seconds = max(seconds, time.thread_time() - began)
        return seconds

    assert least(longest, STAGE_SECONDS) < STAGE_SECONDS
    return kind


TOO_MANY_VALUES: dict[str, Callable[[], bytes]] = {
    "opening brackets": lambda: b"[" * BODY_BYTES,
    "nested objects": lambda: filled(b"?1", b'{"a":'),
    "empty objects": lambda: b"[" + list_of(b"{}", BODY_BYTES // 3 - 1) + b"]",
    "numbers": lambda: b"[" + list_of(b"1", BODY_BYTES // 2 - 1) + b"]",
    "empty strings": lambda: b"[" + list_of(b'""', BODY_BYTES // 3 - 1) + b"]",
    "one million predictions": lambda: an_event(list_of(b"{}", 1_000_000)),
    "honest predictions": lambda: an_event(list_of(PRED, 190_000)),
    "members": lambda: b"{" + b",".join(b'"%d":1' % n for n in range(600_000)) + b"}",
    "members that escape": lambda: b"{" + b",".join(b'"\\n%d":1' % n for n in range(500_000)) + b"}",
    "tags": lambda: with_tags(list_of(b'"a"', 2_000_000)),
    "an escaped quote before them": lambda: rb'["\"",' + list_of(b"{}", 2_000_000) + b"]",
}


@pytest.mark.parametrize("make", TOO_MANY_VALUES.values(), ids=TOO_MANY_VALUES)
def test_too_many_values_are_refused_before_parsing(make: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch) -> None:

    def never(body: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr("common.event.schema.read_json", never)
    body = make()
    assert kind_of(lambda: normalise_in_stages(body, MAX_PREDS)) == "json_too_large"


@given(
    st.lists(st.tuples(st.sampled_from([b",", b"[", b":", b"A", b",A", b"[{,A"]), st.integers(0, 70_000)), max_size=5)
)
def test_values_are_counted_exactly(runs: list[tuple[bytes, int]]) -> None:
    """It does not matter whether a stretch of the document has many or few."""
    body = b"".join(text * count for text, count in runs) + b"A" * UNBOUNDED_BYTES
    values = sum(body.count(char) for char in (b",", b":", b"[", b"{"))
    finish(bound_values(body, values))
    if values:
        with pytest.raises(InvalidEvent):
            finish(bound_values(body, values - 1))


@given(st.text(st.sampled_from('a,:[\\"'), max_size=30), st.integers(1, 400))
def test_what_strings_hold_is_not_counted(text: str, count: int) -> None:
    body = (json.dumps([text] * count) + " " * UNBOUNDED_BYTES).encode()
    finish(bound_values(body, count))
    if count > 1:
        with pytest.raises(InvalidEvent):
            finish(bound_values(body, count - 1))


COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "a long frame": (lambda: filled(with_frame(b'"?"'), b"A"), "ok"),
    "a long frame, then a fault": (lambda: filled(with_frame(b'"?"', b"null"), b"A"), "float_type"),
    "two-byte characters": (lambda: filled(with_frame(b'"?"'), "é".encode()), "ok"),
    "short escapes": (lambda: filled(with_frame(b'"?"'), b"\\n"), "ok"),
    "long escapes": (lambda: filled(with_frame(b'"?"'), b"\\u0001"), "ok"),
    "escapes beside an id of 30 digits": (
        lambda: filled(an_event(PRED.replace(b'"f"', b'"?"'), device_id=b"1" * 30), b"\\n"),
        "string_type",
    ),
    "numbers of 900 digits in strings": (
        lambda: an_event(list_of(PRED.replace(b"0.5", b'"0.' + b"1" * 900 + b'"'), MAX_PREDS)),
        "ok",
    ),
    "two-byte tags, the last at fault": (lambda: with_tags(list_of('"é"'.encode(), 60_000) + b",1"), "string_type"),
    "two-byte frames, the last at fault": (
        lambda: an_event(list_of(PRED.replace(b'"f"', b'"' + "é".encode() * 370 + b'"'), MAX_PREDS - 1) + b",1"),
        "model_attributes_type",
    ),
    "names of 150 bytes": (lambda: b"{" + b",".join(b'"%0150d":1' % n for n in range(30_000)) + b"}", "missing"),
    "white space": (lambda: b" " * BODY_BYTES, "json_invalid"),
    "white space around a fault": (lambda: with_frame(b"1") + b" " * (BODY_BYTES - 200), "string_type"),
    "NULs": (lambda: b"\0" * BODY_BYTES, "json_invalid"),
    "byte order marks": (lambda: b"\xef\xbb\xbf" * (BODY_BYTES // 3), "json_invalid"),
    "an invalid byte at the end": (lambda: filled(with_frame(b'"?\xff"'), b"A"), "json_invalid"),
    "lone surrogates": (lambda: filled(with_frame(b'"?"'), b"\\ud800"), "json_invalid"),
    "pixels as text beside an escape": (lambda: filled(with_frame(b'"\\u00e9?"'), b"128,"), "ok"),
    "escaped quotes and commas": (lambda: filled(with_frame(b'"?"'), b'\\",'), "json_too_large"),
    "escaped backslashes and commas": (lambda: filled(with_frame(b'"?"'), b"\\\\,"), "json_too_large"),
    "text of JSON": (lambda: filled(with_frame(b'"?"'), b'\\"a\\",{[33.333333333333]},aaaaaaaa'), "ok"),
    "quotes": (lambda: b'"' * BODY_BYTES, "json_invalid"),
    "a long id and a long frame": (
        lambda: filled(an_event(PRED.replace(b'"f"', b'"?"'), device_id=b"1" + b"0" * 30), b"1"),
        "string_type",
    ),
    "one integer": (lambda: b"9" * BODY_BYTES, "json_invalid"),
    "one id": (lambda: filled(an_event(PRED, b"?"), b"9"), "json_invalid"),
    "one fraction": (lambda: filled(with_frame(b'"f"', b"0.?"), b"1"), "ok"),
    "one number in a string": (lambda: filled(with_frame(b'"f"', b'"0.?"'), b"1"), "float_parsing"),
    "underscores": (lambda: filled(with_frame(b'"f"', b'"?1"'), b"1_"), "float_parsing"),
    "integers of 300 digits": (lambda: with_tags(list_of(b"9" * 300, 27_000)), "string_type"),
    "integers of 4000 digits": (lambda: with_tags(list_of(b"9" * 4000, 2000)), "json_invalid"),
    "fractions of 700 digits": (lambda: with_tags(list_of(b"1." + b"0" * 15 + b"1" * 700, 11_000)), "string_type"),
    "predictions, empty": (lambda: an_event(list_of(b"{}", MAX_PREDS)), "missing"),
    "predictions with null": (lambda: an_event(list_of(PRED.replace(b"0.5", b"null"), MAX_PREDS)), "float_type"),
    "predictions, one too many": (lambda: an_event(list_of(PRED, MAX_PREDS + 1)), "too_long"),
    "predictions": (lambda: an_event(list_of(PRED, MAX_PREDS)), "ok"),
    "tags": (lambda: with_tags(list_of(b'"a"', 60_000)), "ok"),
    "tags, the last at fault": (lambda: with_tags(list_of(b'"a"', 60_000) + b",1"), "string_type"),
    "tags, all at fault": (lambda: with_tags(list_of(b"1", 60_000)), "string_type"),
    "tags and an id of 30 digits": (
        lambda: an_event(PRED.replace(b'"a"', list_of(b'"a"', 50_000)), b"9" * 30),
        "string_type",
    ),
    "a NUL before many tags": (lambda: with_tags(b'"\\u0000",' + list_of(b'"a"', 60_000)), "string_nul"),
    "a NUL in each of many tags": (lambda: with_tags(list_of(b'"\\u0000"', 60_000)), "string_nul"),
    "100000 deep": (lambda: b"[" * 100_000, "json_invalid"),
    "100000 deep, closed": (
        lambda: an_event(PRED, other=b',"x":' + b"[" * 100_000 + b"]" * 100_000),
        "json_too_large",
    ),
}


@pytest.mark.parametrize(("make", "kind"), COSTLY.values(), ids=COSTLY)
def test_a_costly_body_takes_no_long_stage(make: Callable[[], bytes], kind: str) -> None:
    body = make()
    assert len(body) <= BODY_BYTES
    assert kind_of(lambda: normalise_in_stages(body, MAX_PREDS)) == kind


def test_the_list_of_faults_is_bounded_and_states_it() -> None:
    with pytest.raises(InvalidEvent) as caught:
        normalise_event(an_event(list_of(b"{}", MAX_PREDS)), MAX_PREDS)
    *listed, last = caught.value.faults
    assert len(listed) == MAX_FAULTS
    assert last == {
        "loc": ["body"],
        "msg": f"Only the first {MAX_FAULTS} faults are listed",
        "type": "too_many_faults",
    }


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(an_event(list_of(PRED.replace(b'"f"', b'"' + b"Ab+/" * 5000 + b'"'), 5)), id="base64 frames"),
        pytest.param(with_frame(b'"' + b"[1,22,333]," * 700_000 + b'"'), id="pixels as text"),
        pytest.param(with_frame(json.dumps(", [{" * 20_000).encode()), id="80000 commas and brackets in a string"),
        pytest.param(
            an_event(list_of(PRED.replace(b'"a"', list_of(b'"a"', 8)), MAX_PREDS)),
            id="a full batch with 8 tags in each",
        ),
    ],
)
def test_a_big_honest_body_is_accepted(body: bytes) -> None:
    assert normalise_event(body, MAX_PREDS).body == body


def test_small_limits_leave_room_for_tags() -> None:
    body = with_tags(list_of(b'"a"', 5000))
    assert normalise_event(body, max_preds=1).body == body


def test_without_a_limit_any_number_of_predictions_is_an_event() -> None:
    assert len(read_event(an_event(list_of(PRED, MAX_PREDS * 3)))["data"]["preds"]) == MAX_PREDS * 3


def batch_body(lines: bool, count: int, frame: str) -> bytes:
    """A batch of `count` ordinary events, with five predictions of two tags each."""
    pred = PRED.replace(b'"f"', json.dumps(frame).encode()).replace(b'"a"', b'"cat","animal"')
    documents = [an_event(list_of(pred, 5), device_id=b'"camera-%d"' % number) for number in range(count)]
    return b"\n".join(documents) if lines else b"[" + b",".join(documents) + b"]"


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("frame", ["frame-1", "data:image/jpeg;base64," + "A" * 210])
def test_a_batch_of_5000_events_is_taken_in_short_stages(lines: bool, frame: str) -> None:
    body = batch_body(lines, 5000, frame)
    assert len(body) <= BODY_BYTES
    assert kind_of(lambda: normalise_batch(body, lines, MAX_PREDS)) == "ok"
    assert sum(isinstance(item, NormalEvent) for item in normalise_batch(body, lines, MAX_PREDS)) == 5000


COSTLY_BATCHES: dict[str, tuple[Callable[[], bytes], bool, str]] = {
    "NaN beside two-byte characters": (lambda: b'[NaN,"' + "é".encode() * 4_194_290 + b'"]', False, "json_invalid"),
    "names": (lambda: b"[{" + b",".join(b'"%035d":1' % n for n in range(BATCH_VALUES // 2 - 2)) + b"}]", False, "ok"),
    "tags, the last at fault": (lambda: b"[" + with_tags(list_of(b'"a"', 290_000) + b",1") + b"]", False, "ok"),
    "a quote that is never closed, before many values": (
        lambda: b'"\n' + b"\n".join([b'{"a":[' + list_of(b"[]", 83_000) + b"]}"] * 33),
        True,
        "ok",
    ),
    "escaped commas": (lambda: b"[" + list_of(b'"' + b'\\",' * 20 + b'"', 129_000) + b"]", False, "json_too_large"),
    "one large event": (lambda: b"[" + an_event(list_of(PRED, MAX_PREDS - 1)) + b"]", False, "ok"),
    "one large event, faulty": (lambda: b"[" + an_event(list_of(PRED, MAX_PREDS - 1) + b",{}") + b"]", False, "ok"),
    "one large line, all escaped": (lambda: filled(with_frame(b'"?"', b"null"), b"\\n"), True, "ok"),
    "an empty object in each line": (lambda: b"\n".join([b"{}"] * MAX_EVENTS), True, "ok"),
    "an empty object for each event": (lambda: b"[" + list_of(b"{}", MAX_EVENTS) + b"]", False, "ok"),
    "far too many lines": (lambda: b"\n" * BODY_BYTES, True, "json_too_large"),
}


@pytest.mark.parametrize(("make", "lines", "kind"), COSTLY_BATCHES.values(), ids=COSTLY_BATCHES)
def test_a_costly_batch_takes_no_long_stage(make: Callable[[], bytes], lines: bool, kind: str) -> None:
    body = make()
    assert kind_of(lambda: normalise_batch(body, lines, MAX_PREDS)) == kind


def test_an_object_for_a_batch_is_refused_with_a_hint_at_ndjson() -> None:
    """NDJSON that is sent as application/json begins like one."""
    for body in (batch_body(True, 3, "f"), b" {}"):
        with pytest.raises(InvalidEvent) as caught:
            list(normalise_batch(body, False, MAX_PREDS))
        assert "application/x-ndjson" in str(caught.value.faults[0]["msg"])
