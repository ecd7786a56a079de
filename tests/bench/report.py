"""Results → lines for a person who watches, and docs/benchmarks.md. Pure, except for write()."""

# ruff: noqa: RUF001 - the typography is for people

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.results import (
    BASELINE,
    BRIDGE_TUNED,
    FEW,
    FLOOR,
    HALF_LOAD,
    IMAGES,
    IMAGES_CASE,
    MANY,
    PREDLOG,
    SINGLE,
    SMALL,
    Record,
    Results,
)

_COUNT, _TENTHS, _HUNDREDTHS = "{:,.0f}", "{:,.1f}", "{:,.2f}"

# value name → (title with its unit, format)
VALUES = {
    "rate": ("per second", _COUNT),
    "offered": ("offered per second", _COUNT),
    "cpu_us": ("CPU each, µs", _TENTHS),
    "broker_us": ("broker's CPU each, µs", _TENTHS),
    "producer_cpu_us": ("producer, CPU each, µs", _TENTHS),
    "drain_rate": ("drained per second", _COUNT),
    "consumer_cpu_us": ("consumer, CPU each, µs", _TENTHS),
    "p50_ms": ("p50, ms", _HUNDREDTHS),
    "p99_ms": ("p99, ms", _HUNDREDTHS),
    "p999_ms": ("p99.9, ms", _HUNDREDTHS),
    "answer_p50_ms": ("answer p50, ms", _HUNDREDTHS),
    "answer_p99_ms": ("answer p99, ms", _HUNDREDTHS),
    "answer_p999_ms": ("answer p99.9, ms", _HUNDREDTHS),
    "fsyncs": ("fsyncs per second", _COUNT),
    "seconds": ("seconds", _HUNDREDTHS),
    "memory_mb": ("memory, MB", _TENTHS),
    "kb_per_connection": ("per connection, kB", _TENTHS),
    "memory_max_mb": ("memory most, MB", _TENTHS),
    "memory_growth_mb": ("second half − first, MB", _TENTHS),
    "status_200": ("200", _COUNT),
    "status_503": ("503", _COUNT),
    "status_504": ("504", _COUNT),
    "slowest_ms": ("slowest answer, ms", _COUNT),
    "broken": ("connections broken", _COUNT),
}

# By what a case is compared: the first of these that was measured in it, and whether more is better.
COMPARED = (("rate", True), ("seconds", False), ("p99_ms", False), ("memory_mb", False))


@dataclass(frozen=True, slots=True)
class Topic:
    """A section of the page: what it says, and which values its table shows, in this order."""

    section: str
    title: str
    text: str
    values: tuple[str, ...]


TOPICS = (
    Topic(
        "producer", "Producer: POST → confirm",
        "`wrk -t1`, closed loop, as many requests as are answered; RabbitMQ on the same cores. All answer only after "
        "the publisher confirm of a persistent message in a quorum queue. *mq-bridge* validates nothing, echoes "
        "nothing, and its messages have no id and are not mandatory; it runs with its defaults and *tuned*, in the "
        "best combination of its settings that was found. *The floor* is the smallest program on uvloop and orjson "
        "that reads a request, publishes its event and echoes it, and checks neither. *RabbitMQ alone* takes "
        "pre-encoded frames, one event a message, from a bare socket with 4,096 unconfirmed. predlog can be faster: "
        "under load it puts several events into one message. *One event a message* is predlog with "
        "`EVENTS_PER_MESSAGE=1`. Memory is the peak of the process so far.",
        ("rate", "cpu_us", "broker_us", "p50_ms", "p99_ms", "memory_mb"),
    ),
    Topic(
        "batches", "Producer: batches",
        "`POST /process/batch` with 1,000 events each (NDJSON), four at a time, as many as are answered.",
        ("rate", "cpu_us", "broker_us"),
    ),
    Topic(
        "latency", "Producer: latency at equal offered load",
        "An open loop on 64 connections: each request has its moment, and its latency counts from then; the client "
        "looks at its clock every millisecond. All are offered the same, in shares of the baseline's highest rate "
        "above; beyond that, predlog alone.",
        ("offered", "p50_ms", "p99_ms", "p999_ms"),
    ),
    Topic(
        "consumer", "Consumer: queue → CSV",
        "The drain of a backlog, measured from the first row in the file to the last; the size of the file is "
        "checked. predlog syncs and remembers every batch before it acks; the baseline only flushes. *RabbitMQ alone* "
        "delivers and takes an ack for every 256 messages, and nothing is done with them. predlog's small events were "
        "posted on 256 connections, so they share messages as under load; *one event a message* and all others "
        "read a queue in which each event is a message of its own.",
        ("rate", "cpu_us", "memory_mb"),
    ),
    Topic(
        "end to end", "End to end: POST → row in the CSV",
        "Both processes at work. *1,000 calls*: on 32 connections, seconds until the last row is in the file. "
        "*1,000 requests/s*: an open loop; p50, p99 and p99.9 until the last row of an event can be read from the "
        "file. *32 connections*: `wrk`, events over the time until the last row; CPU of both processes together. "
        "predlog syncs each batch before its rows count as stored; the baseline never syncs.",
        ("seconds", "answer_p50_ms", "answer_p99_ms", "p50_ms", "p99_ms", "p999_ms", "rate", "cpu_us", "fsyncs"),
    ),
    Topic(
        "idle", "Idle connections",
        "Each connection has served one request and stays open.",
        ("memory_mb", "kb_per_connection"),
    ),
    Topic(
        "blocked", "A blocked broker under full load",
        "`wrk -c256` continues while a memory alarm stops the broker from taking messages, with "
        "`CONFIRM_TIMEOUT_MS=2000`. Memory is that of the producer from the alarm on: the most, and how much more that "
        "was in the second half of the time than in the first. The answers include those before the alarm. A round "
        "ends only once the producer, the alarm being over, is ready again.",
        ("memory_max_mb", "memory_growth_mb", "status_200", "status_503", "status_504", "slowest_ms", "broken"),
    ),
    Topic(
        "partitions", "Partitions",
        "`wrk` on 256 connections while the consumer is stopped, then the drain of that backlog. Everything is on the "
        "same cores, so that partitions do not make it faster; what counts is the CPU of each process for an event. "
        "At a low rate several consumers have smaller batches than one, and need more CPU for each event, on cores "
        "that are idle otherwise. [scaling.md](scaling.md) says what it means for more machines.",
        ("rate", "producer_cpu_us", "drain_rate", "consumer_cpu_us"),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A target. `met` is None if it was not measured in this run."""

    name: str
    wanted: str
    shown: str
    met: bool | None


def targets(results: Results) -> list[Target]:
    """The project's targets and what was measured; ratios, so that they hold on any machine."""

    def target(name: str, wanted: str, shown: str, met: Callable[[float], bool], value: float | None) -> Target:
        if value is None:
            return Target(name, wanted, "not measured", None)
        return Target(name, wanted, shown.format(value), met(value))

    def at_most(name: str, limit: float, unit: str, value: float | None) -> Target:
        return target(name, f"≤ {limit:g} {unit}", "{:,.3g} " + unit, lambda measured: measured <= limit, value)

    def times(name: str, limit: float, section: str, case: str, other: str = BASELINE) -> Target:
        value = results.ratio(section, case, "rate", other)
        return target(name, f"≥ {limit:g} ×", "{:,.2f} ×", lambda measured: measured >= limit, value)

    def cost(name: str, limit: float, case: str, value: str, other: str, section: str = "producer") -> Target:
        return at_most(name, limit, "×", results.ratio(section, case, value, other))

    def median(section: str, case: str, value: str) -> float | None:
        return results.median(section, case, PREDLOG, value)

    def worst(section: str, value: str) -> float | None:
        found = [m for case in results.cases(section) if (m := median(section, case, value)) is not None]
        return max(found, default=None)

    def worst_p99(other: str) -> float | None:
        found = [r for case in results.cases("latency") if (r := results.ratio("latency", case, "p99_ms", other))]
        return max(found, default=None)

    idle_case = next(iter(results.cases("idle")), "idle connections")
    batch_case = next(iter(results.cases("batches")), "batches")
    at_rate = "1,000 requests/s"
    return [
        times(f"producer, {FEW}: requests/s, to the baseline", 10, "producer", FEW),
        times(f"producer, {MANY}: the same", 17, "producer", MANY),
        times(f"producer, {FEW}: requests/s, to the floor", 1.2, "producer", FEW, FLOOR),
        times(f"producer, {MANY}: the same", 1.2, "producer", MANY, FLOOR),
        times(f"producer, {FEW}: requests/s, to the tuned bridge", 1.3, "producer", FEW, BRIDGE_TUNED),
        times(f"producer, {MANY}: the same", 1.3, "producer", MANY, BRIDGE_TUNED),
        cost(f"broker's CPU for an event, {FEW}, to one event a message", 1 / 1.8, FEW, "broker_us", SINGLE),
        cost(f"the same, {MANY}", 1 / 4, MANY, "broker_us", SINGLE),
        cost(f"producer's CPU, {FEW}, to the baseline", 1 / 14, FEW, "cpu_us", BASELINE),
        cost("the same, to the floor", 1.5, FEW, "cpu_us", FLOOR),
        cost("p99 of one connection, to one event a message", 1, "1 connection", "p99_ms", SINGLE),
        at_most("p99 at equal offered load, to one event a message, worst", 1, "×", worst_p99(SINGLE)),
        at_most("the same, to the baseline", 1, "×", worst_p99(BASELINE)),
        times("batches: events/s, to one event a message", 2, "batches", batch_case, SINGLE),
        times("producer, images: events/s, to the floor", 1, "producer", IMAGES_CASE, FLOOR),
        cost("the same: CPU", 1.3, IMAGES_CASE, "cpu_us", FLOOR),
        times("consumer, small events: events/s, to the baseline", 18, "consumer", SMALL),
        cost("the same: CPU", 1 / 18, SMALL, "cpu_us", BASELINE, "consumer"),
        at_most("the same: memory", 100, "MB", median("consumer", SMALL, "memory_mb")),
        times("consumer, images: events/s, to the baseline", 4, "consumer", IMAGES),
        at_most("POST → row at 1,000 events/s, p50", 8, "ms", median("end to end", at_rate, "p50_ms")),
        at_most("POST → row at 1,000 events/s, p99", 25, "ms", median("end to end", at_rate, "p99_ms")),
        at_most(f"memory, {idle_case}", 150, "MB", median("idle", idle_case, "memory_mb")),
        at_most("memory, blocked broker: most", 256, "MB", worst("blocked", "memory_max_mb")),
        at_most("memory, blocked broker: growth", 5, "MB", worst("blocked", "memory_growth_mb")),
    ]


# (words, section, case, value, unit), for the table that the README shows too
_SUMMARY = (
    ("`POST /process` → confirm, 32 connections", "producer", FEW, "rate", "/s"),
    ("the same, 256 connections", "producer", MANY, "rate", "/s"),
    ("the same, 32 connections, 5 images of 20 KB each", "producer", IMAGES_CASE, "rate", "/s"),
    ("p99 of the answer, half of the baseline's best rate", "latency", HALF_LOAD, "p99_ms", " ms"),
    ("queue → CSV, small events of 5.4 rows", "consumer", SMALL, "rate", "/s"),
    ("queue → CSV, events of 5 images of 20 KB each", "consumer", IMAGES, "rate", "/s"),
    ("POST → row in the CSV at 1,000 events/s, p50", "end to end", "1,000 requests/s", "p50_ms", " ms"),
    ("the same, p99", "end to end", "1,000 requests/s", "p99_ms", " ms"),
    ("memory, 10,000 idle connections", "idle", "10,000 idle connections", "memory_mb", " MB"),
)


def summary_rows(results: Results) -> list[list[str]]:
    """A row for each figure that matters most, a column for each program."""
    rows = [["", PREDLOG, BRIDGE_TUNED, BASELINE]]
    for words, section, case, value, unit in _SUMMARY:
        cells = []
        for subject in (PREDLOG, BRIDGE_TUNED, BASELINE):
            median = results.median(section, case, subject, value)
            form = _TENTHS if unit == " ms" else _COUNT
            cell = "" if median is None else form.format(median) + unit
            cpu_us = results.median(section, case, subject, "cpu_us")
            cells.append(cell if cpu_us is None else f"{cell}, {cpu_us:,.0f} µs of CPU each")
        if cells[0]:
            rows.append([words, *cells])
    return rows


def record_line(record: Record) -> str:
    """One line for the terminal."""
    known = [(*VALUES[name], value) for name, value in record.values.items() if name in VALUES]
    shown = [f"{title} {form.format(value)}" for title, form, value in known]
    return f"{record.section:<11} {record.case:<48} {record.subject:<19} " + " · ".join(shown)


def table(results: Results, topic: Topic) -> list[list[str]]:
    """Title row, then a row for each case and subject: medians, with the range of the rounds at each rate."""
    measured = {name for record in results.records if record.section == topic.section for name in record.values}
    names = [name for name in topic.values if name in measured]
    rows = [["", "", *(VALUES[name][0] for name in names), "compared with the baseline"]]
    for case in results.cases(topic.section):
        for subject in results.subjects(topic.section, case):
            cells = [_cell(results, topic.section, case, subject, name) for name in names]
            rows.append([case, subject, *cells, _comparison(results, topic.section, case, subject)])
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]


def _cell(results: Results, section: str, case: str, subject: str, name: str) -> str:
    values = results.all(section, case, subject, name)
    if not values:
        return ""
    form = VALUES[name][1]
    median = form.format(results.median(section, case, subject, name))
    if name == "rate" and len(values) > 1:
        return f"{median} ({form.format(min(values))}–{form.format(max(values))})"
    return median


def _comparison(results: Results, section: str, case: str, subject: str) -> str:
    for name, more_is_better in COMPARED:
        value = results.median(section, case, subject, name)
        baseline = results.median(section, case, BASELINE, name)
        if value and baseline:
            return f"{value / baseline if more_is_better else baseline / value:.1f} ×"
    return ""


def text_table(rows: list[list[str]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(cells)))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Iterable[list[str]]) -> str:
    first, *rest = rows
    words = 2 if first[1] == "" else 1  # columns
    rule = ["---"] * words + ["---:"] * (len(first) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (first, rule, *rest))


def target_rows(results: Results) -> list[list[str]]:
    words = {True: "met", False: "missed", None: ""}
    return [["", "target", "measured", ""], *([t.name, t.wanted, t.shown, words[t.met]] for t in targets(results))]


def markdown(results: Results, machine: dict[str, str], load_text: str, rounds: int) -> str:
    """The whole page."""
    parts = [
        "# Benchmarks",
        "Written by `make bench`; every figure comes from one run of it. predlog and a *baseline* — what a competent "
        "user would build today from FastAPI, pydantic 2, uvicorn (uvloop, httptools) and aio-pika, see "
        f"[tests/bench](../tests/bench) — take turns on the same broker, {rounds} rounds each, every other one in "
        "reverse order. Figures are medians, with the range of the rounds in brackets; the last column says how many "
        "times better than the baseline "
        f"(above 1: more per second, or less time or memory). Load: {load_text}. CPU is user + sys of the process "
        "itself, from /proc.",
        "![The figures that matter most](benchmarks.svg)\n\n![Latency at equal load](latency.svg)",
        markdown_table(summary_rows(results)),
    ]
    for topic in TOPICS:
        if results.cases(topic.section):
            parts += [f"## {topic.title}", topic.text, markdown_table(table(results, topic))]
    parts += ["## Machine and versions", "\n".join(f"- {name}: {value}" for name, value in machine.items())]
    return "\n\n".join(parts) + "\n"


def write(path: Path, results: Results, machine: dict[str, str], load_text: str, rounds: int) -> None:
    path.write_text(markdown(results, machine, load_text, rounds), encoding="utf-8")
