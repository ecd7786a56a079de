"""/openapi.json is well formed, and agrees with the code that validates events. tests/integration/test_schemathesis.py
tries what it says about HTTP on a live producer."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from http import HTTPStatus
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ProducerSettings
from common.errors import HttpError, InvalidEvent
from common.event.document import read_json, write_json
from common.event.schema import NormalEvent, normalise_batch, normalise_event, validate_event
from common.http.fields import idempotency_key
from common.producer.api import PAGE as PAGE_FILE
from common.producer.metrics import STATUSES, Counters
from common.producer.openapi import page_headers
from common.producer.routes import ROUTES
from tests.support import openapi

MAX_PREDS = 5
SECURED = ProducerSettings(max_preds=MAX_PREDS, api_token="secret", protect_pages=True)
DOCUMENT = openapi.document(SECURED)
OPEN = openapi.document(ProducerSettings())
OPERATIONS = {
    (path, method): operation for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
}
PAGE = PAGE_FILE.read_bytes()


def validator(name: str) -> Any:
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )


EVENT_IN, EVENT, FAULTS = validator("EventIn"), validator("Event"), validator("Faults")


def references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in references(value)]
    return [found for value in node for found in references(value)] if isinstance(node, list) else []


def resolve(node: dict[str, Any]) -> Any:
    at: Any = DOCUMENT
    for part in node.get("$ref", "#")[2:].split("/") if "$ref" in node else []:
        at = at[part]
    return at if "$ref" in node else node


def test_every_reference_leads_to_a_component() -> None:
    used = set(references(DOCUMENT))
    for reference in used:
        resolve({"$ref": reference})
    components = DOCUMENT["components"]
    there = {f"#/components/{kind}/{name}" for kind in components for name in components[kind]}
    assert there - {"#/components/securitySchemes/token"} == used


def test_every_schema_is_a_schema() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_it_names_the_producers_paths_and_statuses() -> None:
    methods = {
        (route.label, method.decode().lower()): route.name
        for route in ROUTES.values()
        for method in route.methods
        if method != b"HEAD"
    }
    assert {place: operation["operationId"] for place, operation in OPERATIONS.items()} == methods
    statuses = {int(status) for operation in OPERATIONS.values() for status in operation["responses"]}
    unnamed = {
        HTTPStatus.NOT_FOUND,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.NO_CONTENT,
    }  # no path; a bug; a preflight
    assert statuses == set(STATUSES) - unnamed


def test_operation_ids_are_unique_and_every_answer_is_described() -> None:
    assert len({operation["operationId"] for operation in OPERATIONS.values()}) == len(OPERATIONS)
    for operation in OPERATIONS.values():
        assert all(resolve(response)["description"] for response in operation["responses"].values())


@pytest.mark.parametrize("name", openapi.EVENT_EXAMPLES)
def test_an_example_is_valid_accepted_and_answered_as_described(name: str) -> None:
    example = openapi.EVENT_EXAMPLES[name]["value"]
    EVENT_IN.validate(example)
    EVENT.validate(read_json(normalise_event(write_json(example), MAX_PREDS).body))


def test_batch_examples_are_what_they_say() -> None:
    def batch(example: object, lines: bool) -> list[bool]:
        body = example.encode() if isinstance(example, str) else write_json(example)
        return [isinstance(item, NormalEvent) for item in normalise_batch(body, lines, MAX_PREDS) if item]

    examples = openapi.BATCH_EXAMPLES | openapi.LINES_EXAMPLES
    assert batch(examples["batch"]["value"], False) == batch(examples["lines"]["value"], True) == [True, True]
    assert batch(examples["mixed"]["value"], False) == [True, False]


def test_a_refused_example_has_the_faults_it_promises() -> None:
    faults = {}
    for name, example in openapi.REFUSED_EXAMPLES.items():
        value = example["value"]
        with pytest.raises(InvalidEvent) as refused:
            normalise_event(value.encode() if isinstance(value, str) else write_json(value), MAX_PREDS)
        faults[name] = refused.value.faults
        FAULTS.validate(read_json(write_json({"detail": refused.value.faults})))
    assert not EVENT_IN.is_valid(openapi.REFUSED_EXAMPLES["faults"]["value"])
    assert len(faults["faults"]) > 1
    assert faults["not_json"][0]["type"] == "json_invalid"


PRED = DOCUMENT["components"]["schemas"]["EventIn"]["properties"]["data"]["properties"]["preds"]["items"]["properties"]
NUMERIC_STRING = PRED["prob"]["anyOf"][1]["pattern"]
fractions = st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
scalars = st.none() | st.booleans() | st.integers() | st.text() | fractions  # 1.0 is an integer only to JSON Schema
numbers = st.from_regex(NUMERIC_STRING) | st.floats().map(str) | st.integers().map(str)
preds = st.fixed_dictionaries(
    {"image_frame": st.text() | scalars, "prob": scalars | numbers, "tags": st.lists(st.text() | scalars, max_size=3)}
)
events = st.fixed_dictionaries(
    {
        "device_id": scalars,
        "client_id": st.text() | st.integers(),
        "created_at": st.text() | st.integers(),
        "data": st.fixed_dictionaries({"license_id": scalars, "preds": st.lists(preds, max_size=MAX_PREDS + 1)}),
    },
    optional={"unknown": scalars},
)


@given(events)
def test_whatever_matches_the_schema_is_accepted(document: dict[str, Any]) -> None:
    try:
        answer = read_json(normalise_event(json.dumps(document).encode(), MAX_PREDS).body)
    except InvalidEvent:
        accepted = False
    else:
        accepted = True
        EVENT.validate(answer)
    if EVENT_IN.is_valid(document):
        assert accepted


@given(st.from_regex(NUMERIC_STRING))
def test_a_numeric_string_by_the_schema_is_a_finite_number(text: str) -> None:
    document = {**openapi.EVENT, "data": {"license_id": "", "preds": [{"image_frame": "", "prob": text, "tags": []}]}}
    assert validate_event(document)["data"]["preds"][0]["prob"] == float(text)


@pytest.mark.parametrize("text", ["", " ", "high", "nan", "inf", "-Infinity", "0x10", "1,5", "1.5.2", "٣", "1e", "--1"])
def test_what_is_not_a_number_matches_neither_schema_nor_code(text: str) -> None:
    document = {**openapi.EVENT, "data": {"license_id": "", "preds": [{"image_frame": "", "prob": text, "tags": []}]}}
    assert not EVENT_IN.is_valid(document)
    with pytest.raises(InvalidEvent):
        validate_event(document)


@given(st.from_regex(r'[!-~"\\ é]{0,4}', fullmatch=True) | st.text(st.characters(max_codepoint=0x7F), min_size=250))
def test_a_key_is_accepted_exactly_when_it_matches_the_schema(key: str) -> None:
    schema = DOCUMENT["components"]["parameters"]["IdempotencyKey"]["schema"]
    matches = re.fullmatch(schema["pattern"].removeprefix("^").removesuffix("$"), key) is not None
    try:
        idempotency_key(key.encode())
    except HttpError:
        assert not matches
    else:
        assert matches


def test_security_follows_the_settings() -> None:
    assert not any("security" in operation for methods in OPEN["paths"].values() for operation in methods.values())
    secured = {path for (path, _), operation in OPERATIONS.items() if "security" in operation}
    assert secured == {"/process", "/process/batch", "/metrics", "/openapi.json", "/docs"}
    assert all("401" in operation["responses"] for operation in OPERATIONS.values() if "security" in operation)
    assert all("401" not in operation["responses"] for operation in OPERATIONS.values() if "security" not in operation)
    events_only = openapi.document(ProducerSettings(api_token="secret"))["paths"]
    assert {path for path in events_only for it in events_only[path].values() if "security" in it} == {
        *("/process", "/process/batch")
    }


def test_limits_are_those_of_the_settings() -> None:
    small = openapi.document(ProducerSettings(max_preds=7, max_body_bytes=1000))
    assert b'"maxItems":7' in write_json(small)
    assert b"1000 bytes" in write_json(small)
    assert b"8388608 bytes" in write_json(OPEN)
    assert b"@" not in write_json(OPEN)


# --- the page ---


def test_only_the_pages_own_script_and_style_may_run() -> None:
    policy = page_headers(PAGE).decode().split("Content-Security-Policy: ")[1].split("\r\n")[0]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    [script] = re.findall(rb"<script>(.*?)</script>", PAGE, re.DOTALL)
    [style] = re.findall(rb"<style>(.*?)</style>", PAGE, re.DOTALL)
    for directive, block in (("script-src", script), ("style-src", style)):
        assert directives[directive] == f"'sha256-{b64encode(sha256(block).digest()).decode()}'"
    assert directives["default-src"] == directives["frame-ancestors"] == directives["form-action"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "unsafe" not in policy


def test_page_headers_are_whole_lines() -> None:
    lines = page_headers(PAGE).split(b"\r\n")
    assert lines[-1] == b""
    assert all(re.fullmatch(rb"[A-Za-z-]+: [ -~]+", line) for line in lines[:-1])
    assert b"X-Content-Type-Options: nosniff" in lines


def test_the_page_takes_nothing_from_elsewhere() -> None:
    """It also parses no data as HTML."""
    text = PAGE.decode()
    assert not re.search(r"""(?:src|href|url\(|import)\s*[=(]?\s*["']?(?:https?:)?//""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"""\s(?:style|on[a-z]+)=["']""", text)  # the policy would block them


def test_the_page_reads_metrics_that_the_producer_has() -> None:
    read = set(re.findall(rb"predlog_[a-z_]+", PAGE))
    assert len(read) >= 6
    assert read <= set(re.findall(rb"^# TYPE (\S+)", Counters().metrics.render(), re.MULTILINE))
