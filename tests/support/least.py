"""How long a piece of work takes, on a machine that others use too, and that is slower than another."""

from __future__ import annotations

import time
from collections.abc import Callable

import orjson

MOST_RUNS = 10
_WORK = b"{" + b",".join(b'"%035d":1' % number for number in range(50_000)) + b"}"
_QUIET_SECONDS = 0.007  # what it takes on the machine on which the bounds were chosen, while nothing else runs


def least(measure: Callable[[], float], enough: float) -> float:
    """Return the least of several measurements; stop at one below `enough`. Other programs can only add to a time.

    Each time is what it would be on the machine on which the bounds were chosen.
    """
    best = measure() / slowness()
    for _ in range(MOST_RUNS - 1):
        if best < enough:
            break
        best = min(best, measure() / slowness())
    return best


def slowness() -> float:
    """Return how many times longer work takes here and now than on that machine; at least 1.

    A process that uses many CPUs and caches slows all others down, in CPU time too.
    """
    return max(1.0, min(_work_seconds() for _ in range(2)) / _QUIET_SECONDS)


def _work_seconds() -> float:
    began = time.thread_time()
    orjson.loads(_WORK)
    return time.thread_time() - began
