"""How long a piece of work takes, on a machine that others use too."""

from __future__ import annotations

from collections.abc import Callable

MOST_RUNS = 10


def least(measure: Callable[[], float], enough: float) -> float:
    """The least of some measurements, no more than are needed to be below `enough`: what else runs can only add."""
    best = measure()
    for _ in range(MOST_RUNS - 1):
        if best < enough:
            break
        best = min(best, measure())
    return best
