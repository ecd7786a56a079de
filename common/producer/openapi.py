"""The OpenAPI document of GET /openapi.json, and the headers of GET /docs. Pure: dicts and bytes from arguments.

The document is the contract for machines. It says neither more nor less than the producer does: a test tries every
statement of it on a live one.
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256

from common.config import ProducerSettings

Json = dict[str, object]

# Every match is accepted. The producer also accepts strings such as those with three-digit exponents, where no pattern
# can tell a finite number from an infinite one.
NUMERIC_STRING = r"^[ \t\r\n]*[+-]?([0-9]{1,100}(\.[0-9]{0,100})?|\.[0-9]{1,100})([eE][+-]?[0-9]{1,2})?[ \t\r\n]*$"
LARGEST_DOUBLE = 1.7976931348623157e308

EVENT: Json = {
    "device_id": "camera-17",
    "client_id": "north-gate",
    "created_at": "2024-05-14 09:26:53.589793",
    "data": {
        "license_id": "L-2048",
        "preds": [
            {"image_frame": "aGVsbG8gZnJhbWUgMQ==", "prob": 0.97, "tags": ["truck", "loaded"]},
            {"image_frame": "aGVsbG8gZnJhbWUgMg==", "prob": 0.12, "tags": []},
        ],
    },
}
EMPTY_EVENT: Json = {**EVENT, "data": {"license_id": "L-2048", "preds": []}}
LAX_EVENT: Json = {
    "device_id": 17,
    "client_id": 4,
    "created_at": 1715678813,
    "data": {"license_id": 2048, "preds": [{"image_frame": "frame-1", "prob": "0.5", "tags": ["cat", "indoors"]}]},
}
FAULTY_EVENT: Json = {
    "device_id": None,
    "client_id": "north-gate",
    "data": {
        "license_id": "L-2048",
        "preds": [{"image_frame": "frame-1", "prob": "high", "tags": "truck"}, {"image_frame": 7, "tags": []}],
    },
}
FAULT: Json = {"loc": ["body", "data", "preds", 0, "prob"], "msg": "Field required", "type": "missing"}

EVENT_EXAMPLES: Json = {
    "event": {"summary": "Two predictions, one of low probability", "value": EVENT},
    "lax": {"summary": "Integers as ids, a number in a string", "value": LAX_EVENT},
    "empty": {"summary": "No predictions: accepted, no rows", "value": EMPTY_EVENT},
}
BATCH_EXAMPLES: Json = {
    "batch": {"summary": "Two events", "value": [EVENT, LAX_EVENT]},
    "mixed": {"summary": "One event, and one with faults", "value": [EVENT, FAULTY_EVENT]},
}
LINES_EXAMPLES: Json = {
    "lines": {"summary": "Two events, one a line", "value": f"{json.dumps(EVENT)}\n{json.dumps(LAX_EVENT)}\n"},
}
# OpenAPI's own examples must be valid, so those that are refused have a field of ours.
REFUSED_EXAMPLES: Json = {
    "faults": {"summary": "Several faults at once", "value": FAULTY_EVENT},
    "not_json": {"summary": "Not JSON", "value": '{"device_id": "camera-17", "client_id":'},
}


def document(version: str, settings: ProducerSettings) -> Json:
    """Return the OpenAPI 3.1 document of a producer with these settings."""
    secured, secured_pages = bool(settings.api_token), settings.protect_pages
    max_preds, max_body_bytes = settings.max_preds, settings.max_body_bytes
    status = _ref("schemas", "Status")
    pages = {
        "/metrics": _get("metrics", "Metrics for Prometheus", "text/plain", _STRING, secured_pages),
        "/openapi.json": _get("openapi", "This document", "application/json", {"type": "object"}, secured_pages),
        "/docs": _get("docs", "A page to read and try it", "text/html", _STRING, secured_pages),
        "/healthz": _get("healthz", "Is the process alive?", "application/json", status),
        "/readyz": _get("readyz", "Would an event be accepted now? If not, why?", "application/json", status),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "predlog",
            "version": version,
            "summary": "Predictions in over HTTP, through RabbitMQ, into CSV: each accepted prediction exactly once.",
        },
        "tags": [
            {"name": "events", "description": "Hand over what a model saw."},
            {"name": "operations", "description": "Watch the producer."},
        ],
        "paths": {
            "/process": {"post": _process(max_body_bytes, secured)},
            "/process/batch": {"post": _process_batch(max_preds, secured)},
            **{path: {"get": get} for path, get in pages.items()},
        },
        "components": {
            "schemas": _schemas(max_preds),
            "responses": _responses(max_body_bytes),
            "headers": _HEADERS,
            "parameters": {"IdempotencyKey": _IDEMPOTENCY_KEY},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "One of the tokens in `API_TOKEN`."}
            },
        },
    }


def page_headers(page: bytes) -> bytes:
    """Return header lines for the page. Its policy allows only the page's own styles and scripts, by their digests."""

    def digests(tag: bytes) -> str:
        blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(block).digest()).decode()}'" for block in blocks)

    policy = (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    lines = (
        f"Content-Security-Policy: {policy}",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: no-referrer",
        "Cross-Origin-Opener-Policy: same-origin",
        "Cache-Control: no-cache",
    )
    return "".join(f"{line}\r\n" for line in lines).encode()


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _object(members: Mapping[str, object], **more: object) -> Json:
    return {"type": "object", "required": list(members), "properties": dict(members), **more}


def _array(items: Json, **more: object) -> Json:
    return {"type": "array", "items": items, **more}


def _text(description: str, **more: object) -> Json:
    return {"type": "string", "description": description, **more}


_STRING: Json = {"type": "string"}
_NUMBER: Json = {"type": "number", "minimum": -LARGEST_DOUBLE, "maximum": LARGEST_DOUBLE}


def _event(identifier: Json, prob: Json, max_preds: int, description: str) -> Json:
    pred = _object(
        {
            "image_frame": _text("The frame, as the device encodes it."),
            "prob": {**prob, "description": "The model's certainty."},
            "tags": _array(_STRING, description="What the model saw; may be empty."),
        }
    )
    data = _object(
        {
            "license_id": {**identifier, "description": "The licence that the model runs under."},
            "preds": _array(pred, maxItems=max_preds, description="The predictions: one row of the CSV each."),
        }
    )
    return _object(
        {
            "device_id": {**identifier, "description": "The device."},
            "client_id": {**identifier, "description": "Whom the device belongs to."},
            "created_at": {**identifier, "description": "When, in the device's own words."},
            "data": data,
        },
        description=description,
    )


def _schemas(max_preds: int) -> Json:
    identifier: Json = {"type": ["string", "integer"]}
    prob: Json = {"anyOf": [_NUMBER, {"type": "string", "pattern": NUMERIC_STRING}]}
    fault = {
        "loc": _array({"type": ["string", "integer"]}, minItems=1, description="The path to the fault."),
        "msg": _text("What is wrong, for people."),
        "type": _text("What is wrong, for programs."),
    }
    faults = _array(_ref("schemas", "Fault"), minItems=1, description="Every fault.")
    detail = _text("What is wrong, for people.", minLength=1)
    faulty = _object({"status": {"const": 422}, "detail": faults})
    failed = _object({"status": {"enum": [413, 503, 504]}, "detail": detail})
    return {
        "EventIn": _event(identifier, prob, max_preds, "An event as a device sends it. Other members are dropped."),
        "Event": _event(_STRING, _NUMBER, max_preds, "An event as it was published."),
        "BatchOut": _object(
            {
                "accepted": {"type": "integer", "minimum": 0, "description": "How many of the events were accepted."},
                "results": _array(
                    {"anyOf": [_object({"status": {"const": 200}}), faulty, failed]},
                    maxItems=max_preds,
                    description="What became of each event, in their order.",
                ),
            }
        ),
        "Fault": _object(fault),
        "Faults": _object({"detail": faults}),
        "Error": _object({"detail": detail}),
        "Status": _object(
            {
                "status": _text("One word."),
                "down": _text("Of several partitions: those that take no events now, and why. Else it is not there."),
            },
            required=["status"],
        ),
    }


def _content(media_type: str, schema: Json, **more: object) -> Json:
    return {media_type: {"schema": schema, **more}}


def _json(name: str, **more: object) -> Json:
    return _content("application/json", _ref("schemas", name), **more)


def _error(description: str, header: str = "") -> Json:
    response: Json = {"description": description, "content": _json("Error")}
    return {**response, "headers": {header: _ref("headers", header)}} if header else response


def _header(description: str, schema: Json) -> Json:
    return {"description": description, "required": True, "schema": schema}


def _responses(max_body_bytes: int) -> Json:
    return {
        "400": _error("Not a valid request (RFC 9112), or a bad `Idempotency-Key`."),
        "401": _error("No token, or an unknown one.", "WWW-Authenticate"),
        "403": _error(
            "A browser sent it for a page of another origin (`CORS_ORIGINS`), or to a `Host` that is not served "
            "(`ALLOWED_HOSTS`)."
        ),
        "405": _error("The path has no such method.", "Allow"),
        "408": _error("The request did not arrive in time."),
        "413": _error(f"The body has more than {_size(max_body_bytes)}, as sent or inflated."),
        "414": _error("The request target is too long."),
        "415": _error("`Content-Type` or `Content-Encoding` is not supported."),
        "417": _error("`Expect` asks for something other than 100-continue."),
        "422": {
            "description": "Not an event: every fault, and nothing was published.",
            "content": _json("Faults", example={"detail": [FAULT]}),
        },
        "431": _error("The header section is too large."),
        "501": _error("An unknown transfer coding."),
        "503": _error(
            "Not accepted: the broker is away or blocked, too much is in flight, or the producer is stopping. "
            "A retry is safe.",
            "Retry-After",
        ),
        "504": _error("No confirm in time: the outcome is unknown. A retry with the same `Idempotency-Key` is safe."),
        "505": _error("Not HTTP/1.x."),
    }


_ANY_REQUEST = ("400", "403", "405", "408", "413", "414", "417", "431", "501", "503", "505")
_ANY_EVENT = (*_ANY_REQUEST, "415", "422", "504")

_HEADERS: Json = {
    "Retry-After": _header("Seconds to wait before a retry.", {"type": "integer", "minimum": 1}),
    "Allow": _header("The methods that the path has.", {"type": "string", "enum": ["POST", "GET, HEAD"]}),
    "WWW-Authenticate": _header("The scheme to use.", {"type": "string", "pattern": "^Bearer "}),
}
_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A retry of the same body with the same key makes no second row. "
    "1 to 255 visible ASCII characters, also as a quoted string.",
    "schema": {"type": "string", "pattern": r'^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$'},
    "example": "camera-17:000042",
}


def _size(size_bytes: int) -> str:
    mebibytes, rest = divmod(size_bytes, 1 << 20)
    return f"{size_bytes} bytes" if rest else f"{mebibytes} MiB"


def _operation(name: str, summary: str, own: Json, shared: tuple[str, ...], secured: bool, **more: object) -> Json:
    """Return an operation with its `own` responses, and references to the `shared` ones by status."""
    statuses = sorted({*shared, "401"} if secured else shared)
    responses = {**own, **{status: _ref("responses", status) for status in statuses}}
    operation: Json = {"operationId": name, "summary": summary, **more, "responses": responses}
    return {**operation, "security": [{"token": []}]} if secured else operation


def _process(max_body_bytes: int, secured: bool) -> Json:
    accepted = {
        "description": "RabbitMQ has it on disk. The answer is the event as it was published.",
        "content": _json("Event", example=EVENT),
    }
    return _operation(
        "process",
        "Hand over one event",
        {"200": accepted},
        _ANY_EVENT,
        secured,
        tags=["events"],
        description="Answers when RabbitMQ has confirmed the event. Each of its predictions is then in the CSV exactly "
        "once, whatever fails.\n\n"
        "`Content-Type` is `application/json`, `application/*+json` or missing. The body may be compressed with "
        f"`Content-Encoding: gzip`; it has at most {_size(max_body_bytes)}, also after inflation.",
        parameters=[_ref("parameters", "IdempotencyKey")],
        requestBody={"required": True, "content": _json("EventIn", examples=EVENT_EXAMPLES)},
        **{"x-refused-examples": REFUSED_EXAMPLES},
    )


def _process_batch(max_preds: int, secured: bool) -> Json:
    # Each item is validated alone, so any array is a batch.
    events = _array({"anyOf": [_ref("schemas", "EventIn"), {}]}, maxItems=max_preds)
    results = [{"status": 200}, {"status": 422, "detail": [FAULT]}]
    return _operation(
        "process_batch",
        "Hand over many events",
        {
            "200": {
                "description": "All were accepted.",
                "content": _json("BatchOut", example={"accepted": 1, "results": results[:1]}),
            },
            "207": {
                "description": "Some were not accepted. Each result says which, and why.",
                "content": _json("BatchOut", example={"accepted": 1, "results": results}),
            },
        },
        _ANY_EVENT,
        secured,
        tags=["events"],
        description=f"A JSON array of at most {max_preds} events, or one event a line (`application/x-ndjson`). "
        "Answers when the outcome of every event is known.\n\n"
        "With an `Idempotency-Key`, a retry of the same batch is safe: key and position name each event.",
        parameters=[_ref("parameters", "IdempotencyKey")],
        requestBody={
            "required": True,
            "content": {
                "application/json": {"schema": events, "examples": BATCH_EXAMPLES},
                "application/x-ndjson": {"schema": {"description": "One event a line."}, "examples": LINES_EXAMPLES},
            },
        },
    )


def _get(name: str, summary: str, media_type: str, schema: Json, secured: bool = False) -> Json:
    own: Json = {"200": {"description": "As asked.", "content": _content(media_type, schema)}}
    return _operation(name, summary, own, _ANY_REQUEST, secured, tags=["operations"])
