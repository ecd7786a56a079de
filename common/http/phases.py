"""The phases of a connection: what each waits for, for how long, and which may follow. Pure.

    IDLE ─────> HEAD ─────> BODY ─────> ANSWERING ─────> LAST ─────> LINGERING ─────> CLOSING ─────> CLOSED
     ^  bytes        head         body      |   closing         answer          client          all
     |                                      |   request         written         done            sent
     +──────────────────────────────────────+
                 all answers written

A request that comes in one piece leads from IDLE to ANSWERING at once. With pipelining, further requests are read and
handled while an answer is due, but the phase stays ANSWERING, in which the client is not timed. Only ANSWERING leads
back, to IDLE, HEAD or BODY by what the parser holds.

The other direction is a separate machine with two states: the transport takes what is written, or the client does not
read it (`Connection.stuck`). While it is stuck nothing is read, and the time-out concerns the bytes that it takes.

Each phase has one time-out, and a connection has one deadline. The time-outs of IDLE and HEAD bound the whole phase.
The others bound the time without progress (`granted`).
"""

from __future__ import annotations

import math
from enum import IntEnum


class Phase(IntEnum):
    """The phases, in the order in which a connection passes through them."""

    IDLE = 0  # no part of a request has come, and no answer is due
    HEAD = 1  # part of a head has come
    BODY = 2  # a head has come and was checked; part of its body is missing
    ANSWERING = 3  # answers are due
    LAST = 4  # answers are due, and the connection ends with the last of them: nothing more is read
    LINGERING = 5  # the last answer is written; what the client still sends is read and dropped
    CLOSING = 6  # nothing is read; what was written is being sent
    CLOSED = 7


IDLE, HEAD, BODY, ANSWERING, LAST, LINGERING, CLOSING, CLOSED = Phase

NEXT: dict[Phase, frozenset[Phase]] = {
    IDLE: frozenset({HEAD, BODY, ANSWERING, LAST, CLOSING, CLOSED}),
    HEAD: frozenset({BODY, ANSWERING, LAST, CLOSING, CLOSED}),
    BODY: frozenset({ANSWERING, LAST, CLOSING, CLOSED}),
    ANSWERING: frozenset({IDLE, HEAD, BODY, ANSWERING, LAST, CLOSING, CLOSED}),
    LAST: frozenset({LINGERING, CLOSING, CLOSED}),
    LINGERING: frozenset({CLOSING, CLOSED}),
    CLOSING: frozenset({CLOSED}),
    CLOSED: frozenset(),
}

# The slowest rate of a client that is not cut off. GPRS carries 3 to 10 KB/s, LTE Cat M1 uplinks 40.
SLOWEST_BYTES_PER_SECOND = 16_000
# A client that was refused may be silent for this long before it is cut off, as with nginx's lingering_timeout.
LINGER_SECONDS = 5.0
# A stop waits this long for the next request of a connection that was just used, and for the rest of a request that has
# begun. nginx's keepalive_min_timeout serves the same purpose.
LAST_REQUEST_SECONDS = 1.0


def seconds_by_phase(
    head_seconds: float, body_seconds: float, idle_seconds: float, write_seconds: float, draining: bool
) -> tuple[float, ...]:
    """Return how long each phase may last, or last without progress, by the number of the phase."""
    seconds = [idle_seconds, head_seconds, body_seconds, math.inf, math.inf, LINGER_SECONDS, write_seconds, math.inf]
    if draining:
        for phase in (IDLE, HEAD, BODY, LINGERING):
            seconds[phase] = min(seconds[phase], LAST_REQUEST_SECONDS)
    return tuple(seconds)


def granted(deadline: float, progress_bytes: int, now: float, seconds: float) -> float:
    """Return the deadline after progress. Each byte adds its time at the slowest rate, up to `seconds` from now.

    So a client that sends or takes steadily is never cut off, and neither silence nor a trickle can last.
    """
    return min(deadline + progress_bytes / SLOWEST_BYTES_PER_SECOND, now + seconds)
