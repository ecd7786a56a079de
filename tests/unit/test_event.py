"""What an event is: validation against FastAPI itself, normal form, identity, rows."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, Field

from common.errors import InvalidEvent
from common.event.document import read_json, write_json
from common.event.faults import describe_faults
from common.event.ids import id_digest, keyed_message_id, line_id
from common.event.rows import CSV_HEADER, count_rows, csv_rows
from common.event.schema import (
    _EVENT,
    MAX_EVENTS,
    MAX_FAULTS,
    MAX_ID_CHARS,
    NormalEvent,
    _validate_quickly,
    _Walk,
    normalise_batch,
    normalise_event,
    read_event,
    validate_event,
)

MAX_PREDS = 100


def an_event(**members: Any) -> dict[str, Any]:
    return {"device_id": "d", "client_id": "c", "created_at": "t", "data": {"license_id": "l", "preds": []}, **members}


def with_preds(*preds: Any) -> dict[str, Any]:
    return an_event(data={"license_id": "l", "preds": list(preds)})


def a_pred(**members: Any) -> dict[str, Any]:
    return {"image_frame": "f", "prob": 0.5, "tags": ["a"], **members}


def events_of(body: bytes, lines: bool, max_preds: int) -> list[NormalEvent | InvalidEvent]:
    """Return what a batch gives, without its pauses."""
    return [event for event in normalise_batch(body, lines, max_preds) if event is not None]


def batch_of(documents: list[Any], lines: bool) -> list[NormalEvent | InvalidEvent]:
    return events_of((b"\n".join(map(write_json, documents)) if lines else write_json(documents)), lines, MAX_PREDS)


def faults_of(body: bytes | dict[str, Any]) -> list[tuple[str, str]]:
    """Return the faults of a body as (loc joined with dots, type); none if it is an event."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        normalise_event(raw, MAX_PREDS)
    except InvalidEvent as error:
        return [(".".join(map(str, fault["loc"])), str(fault["type"])) for fault in error.faults]  # type: ignore[call-overload]
    return []


# --- the reference: the original's models, on FastAPI and pydantic 2 ---

Identifier = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Number = Annotated[
    float, BeforeValidator(lambda value: None if type(value) is bool else value), Field(allow_inf_nan=False)
]


class Prediction(BaseModel):
    image_frame: str
    prob: Number
    tags: list[str]


class Data(BaseModel):
    license_id: Identifier
    preds: Annotated[list[Prediction], Field(max_length=MAX_PREDS)]


class Event(BaseModel):
    device_id: Identifier
    client_id: Identifier
    created_at: Identifier
    data: Data


class Reference:
    """FastAPI's answer to a body: the event, or its faults as loc, msg and type."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.loop = asyncio.new_event_loop()

        @self.app.post("/process")
        async def process(event: Event) -> Event:
            return event

        @self.app.exception_handler(RequestValidationError)
        async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
            faults = [{name: fault[name] for name in ("loc", "msg", "type")} for fault in error.errors()]
            return JSONResponse({"detail": faults}, 422)

    def answer(self, body: bytes) -> tuple[int, Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/process",
            "raw_path": b"/process",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.loop.run_until_complete(self.app(scope, receive, send))
        answer = json.loads(b"".join(message["body"] for message in sent[1:]))
        return sent[0]["status"], answer if sent[0]["status"] == 200 else answer["detail"]


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    reference = Reference()
    yield reference
    reference.loop.close()


def answer(body: bytes) -> tuple[int, Any]:
    try:
        return 200, json.loads(normalise_event(body, MAX_PREDS).body)
    except InvalidEvent as error:
        return 422, error.faults


def one_value(template: dict[str, Any], literal: str) -> bytes:
    return json.dumps(template).replace('"?"', literal).encode()


LITERALS = [
    *("null", "true", "false", "0", "-0", "-0.0", "1", "-1", "1.0", "1e5", "0.1", "1E-400"),
    *("18446744073709551615", "-9223372036854775808", "[]", "{}", '""', '"x"', '[""]', '["a",1,null]', "[[]]"),
]
NUMBER_TEXTS = [
    *(
        "1",
        " 1 ",
        "+1",
        "++1",
        "-.5",
        "5.",
        ".",
        "",
        " ",
        "1e5",
        "e5",
        "1e",
        "1E+5",
        "1e999",
        "0x1",
        "1,5",
        "1 5",
        "1d",
    ),
    *("1_0", "1__0", "_1", "1_", "1_.5", "1._5", "1e_5", " _1", "_", "nan", "-NaN", "inf", "-Infinity", "infinit"),
    *("\t1\n", "\x0b1\x0c", "\x1c1", "1\x1f", "\x851", "\xa01", "\u20091", "\u20281", "\u30001", "\u200b1", "\ufeff1"),
    *("\u0661", "1\0", "\0", "-", "-0", "1e-400", "0" * 400, "0." + "1" * 900, "true", "\U0001d7d9"),
]


@pytest.mark.parametrize(
    "template",
    [
        an_event(device_id="?"),
        an_event(client_id="?"),
        an_event(created_at="?"),
        an_event(data="?"),
        an_event(data={"license_id": "?", "preds": []}),
        an_event(data={"license_id": "l", "preds": "?"}),
        with_preds("?"),
        with_preds(a_pred(), a_pred(image_frame="?")),
        with_preds(a_pred(prob="?")),
        with_preds(a_pred(tags="?")),
        with_preds(a_pred(tags=["a", "?"])),
    ],
    ids=lambda template: json.dumps(template)[:60],
)
def test_every_value_in_every_place_is_answered_as_fastapi_does(reference: Reference, template: dict[str, Any]) -> None:
    for literal in LITERALS:
        body = one_value(template, literal)
        assert answer(body) == reference.answer(body), literal


@pytest.mark.parametrize("text", NUMBER_TEXTS, ids=ascii)
def test_a_number_in_a_string_is_read_as_pydantic_reads_it(reference: Reference, text: str) -> None:
    body = json.dumps(with_preds(a_pred(prob=text))).encode()
    assert answer(body) == reference.answer(body)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"null", b"true", b"1", b'"x"', b"[]", b"{}", b"[{}]", b'{"data":{}}', b'{"data":{"preds":[{}]}}'),
        *(b"{", b"[1,]", b'{"a":}', b'{"a" 1}', b"{'a':1}", b'{"a":1} x', b'{"a":01}', b'{"a":"\x01"}', b'{"a":"\\x"}'),
        *(b"nul", b"\x00", b'\xef\xbb\xbf{"device_id":1}', "é".encode() * 3, b'{"\xc3\xa9":}', b"-", b"{}{}", b"//"),
    ],
    ids=ascii,
)
def test_a_body_that_is_not_an_object_is_answered_as_by_fastapi(reference: Reference, body: bytes) -> None:
    """The only difference is the place where JSON ends."""
    (status, ours), (its_status, its) = answer(body), reference.answer(body)
    if its[0]["type"] == "json_invalid":
        ours[0]["loc"][1] = its[0]["loc"][1]
    assert (status, ours) == (its_status, its)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.floats().map(str)
    | st.text(" +-_.eE0123456789infaNty\t\x1c", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
STRICT_JSON = st.none() | st.booleans() | TEXT | st.lists(st.integers(), max_size=3)


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 5).flatmap(lambda n: JUNK if n == 0 else strategy)


def objects(members: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Objects with junk in some members, some missing, and some unknown."""
    whole = st.fixed_dictionaries({name: mostly(member) for name, member in members.items()})
    holed = st.fixed_dictionaries(
        {}, optional={**{name: mostly(member) for name, member in members.items()}, "other": STRICT_JSON}
    )
    return mostly(st.integers(0, 3).flatmap(lambda n: holed if n == 0 else whole))


ALMOST_EVENTS = objects(
    {
        "device_id": TEXT | st.integers(-(2**63), 2**64 - 1),
        "client_id": TEXT,
        "created_at": TEXT,
        "data": objects(
            {
                "license_id": TEXT | st.integers(0, 10**18),
                "preds": st.lists(
                    objects(
                        {
                            "image_frame": TEXT,
                            "prob": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1),
                            "tags": st.lists(mostly(TEXT), max_size=3),
                        }
                    ),
                    max_size=3,
                ),
            }
        ),
    }
)


@settings(max_examples=100, deadline=None)
@given(document=ALMOST_EVENTS, ascii_only=st.booleans())
def test_any_document_is_answered_as_fastapi_answers_it(reference: Reference, document: Any, ascii_only: bool) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only).encode()
    assert answer(body) == reference.answer(body)


@settings(max_examples=100, deadline=None)
@given(document=ALMOST_EVENTS)
def test_the_quick_and_the_careful_reading_agree(document: Any) -> None:
    quick = _validate_quickly(document, MAX_PREDS)
    if quick is not None:
        walk = _Walk(MAX_PREDS, MAX_FAULTS, takes_nul=True)
        assert repr(quick) == repr(walk.read(document, _EVENT))
        assert walk.faults == []


# --- what is an event ---


def test_every_fault_is_named_at_once() -> None:
    document = {
        "device_id": True,
        "created_at": None,
        "data": {"preds": [{"image_frame": 1, "prob": "x", "tags": ["a", 1, None]}, a_pred(), 7, {"tags": "abc"}]},
    }
    assert faults_of(document) == [
        ("body.device_id", "string_type"),
        ("body.client_id", "missing"),
        ("body.created_at", "string_type"),
        ("body.data.license_id", "missing"),
        ("body.data.preds.0.image_frame", "string_type"),
        ("body.data.preds.0.prob", "float_parsing"),
        ("body.data.preds.0.tags.1", "string_type"),
        ("body.data.preds.0.tags.2", "string_type"),
        ("body.data.preds.2", "model_attributes_type"),
        ("body.data.preds.3.image_frame", "missing"),
        ("body.data.preds.3.prob", "missing"),
        ("body.data.preds.3.tags", "list_type"),
    ]


def test_normal_form_is_compact_json_in_the_contracts_order() -> None:
    body = b"""{"x": 1, "data": {"preds": [{"tags": [], "y": {}, "prob": 1, "image_frame": "\\u00e9"}],
        "license_id": 7}, "created_at": 1675781809386042, "client_id": -0,
        "device_id": 18446744073709551615}"""
    normal, device_id, rows = normalise_event(body, MAX_PREDS)
    assert (device_id, rows) == ("18446744073709551615", 1)
    assert (
        normal.decode() == '{"device_id":"18446744073709551615","client_id":"0","created_at":"1675781809386042",'
        '"data":{"license_id":"7","preds":[{"image_frame":"é","prob":1.0,"tags":[]}]}}'
    )
    assert normalise_event(normal, MAX_PREDS).body == normal


@pytest.mark.parametrize(
    ("literal", "prob"),
    [("1", 1.0), ("-0.0", -0.0), ("-0", 0.0), ('"-0"', -0.0), ('" 2.5 "', 2.5), ("1e-400", 0.0), ("5e-324", 5e-324)],
)
def test_prob_always_leaves_as_a_float(literal: str, prob: float) -> None:
    decoded = read_event(one_value(with_preds(a_pred(prob="?")), literal))["data"]["preds"][0]["prob"]
    assert type(decoded) is float
    assert (decoded, math.copysign(1, decoded)) == (prob, math.copysign(1, prob))


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999"])
def test_a_prob_that_is_not_finite_is_named(text: str) -> None:
    assert faults_of(with_preds(a_pred(), a_pred(prob=text))) == [("body.data.preds.1.prob", "finite_number")]


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**300])
def test_an_id_beyond_64_bits_is_422_and_a_prob_is_a_number(number: int) -> None:
    assert faults_of(an_event(device_id=number)) == [("body.device_id", "string_type")]
    assert faults_of(with_preds(a_pred(prob=number))) == []


NUL = "a\0b"


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (an_event(device_id=NUL), "device_id"),
        (an_event(created_at=NUL), "created_at"),
        (an_event(data={"license_id": NUL, "preds": []}), "data.license_id"),
        (with_preds(a_pred(), a_pred(image_frame=NUL)), "data.preds.1.image_frame"),
        (with_preds(a_pred(tags=["a", NUL, "\\u0000"])), "data.preds.0.tags.1"),
    ],
)
def test_a_nul_in_any_string_is_422_and_names_its_place(document: dict[str, Any], place: str) -> None:
    """PostgreSQL loads no file with one, and C readers stop at it."""
    assert faults_of(document) == [(f"body.{place}", "string_nul")]
    for lines in (True, False):
        good, bad = batch_of([an_event(), document], lines)
        assert isinstance(good, NormalEvent)
        assert isinstance(bad, InvalidEvent)
        assert "U+0000" in describe_faults(bad.faults)


def test_a_nul_that_is_not_one_or_is_dropped_is_accepted() -> None:
    assert faults_of(with_preds(a_pred(image_frame="\\u0000"))) == []
    assert faults_of(an_event(other=NUL)) == []


def test_a_nul_that_1_0_accepted_still_becomes_a_row() -> None:
    body = write_json(with_preds(a_pred(image_frame=NUL, tags=[NUL])))
    assert csv_rows(body, 0.25) == ([f"d;c;t;l;{NUL};0.5;{NUL}\r\n"], 1)


@pytest.mark.parametrize("member", ["image_frame", "tags"])
def test_only_ids_and_created_at_accept_an_integer(member: str) -> None:
    value: Any = 1 if member == "image_frame" else [1]
    assert [kind for _, kind in faults_of(with_preds(a_pred(**{member: value})))] == ["string_type"]


def test_the_number_of_predictions_is_bounded() -> None:
    assert faults_of(with_preds(*[a_pred()] * MAX_PREDS)) == []
    assert faults_of(with_preds(*[{}] * (MAX_PREDS + 1))) == [("body.data.preds", "too_long")]


# --- JSON ---


WHOLE = json.dumps(an_event()).encode()


def other(literal: str) -> bytes:
    """An event with an unknown member."""
    return one_value(an_event(other="?"), literal)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"device_id":null,' + WHOLE[1:], id="the last of equal keys wins"),
        pytest.param(b"\xef\xbb\xbf" + WHOLE, id="a byte order mark is skipped"),
        pytest.param(one_value(an_event(device_id="?"), r'"\ud83d\ude00"'), id="a pair of surrogates"),
        pytest.param(one_value(an_event(device_id="?"), r'"\u0001\u001f\u007f"'), id="control characters"),
        pytest.param(other("[" * 900 + "]" * 900), id="900 deep"),
        pytest.param(other("9" * 308), id="308 digits"),
        pytest.param(b" \t\r\n" + WHOLE + b" \t\r\n", id="white space around"),
    ],
)
def test_what_json_leaves_open_and_we_accept(body: bytes) -> None:
    assert faults_of(body) == []


@pytest.mark.parametrize(
    ("body", "position"),
    [
        pytest.param(b"\xef\xbb\xbf" * 2 + WHOLE, 0, id="a second byte order mark"),
        pytest.param(WHOLE.decode().encode("utf-16"), 0, id="UTF-16"),
        pytest.param(b'{"a":"\xff"}', None, id="no UTF-8"),
        pytest.param(b'{"a":"\xed\xa0\x80"}', None, id="a surrogate in UTF-8"),
        pytest.param(b'{"a":"\xc0\x80"}', None, id="overlong UTF-8"),
        pytest.param(b'{"a":"\0"}', 6, id="a bare NUL"),
        pytest.param(b'{"a":"\n"}', 6, id="a bare line feed"),
        pytest.param(one_value(an_event(device_id="?"), r'"\ud800"'), None, id="a lone surrogate"),
        pytest.param(one_value(with_preds(a_pred(prob="?")), "NaN"), None, id="NaN"),
        pytest.param(one_value(with_preds(a_pred(prob="?")), "1e999"), None, id="a number beyond a double"),
        pytest.param(other(r'"\udc00"'), None, id="a lone surrogate in an unknown member"),
        pytest.param(other("NaN"), None, id="NaN in an unknown member"),
        pytest.param(other("1e999"), None, id="an infinite number in an unknown member"),
        pytest.param(one_value(an_event(device_id="?"), "9" * 310), None, id="310 digits"),
        pytest.param(one_value(an_event(device_id="?"), "9" * 5000), None, id="5000 digits"),
        pytest.param(other("[" * 1100 + "]" * 1100), None, id="1100 deep"),
        pytest.param(b"[" * 10_000, None, id="10000 deep, not closed"),
    ],
)
def test_what_json_leaves_open_and_we_refuse(body: bytes, position: int | None) -> None:
    [(loc, kind)] = faults_of(body)
    assert kind == "json_invalid"
    at = int(loc.removeprefix("body."))
    assert at == position if position is not None else 0 <= at < len(body)


def test_the_reason_is_one_short_line_without_the_text() -> None:
    with pytest.raises(InvalidEvent) as caught:
        read_event(b'{"device_id":"secret\\n","client_id":[]}')
    assert describe_faults(caught.value.faults) == "body.client_id: Input should be a valid string (and 2 more)"
    assert describe_faults(caught.value.faults[:1]) == "body.client_id: Input should be a valid string"


# --- identity ---


def test_a_message_id_depends_on_key_and_event() -> None:
    """It is 32 hex digits in lower case."""
    ids = [keyed_message_id(key, normal) for key, normal in [(b"k", b"e"), (b"k", b"f"), (b"ke", b""), (b"", b"ke")]]
    assert len(set(ids)) == 4
    assert all(len(one) == 32 and set(one) <= set(b"0123456789abcdef") for one in ids)
    assert keyed_message_id(b"k", b"e") == ids[0]


def test_a_message_id_stays_the_same_from_version_to_version() -> None:
    """Otherwise a client's retry across an upgrade of the producer would make a second row."""
    assert keyed_message_id(b"key", b"{}") == b"09003706efcb6a18985ed2fe4b728eb9"


@pytest.mark.parametrize(
    ("message_id", "own"),
    [
        ("00112233445566778899aabbccddeeff", True),
        (b"00112233445566778899AABBCCDDEEFF", False),
        ("00112233-4455-6677-8899-aabbccddeeff", False),
        ("00112233445566778899aabbccddee  ", False),
        ("00112233445566778899aabbccddeefg", False),
        ("0" * 31, False),
        ("\u0660" * 32, False),
        ("", False),
        (b"\xff", False),
        ("\udcff", False),
    ],
)
def test_a_digest_is_the_ids_own_16_bytes_or_a_hash_of_it(message_id: str | bytes, own: bool) -> None:
    digest = id_digest(message_id)
    assert len(digest) == 16
    assert (digest == bytes.fromhex("00112233445566778899aabbccddeeff")) == own
    assert digest == id_digest(
        message_id if isinstance(message_id, bytes) else message_id.encode(errors="surrogateescape")
    )


OWN = b"0123456789abcdef" * 2


def test_a_line_of_a_message_has_its_id_first_and_the_same_rows() -> None:
    event = write_json(with_preds(a_pred()))
    line = b'{"message_id":"%b",%b' % (OWN, event[1:])
    assert line.startswith(b'{"message_id":"0123456789abcdef0123456789abcdef","device_id":')
    assert read_json(line) == {"message_id": OWN.decode(), **read_json(event)}
    assert line_id(line) == OWN
    assert csv_rows(line, 0.25) == csv_rows(event, 0.25)
    assert count_rows(line) == 1


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"device_id":"d", "message_id" : "x"}', b"x"),
        (b'{"message_id":"\\u00e9"}\r', "é".encode()),
        (b'{"message_id":"%b"}' % OWN.upper(), OWN.upper()),
        (b'{"message_id":"%b\\"","a":1}' % (b"a" * 31), b"a" * 31 + b'"'),
        (b'{"message_id":""}', None),
        (b'{"message_id":7}', None),
        (b'{"device_id":"d"}', None),
        (b'["message_id"]', None),
        (b"not JSON", None),
        (b"", None),
    ],
)
def test_the_id_of_another_publishers_line_is_found_anywhere(line: bytes, found: bytes | None) -> None:
    assert line_id(line) == found


# --- rows ---


@pytest.mark.parametrize(
    ("pred", "row"),
    [
        (a_pred(), b"d;c;t;l;f;0.5;a\r\n"),
        (a_pred(prob=0.25), b"d;c;t;l;f;0.25;a\r\n"),
        (a_pred(prob=0.2, tags=["a", "b"]), b"d;c;t;l;f;0.2;a,b,low_prob\r\n"),
        (a_pred(prob=-0.0, tags=[]), b"d;c;t;l;f;-0.0;low_prob\r\n"),
        (a_pred(prob=1e22, tags=[]), b"d;c;t;l;f;1e+22;\r\n"),
        (a_pred(tags=[""]), b'd;c;t;l;f;0.5;""""""\r\n'),
        (a_pred(tags=["", ""]), b"d;c;t;l;f;0.5;,\r\n"),
        (a_pred(prob=0.1, tags=[""]), b"d;c;t;l;f;0.1;,low_prob\r\n"),
        (a_pred(tags=["a,b", "c"]), b'd;c;t;l;f;0.5;"""a,b"",c"\r\n'),
        (a_pred(tags=['"']), b'd;c;t;l;f;0.5;""""""""""\r\n'),
        (a_pred(tags=["a;b", "c"]), b'd;c;t;l;f;0.5;"a;b,c"\r\n'),
        (a_pred(tags=["a\nb"]), b'd;c;t;l;f;0.5;"""a\nb"""\r\n'),
        (a_pred(tags=["a\r"]), b'd;c;t;l;f;0.5;"""a\r"""\r\n'),
        (a_pred(image_frame="a;b"), b'd;c;t;l;"a;b";0.5;a\r\n'),
        (a_pred(image_frame='"'), b'd;c;t;l;"""";0.5;a\r\n'),
        (a_pred(image_frame="a\nb\rc"), b'd;c;t;l;"a\nb\rc";0.5;a\r\n'),
        (a_pred(image_frame=" a\tb,'\0\x1f\u2028é "), "d;c;t;l; a\tb,'\0\x1f\u2028é ;0.5;a\r\n".encode()),
    ],
    ids=ascii,
)
def test_a_row_has_the_original_dialect_and_low_prob(pred: dict[str, Any], row: bytes) -> None:
    assert csv_rows(write_json(with_preds(pred)), 0.25) == ([row.decode()], 1)


def test_rows_follow_the_order_of_predictions() -> None:
    parts, count = csv_rows(write_json(with_preds(*[a_pred(image_frame=str(n)) for n in range(3)])), 0.25)
    assert [line.split(";")[4] for line in "".join(parts).splitlines()] == ["0", "1", "2"]
    assert count == 3
    assert csv_rows(write_json(with_preds()), 0.25) == ([], 0)


def test_an_image_becomes_a_part_of_its_own() -> None:
    """It is not copied into its row, unless it must be quoted."""
    image, quoted = "x" * 20_000, "x" * 20_000 + ";"
    parts, _ = csv_rows(write_json(with_preds(a_pred(image_frame=image), a_pred(image_frame="short"))), 0.25)
    assert image in parts
    assert "".join(parts).count("\r\n") == 2
    parts, _ = csv_rows(write_json(with_preds(a_pred(image_frame=quoted))), 0.25)
    assert f';"{quoted}";' in "".join(parts)


def test_rows_are_counted_whatever_the_strings_hold() -> None:
    tricky = a_pred(image_frame='"prob":', tags=['{"prob":1}', '\\"prob":', "prob"])
    for preds in [], [tricky], [tricky] * 3:
        assert count_rows(write_json(validate_event(with_preds(*preds)))) == len(preds)


def test_the_header_is_what_csv_writer_writes() -> None:
    file = io.StringIO(newline="")
    names = ["device_id", "client_id", "created_at", "license_id", "image_frame", "prob", "tags"]
    csv.writer(file, delimiter=";").writerow(names)
    assert file.getvalue().encode() == CSV_HEADER


# --- batches ---


@pytest.mark.parametrize("lines", [False, True])
def test_a_batch_gives_each_event_its_own_outcome(lines: bool) -> None:
    documents = [
        json.dumps(document) for document in (an_event(), {**an_event(), "device_id": None}, with_preds(a_pred()))
    ]
    body = "\r\n\n".join(documents) if lines else f"[{','.join(documents)}]"
    good, bad, other = events_of(body.encode(), lines, MAX_PREDS)
    assert good == (write_json(an_event()), an_event()["device_id"], len(an_event()["data"]["preds"]))
    assert isinstance(other, NormalEvent)
    assert other.body == write_json(with_preds(a_pred()))
    assert isinstance(bad, InvalidEvent)
    assert bad.faults == [
        {"loc": ["body", 1, "device_id"], "msg": "Input should be a valid string", "type": "string_type"}
    ]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        pytest.param(b"{}", "list_type", id="no list"),
        pytest.param(b"[", "json_invalid", id="no JSON"),
        pytest.param(b"", "missing", id="nothing"),
        pytest.param(json.dumps([an_event()] * (MAX_EVENTS + 1)).encode(), "too_long", id="too many events"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused_whole(body: bytes, kind: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        events_of(body, False, MAX_PREDS)
    assert [(fault["loc"][0], fault["type"]) for fault in caught.value.faults] == [("body", kind)]  # type: ignore[index]


def test_beyond_the_most_faults_an_event_has_only_one() -> None:
    *bad, good = events_of(b"\n".join([b"{}"] * 2501 + [write_json(an_event())]), True, 10_000)
    assert isinstance(good, NormalEvent)
    faults = [item.faults for item in bad if isinstance(item, InvalidEvent)]
    assert len(faults) == 2501
    assert {len(own) for own in faults[:500]} == {4}
    assert {tuple(own[0]) for own in faults[500:]} == {("loc", "msg", "type")}
    assert [own[0]["loc"] for own in faults[500:]] == [["body", position] for position in range(500, 2501)]


def test_predictions_are_bounded_for_each_event_of_a_batch() -> None:
    events = events_of(json.dumps([with_preds(*[a_pred()] * 6)] * 50).encode(), False, MAX_PREDS)
    assert len([event for event in events if isinstance(event, NormalEvent)]) == 50


ONE_BY_ONE = [
    '{"device_id":"a"}',
    json.dumps({**an_event(), "device_id": 2**70}),
    json.dumps({**an_event(), "device_id": 2**63}),
    json.dumps(with_preds(a_pred(prob=float("nan")))),
    json.dumps(with_preds(a_pred(image_frame="\ud800"))),
    json.dumps({**an_event(), "unknown": float("inf")}),
    json.dumps(an_event()),
]


@pytest.mark.parametrize("frame_bytes", [10, 400_000])
def test_each_line_of_a_batch_is_judged_as_it_would_be_alone(frame_bytes: int) -> None:
    alone: list[object] = []
    documents = [*ONE_BY_ONE, json.dumps(with_preds(a_pred(image_frame="1,[" * (frame_bytes // 3) + '\\"')))]
    for text in documents:
        try:
            alone.append(normalise_event(text.encode(), MAX_PREDS))
        except InvalidEvent as error:
            alone.append([(fault["loc"][1:], fault["type"]) for fault in error.faults])  # type: ignore[index]
    together = events_of("\n".join(documents).encode(), True, MAX_PREDS)
    assert [
        [(fault["loc"][2:], fault["type"]) for fault in item.faults] if isinstance(item, InvalidEvent) else item  # type: ignore[index]
        for item in together
    ] == alone
    assert sum(isinstance(item, NormalEvent) for item in together) == 3


def test_an_array_is_read_once_and_refused_whole() -> None:
    """What orjson refuses in one event of a JSON array refuses the array; NDJSON is read line by line."""
    for text in ONE_BY_ONE[3:6]:
        with pytest.raises(InvalidEvent) as caught:
            events_of(f"[{json.dumps(an_event())},{text}]".encode(), False, MAX_PREDS)
        assert [fault["type"] for fault in caught.value.faults] == ["json_invalid"]


def test_too_many_lines_are_refused_before_they_are_split() -> None:
    with pytest.raises(InvalidEvent) as caught:
        events_of(b"\n" * 1_000_000, True, MAX_PREDS)
    assert [fault["type"] for fault in caught.value.faults] == ["json_too_large"]


@pytest.mark.parametrize("more", ["", r', "more": "\u0000"'], ids=["quickly", "by a walk"])
def test_an_event_whose_rows_repeat_too_long_ids_is_refused(more: str) -> None:
    """A body of half a megabyte could have rows of gigabytes. The consumer refuses such an event, too."""

    def body(id_chars: int) -> bytes:
        preds = ", ".join(['{"image_frame": "f", "prob": 0.5, "tags": []}'] * MAX_PREDS)
        ids = f'"device_id": "{"x" * (id_chars - 3)}", "client_id": "c", "created_at": "t"{more}'
        return f'{{{ids}, "data": {{"license_id": "l", "preds": [{preds}]}}}}'.encode()

    longest, too_long = body(MAX_ID_CHARS // MAX_PREDS), body(MAX_ID_CHARS // MAX_PREDS + 1)
    assert normalise_event(longest, MAX_PREDS).rows == csv_rows(longest, 0.25)[1] == MAX_PREDS
    for read in (lambda: normalise_event(too_long, MAX_PREDS), lambda: csv_rows(too_long, 0.25)):
        with pytest.raises(InvalidEvent) as refusal:
            read()
        [fault] = refusal.value.faults
        assert (fault["loc"], fault["type"]) == (["body"], "json_too_large")
