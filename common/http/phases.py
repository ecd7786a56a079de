"""The phases of a connection: what each waits for, for how long, and which may follow. Pure.

    HANDSHAKE ──> IDLE ──> HEAD ──> BODY ──> ANSWERING ──> LAST ──> LINGERING ──> CLOSING ──> CLOSED
           TLS     ^  bytes    head     body   |    closing    answer        client       all
                   |                           |    request    written       done         sent
                   +───────────────────────────+
                       all answers written

A plain connection begins in IDLE. A request that comes in one piece leads from IDLE to ANSWERING at once. With
pipelining, further requests are read and handled while an answer is due, but the phase stays ANSWERING, in which the
client is not timed. Only ANSWERING leads back, to IDLE, HEAD or BODY by what the parser holds.

The other direction is a separate machine with two states: the transport takes what is written, or the client does not
read it (`Writer.stuck`). While it is stuck nothing is read or handled, and the time-out concerns the bytes it takes.

Each phase has one time-out, and a connection has one deadline. The time-outs of HANDSHAKE, IDLE and HEAD bound the
whole phase. The others bound the time without progress (`granted`).
"""

from __future__ import annotations

import math
from enum import IntEnum


class Phase(IntEnum):
    """The phases, in the order in which a connection passes through them."""

    HANDSHAKE = 0  # of TLS
    IDLE = 1  # no part of a request has come, and no answer is due
    HEAD = 2  # part of a head has come
    BODY = 3  # a head has come and was checked; part of its body is missing
    ANSWERING = 4  # answers are due
    LAST = 5  # answers are due, and the connection ends with the last of them: nothing more is handled
    LINGERING = 6  # the last answer is written; what the client still sends is read and dropped
    CLOSING = 7  # nothing is read; what was written is being sent
    CLOSED = 8


HANDSHAKE, IDLE, HEAD, BODY, ANSWERING, LAST, LINGERING, CLOSING, CLOSED = Phase

NEXT: dict[Phase, frozenset[Phase]] = {
    HANDSHAKE: frozenset({IDLE, CLOSED}),
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
# Two round trips of TLS over a bad mobile link, and the retransmissions of its first lost packets (1 + 2 + 4 s).
HANDSHAKE_SECONDS = 10.0
# A client that was refused can be silent for this long before it is cut off, as with nginx's lingering_timeout.
LINGER_SECONDS = 5.0
# A stop waits this long for the next request of a connection that was just used, and for the rest of a request that has
# begun. nginx's keepalive_min_timeout serves the same purpose.
LAST_REQUEST_SECONDS = 1.0


def seconds_by_phase(
    head_seconds: float, body_seconds: float, idle_seconds: float, write_seconds: float, draining: bool
) -> tuple[float, ...]:
    """Return how long each phase may last, or last without progress, by the number of the phase."""
    inf = math.inf
    waits = (HANDSHAKE_SECONDS, idle_seconds, head_seconds, body_seconds, inf, inf, LINGER_SECONDS, write_seconds, inf)
    if not draining:
        return waits
    on_client = {HANDSHAKE, IDLE, HEAD, BODY, LINGERING}
    return tuple(min(each, LAST_REQUEST_SECONDS) if phase in on_client else each for phase, each in enumerate(waits))


def granted(deadline: float, progress_bytes: int, now: float, seconds: float) -> float:
    """Return the deadline after progress. Each byte adds its time at the slowest rate, up to `seconds` from now.

    So a client that sends or takes steadily is never cut off, and neither silence nor a trickle can last.
    """
    return min(deadline + progress_bytes / SLOWEST_BYTES_PER_SECOND, now + seconds)
