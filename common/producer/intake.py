"""The way of a valid event to the broker: its id, its partition, its metrics, and its outcome in HTTP.

Shared by single events (api.py) and batches (batch.py). Independent of sockets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from random import randint

from common.errors import HttpError, NotConfirmed, OutcomeUnknown, TooLarge, Unavailable
from common.event.ids import keyed_message_id, partition_of
from common.event.schema import NormalEvent
from common.producer.metrics import Counters
from common.producer.publisher import Publisher


class Intake:
    """The publishers, one for each partition, and the metrics of what they publish."""

    def __init__(self, publishers: Sequence[Publisher], counters: Counters) -> None:
        self._publishers = publishers
        self._counters = counters
        self._uuids = random_uuids()

    def publisher_for(self, event: NormalEvent) -> Publisher:
        """Return the publisher of the event's partition."""
        return self._publishers[partition_of(event.device_id, len(self._publishers))]

    def message_id(self, event: NormalEvent, key: bytes | None) -> bytes:
        """Return the message id of an event, 32 hex digits: with a key the same at every retry, else random."""
        return next(self._uuids) if key is None else keyed_message_id(key, event.body)

    def count(self, event: NormalEvent, seconds: float) -> None:
        """Count an event that was confirmed `seconds` after it was sent."""
        counters = self._counters
        values = counters.metrics.values
        values[counters.events] += 1.0
        values[counters.predictions] += event.rows
        values[counters.event_bytes] += len(event.body)
        counters.confirm_seconds.observe(seconds)

    def as_http(self, error: NotConfirmed) -> HttpError:
        """Return the answer for an event that was not confirmed; count a refusal by its reason."""
        if isinstance(error, Unavailable):
            self._counters.metrics.values[self._counters.refusals[error.reason]] += 1.0
            return HttpError(503, str(error), retry_after(error.reason == "broker_away"))
        if isinstance(error, TooLarge):
            return HttpError(413, str(error))
        assert isinstance(error, OutcomeUnknown)
        return HttpError(504, str(error))


def retry_after(broker_away: bool = False) -> tuple[tuple[str, str]]:
    """Return the Retry-After field of a 503. It varies, so that the devices do not all come back in the same second."""
    return (("Retry-After", str(randint(5, 15) if broker_away else randint(1, 5))),)


def random_uuids() -> Iterator[bytes]:
    """Yield version 4 UUIDs as 32 hex digits (RFC 9562 section 5.4), made 256 at a time."""
    while True:
        block = bytearray(os.urandom(16 * 256))
        block[6::16] = block[6::16].translate(_VERSION_4)
        block[8::16] = block[8::16].translate(_VARIANT)
        digits = block.hex().encode()
        for at in range(0, len(digits), 32):
            yield digits[at : at + 32]


_VERSION_4 = bytes(byte & 0x0F | 0x40 for byte in range(256))
_VARIANT = bytes(byte & 0x3F | 0x80 for byte in range(256))
