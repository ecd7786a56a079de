"""The unconfirmed window: every event under way to the broker, until its confirm, nack, or time-out.

Nothing here knows HTTP or sockets: a lane sends bytes, a publication hears its outcome. Events that were sent when the
link went down are held and published again, with the same message_id, on the next; the consumer drops the duplicate.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Protocol, cast

from common.amqp.codec import Confirm, PublishEncoder, packed_seconds
from common.errors import HttpError, Unavailable

# What RabbitMQ (3.8 and later: max_message_size) closes the channel with.
_TOO_LARGE = re.compile(r"larger than configured max size (\d+)")


class Lane(Protocol):
    """What the publisher needs of a connection."""

    congested: bool

    def send(self, parts: Iterable[bytes]) -> None: ...
    def fail(self, reason: str) -> None: ...


class Publication(ABC):
    """An event under way, and who hears of its outcome: exactly one of the two methods is called, once."""

    __slots__ = ("body", "message_id", "sent_before", "since")

    body: bytes
    message_id: bytes
    # The publisher's own:
    since: float  # when it was first sent
    sent_before: bool  # on a link that was lost

    @abstractmethod
    def confirmed(self, seconds: float) -> None: ...

    @abstractmethod
    def failed(self, error: HttpError | Unavailable) -> None: ...


class Publisher:
    """Publishes to one queue. `now` is a monotonic clock, `wall` the time of day, both in seconds."""

    def __init__(
        self,
        queue_name: str,
        max_unconfirmed: int,
        max_unconfirmed_bytes: int,
        confirm_timeout_seconds: float,
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.unconfirmed_bytes = 0
        self.blocked = ""  # the broker's reason while it takes no messages
        self.down: str | None = "not connected yet"  # why there is no link
        self.draining = False
        self._queue_name = queue_name
        self._max_unconfirmed = max_unconfirmed
        self._max_unconfirmed_bytes = max_unconfirmed_bytes
        self._confirm_timeout = confirm_timeout_seconds
        self._now = now
        self._wall = wall
        self._lane: Lane | None = None
        self._encoder: PublishEncoder
        # By delivery tag, which a channel counts up from 1: the order of the dict is the order of sending and of age.
        self._sent: dict[int, Publication] = {}
        self._held: deque[Publication] = deque()  # of a lost link, oldest first
        self._next_tag = 1
        self._confirmed_at = 0.0
        self._most_body_bytes = sys.maxsize  # that the broker takes, as far as it has said so
        self._stamp = packed_seconds(int(wall()))  # as new as the last sweep

    @property
    def unconfirmed(self) -> int:
        """Events under way."""
        return len(self._sent) + len(self._held)

    def trouble(self) -> Unavailable | None:
        """Why no event could be accepted now; None if one could."""
        if self.draining:
            return Unavailable("draining", "the server is shutting down")
        if self._lane is None:
            return Unavailable("broker_away", f"no broker: {self.down}")
        if self.blocked:
            return Unavailable("broker_blocked", f"the broker takes no messages now ({self.blocked})")
        if (
            self._lane.congested
            or self.unconfirmed_bytes >= self._max_unconfirmed_bytes
            or self.unconfirmed >= self._max_unconfirmed
        ):
            return Unavailable("window_full", "too many events wait for the broker's confirm")
        return None

    def publish(self, event: Publication) -> None:
        """Send one event; it hears the outcome. Raises Unavailable or HttpError, and then has sent nothing."""
        lane, body_bytes = self._lane, len(event.body)
        if body_bytes > self._most_body_bytes:
            raise self._too_large()
        if (
            lane is None
            or self.blocked
            or self.draining
            or lane.congested
            or self.unconfirmed_bytes >= self._max_unconfirmed_bytes
            or len(self._sent) + len(self._held) >= self._max_unconfirmed
        ):
            raise cast(Unavailable, self.trouble())  # no variable of this frame: it would hold the event in a cycle
        self.unconfirmed_bytes += body_bytes
        event.since, event.sent_before = self._now(), False
        self._send(lane, event)

    def _send(self, lane: Lane, event: Publication) -> None:
        lane.send(self._encoder.encode(event.body, event.message_id, self._stamp))
        self._sent[self._next_tag] = event
        self._next_tag += 1

    # What the broker says

    def link_up(self, lane: Lane, frame_max: int) -> None:
        """A new channel: its tags begin at 1, and what is held goes out again first."""
        self._lane, self.down, self.blocked = lane, None, ""
        self._encoder = PublishEncoder(self._queue_name, frame_max)
        self._next_tag = 1
        self._confirmed_at = self._now()
        held, self._held = self._held, deque()
        for event in held:
            event.sent_before = True
            self._send(lane, event)

    def link_down(self, reason: str) -> None:
        """The channel is gone, and with it what it would have confirmed: hold it for the next one.

        But not an event that the broker closed the channel for: it would close the next one, too.
        """
        self._lane, self.down, self.blocked = None, reason, ""
        self._held.extend(self._sent.values())
        self._sent = {}
        refusal = _TOO_LARGE.search(reason)
        self._most_body_bytes = int(refusal[1]) if refusal else sys.maxsize
        if refusal:
            held, self._held = self._held, deque()
            for event in held:
                if len(event.body) <= self._most_body_bytes:
                    self._held.append(event)
                    continue
                self.unconfirmed_bytes -= len(event.body)
                event.failed(_unknown() if event.sent_before else self._too_large())

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the broker takes no event longer than {self._most_body_bytes} bytes")

    def confirms(self, confirms: Sequence[Confirm]) -> None:
        """Match confirms, in any order; `multiple` covers every tag not yet confirmed up to its own."""
        now = self._confirmed_at = self._now()
        sent = self._sent
        for tag, multiple, ok in confirms:
            if multiple:
                for lower in list(takewhile(tag.__gt__, sent)):
                    self._settle(sent.pop(lower), ok, now)
            event = sent.pop(tag, None)
            if event is not None:
                self._settle(event, ok, now)

    def _settle(self, event: Publication, ok: bool, now: float) -> None:
        self.unconfirmed_bytes -= len(event.body)
        if ok:
            event.confirmed(now - event.since)
        elif event.sent_before:  # what became of the first copy is not known
            event.failed(_unknown())
        else:
            event.failed(Unavailable("nacked", "the broker could not take the event"))

    # Time

    def sweep(self) -> None:
        """Give up on what waits too long; call it a few times a second."""
        self._stamp = packed_seconds(int(self._wall()))
        oldest = self._now() - self._confirm_timeout
        while self._held and self._held[0].since <= oldest:
            self._expire(self._held.popleft())
        expired = list(takewhile(lambda tag: self._sent[tag].since <= oldest, self._sent))
        for tag in expired:
            self._expire(self._sent.pop(tag))
        if expired and self._confirmed_at <= oldest and self._lane is not None and not self.blocked:
            # Not one confirm in all that time: this link is of no use. A new one may reach a live broker.
            self._lane.fail(f"no confirm for {self._confirm_timeout:g} s")

    def _expire(self, event: Publication) -> None:
        self.unconfirmed_bytes -= len(event.body)
        event.failed(_unknown())

    def fail_all(self) -> None:
        """The end of a drain that took too long: everything under way gets its 504."""
        events = [*self._held, *self._sent.values()]
        self._held.clear()
        self._sent.clear()
        for event in events:
            self._expire(event)


def _unknown() -> HttpError:
    return HttpError(
        504,
        "no confirm from the broker in time: the event may or may not be stored; "
        "a retry with the same Idempotency-Key is safe",
    )
