"""The publisher of one queue, which owns each event in flight until its confirm, nack or time-out.

Independent of HTTP and sockets: a lane sends bytes, and a publication receives its outcome. The events of one turn of
the event loop go out together, several in one message. Events in flight on a lost link are published again on the next,
with the same ids. The consumer drops the duplicate.
"""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from common.amqp.codec import NDJSON, Confirm, Part, PublishEncoder, packed_seconds
from common.amqp.link import Link, LinkListener
from common.amqp.topology import QUEUE_ARGUMENTS, begin_publishing, declare
from common.amqp.window import ConfirmWindow
from common.errors import NotConfirmed, OutcomeUnknown, TooLarge, Unavailable
from common.event.ids import ID_END, LINE_START
from common.producer.broker_health import BrokerHealth
from common.producer.metrics import Counters

# After a sweep this late, confirms may be unread in the socket: the process was late, not the broker.
LATE_SWEEP_SECONDS = 0.5

GROUP_BYTES = 64 * 1024  # of the body of a message of several events, which is then one frame
_LINE_BYTES = len(LINE_START) + 32 + len(ID_END)  # that a line of such a message adds to its event

# The reason with which RabbitMQ 3.8 and later closes the channel (max_message_size).
_TOO_LARGE = re.compile(r"larger than configured max size (\d+)")
_DENIED = "ACCESS_REFUSED"


class Lane(Protocol):
    """The part of a connection that the publisher uses."""

    congested: bool

    def send(self, parts: Iterable[Part]) -> None: ...
    def fail(self, reason: str) -> None: ...


class Publication(ABC):
    """An event in flight. Exactly one of the two methods is called, once."""

    __slots__ = ("body", "message_id", "rows", "sent_before", "since")

    body: bytes
    message_id: bytes
    rows: int
    # Set by the publisher:
    since: float  # when it was first published
    sent_before: bool  # on a link that was lost

    @abstractmethod
    def confirmed(self) -> None:
        """Note that the broker has the event on disk."""

    @abstractmethod
    def failed(self, error: NotConfirmed) -> None:
        """Note that the event was not accepted, or that its outcome is unknown."""


@dataclass(frozen=True, slots=True)
class PublisherLimits:
    """The bounds of one publisher."""

    unconfirmed: int  # events
    unconfirmed_bytes: int
    confirm_timeout_seconds: float
    events_per_message: int


class _Channel:
    """What lives exactly as long as one channel: its lane, and the window of its delivery tags."""

    def __init__(self, lane: Lane, queue_name: str, frame_max: int, most_events: int, most_bytes: int) -> None:
        self.lane = lane
        self.window = ConfirmWindow[Sequence[Publication]]()  # of messages, each with its events
        self._encode_event = PublishEncoder(queue_name, frame_max).encode
        self._encode_group = PublishEncoder(queue_name, frame_max, NDJSON).encode
        self._most_events = most_events
        self._most_bytes = most_bytes

    def send(self, events: Sequence[Publication], stamp: bytes) -> None:
        """Publish `events` in as few messages as possible, with one write."""
        if len(events) == 1:  # the most frequent case, without a detour
            self.window.add(events)
            self.lane.send(self._encode_event(events[0].body, events[0].message_id, stamp))
            return
        parts: list[Part] = []
        group: list[Publication] = []
        room = self._most_bytes
        for event in events:
            line_bytes = len(event.body) + _LINE_BYTES
            room -= line_bytes
            if group and (room < 0 or len(group) == self._most_events):
                parts += self._message(group, stamp)
                group, room = [], self._most_bytes - line_bytes
            group.append(event)
        parts += self._message(group, stamp)
        self.lane.send(parts)

    def _message(self, events: Sequence[Publication], stamp: bytes) -> Sequence[Part]:
        self.window.add(events)
        if len(events) == 1:
            return self._encode_event(events[0].body, events[0].message_id, stamp)
        pieces: list[bytes] = []
        for event in events:
            pieces += (LINE_START, event.message_id, ID_END, event.body[1:], b"\n")
        return self._encode_group(b"".join(pieces), uuid.uuid4().hex.encode(), stamp)


class Publisher(LinkListener):
    """The publisher of one queue, and the listener of its link.

    `now` is a monotonic clock, `wall` the Unix time. `call_soon` calls a function at the end of the turn of the event
    loop. `partition` is None for the only queue.
    """

    def __init__(
        self,
        queue_name: str,
        limits: PublisherLimits,
        now: Callable[[], float],
        wall: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], object],
        counters: Counters,
        partition: int | None = None,
    ) -> None:
        self.limits = limits
        self.health = BrokerHealth(limits.confirm_timeout_seconds, partition)
        self.unconfirmed_bytes = 0
        self.name = "producer" if partition is None else f"producer-{partition}"
        self.was_up = asyncio.Event()  # set once the first link is up
        self._queue_name = queue_name
        self._now = now
        self._wall = wall
        self._call_soon = call_soon
        self._counters = counters
        self._is_blocked = asyncio.Event()
        self._channel: _Channel | None = None
        self._in_flight: dict[Publication, None] = {}  # a set in order, oldest first
        self._gathered: list[Publication] = []  # the last of them, which go out at the end of this turn
        self._waiting: deque[Callable[[], None]] = deque()  # batches that wait for room
        self._most_body_bytes = sys.maxsize  # that the broker takes, once it has said so
        self._swept_at = now()
        self._was_late = False
        self._stamp = packed_seconds(int(wall()))  # of the last sweep

    @property
    def unconfirmed(self) -> int:
        """Events in flight."""
        return len(self._in_flight)

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def has_room_for_batch(self) -> bool:
        """Return whether an event of a batch may be published now. Half of the window is kept for single events."""
        return (
            self.health.trouble is None
            and self._channel is not None
            and not self._channel.lane.congested
            and 2 * len(self._in_flight) < self.limits.unconfirmed
            and 2 * self.unconfirmed_bytes < self.limits.unconfirmed_bytes
        )

    def call_when_there_is_room(self, resume: Callable[[], None]) -> None:
        """Call `resume` once, when a batch may have room, when there is trouble, or at the next sweep."""
        self._waiting.append(resume)

    def publish(self, event: Publication) -> None:
        """Send one event at the end of the turn; its outcome comes later. Raise Unavailable or TooLarge if refused."""
        channel, limits, body_bytes = self._channel, self.limits, len(event.body)
        if (
            self.health.trouble is not None
            or channel is None  # then there is also trouble
            or channel.lane.congested
            or body_bytes > self._most_body_bytes
            or self.unconfirmed_bytes >= limits.unconfirmed_bytes
            or len(self._in_flight) >= limits.unconfirmed
        ):
            raise self._refusal(body_bytes)  # not in a local variable, which would keep the event alive in a cycle
        self._in_flight[event] = None
        self.unconfirmed_bytes += body_bytes
        event.since, event.sent_before = self._now(), False
        if not self._gathered:
            self._call_soon(self._send_gathered)
        self._gathered.append(event)

    def _refusal(self, body_bytes: int) -> NotConfirmed:
        if body_bytes > self._most_body_bytes:
            return TooLarge(self._most_body_bytes)
        return self.health.trouble or Unavailable("window_full", "too many events wait for the broker's confirm")

    def _send_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        if gathered and self._channel is not None:
            self._channel.send(gathered, self._stamp)

    # The link

    async def up(self, link: Link) -> None:
        """Declare the queue, and check that an event could be published."""
        await declare(link.channel, self._queue_name, QUEUE_ARGUMENTS)
        await begin_publishing(link, self._is_blocked)
        self.link_up(link.lane, link.frame_max)

    def link_up(self, lane: Lane, frame_max: int) -> None:
        """Begin with a new channel. Publish what is in flight again, before anything new."""
        group_bytes = min(GROUP_BYTES, frame_max - 8) if frame_max else GROUP_BYTES
        if self._most_body_bytes < group_bytes:
            group_bytes = 0
        self._channel = _Channel(lane, self._queue_name, frame_max, self.limits.events_per_message, group_bytes)
        self._gathered = list(self._in_flight)
        self._send_gathered()
        self.health.up(self._now())
        self.was_up.set()

    def down(self, reason: str) -> None:
        """Keep what is in flight for the next channel.

        Fail what the broker closed the channel for, since it would close the next one too: an event that is too large,
        and every event if the user may not publish.
        """
        in_flight = list(self._in_flight)
        sent = in_flight[: len(in_flight) - len(self._gathered)] if self._channel is not None else []
        self._counters.metrics.values[self._counters.reconnects] += self._channel is not None
        self._channel = None
        self._is_blocked.clear()
        self.health.down(reason)
        refusal = _TOO_LARGE.search(reason)
        self._most_body_bytes = int(refusal[1]) if refusal else sys.maxsize
        for event in in_flight:
            if _DENIED in reason:
                self._fail(event, OutcomeUnknown())
            elif len(event.body) > self._most_body_bytes:
                self._fail(event, OutcomeUnknown() if event.sent_before else TooLarge(self._most_body_bytes))
        for event in sent:
            event.sent_before = True
        self._resume_batches()

    def close(self) -> None:
        """Publish nothing from now on, and fail what is in flight: the end of a drain that took too long."""
        self.health.close()
        self._channel = None  # with its window: late confirms mean nothing
        for event in list(self._in_flight):
            self._fail(event, OutcomeUnknown())
        self._resume_batches()

    def blocked(self, reason: str) -> None:
        """Refuse events while the broker reads none, during a memory or disk alarm."""
        if reason:
            self._is_blocked.set()
        self.health.block(reason, self._now())
        self._resume_batches()

    def confirms(self, confirms: Sequence[Confirm]) -> None:
        """Tell each event its outcome."""
        if self._channel is None:
            return
        now, counters, nacked = self._now(), self._counters, False
        pop, observe = self._in_flight.pop, counters.confirm_seconds.observe
        acked = events = rows = acked_bytes = 0
        for group, ok in self._channel.window.settle(confirms):
            acked += ok
            nacked = nacked or not ok
            for event in group:
                if pop(event, True):  # it had timed out
                    continue
                event_bytes = len(event.body)
                self.unconfirmed_bytes -= event_bytes
                if ok:
                    events += 1
                    rows += event.rows
                    acked_bytes += event_bytes
                    observe(now - event.since)
                    event.confirmed()
                elif event.sent_before:  # the first copy may be stored
                    event.failed(OutcomeUnknown())
                else:
                    event.failed(Unavailable("nacked", "the broker refused the event"))
        if acked:
            values = counters.metrics.values
            values[counters.messages] += acked
            values[counters.events] += events
            values[counters.predictions] += rows
            values[counters.event_bytes] += acked_bytes
            self.health.ack(now)
        elif nacked:
            self.health.nack(now)
        self._resume_batches()

    def _fail(self, event: Publication, error: NotConfirmed) -> None:
        del self._in_flight[event]
        self.unconfirmed_bytes -= len(event.body)
        event.failed(error)

    def _resume_batches(self) -> None:
        for _ in range(len(self._waiting)):
            if self.health.trouble is None and not self.has_room_for_batch():
                return
            self._waiting.popleft()()

    # Time

    def sweep(self) -> None:
        """Fail events that wait too long, and leave a link that does not confirm. Call it ten times a second."""
        now = self._now()
        # The time-outs must hold even if every sweep is late.
        late = now - self._swept_at > LATE_SWEEP_SECONDS and not self._was_late
        self._swept_at, self._was_late = now, late
        self._stamp = packed_seconds(int(self._wall()))
        for _ in range(len(self._waiting)):
            self._waiting.popleft()()
        if late:
            return
        oldest = next(iter(self._in_flight), None)
        reason = self.health.judge(None if oldest is None else oldest.since, now)
        last = now - self.limits.confirm_timeout_seconds
        for event in list(takewhile(lambda event: event.since <= last, self._in_flight)):
            self._fail(event, OutcomeUnknown())
        if self._channel is not None:
            self._channel.window.forget_oldest_while(lambda events: events[-1] not in self._in_flight)
            if reason:
                self._channel.lane.fail(reason)
