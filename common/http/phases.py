"""The phases of a connection: what each waits for, for how long, and which may follow. Pure.

    HANDSHAKE ──> IDLE ──> HEAD ──> BODY ──> ANSWERING ──> LAST ──> LINGERING ──> CLOSING ──> CLOSED
           TLS     ^  bytes    head     body   |    closing    answer        client       all
                   |                           |    request    written       done         sent
                   +───────────────────────────+
                       all answers written

A request in one piece leads from IDLE to ANSWERING at once. With pipelining the phase stays ANSWERING, in which the
client is not timed. While the client does not read its answers (`Writer.stuck`) nothing is read or handled, and it is
timed by the bytes it takes. The time-outs of HANDSHAKE, IDLE and HEAD bound the whole phase; those of BODY, LINGERING
and CLOSING bound the time without progress (`after_progress`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from common.http.parser import Limits


class Phase(IntEnum):
    """The phases in the order in which a connection passes through them."""

    HANDSHAKE = 0  # of TLS
    IDLE = 1  # no part of a request has come, and no answer is due
    HEAD = 2  # part of a head has come
    BODY = 3  # a head has come and was checked; part of its body is missing
    ANSWERING = 4  # answers are due
    LAST = 5  # answers are due, and the connection ends with the last of them: nothing more is handled
    LINGERING = 6  # the last answer is written; what the client still sends is read and dropped
    CLOSING = 7  # nothing is read any more; what was written is being sent
    CLOSED = 8


HANDSHAKE, IDLE, HEAD, BODY, ANSWERING, LAST, LINGERING, CLOSING, CLOSED = Phase

NEXT: dict[Phase, frozenset[Phase]] = {
    HANDSHAKE: frozenset({IDLE, CLOSED}),
    IDLE: frozenset({HEAD, BODY, ANSWERING, LAST, CLOSING, CLOSED}),
    HEAD: frozenset({BODY, ANSWERING, LAST, CLOSING, CLOSED}),
    BODY: frozenset({ANSWERING, LAST, CLOSING, CLOSED}),
    ANSWERING: frozenset({IDLE, HEAD, BODY, ANSWERING, LAST, LINGERING, CLOSING, CLOSED}),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds on connections and time. Those on one request are in `parser.Limits`."""

    request: Limits
    connections: int  # beyond it, a newcomer takes the place of the longest silent one, or gets 503
    buffered_bytes: int  # of handshakes, incomplete requests and unread answers, over all connections
    idle_seconds: float  # proxies keep idle connections for 60 s; ours must last longer
    # Unanswered requests of one connection; beyond it the connection is not read. Enough for a confirm to cover a round
    # trip, and few enough that one connection takes a small part of the window.
    pipelined: int = 32
    head_seconds: float = 10.0  # a head is one packet or a few: time for some to be lost and sent again
    body_seconds: float = 20.0  # without progress, for uploads over mobile links that pause
    write_seconds: float = 20.0  # without progress, for the same links


def seconds_by_phase(limits: ServerLimits, draining: bool) -> tuple[float, ...]:
    """Return how long each phase can last, or last without progress, by the number of the phase."""
    inf = math.inf
    on_client = (HANDSHAKE_SECONDS, limits.idle_seconds, limits.head_seconds, limits.body_seconds)
    if draining:
        on_client = (LAST_REQUEST_SECONDS,) * 4
    linger_seconds = LAST_REQUEST_SECONDS if draining else LINGER_SECONDS
    return (*on_client, inf, inf, linger_seconds, limits.write_seconds, inf)


def after_progress(since: float, progress_bytes: int, now: float) -> float:
    """Return since when a client counts as silent. Each byte makes that later, by its time at the slowest rate.

    So a client that sends or takes steadily is never cut off, and neither silence nor a trickle can last.
    """
    return min(since + progress_bytes / SLOWEST_BYTES_PER_SECOND, now)
