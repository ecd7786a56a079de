"""The preparation of a batch for the store: decoding, deduplication, rows. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.amqp.codec import Delivery, FrameError
from common.amqp.properties import message_id_of
from common.errors import InvalidEvent
from common.event.faults import describe_faults, is_not_json
from common.event.ids import id_digest
from common.event.rows import csv_rows

POISON_KINDS = ("not_json", "not_an_event")


class Poison(NamedTuple):
    """A message that can never become rows."""

    delivery: Delivery
    kind: str  # for metrics: one of POISON_KINDS
    reason: str  # for a person


class Prepared(NamedTuple):
    """A batch made ready for the store."""

    data: bytes  # whole CSV rows
    rows: int
    ids: list[bytes]  # of the messages in `data`, 16 bytes each
    stored: list[int]  # delivery tags to ack once `data` is safe, ascending, duplicates included
    duplicates: int
    poison: list[Poison]


def prepare_batch(deliveries: Sequence[Delivery], seen: Callable[[bytes], bool], low_prob_threshold: float) -> Prepared:
    """Decode a batch, drop what is stored already, encode the rest. A message gives all of its rows or none."""
    parts, stored, poison, fresh = list[str](), [], [], dict[bytes, None]()
    duplicates = rows = 0
    for delivery in deliveries:
        try:
            message_id = message_id_of(delivery.header)
            texts, count = csv_rows(delivery.body, low_prob_threshold)
        except InvalidEvent as error:
            kind = "not_json" if is_not_json(error.faults) else "not_an_event"
            poison.append(Poison(delivery, kind, describe_faults(error.faults)))
            continue
        except FrameError as error:
            poison.append(Poison(delivery, "not_an_event", str(error)))
            continue
        if message_id is not None:
            digest = id_digest(message_id)
            if digest in fresh or seen(digest):
                duplicates += 1
                stored.append(delivery.delivery_tag)
                continue
            fresh[digest] = None
        parts += texts
        rows += count
        stored.append(delivery.delivery_tag)
    return Prepared("".join(parts).encode(), rows, list(fresh), stored, duplicates, poison)
