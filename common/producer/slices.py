"""Long work in slices, so that no request blocks the event loop.

A job is a generator that yields between its stages, of which none takes more than 30 ms. It yields None to continue
soon, or a function that takes a `resume` callback and calls it when the job can continue.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable

log = logging.getLogger("predlog.http")

SLICE_SECONDS = 0.004  # of one turn of the loop, all jobs together

Job = Generator[Callable[[Callable[[], None]], None] | None, None, None]


class Slices:
    """A scheduler of jobs. The jobs of one owner run in order, the owners take turns, one slice for each loop turn."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._jobs: dict[Hashable, deque[Job]] = {}  # by owner, in the order of their turns
        self._due = False

    def add(self, owner: Hashable, job: Job) -> None:
        """Run `job` behind the others of its owner. What it raises is logged as a bug."""
        self._jobs.setdefault(owner, deque()).append(job)
        self._schedule()

    def _schedule(self) -> None:
        if not self._due and self._jobs:
            self._due = True
            self._call_soon(self._run)

    def _run(self) -> None:
        self._due = False
        end = time.perf_counter() + SLICE_SECONDS
        while self._jobs:
            owner = next(iter(self._jobs))
            jobs = self._jobs.pop(owner)
            if self._advance(owner, jobs.popleft(), end, jobs):
                break
        self._schedule()

    def _advance(self, owner: Hashable, job: Job, end: float, jobs: deque[Job]) -> bool:
        """Run a job until it ends, waits, or the slice is over; tell whether the slice is. Then the owner goes last."""
        over = False
        try:
            while not over:
                wait = next(job)
                if wait is not None:
                    wait(lambda: self.add(owner, job))
                    break
                over = time.perf_counter() >= end
            else:
                jobs.appendleft(job)
        except StopIteration:
            pass
        except Exception:
            log.exception("a bug: a request was not finished")
        if jobs:
            self._jobs[owner] = jobs + self._jobs.pop(owner, deque())
        return over or time.perf_counter() >= end
