"""What one publisher knows of its broker: whether it takes events, and whether its link should be left. Pure."""

from __future__ import annotations

import logging

from common.errors import Unavailable

log = logging.getLogger("predlog.producer")

STALL_SECONDS = 5.0  # after so long without a confirm, new events are refused and /readyz is 503
# Nacks without an ack between them end the link after this long. RabbitMQ 3.10 never again takes a message on a channel
# that met a full queue (overflow reject-publish) if the policy is then removed; a new channel works.
NACKS_SECONDS = 10.0
_NACKED = "the broker refuses every event (nack): the queue is full, limited by a policy, or has no leader"

# Reasons why no event can be accepted, each with the text for a client; the first that holds counts.
_TROUBLES = {
    "shutting_down": "the server is shutting down",
    "broker_away": "the broker is away",
    "broker_blocked": "the broker takes no messages now",
    "stalled": "the broker confirms no events",
}
_OF_ONE_PARTITION = ("broker_away", "stalled")


class BrokerHealth:
    """The state of the broker as its link and its confirms show it. `now` is the time of a monotonic clock, in seconds.

    `trouble` is why no event can be accepted now, or None. `partition` is None for the only queue; otherwise trouble
    with the queue is reported as that of one partition.
    """

    def __init__(self, confirm_timeout_seconds: float, partition: int | None) -> None:
        self.trouble: Unavailable | None
        self._confirm_timeout = confirm_timeout_seconds
        self._is_partition = partition is not None
        self._log_prefix = "" if partition is None else f"partition {partition}: "
        self._why = dict.fromkeys(_TROUBLES, "")  # for the log and /readyz; "" while the reason does not hold
        self._progress_at = 0.0  # of the last ack, or of the start of the link
        self._nacked_since: float | None = None  # time of the first nack after the last ack, on this link
        self._nacked_before = False  # the last link ended with nacks
        self._set(broker_away="no broker: not connected yet")

    @property
    def is_blocked(self) -> bool:
        return bool(self._why["broker_blocked"])

    @property
    def is_stalled(self) -> bool:
        return bool(self._why["stalled"])

    def up(self, now: float) -> None:
        """Note that a link is up."""
        self._progress_at = now
        self._set(broker_away="")

    def down(self, reason: str) -> None:
        """Note why there is no link."""
        self._nacked_before, self._nacked_since = self._nacked_since is not None, None
        self._set(broker_away=f"no broker: {reason}", broker_blocked="", stalled="")

    def close(self) -> None:
        """Note that the process stops, and accepts no more events."""
        self._set(shutting_down=_TROUBLES["shutting_down"])

    def block(self, reason: str, now: float) -> None:
        """Note why the broker reads nothing that is published; "" when it reads again."""
        self._progress_at = now
        if reason:
            log.warning("%sthe broker takes no messages: %s", self._log_prefix, reason)
        else:
            log.info("%sthe broker takes messages again", self._log_prefix)
        self._set(broker_blocked=reason and f"{_TROUBLES['broker_blocked']} ({reason})")

    def ack(self, now: float) -> None:
        """Note an ack."""
        self._progress_at, self._nacked_since, self._nacked_before = now, None, False
        if self._why["stalled"]:
            log.info("%sthe broker confirms events again", self._log_prefix)
            self._set(stalled="")

    def nack(self, now: float) -> None:
        """Note a nack that came without an ack."""
        if self._nacked_since is None:
            self._nacked_since = now
            if self._nacked_before:  # so a new link does not help
                self._stall(_NACKED)

    def judge(self, since: float | None, now: float) -> str:
        """Check the time-outs. Return why another link should be tried, which can reach a live broker, or "".

        `since` is when the oldest event without a confirm was sent.
        """
        if self.is_blocked:
            return ""
        if since is None and self.is_stalled and self._nacked_since is None:
            return self._why["stalled"]  # without an event in flight, only another link can end the stall
        silent_seconds = 0.0 if since is None else now - max(since, self._progress_at)
        if silent_seconds >= self._confirm_timeout:
            return f"no confirm for {self._confirm_timeout:g} s"
        if silent_seconds >= STALL_SECONDS:
            self._stall(f"the broker has confirmed nothing for {STALL_SECONDS:g} s")
        only_nacks = self._nacked_since is not None and now - self._nacked_since >= NACKS_SECONDS
        return _NACKED if only_nacks else ""

    def _stall(self, why: str) -> None:
        if not self.is_stalled:
            log.warning("%s%s; new events are refused", self._log_prefix, why)
        self._set(stalled=why)

    def _set(self, **why: str) -> None:
        """Note that reasons hold, or no longer hold, and find the one that counts."""
        self._why |= why
        reason = next(filter(self._why.get, _TROUBLES), None)
        if reason is None:
            self.trouble = None
        elif self._is_partition and reason in _OF_ONE_PARTITION:
            self.trouble = Unavailable("partition_down", "the partition of this device is down", self._why[reason])
        else:
            public = self._why[reason] if reason == "broker_blocked" else _TROUBLES[reason]
            self.trouble = Unavailable(reason, public, self._why[reason])
