"""The phases of a connection: what it waits for, for how long, and what may follow. Pure.

    IDLE ─────> HEAD ─────> BODY ─────> ANSWERING ─────> LAST ─────> LINGERING ─────> CLOSING ─────> CLOSED
     ^  bytes        head         body      |   closing         answer          client          all
     |                                      |   request         written         done            sent
     +──────────────────────────────────────+
                 all answers written

A request that comes in one piece goes from IDLE to ANSWERING at once. With pipelining, what comes behind a request
whose answer is due is read and handled too, but changes nothing: the phase is ANSWERING as long as an answer is due.
Then it is our turn, and the client is not timed. Only ANSWERING goes back, to what the parser holds.

The other direction is a machine of its own with two states: the transport takes what we write, or the client does not
read it (`Connection.stuck`). While it is stuck nothing is read, and the time-out is about the bytes that it takes.

Each phase has one time-out and a connection one deadline. Two are about a whole: a head must be there in time, an idle
connection closes in time. The others are about progress, and follow one rule (`granted`).
"""

from __future__ import annotations

import math
from enum import IntEnum


class Phase(IntEnum):
    """In the order in which a connection goes through them."""

    IDLE = 0  # no part of a request has come, and no answer is due
    HEAD = 1  # part of a head has come
    BODY = 2  # a head has come and was checked; part of its body is missing
    ANSWERING = 3  # answers are due
    LAST = 4  # answers are due, and the connection ends with the last of them: nothing more is read
    LINGERING = 5  # the last answer is written; what the client still sends is read and dropped
    CLOSING = 6  # nothing is read; what is written is on its way out
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

# What a slow but honest client is good for: GPRS carries 3 to 10 KB/s, the slowest of today's uplinks (LTE Cat M1) 40.
SLOWEST_BYTES_PER_SECOND = 16_000
# nginx's lingering_timeout: how long a client that was refused may send nothing before it is cut off.
LINGER_SECONDS = 5.0
# nginx's keepalive_min_timeout is there for this: a stop waits so long for the next request of a connection that was
# used a moment ago, and for the rest of one that has begun.
LAST_REQUEST_SECONDS = 1.0


def seconds_by_phase(
    head_seconds: float, body_seconds: float, idle_seconds: float, write_seconds: float, draining: bool
) -> tuple[float, ...]:
    """How long each phase may last, by its number; for progress phases, how long without progress."""
    seconds = [idle_seconds, head_seconds, body_seconds, math.inf, math.inf, LINGER_SECONDS, write_seconds, math.inf]
    if draining:
        for phase in (IDLE, HEAD, BODY, LINGERING):
            seconds[phase] = min(seconds[phase], LAST_REQUEST_SECONDS)
    return tuple(seconds)


def granted(deadline: float, progress_bytes: int, now: float, seconds: float) -> float:
    """The deadline after progress: each byte buys its time at the slowest rate, `seconds` from now at most.

    So a client that sends (or takes) steadily is never cut off, and neither silence nor a trickle lasts.
    """
    return min(deadline + progress_bytes / SLOWEST_BYTES_PER_SECOND, now + seconds)
