"""Events on their way to the broker, single ones and batches: id, partition, metrics, outcome. It knows no sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from random import randint

from common.errors import HttpError, InvalidEvent, NotConfirmed, OutcomeUnknown, TooLarge, Unavailable
from common.event.document import write_json
from common.event.ids import keyed_message_id, partition_of
from common.event.schema import NormalEvent, normalise_batch
from common.http.exchange import Exchange
from common.http.turns import Job
from common.producer.metrics import Counters
from common.producer.publisher import Publication, Publisher

_ACCEPTED: dict[str, object] = {"status": 200}  # one object for all events, which costs the garbage collector nothing
PARSED_FACTOR = 8  # the memory of a document of small values, compared with its JSON


class Intake:
    """The publishers, one for each partition, and the metrics of what they publish."""

    def __init__(self, publishers: Sequence[Publisher], counters: Counters) -> None:
        self._publishers = publishers
        self._only_publisher = publishers[0] if len(publishers) == 1 else None
        self._counters = counters
        self._uuids = random_uuids()

    def publisher_for(self, event: NormalEvent) -> Publisher:
        """Return the publisher of the event's partition."""
        return self._only_publisher or self._publishers[partition_of(event.device_id, len(self._publishers))]

    def message_id(self, event: NormalEvent, key: bytes | None) -> bytes:
        """Return the message id of an event, 32 hex digits: with a key the same at every retry, else random."""
        return next(self._uuids) if key is None else keyed_message_id(key, event.body)

    def publish(self, event: NormalEvent, key: bytes | None, exchange: Exchange) -> None:
        """Publish the event of a POST /process, and answer it with its outcome."""
        try:
            self.publisher_for(event).publish(_Post(event, self.message_id(event, key), self, exchange))
        except NotConfirmed as error:
            # The traceback's frames hold the event and the error: a cycle that would keep both until a collection.
            error.__traceback__ = None
            exchange.fail(self.as_http(error))

    def as_http(self, error: NotConfirmed) -> HttpError:
        """Return the answer for an event that was not confirmed; count a refusal by its reason."""
        if isinstance(error, Unavailable):
            self._counters.metrics.values[self._counters.refusals[error.reason]] += 1.0
            return HttpError(503, str(error), retry_after(error.reason == "broker_away"))
        assert isinstance(error, TooLarge | OutcomeUnknown)
        return HttpError(413 if isinstance(error, TooLarge) else 504, str(error))


class _Post(Publication):
    """The event of a POST /process."""

    __slots__ = ("_exchange", "_intake")

    def __init__(self, event: NormalEvent, message_id: bytes, intake: Intake, exchange: Exchange) -> None:
        self.body, _, self.rows = event
        self.message_id = message_id
        self._intake = intake
        self._exchange = exchange

    def confirmed(self) -> None:
        self._exchange.answer(200, self.body)

    def failed(self, error: NotConfirmed) -> None:
        self._exchange.fail(self._intake.as_http(error))


class Batch:
    """A POST /process/batch. Its events are read and published in their order, and answered together."""

    def __init__(self, intake: Intake, exchange: Exchange, key: bytes | None, wait_seconds: float) -> None:
        self._intake = intake
        self._exchange = exchange
        self._key = key
        self._wait_until = time.monotonic() + wait_seconds
        self._results: list[dict[str, object] | None] = []  # in the order of the events; None while it is not known
        self._open = 1  # events without a result, and 1 until all are read

    def steps(self, content: bytes, lines: bool, max_preds: int) -> Job:
        """Publish each event once the window has room; answer when the last has its outcome. Raise InvalidEvent."""
        for event in normalise_batch(content, lines, max_preds):
            if isinstance(event, InvalidEvent):
                self._results.append({"status": 422, "detail": event.faults})
            elif event is not None:
                publisher = self._intake.publisher_for(event)
                while _is_full(publisher) and time.monotonic() < self._wait_until:
                    yield publisher.call_when_there_is_room
                self._publish(event, publisher)
            yield None
        self.settle_one()

    def _publish(self, event: NormalEvent, publisher: Publisher) -> None:
        position = len(self._results)
        # No client's key has a NUL, so no other request has this key.
        key = None if self._key is None else b"%b\x00%d" % (self._key, position)
        published = _BatchEvent(event, self._intake.message_id(event, key), self._intake, self, position)
        self._results.append(None)
        self._open += 1
        try:
            if _is_full(publisher):
                raise Unavailable("window_full", "too many events wait for the broker's confirm")
            publisher.publish(published)
        except NotConfirmed as error:
            published.failed(error)

    def settle(self, position: int, result: dict[str, object]) -> None:
        """Note the result of one event."""
        self._results[position] = result
        self.settle_one()

    def settle_one(self) -> None:
        """Note that one event fewer is open, or that the last was read. Answer when nothing is open any more."""
        self._open -= 1
        if not self._open:
            accepted = sum(result is _ACCEPTED for result in self._results)
            status = 200 if accepted == len(self._results) else 207
            self._exchange.answer(status, write_json({"accepted": accepted, "results": self._results}))


def _is_full(publisher: Publisher) -> bool:
    return publisher.health.trouble is None and not publisher.has_room_for_batch()


class _BatchEvent(Publication):
    """One event of a batch."""

    __slots__ = ("_batch", "_intake", "_position")

    def __init__(self, event: NormalEvent, message_id: bytes, intake: Intake, batch: Batch, position: int) -> None:
        self.body, _, self.rows = event
        self.message_id = message_id
        self._intake = intake
        self._batch = batch
        self._position = position

    def confirmed(self) -> None:
        self._batch.settle(self._position, _ACCEPTED)

    def failed(self, error: NotConfirmed) -> None:
        refusal = self._intake.as_http(error)
        self._batch.settle(self._position, {"status": refusal.status, "detail": refusal.detail})


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
