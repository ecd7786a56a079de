"""Drives a producer with seeded events and enters every answer into a ledger."""

import asyncio
import json
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TextIO

from scripts.load.client import Answer, Connection, Target
from scripts.load.events import BATCH_EVENTS, Events
from scripts.load.ledger import CUT, Ledger

ANSWER_TIMEOUT_SECONDS = 15.0  # longer than CONFIRM_TIMEOUT_MS, so that the producer can answer 504 itself
GIVE_UP_SECONDS = 60.0
BURST_EVENTS = 512
_BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)
_AGAIN_EVERY = 50  # with retries: events that are sent once more although they were answered
_AGAIN_LATER = 20  # of those: how many wait, so that a repeat falls into another batch, or another life of the consumer
_RECENT = 2000
_ONE_LINE_VARIANTS = (0, 2, 3)


class Load:
    """Results are public: `ledger`, `latencies_seconds`, `wrong_answers`; they grow while `run` runs."""

    def __init__(
        self,
        target: Target | Sequence[Target],
        events: Events,
        *,
        count: int | None = None,
        concurrency: int = 64,
        pipeline: int = 1,
        retries: bool = False,
        rate: float | None = None,
        bursts: Sequence[int] = (1,),
        log: TextIO | None = None,
    ) -> None:
        """Prepare `count` events (None: until `stop`), at most `rate` a second, `pipeline` at once on a connection.

        With a `rate`, `bursts` says how many events are due at the same moment, each number for BURST_EVENTS in turn.

        With `retries` each event has an Idempotency-Key and is sent until it is answered 200 or refused for good, for
        GIVE_UP_SECONDS; a retry can write the same event differently. `log` gets each answer as a JSON line.
        Several targets are as many ways to one service: connections are spread over them, and a retry takes another.
        """
        self.ledger = Ledger()
        self.latencies_seconds = array("f")  # of the answers 200
        self.recent_seconds: deque[float] = deque(maxlen=_RECENT)
        self.slowest_seconds = 0.0  # from an event's first attempt until it was accepted
        self.wrong_answers = 0  # 200 with another event than the one that was sent
        self.gave_up = 0
        self.accepted_predictions = 0
        self.batches = 0
        self._targets = [target] if isinstance(target, Target) else list(target)
        self._events = events
        self._count = count
        self._connections = max(1, concurrency // pipeline)
        self._pipeline = pipeline
        self._retries = retries
        self._rate = rate
        self._bursts = bursts
        self._log = log
        self._started = 0.0
        self._stopping = False
        self._again: deque[int] = deque()

    def stop(self) -> None:
        """Begin no new event. `run` ends when those in flight are settled."""
        self._stopping = True

    async def run(self) -> None:
        self._started = time.monotonic()
        lines = [[_Line(target) for target in self._targets] for _ in range(self._connections)]
        try:
            async with asyncio.TaskGroup() as group:
                for index, ways in enumerate(lines):
                    first = index % len(ways)
                    for _ in range(self._pipeline):
                        group.create_task(self._work(ways[first:] + ways[:first]))
        finally:
            for line in chain.from_iterable(lines):
                line.close()

    async def _work(self, lines: list["_Line"]) -> None:
        while not self._stopping and (self._count is None or len(self.ledger) < self._count):
            if len(self._again) > _AGAIN_LATER:
                await self._deliver(lines, self._again.popleft(), variant=2)
                continue
            number = self.ledger.open()
            numbers = [number]
            if self._retries and self._events.batch_key(number) is not None:
                numbers += [self.ledger.open() for _ in range(BATCH_EVENTS - 1)]
            if self._rate is not None:
                burst = self._bursts[number // BURST_EVENTS % len(self._bursts)]
                await asyncio.sleep(self._started + number // burst * burst / self._rate - time.monotonic())
            if len(numbers) > 1:
                await self._deliver_batch(lines, numbers)
                continue
            await self._deliver(lines, number, variant=0)
            if self._retries and number % _AGAIN_EVERY == 0 and self._events.key(number) is not None:
                self._again.append(number)

    async def _deliver(self, lines: list["_Line"], number: int, variant: int) -> None:
        key = self._events.key(number) if self._retries else None
        began = time.monotonic()
        give_up = began + GIVE_UP_SECONDS
        for attempt in range(1_000_000):
            line = lines[attempt % len(lines)]
            connection = await line.connected(give_up if len(lines) == 1 else 0.0)
            if connection is None:
                if time.monotonic() > give_up:
                    self.gave_up += 1
                    return
                await _back_off(attempt)
                continue
            request = line.target.request(self._events.body(number, variant), key)
            pending = [connection.send(request)]
            if key is not None and number % _AGAIN_EVERY == _AGAIN_EVERY // 2:  # an impatient client
                pending.append(connection.send(line.target.request(self._events.body(number, variant + 1), key)))
            answers = [await answer for answer in pending]
            for answer in answers:
                self._enter(number, attempt, answer)
            last = answers[-1].status
            if last == 200:
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
            if not self._retries or not (last == CUT or last >= 500):
                return
            if time.monotonic() > give_up:
                self.gave_up += 1
                return
            variant += attempt % 2  # the same bytes, and sometimes others of the same event
            await _back_off(attempt)

    async def _deliver_batch(self, lines: list["_Line"], numbers: list[int]) -> None:
        """Send a batch as an array or as lines. A retry repeats the whole batch."""
        self.batches += 1
        key, as_lines = self._events.batch_key(numbers[0]), self.batches % 2 == 0
        content_type = "application/x-ndjson" if as_lines else "application/json"
        began = time.monotonic()
        give_up = began + GIVE_UP_SECONDS
        for attempt in range(1_000_000):
            line = lines[attempt % len(lines)]
            connection = await line.connected(give_up if len(lines) == 1 else 0.0)
            if time.monotonic() > give_up:
                self.gave_up += len(numbers)
                return
            if connection is None:
                await _back_off(attempt)
                continue
            target = line.target._replace(path=f"{line.target.path}/batch")
            variant = _ONE_LINE_VARIANTS[attempt % 3] if as_lines else attempt
            bodies = [self._events.body(number, variant) for number in numbers]
            body = b"\n".join(bodies) if as_lines else b"[" + b",".join(bodies) + b"]"
            answer = await connection.send(target.request(body, key, content_type))
            if answer.status in (200, 207):
                results = json.loads(answer.body)["results"]
                statuses = [result["status"] for result in results]
            else:
                statuses = [answer.status] * len(numbers)
            for number, status in zip(numbers, statuses, strict=True):
                self._enter(number, attempt, answer._replace(status=status, body=self._events.id(number)))
            if not any(status == CUT or status >= 500 for status in statuses):
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
                return
            await _back_off(attempt)

    def _enter(self, number: int, attempt: int, answer: Answer) -> None:
        if answer.status == 200 and not self.ledger.accepted[number]:
            self.accepted_predictions += len(self._events.rows(number))
        self.ledger.record(number, answer.status)
        if answer.status == 200:
            self.latencies_seconds.append(answer.seconds)
            self.recent_seconds.append(answer.seconds)
            if self._events.id(number) not in answer.body:
                self.wrong_answers += 1
        if self._log is not None:
            line = {"event": self._events.id(number).decode(), "attempt": attempt, "status": answer.status}
            self._log.write(json.dumps({**line, "ms": round(answer.seconds * 1000, 3)}) + "\n")


class _Line:
    """One connection, which is kept up for all who share it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    async def connected(self, give_up: float) -> Connection | None:
        """Return an open connection; None if there is none before `give_up` (of time.monotonic)."""
        if self._connection is not None and self._connection.is_open:
            return self._connection
        async with self._connecting:
            while self._connection is None or not self._connection.is_open:
                try:
                    self._connection = await Connection.open(self.target, ANSWER_TIMEOUT_SECONDS)
                except OSError:
                    if time.monotonic() > give_up:
                        return None
                    await asyncio.sleep(0.1)
            return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


async def _back_off(attempt: int) -> None:
    await asyncio.sleep(_BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)])


def percentile(values: "array[float] | deque[float]", per_cent: float) -> float:
    """Return a percentile of values in any order; 0 without values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * per_cent / 100))] if ranked else 0.0


Progress = Callable[[Load], None]


async def run_with_progress(load: Load, show: Progress, every_seconds: float = 0.25) -> None:
    """Run the load; call `show` repeatedly."""

    async def watch() -> None:
        while True:
            show(load)
            await asyncio.sleep(every_seconds)

    watching = asyncio.create_task(watch())
    try:
        await load.run()
    finally:
        watching.cancel()
        show(load)
