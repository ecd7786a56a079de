"""Events as CSV rows, in the dialect of Python's csv.writer. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from common.event.schema import MAX_ID_CHARS, Event, read_event

CSV_HEADER = b"device_id;client_id;created_at;license_id;image_frame;prob;tags\r\n"
LOW_PROB_TAG = "low_prob"
LONG_CHARS = 1000  # a longer frame is not copied into its row; it stays a separate part


def count_rows(body: bytes) -> int:
    """Return the number of rows of the event in `body`. It is exact for normal form, where quotes are escaped."""
    return body.count(b'"prob":') or body.count(b'"prob"')


def csv_rows(body: bytes, low_prob_threshold: float) -> tuple[list[str], int]:
    """Return the CSV rows of the event in `body`, one for each prediction, and their number. Raise InvalidEvent.

    The rows come in parts to be joined: a caller that joins those of a whole batch copies an image once. They are what
    `csv.writer(delimiter=";")` writes. `tags` is itself a CSV record (delimiter ","), with `low_prob` appended when
    `prob < low_prob_threshold`. csv.writer, which examines each character, costs twice as much for a short row and 13
    times as much for a 20 KB frame.
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
    """Do `csv_rows` for a document in normal form (unknown members aside) with nothing to quote; else return None."""
    try:
        data = document["data"]
        device_id, client_id, created_at = document["device_id"], document["client_id"], document["created_at"]
        license_id, preds = data["license_id"], data["preds"]
        if not (str is type(device_id) is type(client_id) is type(created_at) is type(license_id)):
            return None
        if type(preds) is not list:
            return None
        prefix = f"{device_id};{client_id};{created_at};{license_id};"
        if len(prefix) * len(preds) > MAX_ID_CHARS:
            return None
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
    # One search through all cells at once costs less than one for each cell.
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
    """Quote a cell as csv.writer's QUOTE_MINIMAL does in Python 3.11 to 3.13 (except for a row of one empty cell)."""
    if delimiter in text or '"' in text or "\n" in text or "\r" in text:
        return '"' + text.replace('"', '""') + '"'
    return text


def _join_tags(tags: list[str]) -> str:
    return '""' if tags == [""] else ",".join([_quote(tag, ",") for tag in tags])
