"""Turns on the event loop: the one scheduler of long work, so that no client keeps the loop from the others.

A job is a generator that yields between its stages. It yields None to continue soon, or a function that takes a
`resume` callback and calls it when the job can continue.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Hashable
from itertools import count

log = logging.getLogger("predlog.http")

# The time for long work in one turn of the loop, all clients together. A stage that has begun runs to its end, which
# takes 30 ms at most. So a turn stays below the 50 ms by which a request may delay other clients (docs/http.md).
TURN_SECONDS = 0.005
FORWARD_TURNS = 10  # newcomers can come without end: after this many full turns, the next of the others goes first

Job = Generator[Callable[[Callable[[], None]], None] | None, None, None]


class Turns:
    """A scheduler of jobs. The jobs of one owner run in order. The owners take turns; new ones go first, as a rule."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object], now: Callable[[], float]) -> None:
        self.ends = math.inf  # of this turn of the loop, when work that arrives must wait; inf without long work
        self._call_soon = call_soon
        self._now = now
        self._jobs: dict[Hashable, deque[Job]] = {}  # by owner
        self._new: deque[Hashable] = deque()  # owners that had no slice yet
        self._again: deque[Hashable] = deque()  # owners that had one and have more to do
        self._crowded = count(1)  # turns that ended with owners of both kinds left

    def add(self, owner: Hashable, job: Job) -> None:
        """Run `job` after the others of its owner. What it raises is logged as a bug."""
        jobs = self._jobs.get(owner)
        if jobs is None:
            self._jobs[owner] = deque((job,))
            self._new.append(owner)
            self.worked_since(self._now())
        else:
            jobs.append(job)

    def worked_since(self, began: float) -> None:
        """Note work outside of a job that has lasted since `began`: it counts for this turn of the loop."""
        if self.ends == math.inf:
            self.ends = began + TURN_SECONDS
            self._call_soon(self._run)

    def _run(self) -> None:
        self.ends = self._now() + TURN_SECONDS
        while self._new or self._again:
            owner = (self._new or self._again).popleft()
            self._advance(owner)
            if self._jobs[owner]:
                self._again.append(owner)
            else:
                del self._jobs[owner]
            if self._now() >= self.ends:
                if self._new and self._again and next(self._crowded) % FORWARD_TURNS == 0:
                    self._new.appendleft(self._again.popleft())
                self._call_soon(self._run)
                return
        self.ends = math.inf

    def _advance(self, owner: Hashable) -> None:
        """Run the owner's first job until it ends, waits, or the turn does."""
        jobs = self._jobs[owner]
        job = jobs.popleft()
        try:
            while (wait := next(job)) is None:
                if self._now() >= self.ends:
                    jobs.appendleft(job)
                    return
            wait(lambda: self.add(owner, job))
        except StopIteration:
            pass
        except Exception:
            log.exception("a bug: a request was not finished")
