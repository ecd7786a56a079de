"""The publisher of one queue, which owns each event in flight until its confirm, nack or time-out.

Nothing here knows HTTP or sockets: a lane sends bytes, and a publication is told its outcome. Events in flight on a
lost link are held and published again on the next, with the same message_id. The consumer drops the duplicate.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from common.amqp.codec import Confirm, Delivery, Part, PublishEncoder, packed_seconds
from common.amqp.link import Link
from common.amqp.topology import QUEUE_ARGUMENTS, begin_publishing, declare
from common.amqp.window import ConfirmWindow
from common.errors import NotConfirmed, OutcomeUnknown, TooLarge, Unavailable

log = logging.getLogger("predlog.producer")

STALL_SECONDS = 5.0  # after so long without a confirm, new events are refused and /readyz is 503
# Nacks without an ack between them end the link after this long. RabbitMQ 3.10 never again takes a message on a channel
# that met a full queue (overflow reject-publish) if the policy is then removed; a new channel works. If that one only
# nacks as well, the queue is full or has no leader (a node was cut off), and the next attempt waits twice as long.
NACKS_FIRST_SECONDS, NACKS_MOST_SECONDS = 2.0, 30.0
# After a sweep this late, confirms may be unread in the socket: the process was late, not the broker.
LATE_SWEEP_SECONDS = 0.5

# The reason with which RabbitMQ 3.8 and later closes the channel (max_message_size).
_TOO_LARGE = re.compile(r"larger than configured max size (\d+)")
_DENIED = "ACCESS_REFUSED"
_NACKED = "the broker refuses every event (nack): the queue is full, limited by a policy, or has no leader"


class Lane(Protocol):
    """The part of a connection that the publisher uses."""

    congested: bool

    def send(self, parts: Iterable[Part]) -> None: ...
    def fail(self, reason: str) -> None: ...


class Publication(ABC):
    """An event in flight. Exactly one of the two methods is called, once."""

    __slots__ = ("body", "message_id", "sent_before", "since")

    body: bytes
    message_id: bytes
    # Set by the publisher:
    since: float  # when it was first sent
    sent_before: bool  # on a link that was lost

    @abstractmethod
    def confirmed(self, seconds: float) -> None:
        """Take note that the broker has the event on disk, `seconds` after it was first sent."""

    @abstractmethod
    def failed(self, error: NotConfirmed) -> None:
        """Take note that the event was not accepted, or that its outcome is unknown."""


class Publisher:
    """The publisher of one queue, and the listener of its link. `now` is a monotonic clock, `wall` the Unix time.

    `partition` is None for the only queue; otherwise trouble with the queue is reported as that of one partition.
    """

    def __init__(
        self,
        queue_name: str,
        max_unconfirmed: int,
        max_unconfirmed_bytes: int,
        confirm_timeout_seconds: float,
        now: Callable[[], float],
        wall: Callable[[], float],
        partition: int | None = None,
    ) -> None:
        self.unconfirmed_bytes = 0
        self.links_lost = 0
        self.max_unconfirmed_bytes = max_unconfirmed_bytes
        self.name = "producer" if partition is None else f"producer-{partition}"
        self.was_up = asyncio.Event()  # set once the first link is up
        self._queue_name = queue_name
        self._partition = partition
        self._log_prefix = "" if partition is None else f"partition {partition}: "
        self._max_unconfirmed = max_unconfirmed
        self._most_of_batches = -(-max_unconfirmed // 2)
        self._most_bytes_of_batches = -(-max_unconfirmed_bytes // 2)
        self._confirm_timeout = confirm_timeout_seconds
        self._now = now
        self._wall = wall
        self._window = ConfirmWindow[Publication](self._settle)
        self._sent = self._window.unconfirmed
        self._held: deque[Publication] = deque()  # of a lost link, oldest first
        self._waiting: deque[Callable[[], None]] = deque()  # batches that wait for room
        self._lane: Lane | None = None
        self._encoder: PublishEncoder
        self._down = "not connected yet"  # the reason, while there is no link
        self._blocked = ""  # the broker's reason while it reads nothing that is published
        self._is_blocked = asyncio.Event()
        self._stalled = ""  # the reason, while published events are not confirmed
        self._confirms_at = 0.0
        self._acked = self._nacked = False  # whether the confirms being settled had an ack, a nack
        self._progress_at = 0.0  # of the last ack, or of the start of the link
        self._nacked_since: float | None = None  # time of the first nack after the last ack
        self._nacks_seconds = NACKS_FIRST_SECONDS
        self._most_body_bytes = sys.maxsize  # that the broker takes, once it has said so
        self._swept_at = now()
        self._was_late = False
        self._stamp = packed_seconds(int(wall()))  # of the last sweep
        self._trouble: Unavailable | None
        self._judge()

    @property
    def unconfirmed(self) -> int:
        """Events in flight."""
        return len(self._sent) + len(self._held)

    @property
    def connected(self) -> bool:
        return self._lane is not None

    @property
    def is_blocked(self) -> bool:
        return bool(self._blocked)

    @property
    def is_stalled(self) -> bool:
        return bool(self._stalled)

    def trouble(self) -> Unavailable | None:
        """Return why no event can be accepted now; None if one can be, given room in the window."""
        return self._trouble

    def has_room_for_batch(self) -> bool:
        """Tell whether an event of a batch may be published now. Half of the window is kept for single events."""
        return (
            self._trouble is None
            and self._lane is not None
            and not self._lane.congested
            and len(self._sent) < self._most_of_batches
            and self.unconfirmed_bytes < self._most_bytes_of_batches
        )

    def call_when_there_is_room(self, resume: Callable[[], None]) -> None:
        """Call `resume` once, when a batch may have room, when there is trouble, or at the next sweep."""
        self._waiting.append(resume)

    def publish(self, event: Publication) -> None:
        """Send one event, which is then told its outcome. Raise Unavailable or TooLarge if nothing was sent."""
        lane, body_bytes = self._lane, len(event.body)
        if (
            self._trouble is not None
            or lane is None  # then there is trouble, too
            or lane.congested
            or body_bytes > self._most_body_bytes
            or self.unconfirmed_bytes >= self.max_unconfirmed_bytes
            or len(self._sent) >= self._max_unconfirmed  # nothing is held while there is a lane
        ):
            raise self._refusal(body_bytes)  # not in a local variable, which would keep the event alive in a cycle
        self.unconfirmed_bytes += body_bytes
        event.since, event.sent_before = self._now(), False
        lane.send(self._encoder.encode(event.body, event.message_id, self._stamp))
        self._window.add(event)

    def _refusal(self, body_bytes: int) -> NotConfirmed:
        if body_bytes > self._most_body_bytes:
            return TooLarge(self._most_body_bytes)
        return self._trouble or _window_full()

    def _judge(self) -> None:
        """Update `trouble`. Call it after any change of what it depends on."""
        self._trouble = self._find_trouble()

    def _find_trouble(self) -> Unavailable | None:
        if self._lane is not None and self._blocked:
            return Unavailable("broker_blocked", f"the broker takes no messages now ({self._blocked})")
        if self._lane is None:
            reason, public, why = "broker_away", "the broker is away", f"no broker: {self._down}"
        elif self._stalled:
            reason, public, why = "stalled", "the broker confirms no events", self._stalled
        else:
            return None
        if self._partition is None:
            return Unavailable(reason, public, why)
        return Unavailable("partition_down", "the partition of this device is down", why)

    # The link

    async def up(self, link: Link) -> None:
        """Declare the queue, and check that an event could be published."""
        self._blocked = ""
        self._is_blocked.clear()
        await declare(link.channel, self._queue_name, QUEUE_ARGUMENTS)
        await begin_publishing(link, self._is_blocked)
        self.link_up(link.lane, link.frame_max)

    def link_up(self, lane: Lane, frame_max: int) -> None:
        """Begin with a new channel, whose tags count from 1. Publish what is held again, before anything new."""
        self._lane = lane
        self._encoder = PublishEncoder(self._queue_name, frame_max)
        self._progress_at = self._now()
        held, self._held = self._held, deque()
        for event in held:
            event.sent_before = True
            lane.send(self._encoder.encode(event.body, event.message_id, self._stamp))
            self._window.add(event)
        self.was_up.set()
        self._judge()

    def down(self, reason: str) -> None:
        """Hold what is unconfirmed for the next channel.

        Fail what the broker closed the channel for, since it would close the next one too: an event that is too large,
        and every event if the user may not publish.
        """
        self.links_lost += self._lane is not None
        self._lane, self._down, self._stalled, self._nacked_since = None, reason, "", None
        self._held.extend(self._window.take())
        refusal = _TOO_LARGE.search(reason)
        self._most_body_bytes = int(refusal[1]) if refusal else sys.maxsize
        self._judge()
        if refusal or _DENIED in reason:
            held, self._held = self._held, deque()
            for event in held:
                if refusal and len(event.body) <= self._most_body_bytes:
                    self._held.append(event)
                elif refusal and not event.sent_before:
                    self._fail(event, TooLarge(self._most_body_bytes))
                else:
                    self._fail(event, OutcomeUnknown())
        self._resume_batches()

    def blocked(self, reason: str) -> None:
        """Refuse events while the broker reads none, during a memory or disk alarm."""
        self._blocked = reason
        if reason:
            self._is_blocked.set()
            log.warning("%sthe broker takes no messages: %s", self._log_prefix, reason)
        else:
            self._progress_at = self._now()
            log.info("%sthe broker takes messages again", self._log_prefix)
        self._judge()
        self._resume_batches()

    def deliveries(self, deliveries: list[Delivery]) -> None:
        """Ignore them: nothing is consumed on this link."""

    def confirms(self, confirms: Sequence[Confirm]) -> None:
        """Tell each event its outcome."""
        now = self._confirms_at = self._now()
        self._acked = self._nacked = False
        self._window.confirms(confirms)
        if self._acked:
            self._note_progress(now)
        elif self._nacked and self._nacked_since is None:
            self._nacked_since = now
            if self._nacks_seconds > NACKS_FIRST_SECONDS:  # the last link had only nacks too
                self._stall(_NACKED)
        if self._waiting:
            self._resume_batches()

    def _settle(self, event: Publication, ok: bool) -> None:
        if ok:
            self._acked = True
            self.unconfirmed_bytes -= len(event.body)
            event.confirmed(self._confirms_at - event.since)
            return
        self._nacked = True
        # Of an event that was sent before, the first copy may be stored.
        self._fail(
            event, OutcomeUnknown() if event.sent_before else Unavailable("nacked", "the broker refused the event")
        )

    def _note_progress(self, now: float) -> None:
        self._progress_at = now
        self._nacked_since = None
        self._nacks_seconds = NACKS_FIRST_SECONDS
        if self._stalled:
            log.info("%sthe broker confirms events again", self._log_prefix)
            self._stalled = ""
            self._judge()

    def _stall(self, reason: str) -> None:
        if not self._stalled:
            log.warning("%s%s; new events are refused", self._log_prefix, reason)
        self._stalled = reason
        self._judge()

    def _fail(self, event: Publication, error: NotConfirmed) -> None:
        self.unconfirmed_bytes -= len(event.body)
        event.failed(error)

    def _resume_batches(self) -> None:
        for _ in range(len(self._waiting)):
            if self._trouble is None and not self.has_room_for_batch():
                return
            self._waiting.popleft()()

    # Time, and the end

    def sweep(self) -> None:
        """Fail events that wait too long, and leave a link that does not confirm. Call it ten times a second."""
        now = self._now()
        # If every sweep is late, the time-outs must hold all the same.
        late = now - self._swept_at > LATE_SWEEP_SECONDS and not self._was_late
        self._swept_at, self._was_late = now, late
        self._stamp = packed_seconds(int(self._wall()))
        for _ in range(len(self._waiting)):
            self._waiting.popleft()()
        if late:
            return
        oldest = now - self._confirm_timeout
        while self._held and self._held[0].since <= oldest:
            self._fail(self._held.popleft(), OutcomeUnknown())
        expired = self._window.take_oldest_while(lambda event: event.since <= oldest)
        for event in expired:
            self._fail(event, OutcomeUnknown())
        if self._lane is None or self._blocked:
            return
        waiting = self._window.oldest()
        if expired and self._progress_at <= oldest:
            # Not one ack in all that time. A new link may reach a live broker.
            self._lane.fail(f"no confirm for {self._confirm_timeout:g} s")
        elif self._nacked_since is not None and now - self._nacked_since >= self._nacks_seconds:
            self._nacks_seconds = min(2 * self._nacks_seconds, NACKS_MOST_SECONDS)
            self._lane.fail(_NACKED)
        elif waiting is not None and now - max(self._progress_at, waiting.since) >= STALL_SECONDS:
            self._stall(f"the broker has confirmed nothing for {STALL_SECONDS:g} s")

    def fail_all(self) -> None:
        """Fail everything in flight with OutcomeUnknown, at the end of a drain that took too long."""
        for event in [*self._held, *self._window.take()]:
            self._fail(event, OutcomeUnknown())
        self._held.clear()


def _window_full() -> Unavailable:
    return Unavailable("window_full", "too many events wait for the broker's confirm")
