"""The measurements. Each section yields its records as they are made: predlog and the baseline in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from tests.bench import broker_limit, events, load
from tests.bench.events import HEADER, Load
from tests.bench.growth import Growth
from tests.bench.process import Process
from tests.bench.results import BASELINE, LIMIT, PREDLOG, Record, Results
from tests.bench.stage import SUBJECTS, Producer, Stage

CONCURRENCIES = (1, 32, 256)
CLIENT_CONNECTIONS = 64
CALLS = 1000
END_TO_END_RATE = 1000
IMAGES_CASE = "32 connections, 5 images of 20 KB"
SETTLE_SECONDS = 0.5
LONGEST_BLOCK_SECONDS = 120

Section = Callable[[Stage, Results], Iterator[Record]]


def producer(stage: Stage, _: Results) -> Iterator[Record]:
    """POST → confirm: the highest rate at several numbers of connections, and with images."""
    small, images = events.small(), events.with_frames()
    cases = [(f"{c} connection{'s' if c > 1 else ''}", small, c) for c in CONCURRENCIES] + [(IMAGES_CASE, images, 32)]
    limits = {cases[-2][0]: 20_000, IMAGES_CASE: 200}  # messages for each second of measuring
    with _both_producers(stage) as running, stage.queue("bench-limit") as limit:
        for case, messages, connections in cases:
            file = load.write_bodies(messages, stage.folder / "bodies.jsonl")
            for _round in range(stage.effort.rounds):
                for subject in SUBJECTS:
                    yield Record("producer", case, subject, _highest(stage, running[subject], file, connections))
                if case in limits:
                    count = stage.effort.seconds * limits[case]
                    rate = broker_limit.publish_rate(stage.amqp_url, limit, messages.bodies, count)
                    stage.purge(limit)
                    yield Record("producer", case, LIMIT, {"rate": rate})


def latency(stage: Stage, results: Results) -> Iterator[Record]:
    """POST → confirm at half of each one's own highest rate, from the moment each request was due."""
    small = events.small()
    with _both_producers(stage) as running:
        for _round in range(stage.effort.rounds):
            for subject in SUBJECTS:
                rate = results.highest("producer", subject, "rate") / 2
                bodies = list(islice(cycle(small.bodies), int(rate * stage.effort.seconds)))
                answers = load.drive(running[subject].port, bodies, CLIENT_CONNECTIONS, rate)
                _settle(stage, running[subject].queue)
                values = {"offered": rate} | _percentiles([a.at - a.due for a in _accepted(answers)])
                yield Record("latency", "half of its highest rate", subject, values)


def consumer(stage: Stage, _: Results) -> Iterator[Record]:
    """Queue → CSV: the drain of a backlog."""
    small = events.small()
    counts = {PREDLOG: stage.effort.drain_messages, BASELINE: stage.effort.baseline_drain_messages}
    for turn in range(stage.effort.rounds):
        for subject in SUBJECTS:
            with stage.queue(f"bench-drain-{turn}") as queue:
                stage.fill(queue, small, counts[subject])
                csv_file = stage.folder / f"drain-{turn}-{SUBJECTS.index(subject)}.csv"
                values = _drain(stage, subject, queue, csv_file, small, counts[subject])
            yield Record("consumer", "backlog", subject, values)
        with stage.queue("bench-limit") as limit:
            stage.fill(limit, small, counts[PREDLOG])
            rate = broker_limit.consume_rate(stage.amqp_url, limit, counts[PREDLOG])
        yield Record("consumer", "backlog", LIMIT, {"rate": rate})


def end_to_end(stage: Stage, _: Results) -> Iterator[Record]:
    """POST → row in the CSV, with both processes at work."""
    file = load.write_bodies(events.small(), stage.folder / "bodies.jsonl")
    for turn in range(stage.effort.rounds):
        for subject in SUBJECTS:
            csv_file = stage.folder / f"end-{turn}-{SUBJECTS.index(subject)}.csv"
            with (
                stage.queue(f"bench-end-{turn}") as queue,
                stage.producer(subject, queue) as posting,
                stage.consumer(subject, queue, csv_file) as consuming,
            ):
                stage.wait_for_consumer(queue, consuming)
                flow = _Flow(posting, consuming, csv_file)
                yield Record("end to end", f"{CALLS:,} calls", subject, flow.calls())
                latencies = flow.latency(stage.effort.seconds)
                yield Record("end to end", f"{END_TO_END_RATE:,} requests/s", subject, latencies)
                yield Record("end to end", "32 connections", subject, flow.highest(file, stage.effort.seconds))


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
    for case, messages in (("small events", events.small()), ("5 images of 20 KB", events.with_frames())):
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
                end = time.monotonic() + 2 * stage.effort.seconds + 2
                while time.monotonic() < end:
                    memory_mb.append(running.process.memory_mb())
                    time.sleep(0.05)
            finally:
                result = pushing.stop()
                stage.control("set_vm_memory_high_watermark", "0.6")
            running.process.wait_until_ready(running.port)
            values: dict[str, float] = {
                "memory_min_mb": min(memory_mb),
                "memory_max_mb": max(memory_mb),
                "slowest_ms": result.max_us / 1000,
                "broken": result.broken + result.timeouts,
            }
            values |= {f"status_{status}": count for status, count in result.statuses.items()}
            yield Record("blocked", f"256 connections, {case}", PREDLOG, values)


SECTIONS: tuple[Section, ...] = (producer, latency, consumer, end_to_end, idle, blocked)


@contextmanager
def _both_producers(stage: Stage) -> Iterator[dict[str, Producer]]:
    with (
        stage.queue("bench-predlog") as our_queue,
        stage.queue("bench-baseline") as their_queue,
        stage.producer(PREDLOG, our_queue) as ours,
        stage.producer(BASELINE, their_queue) as theirs,
    ):
        yield {PREDLOG: ours, BASELINE: theirs}


@dataclass(frozen=True, slots=True)
class _Flow:
    """One subject's producer and consumer, and the CSV they end in."""

    posting: Producer
    consuming: Process
    csv_file: Path

    def calls(self) -> dict[str, float]:
        """The original's test: 1,000 events, until their last row is in the file."""
        sent = events.numbered(CALLS)
        with Growth(self.csv_file) as growth:
            start = time.perf_counter()
            _accepted(load.drive(self.posting.port, sent.bodies, 32))
            return {"seconds": growth.wait_for_size(sent.csv_bytes(CALLS), self.consuming) - start}

    def latency(self, seconds: int) -> dict[str, float]:
        """From the moment a request was due until its last row is in the file."""
        count = END_TO_END_RATE * seconds
        sent = events.numbered(count)
        with Growth(self.csv_file) as growth:
            base = growth.last[1]
            answers = _accepted(load.drive(self.posting.port, sent.bodies, CLIENT_CONNECTIONS, END_TO_END_RATE))
            growth.wait_for_size(base + sent.csv_bytes(count) - len(HEADER), self.consuming)
        row_ends = _row_ends(self.csv_file, base)
        waits = [growth.reached(row_ends[answer.index]) - answer.due for answer in answers]
        answered = _percentiles([answer.at - answer.due for answer in answers])
        return _percentiles(waits) | {f"answer_{name}": value for name, value in answered.items()}

    def highest(self, file: Path, seconds: int) -> dict[str, float]:
        """wrk on 32 connections, until the last row is in the file."""
        with Growth(self.csv_file) as growth:
            cpu_before, start = self._cpu_seconds(), time.perf_counter()
            result = load.Wrk(self.posting.port, file, 32, seconds).result()
            end = growth.wait_until_still()
            cpu_us = (self._cpu_seconds() - cpu_before) * 1e6 / result.requests
        return {"rate": result.requests / (end - start), "cpu_us": cpu_us}

    def _cpu_seconds(self) -> float:
        return self.posting.process.cpu_seconds() + self.consuming.cpu_seconds()


def _highest(stage: Stage, running: Producer, file: Path, connections: int) -> dict[str, float]:
    load.Wrk(running.port, file, connections, 1).result()  # warm
    _settle(stage, running.queue)
    cpu_before = running.process.cpu_seconds()
    result = load.Wrk(running.port, file, connections, stage.effort.seconds).result()
    cpu_seconds = running.process.cpu_seconds() - cpu_before
    _settle(stage, running.queue)
    if result.refused or result.broken or result.timeouts:
        raise RuntimeError(f"requests failed: {result}\n{running.process.log_tail()}")
    return {
        "rate": result.rate,
        "cpu_us": cpu_seconds * 1e6 / result.requests,
        "p50_ms": result.p50_us / 1000,
        "p99_ms": result.p99_us / 1000,
        "memory_mb": running.process.peak_memory_mb(),
    }


def _drain(stage: Stage, subject: str, queue: str, csv_file: Path, messages: Load, count: int) -> dict[str, float]:
    """From the first growth of the file, so that the start of the interpreter does not count."""
    whole = messages.csv_bytes(count)
    with Growth(csv_file) as growth, stage.consumer(subject, queue, csv_file) as process:
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
    refused = sum(answer.status != 200 for answer in answers)
    if refused:
        raise RuntimeError(f"{refused} of {len(answers)} requests were refused")
    return answers


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{percent}_ms": load.percentile_ms(seconds, percent) for percent in (50, 99)}


def _settle(stage: Stage, queue: str) -> None:
    """Leaves the next measurement an empty queue and a quiet broker."""
    stage.purge(queue)
    time.sleep(SETTLE_SECONDS)
