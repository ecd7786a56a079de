"""The measurements. Each section yields its records as they are made; the programs take turns."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common.amqp.topology import queue_names
from tests.bench import broker_limit, events, load
from tests.bench.events import HEADER, Load, post_lines
from tests.bench.growth import Growth
from tests.bench.process import Process
from tests.bench.results import (
    BASELINE,
    FEW,
    FLOOR,
    IMAGES,
    IMAGES_CASE,
    LIMIT,
    MANY,
    PREDLOG,
    SINGLE,
    SMALL,
    Record,
    Results,
)
from tests.bench.stage import BRIDGES, SUBJECTS, Consumer, Producer, Stage

CLIENT_CONNECTIONS = 64
CALLS = 1000
BATCH_EVENTS, BATCH_CONNECTIONS = 1000, 4
END_TO_END_RATE = 1000
SETTLE_SECONDS = 0.3
STILL_SECONDS = 1.0
LONGEST_BLOCK_SECONDS = 120
WARM_SECONDS = 1

# Offered load, as a share of the baseline's highest rate. Above 1, predlog alone gets it.
OFFERED = {
    SMALL: {"a quarter of": 0.25, "half of": 0.5, "all of": 1.0, "twice": 2.0, "four times": 4.0},
    IMAGES: {"a quarter of": 0.25, "half of": 0.5, "all of": 1.0, "one and a half times": 1.5},
}
PARTITION_COUNTS = (1, 2, 4)
HIGHEST_OFFERED = 0.8  # of the highest rate of predlog itself

# A backlog that takes about a second, on two cores.
BACKLOG = {
    SMALL: {PREDLOG: 50_000, SINGLE: 50_000, BASELINE: 5_000},
    IMAGES: {PREDLOG: 1_500, BASELINE: 400},
}

Section = Callable[[Stage, Results], Iterator[Record]]


def producer(stage: Stage, _: Results) -> Iterator[Record]:
    """POST → confirm: the highest rate at several numbers of connections, and with images."""
    small, images = events.small(), events.with_frames()
    cases = (
        ("1 connection", small, 1, (*SUBJECTS, SINGLE)),
        (FEW, small, 32, (*SUBJECTS, SINGLE, *BRIDGES, FLOOR)),
        (MANY, small, 256, (*SUBJECTS, SINGLE, *BRIDGES, FLOOR)),
        (IMAGES_CASE, images, 32, (*SUBJECTS, *BRIDGES, FLOOR)),
    )
    limits = {MANY: 20_000, IMAGES_CASE: 500}  # messages for each second of measuring
    with _producers(stage, *SUBJECTS, SINGLE, *BRIDGES, FLOOR) as running, stage.queue("bench-limit") as limit:
        for case, messages, connections, subjects in cases:
            file = load.write_bodies(messages, stage.folder / "bodies.jsonl")
            for subject in subjects:
                load.Wrk(running[subject].port, file, connections, WARM_SECONDS).result()
                _settle(stage, running[subject].queue)
            for number in range(stage.effort.rounds):
                for subject in _order(subjects, number):
                    yield Record("producer", case, subject, _highest(stage, running[subject], file, connections))
                if case in limits:
                    count = stage.effort.seconds * limits[case]
                    rate = broker_limit.publish_rate(stage.amqp_url, limit, messages.bodies, count)
                    stage.purge(limit)
                    yield Record("producer", case, LIMIT, {"rate": rate})


def batches(stage: Stage, _: Results) -> Iterator[Record]:
    """POST /process/batch of 1,000 events (NDJSON) → confirm, as many as are answered."""
    body = b"\n".join(json.dumps(json.loads(each)).encode() for each in events.small(BATCH_EVENTS).bodies)
    count = 30 * stage.effort.seconds
    with _producers(stage, PREDLOG, SINGLE) as running:
        turns = ((number, each) for number in range(stage.effort.rounds + 1) for each in _order(running, number))
        for number, subject in turns:
            posting = running[subject]
            cpu_before, broker_before = posting.process.cpu_seconds(), stage.broker_cpu_seconds()
            answers = _accepted(load.drive(posting.port, [body], BATCH_CONNECTIONS, count=count, request=post_lines))
            cpu_seconds = posting.process.cpu_seconds() - cpu_before
            broker_cpu_seconds = stage.broker_cpu_seconds() - broker_before
            _settle(stage, posting.queue)
            if number:  # the first warms up
                sent = count * BATCH_EVENTS
                values = {
                    "rate": sent / (max(each.at for each in answers) - answers[0].due),
                    "cpu_us": cpu_seconds * 1e6 / sent,
                    "broker_us": broker_cpu_seconds * 1e6 / sent,
                }
                yield Record("batches", f"{BATCH_EVENTS:,} events a batch", subject, values)


def latency(stage: Stage, results: Results) -> Iterator[Record]:
    """POST → confirm at equal offered load, from the moment each request was due."""
    with _producers(stage, *SUBJECTS, SINGLE, *BRIDGES[-1:]) as running:
        for kind, messages in ((SMALL, events.small()), (IMAGES, events.with_frames())):
            file = load.write_bodies(messages, stage.folder / "bodies.jsonl")
            highest = {s: _highest_known(stage, results, kind, s, running[s], file) for s in SUBJECTS}
            for words, share in OFFERED[kind].items():
                rate = share * highest[BASELINE]
                if share > 1 and rate > HIGHEST_OFFERED * highest[PREDLOG]:
                    continue
                subjects = running if share <= 1 else (PREDLOG, SINGLE)
                for number in range(stage.effort.rounds):
                    for subject in _order(subjects, number):
                        count = int(rate * stage.effort.seconds)
                        waits = _waits(stage, running[subject], messages.bodies, count, rate)
                        case = f"{kind}, {words} the baseline's best"
                        yield Record("latency", case, subject, {"offered": rate} | _percentiles(waits))


def consumer(stage: Stage, _: Results) -> Iterator[Record]:
    """Queue → CSV: the drain of a backlog."""
    for kind, messages in ((SMALL, events.small()), (IMAGES, events.with_frames())):
        counts = {s: max(100, int(count * stage.effort.drain_seconds)) for s, count in BACKLOG[kind].items()}
        for turn in range(stage.effort.rounds):
            for subject in _order(counts, turn):
                csv_file, count = stage.folder / "drain.csv", counts[subject]
                with stage.queue(f"bench-drain-{turn}") as queue:
                    if (kind, subject) == (SMALL, PREDLOG):
                        stage.fill_by_posting(queue, messages, count)
                    else:
                        stage.fill(queue, messages, count)
                    yield Record("consumer", kind, subject, _drain(stage, subject, queue, csv_file, messages, count))
                _remove(csv_file)
            with stage.queue("bench-limit") as limit:
                stage.fill(limit, messages, counts[PREDLOG])
                rate = broker_limit.consume_rate(stage.amqp_url, limit, counts[PREDLOG])
            yield Record("consumer", kind, LIMIT, {"rate": rate})


def end_to_end(stage: Stage, _: Results) -> Iterator[Record]:
    """POST → row in the CSV, with both processes at work."""
    file = load.write_bodies(events.small(), stage.folder / "bodies.jsonl")
    for turn in range(stage.effort.rounds):
        for subject in _order(SUBJECTS, turn):
            csv_file = stage.folder / f"end-{turn}-{SUBJECTS.index(subject)}.csv"
            with (
                stage.queue(f"bench-end-{turn}") as queue,
                stage.producer(subject, queue) as posting,
                stage.consumer(subject, queue, csv_file) as consuming,
            ):
                stage.wait_for_consumer(queue, consuming.process)
                flow = _Flow(posting, consuming, csv_file, counts_fsyncs=subject == PREDLOG)
                yield Record("end to end", f"{CALLS:,} calls", subject, flow.calls())
                latencies = flow.latency(stage.effort.seconds)
                yield Record("end to end", f"{END_TO_END_RATE:,} requests/s", subject, latencies)
                yield Record("end to end", FEW, subject, flow.highest(file, stage.effort.seconds))
            _remove(csv_file)


def idle(stage: Stage, _: Results) -> Iterator[Record]:
    """Memory of a producer that holds many idle connections."""
    count = stage.effort.idle_connections
    for subject in SUBJECTS:
        with stage.queue("bench-idle") as queue, stage.producer(subject, queue) as running:
            before = running.process.memory_mb()
            with load.idle_connections(running.port, count):
                memory = running.process.memory_mb()
            values = {"memory_mb": memory, "kb_per_connection": (memory - before) * 1000 / count}
            yield Record("idle", f"{count:,} idle connections", subject, values)


def blocked(stage: Stage, _: Results) -> Iterator[Record]:
    """A memory alarm in the broker under full load: the producer's memory, and its answers."""
    for case, messages in ((SMALL, events.small()), (IMAGES, events.with_frames())):
        file = load.write_bodies(messages, stage.folder / "bodies.jsonl")
        with (
            stage.queue("bench-blocked") as queue,
            stage.producer(PREDLOG, queue, CONFIRM_TIMEOUT_MS="2000") as running,
        ):
            pushing = load.Wrk(running.port, file, 256, LONGEST_BLOCK_SECONDS, count_statuses=True)
            try:
                time.sleep(1)
                stage.control("set_vm_memory_high_watermark", "0")
                memory_mb = []
                end = time.monotonic() + 2 * stage.effort.seconds + 4
                while time.monotonic() < end:
                    memory_mb.append(running.process.memory_mb())
                    time.sleep(0.05)
            finally:
                result = pushing.stop()
                stage.control("set_vm_memory_high_watermark", "0.6")
            running.process.wait_until_ready(running.port)
            half = len(memory_mb) // 2
            values: dict[str, float] = {
                "memory_max_mb": max(memory_mb),
                "memory_growth_mb": max(memory_mb[half:]) - max(memory_mb[:half]),
                "slowest_ms": result.max_us / 1000,
                "broken": result.broken + result.timeouts,
            }
            values |= {f"status_{status}": count for status, count in result.statuses.items()}
            yield Record("blocked", f"256 connections, {case}", PREDLOG, values)


def partitions(stage: Stage, _: Results) -> Iterator[Record]:
    """POST → confirm, then the drain of what that left, with several partitions: what they cost each process."""
    small = events.small()
    file = load.write_bodies(small, stage.folder / "bodies.jsonl")
    for turn, count in product(range(stage.effort.rounds), PARTITION_COUNTS):
        queue, folder = f"bench-{turn}-{count}", stage.folder / f"partitions-{turn}-{count}"
        names = queue_names(queue, count)
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(stage.queue(name))
            settings = {"PARTITIONS": str(count)}
            posting = stack.enter_context(stage.producer(PREDLOG, queue, **settings))
            consuming = stack.enter_context(stage.consumer(PREDLOG, queue, folder / "data.csv", **settings)).process
            for name in names:
                stage.wait_for_consumer(name, consuming)
            _turns(posting, consuming, folder, file, WARM_SECONDS)
            values = _turns(posting, consuming, folder, file, stage.effort.seconds)
        shutil.rmtree(folder)
        yield Record("partitions", f"{count} partition{'s' if count > 1 else ''}", PREDLOG, values)


SECTIONS: tuple[Section, ...] = (producer, batches, latency, consumer, end_to_end, idle, blocked, partitions)


def _order(subjects: Iterable[str], number: int) -> Sequence[str]:
    """Return the subjects in their order in this round: the reverse in every other one, as each can slow the next."""
    return list(subjects)[:: -1 if number % 2 else 1]


@contextlib.contextmanager
def _producers(stage: Stage, *subjects: str) -> Iterator[dict[str, Producer]]:
    """A ready producer of each program, with a queue of its own."""
    with contextlib.ExitStack() as stack:
        queues = [stack.enter_context(stage.queue(f"bench-{number}")) for number in range(len(subjects))]
        yield {s: stack.enter_context(stage.producer(s, queue)) for s, queue in zip(subjects, queues, strict=True)}


def _turns(posting: Producer, consuming: Process, folder: Path, file: Path, seconds: int) -> dict[str, float]:
    """wrk while the consumer is stopped; then the consumer, until the last row is in a file of `folder`."""
    before, size = posting.process.cpu_seconds(), _size(folder)
    consuming.signal(signal.SIGSTOP)
    result = load.Wrk(posting.port, file, 256, seconds).result()
    producer_cpu = posting.process.cpu_seconds() - before
    before, start, end = consuming.cpu_seconds(), time.perf_counter(), 0.0
    consuming.signal(signal.SIGCONT)
    while end == 0.0 or time.perf_counter() < end + STILL_SECONDS:
        if size < (grown := _size(folder)):
            size, end = grown, time.perf_counter()
        time.sleep(0.01)
    return {
        "rate": result.rate,
        "producer_cpu_us": producer_cpu * 1e6 / result.requests,
        "drain_rate": result.requests / (end - start),
        "consumer_cpu_us": (consuming.cpu_seconds() - before) * 1e6 / result.requests,
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.csv"))


@dataclass(frozen=True, slots=True)
class _Flow:
    """One subject's producer and consumer, and the CSV they end in."""

    posting: Producer
    consuming: Consumer
    csv_file: Path
    counts_fsyncs: bool

    def calls(self) -> dict[str, float]:
        """The original's test: 1,000 events, until their last row is in the file."""
        sent = events.numbered(CALLS)
        with Growth(self.csv_file) as growth:
            start = time.perf_counter()
            _accepted(load.drive(self.posting.port, sent.bodies, 32))
            return {"seconds": growth.wait_for_size(sent.csv_bytes(CALLS), self.consuming.process) - start}

    def latency(self, seconds: int) -> dict[str, float]:
        """From the moment a request was due until its last row is in the file."""
        count = END_TO_END_RATE * seconds
        sent = events.numbered(count)
        with self._fsyncs() as fsyncs, Growth(self.csv_file) as growth:
            base = growth.last[1]
            answers = _accepted(load.drive(self.posting.port, sent.bodies, CLIENT_CONNECTIONS, END_TO_END_RATE))
            growth.wait_for_size(base + sent.csv_bytes(count) - len(HEADER), self.consuming.process)
        row_ends = _row_ends(self.csv_file, base)
        waits = [growth.reached(row_ends[answer.index]) - answer.due for answer in answers]
        answered = _percentiles([answer.at - answer.due for answer in answers])
        return _percentiles(waits) | {f"answer_{name}": value for name, value in answered.items()} | fsyncs

    def highest(self, file: Path, seconds: int) -> dict[str, float]:
        """wrk on 32 connections, until the last row is in the file."""
        with self._fsyncs() as fsyncs, Growth(self.csv_file) as growth:
            cpu_before, start = self._cpu_seconds(), time.perf_counter()
            result = load.Wrk(self.posting.port, file, 32, seconds).result()
            end = growth.wait_until_still()
            cpu_us = (self._cpu_seconds() - cpu_before) * 1e6 / result.requests
        return {"rate": result.requests / (end - start), "cpu_us": cpu_us} | fsyncs

    @contextlib.contextmanager
    def _fsyncs(self) -> Iterator[dict[str, float]]:
        """How often the consumer synced its file, per second; filled in at the end."""
        values: dict[str, float] = {}
        start, before = time.perf_counter(), self.consuming.fsyncs() if self.counts_fsyncs else 0.0
        yield values
        if self.counts_fsyncs:
            values["fsyncs"] = (self.consuming.fsyncs() - before) / (time.perf_counter() - start)

    def _cpu_seconds(self) -> float:
        return self.posting.process.cpu_seconds() + self.consuming.process.cpu_seconds()


def _highest(stage: Stage, running: Producer, file: Path, connections: int) -> dict[str, float]:
    cpu_before, broker_before = running.process.cpu_seconds(), stage.broker_cpu_seconds()
    result = load.Wrk(running.port, file, connections, stage.effort.seconds).result()
    cpu_seconds = running.process.cpu_seconds() - cpu_before
    broker_cpu_seconds = stage.broker_cpu_seconds() - broker_before
    _settle(stage, running.queue)
    if result.refused or result.broken or result.timeouts:
        raise RuntimeError(f"requests failed: {result}\n{running.process.log_tail()}")
    return {
        "rate": result.rate,
        "cpu_us": cpu_seconds * 1e6 / result.requests,
        "broker_us": broker_cpu_seconds * 1e6 / result.requests,
        "p50_ms": result.p50_us / 1000,
        "p99_ms": result.p99_us / 1000,
        "memory_mb": running.process.peak_memory_mb(),
    }


def _highest_known(stage: Stage, results: Results, kind: str, subject: str, running: Producer, file: Path) -> float:
    """The subject's highest rate for events of that kind: what this run has measured, else measured now."""
    cases = [case for case in results.cases("producer") if (case == IMAGES_CASE) == (kind == IMAGES)]
    rates = [rate for case in cases if (rate := results.median("producer", case, subject, "rate"))]
    return max(rates) if rates else _highest(stage, running, file, 32)["rate"]


def _waits(stage: Stage, running: Producer, bodies: Sequence[bytes], count: int, rate: float) -> list[float]:
    """The seconds from when each request of an open loop was due until its answer."""
    answers = _accepted(load.drive(running.port, bodies, CLIENT_CONNECTIONS, rate, count))
    _settle(stage, running.queue)
    return [answer.at - answer.due for answer in answers]


def _drain(stage: Stage, subject: str, queue: str, csv_file: Path, messages: Load, count: int) -> dict[str, float]:
    """From the first growth of the file, so that the start of the interpreter does not count."""
    whole = messages.csv_bytes(count)
    with Growth(csv_file) as growth, stage.consumer(subject, queue, csv_file) as running:
        process = running.process
        growth.wait_for_size(len(HEADER) + 1, process)
        cpu_before, (start, size) = process.cpu_seconds(), growth.last
        end = growth.wait_for_size(whole, process)
        growth.wait_until_still()
        drained = count * (whole - size) / (whole - len(HEADER))
        cpu_us = (process.cpu_seconds() - cpu_before) * 1e6 / drained
        memory_mb = process.peak_memory_mb()
    if growth.last[1] != whole:
        raise RuntimeError(f"{subject} wrote {growth.last[1]:,} bytes, and should have written {whole:,}")
    return {"rate": drained / (end - start), "cpu_us": cpu_us, "memory_mb": memory_mb}


def _remove(csv_file: Path) -> None:
    """The CSV and what the consumer keeps next to it."""
    for path in csv_file.parent.glob(f"{csv_file.name}*"):
        path.unlink()


def _row_ends(csv_file: Path, base: int) -> dict[int, int]:
    """Number of each event of events.numbered() → offset at which its last row ends, from offset `base` on."""
    ends, position = {}, base
    with csv_file.open("rb") as file:
        file.seek(base)
        for line in file:
            position += len(line)
            ends[int(line[:8])] = position
    return ends


def _accepted(answers: list[load.Answer]) -> list[load.Answer]:
    refused = sum(answer.status // 100 != 2 for answer in answers)
    if refused:
        raise RuntimeError(f"{refused} of {len(answers)} requests were refused")
    return answers


def _percentiles(seconds: list[float]) -> dict[str, float]:
    shown = {"p50_ms": 50, "p99_ms": 99, "p999_ms": 99.9}
    return {name: load.percentile_ms(seconds, percent) for name, percent in shown.items()}


def _settle(stage: Stage, queue: str) -> None:
    """Leave an empty queue and a quiet broker to the next measurement."""
    stage.purge(queue)
    time.sleep(SETTLE_SECONDS)
