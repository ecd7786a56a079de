"""The preparation of a batch for the store: decoding, deduplication, rows. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import NamedTuple

from common.amqp.codec import NDJSON, Delivery, FrameError
from common.amqp.properties import content_type_of, message_id_of
from common.errors import InvalidEvent
from common.event.faults import describe_faults, is_not_json
from common.event.ids import id_digest, line_id
from common.event.rows import csv_rows

POISON_KINDS = ("not_json", "not_an_event")
SMALL_BYTES = 1024  # of a message whose rows cannot be large
FULL_CHARS = 32 * 1024 * 1024  # of rows: no message is added beyond this, since a batch is in memory several times

# An event as it came: the number of its line, its bytes, its id. The number is 0 in a message with one event.
Item = tuple[int, bytes, bytes | None]


class Poison(NamedTuple):
    """A message that can never become rows, or one line of it."""

    kind: str  # for metrics: one of POISON_KINDS
    why: str  # for a person
    id: bytes | None  # of the event; None if the publisher set none
    line: int  # in the message, from 1; 0 for the whole message
    header: bytes  # the payload of the message's content header; empty after the first bad line of a message
    body: bytes


class Prepared(NamedTuple):
    """A batch made ready for the store."""

    data: bytes  # whole CSV rows
    rows: int
    ids: list[bytes]  # of the events in `data`, 16 bytes each
    duplicates: int  # events
    poison: list[Poison]
    most_events: int  # in one message
    messages: int  # that it is made of


def prepare_batch(deliveries: Sequence[Delivery], seen: Callable[[bytes], bool], low_prob_threshold: float) -> Prepared:
    """Prepare `deliveries`, or the first if the rows of all are too large. An event gives all of its rows or none."""
    parts, poison, fresh = list[str](), list[Poison](), dict[bytes, None]()
    duplicates = rows = most_events = messages = chars = 0
    for _, _, header, whole in deliveries:
        if chars > FULL_CHARS:
            break
        messages += 1
        first_part = len(parts)
        try:
            if content_type_of(header) == NDJSON:
                items: Iterable[Item] = ndjson_items(whole)
            else:
                items = ((0, whole, message_id_of(header)),)
        except FrameError as error:
            poison.append(Poison("not_an_event", str(error), None, 0, header, whole))
            continue
        events = 0
        for line, body, event_id in items:
            events += 1
            try:
                texts, count = csv_rows(body, low_prob_threshold)
            except InvalidEvent as error:
                kind = "not_json" if is_not_json(error.faults) else "not_an_event"
                poison.append(Poison(kind, describe_faults(error.faults), event_id, line, header, body))
                header = b""
                continue
            if event_id is not None:
                digest = id_digest(event_id)
                if digest in fresh or seen(digest):
                    duplicates += 1
                    continue
                fresh[digest] = None
            parts += texts
            rows += count
        if events > most_events:
            most_events = events
        if len(whole) > SMALL_BYTES:
            chars += sum(map(len, parts[first_part:]))
    return Prepared("".join(parts).encode(), rows, list(fresh), duplicates, poison, most_events, messages)


def ndjson_items(body: bytes) -> Iterator[Item]:
    """Yield the lines of NDJSON that are not blank, without their line ends."""
    for number, line in enumerate(BytesIO(body), 1):
        text = line.rstrip(b"\r\n")
        if text and not text.isspace():
            yield number, text, line_id(text)
