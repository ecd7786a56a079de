"""What one publisher knows of its broker: whether it takes events, and whether its link should be left.

Pure: whoever calls gives the time, in seconds of a monotonic clock.
"""

from __future__ import annotations

import logging

from common.errors import Unavailable

log = logging.getLogger("predlog.producer")

STALL_SECONDS = 5.0  # after so long without a confirm, new events are refused and /readyz is 503
# Nacks without an ack between them end the link after this long. RabbitMQ 3.10 never again takes a message on a channel
# that met a full queue (overflow reject-publish) if the policy is then removed; a new channel works. If that one only
# nacks as well, the queue is full or has no leader (a node was cut off), and the next attempt waits twice as long.
NACKS_FIRST_SECONDS, NACKS_MOST_SECONDS = 2.0, 30.0
_NACKED = "the broker refuses every event (nack): the queue is full, limited by a policy, or has no leader"


class BrokerHealth:
    """The state of the broker as its confirms show it.

    `trouble` is why no event can be accepted now, or None. `partition` is None for the only queue; otherwise trouble
    with the queue is reported as that of one partition.
    """

    def __init__(self, confirm_timeout_seconds: float, partition: int | None) -> None:
        self.trouble: Unavailable | None
        self.blocked = ""  # the broker's reason while it reads nothing that is published
        self.stalled = ""  # the reason, while published events are not confirmed
        self._confirm_timeout = confirm_timeout_seconds
        self._is_partition = partition is not None
        self._log_prefix = "" if partition is None else f"partition {partition}: "
        self._closed = False
        self._down = "not connected yet"  # the reason, while there is no link
        self._progress_at = 0.0  # of the last ack, or of the start of the link
        self._nacked_since: float | None = None  # time of the first nack after the last ack
        self._nacks_seconds = NACKS_FIRST_SECONDS
        self._judge()

    def up(self, now: float) -> None:
        """Note that a link is up."""
        self._down, self._progress_at = "", now
        self._judge()

    def down(self, reason: str, now: float) -> None:
        """Note why there is no link."""
        if self._only_nacks(now):
            self._nacks_seconds = min(2 * self._nacks_seconds, NACKS_MOST_SECONDS)
        self._down, self.blocked, self.stalled, self._nacked_since = reason, "", "", None
        self._judge()

    def close(self) -> None:
        """Note that the process stops, and accepts no event any more."""
        self._closed = True
        self._judge()

    def block(self, reason: str, now: float) -> None:
        """Note why the broker reads nothing that is published; "" when it reads again."""
        self.blocked, self._progress_at = reason, now
        if reason:
            log.warning("%sthe broker takes no messages: %s", self._log_prefix, reason)
        else:
            log.info("%sthe broker takes messages again", self._log_prefix)
        self._judge()

    def ack(self, now: float) -> None:
        """Note an ack."""
        self._progress_at, self._nacked_since, self._nacks_seconds = now, None, NACKS_FIRST_SECONDS
        if self.stalled:
            log.info("%sthe broker confirms events again", self._log_prefix)
            self.stalled = ""
            self._judge()

    def nack(self, now: float) -> None:
        """Note a nack that came without an ack."""
        if self._nacked_since is None:
            self._nacked_since = now
            if self._nacks_seconds > NACKS_FIRST_SECONDS:  # the last link had only nacks too
                self._stall(_NACKED)

    def wait(self, since: float, now: float) -> None:
        """Note that an event that was sent at `since` has no confirm yet."""
        if not self.blocked and now - max(since, self._progress_at) >= STALL_SECONDS:
            self._stall(f"the broker has confirmed nothing for {STALL_SECONDS:g} s")

    def reason_to_leave(self, since: float | None, now: float) -> str:
        """Return why another link should be tried, or "". `since` is when the oldest event without a confirm was sent.

        A new link may reach a live broker.
        """
        if self.blocked:
            return ""
        if since is not None and now - max(since, self._progress_at) >= self._confirm_timeout:
            return f"no confirm for {self._confirm_timeout:g} s"
        return _NACKED if self._only_nacks(now) else ""

    def _only_nacks(self, now: float) -> bool:
        return self._nacked_since is not None and now - self._nacked_since >= self._nacks_seconds

    def _stall(self, reason: str) -> None:
        if not self.stalled:
            log.warning("%s%s; new events are refused", self._log_prefix, reason)
        self.stalled = reason
        self._judge()

    def _judge(self) -> None:
        """Update `trouble`. Call it after any change of what it depends on."""
        self.trouble = self._find_trouble()

    def _find_trouble(self) -> Unavailable | None:
        if self._closed:
            return Unavailable("shutting_down", "the server is shutting down")
        if self._down:
            reason, public, why = "broker_away", "the broker is away", f"no broker: {self._down}"
        elif self.blocked:
            return Unavailable("broker_blocked", f"the broker takes no messages now ({self.blocked})")
        elif self.stalled:
            reason, public, why = "stalled", "the broker confirms no events", self.stalled
        else:
            return None
        if self._is_partition:
            return Unavailable("partition_down", "the partition of this device is down", why)
        return Unavailable(reason, public, why)
