"""POST /process/batch: events published as the window has room, and one result for each. Independent of sockets."""

from __future__ import annotations

import time

from common.errors import InvalidEvent, NotConfirmed, Unavailable
from common.event.document import write_json
from common.event.schema import NormalEvent, normalise_batch
from common.http.coding import decoded
from common.http.exchange import Exchange
from common.http.turns import Job
from common.producer.intake import Intake
from common.producer.publisher import Publication, Publisher

_ACCEPTED: dict[str, object] = {"status": 200}  # one object for all events, which costs the garbage collector nothing
PARSED_FACTOR = 8  # the memory of a document of small values, compared with its JSON


class Batch:
    """One batch request. Its events are read and published in their order, and answered together."""

    def __init__(self, intake: Intake, exchange: Exchange, key: bytes | None, wait_seconds: float) -> None:
        self._intake = intake
        self._exchange = exchange
        self._key = key
        self._wait_until = time.monotonic() + wait_seconds
        self._results: list[dict[str, object] | None] = []  # in the order of the events; None while it is not known
        self._in_flight = 0
        self._all_read = False

    def steps(self, body: bytes, content_encoding: bytes | None, lines: bool, max_bytes: int, max_preds: int) -> Job:
        """Read the events and publish each once the window has room. Answer when the last has its outcome."""
        try:
            content = decoded(content_encoding, body, max_bytes)
            self._exchange.hold(PARSED_FACTOR * len(content))
            yield None
            for event in normalise_batch(content, lines, max_preds):
                if isinstance(event, InvalidEvent):
                    self._results.append({"status": 422, "detail": event.faults})
                elif event is not None:
                    position = len(self._results)
                    self._results.append(None)
                    publisher = self._intake.publisher_for(event)
                    while publisher.trouble() is None and not publisher.has_room_for_batch():
                        if time.monotonic() >= self._wait_until:
                            break
                        yield publisher.call_when_there_is_room
                    self._publish(position, event, publisher)
                yield None
        except InvalidEvent as error:
            self._exchange.answer(422, write_json({"detail": error.faults}))
        else:
            self._all_read = True
            self._answer_when_done()

    def _publish(self, position: int, event: NormalEvent, publisher: Publisher) -> None:
        # No client's key has a NUL, so this key is that of no other request.
        key = None if self._key is None else b"%b\x00%d" % (self._key, position)
        try:
            if publisher.trouble() is None and not publisher.has_room_for_batch():
                raise Unavailable("window_full", "too many events wait for the broker's confirm")
            publisher.publish(_BatchEvent(event, self._intake.message_id(event, key), self, position))
        except NotConfirmed as error:
            self._refuse(position, error)
        else:
            self._in_flight += 1

    def confirmed(self, position: int, event: NormalEvent, seconds: float) -> None:
        """Note that an event is on the broker's disk."""
        self._intake.count(event, seconds)
        self._results[position] = _ACCEPTED
        self._in_flight -= 1
        self._answer_when_done()

    def failed(self, position: int, error: NotConfirmed) -> None:
        """Note that a published event was not accepted, or that its outcome is unknown."""
        self._refuse(position, error)
        self._in_flight -= 1
        self._answer_when_done()

    def _refuse(self, position: int, error: NotConfirmed) -> None:
        refusal = self._intake.as_http(error)
        self._results[position] = {"status": refusal.status, "detail": refusal.detail}

    def _answer_when_done(self) -> None:
        if self._all_read and not self._in_flight:
            accepted = sum(result is _ACCEPTED for result in self._results)
            status = 200 if accepted == len(self._results) else 207
            self._exchange.answer(status, write_json({"accepted": accepted, "results": self._results}))


class _BatchEvent(Publication):
    """One event of a batch."""

    __slots__ = ("_batch", "_event", "_position")

    def __init__(self, event: NormalEvent, message_id: bytes, batch: Batch, position: int) -> None:
        self.body = event.body
        self.message_id = message_id
        self._event = event
        self._batch = batch
        self._position = position

    def confirmed(self, seconds: float) -> None:
        self._batch.confirmed(self._position, self._event, seconds)

    def failed(self, error: NotConfirmed) -> None:
        self._batch.failed(self._position, error)
