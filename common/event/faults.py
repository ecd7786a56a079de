"""Faults of a document, as FastAPI reports them (pydantic 2, lax mode): `loc`, `msg` and `type`. Pure."""

from __future__ import annotations

from collections.abc import Iterable

Fault = dict[str, object]

_MESSAGES = {
    "missing": "Field required",
    "json_invalid": "JSON decode error",
    "model_attributes_type": "Input should be a valid dictionary or object to extract fields from",
    "list_type": "Input should be a valid list",
    "string_type": "Input should be a valid string",
    "string_nul": "Input should be a valid string without the character U+0000",
    "float_type": "Input should be a valid number",
    "float_parsing": "Input should be a valid number, unable to parse string as a number",
    "finite_number": "Input should be a finite number",
}


def make_fault(loc: Iterable[str | int], kind: str, message: str | None = None) -> Fault:
    """Return a fault at the path `loc`; without a `message`, with pydantic's for the `kind`."""
    return {"loc": list(loc), "msg": message or _MESSAGES[kind], "type": kind}


def is_not_json(faults: list[Fault]) -> bool:
    """Return whether these are the faults of a document that is empty or not JSON."""
    first = faults[0]
    return first["type"] == "json_invalid" or (first["type"], first["loc"]) == ("missing", ["body"])


def describe_faults(faults: list[Fault]) -> str:
    """Return one line for a person: the first fault and the number of others. It repeats no text of the document."""
    first = faults[0]
    loc = first["loc"]
    where = ".".join(map(str, loc)) if isinstance(loc, list) else ""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}: {first['msg']}{more}"
