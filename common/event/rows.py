"""Events as CSV rows, in the dialect of Python's csv.writer. Pure."""

from __future__ import annotations

import re
from typing import Any

import orjson

from common.event.schema import Event, read_event

CSV_HEADER = b"device_id;client_id;created_at;license_id;image_frame;prob;tags\r\n"
LOW_PROB_TAG = "low_prob"
LONG_CHARS = 1000  # a longer text is not copied into its row, but stays a part of its own


def count_rows(body: bytes) -> int:
    """How many rows the event in `body` makes: exact for normal form, where a quote in a string is escaped."""
    return body.count(b'"prob":') or body.count(b'"prob"')


def csv_rows(body: bytes, low_prob_threshold: float) -> tuple[list[str], int]:
    """The CSV rows of the event in `body`, one for each prediction, and how many. Raises InvalidEvent.

    The rows are the parts joined: whoever joins those of a whole batch copies an image once. They are what
    `csv.writer(delimiter=";")` writes. `tags` is a CSV record of its own (delimiter ","), with `low_prob` appended when
    `prob < low_prob_threshold`. csv.writer itself looks at every character in turn: more than twice the cost for a
    short row, 13 times for a 20 KB frame.
    """
    try:
        rows = _rows_quickly(orjson.loads(body), low_prob_threshold)
    except orjson.JSONDecodeError:
        rows = None
    if rows is None:
        event = read_event(body)
        return [_rows(event, low_prob_threshold)], len(event["data"]["preds"])
    return rows


def _rows_quickly(document: Any, low_prob_threshold: float) -> tuple[list[str], int] | None:
    """`csv_rows` for a document in normal form (but for unknown members) with nothing to quote; None for any other."""
    try:
        data = document["data"]
        device_id, client_id, created_at = document["device_id"], document["client_id"], document["created_at"]
        license_id, preds = data["license_id"], data["preds"]
        if not (str is type(device_id) is type(client_id) is type(created_at) is type(license_id)):
            return None
        if type(preds) is not list:
            return None
        prefix = f"{device_id};{client_id};{created_at};{license_id};"
        parts, texts, all_tags = [], [device_id, client_id, created_at, license_id], []
        for pred in preds:
            frame, prob, tags = pred["image_frame"], pred["prob"], pred["tags"]
            if type(frame) is not str or type(prob) is not float or type(tags) is not list:
                return None
            if prob < low_prob_threshold:
                tags = [*tags, LOW_PROB_TAG]
            cell = ",".join(tags)  # a TypeError unless all are strings
            if tags and not cell:  # one empty tag is quoted
                return None
            if len(frame) <= LONG_CHARS:
                parts.append(f"{prefix}{frame};{prob!r};{cell}\r\n")
                texts.append(frame)
            elif _must_quote(frame):
                return None
            else:
                parts += (prefix, frame, f";{prob!r};{cell}\r\n")
            all_tags += tags
    except (KeyError, TypeError):
        return None
    # One look at all of it, each with the processor's own search.
    tag_text = "".join(all_tags)
    if _must_quote("".join(texts) + tag_text) or "," in tag_text:
        return None
    return parts, len(preds)


def _must_quote(text: str) -> bool:
    return '"' in text or ";" in text or "\n" in text or "\r" in text


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
