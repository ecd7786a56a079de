"""How long a piece of work takes, on a machine that others use too."""

from __future__ import annotations

from collections.abc import Callable

MOST_RUNS = 10


def least(measure: Callable[[], float], enough: float) -> float:
    """Return the least of several measurements; stop at one below `enough`. Other programs can only add to a time."""
    best = measure()
    for _ in range(MOST_RUNS - 1):
        if best < enough:
            break
        best = min(best, measure())
    return best
