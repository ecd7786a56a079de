"""Results → lines for a person who watches, and docs/benchmarks.md. Pure but for write()."""

# ruff: noqa: RUF001 - the typography is for people

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.results import BASELINE, PREDLOG, Record, Results

_COUNT, _TENTHS, _HUNDREDTHS = "{:,.0f}", "{:,.1f}", "{:,.2f}"

# value name → (title with its unit, format)
VALUES = {
    "rate": ("per second", _COUNT),
    "offered": ("offered per second", _COUNT),
    "cpu_us": ("CPU each, µs", _TENTHS),
    "p50_ms": ("p50, ms", _HUNDREDTHS),
    "p99_ms": ("p99, ms", _HUNDREDTHS),
    "answer_p50_ms": ("answer p50, ms", _HUNDREDTHS),
    "answer_p99_ms": ("answer p99, ms", _HUNDREDTHS),
    "seconds": ("seconds", _HUNDREDTHS),
    "memory_mb": ("memory, MB", _TENTHS),
    "kb_per_connection": ("per connection, kB", _TENTHS),
    "memory_min_mb": ("memory least, MB", _TENTHS),
    "memory_max_mb": ("memory most, MB", _TENTHS),
    "status_200": ("200", _COUNT),
    "status_503": ("503", _COUNT),
    "status_504": ("504", _COUNT),
    "slowest_ms": ("slowest answer, ms", _COUNT),
    "broken": ("connections broken", _COUNT),
}

# What a case is compared by: the first of these that was measured in it, and whether more is better.
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
        "`wrk -t1`, closed loop, as many requests as are answered; RabbitMQ on the same cores. Both answer 200 only "
        "after the confirm of a persistent, mandatory message in a quorum queue. *RabbitMQ alone* takes pre-encoded "
        "frames from a bare socket with 4,096 unconfirmed. Memory is the peak of the process so far.",
        ("rate", "cpu_us", "p50_ms", "p99_ms", "memory_mb"),
    ),
    Topic(
        "latency", "Producer: latency at half of its highest rate",
        "An open loop on 64 connections: each request has its moment, and its latency counts from then.",
        ("offered", "p50_ms", "p99_ms"),
    ),
    Topic(
        "consumer", "Consumer: queue → CSV",
        "The drain of a backlog, measured from the first row in the file to the last; the size of the file is "
        "checked. predlog syncs and remembers every batch before it acks; the baseline only flushes. *RabbitMQ "
        "alone* delivers and takes an ack for every 256 messages, and nothing is done with them.",
        ("rate", "cpu_us", "memory_mb"),
    ),
    Topic(
        "end to end", "End to end: POST → row in the CSV",
        "Both processes at work. *1,000 calls*: on 32 connections, seconds until the last row is in the file. "
        "*1,000 requests/s*: an open loop; p50 and p99 until the last row of an event can be read from the file: "
        "predlog first gathers rows for `FLUSH_INTERVAL_MS` (50), for one sync a batch; the baseline never syncs. "
        "*32 connections*: `wrk`, messages over the time until the last row; CPU of both processes together.",
        ("seconds", "answer_p50_ms", "answer_p99_ms", "p50_ms", "p99_ms", "rate", "cpu_us"),
    ),
    Topic(
        "idle", "Idle connections",
        "Each has had one answer and is kept open.",
        ("memory_mb", "kb_per_connection"),
    ),
    Topic(
        "blocked", "A blocked broker under full load",
        "`wrk -c256` goes on while a memory alarm stops the broker from taking messages, with "
        "`CONFIRM_TIMEOUT_MS=2000`. Memory is that of the producer from the alarm on; the answers include those "
        "before it. A round ends only once the producer, the alarm being over, is ready again.",
        ("memory_min_mb", "memory_max_mb", "status_200", "status_503", "status_504", "slowest_ms", "broken"),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """What is aimed at. `met` None: not measured in this run."""

    name: str
    wanted: str
    shown: str
    met: bool | None


def targets(results: Results) -> list[Target]:
    """The project's targets beside what was measured; they hold for a machine of two cores with everything on it."""

    def median(section: str, case: str, value: str) -> float | None:
        return results.median(section, case, PREDLOG, value)

    def target(name: str, wanted: str, value: float | None, shown: str, met: bool) -> Target:
        if value is None:
            return Target(name, wanted, "not measured", None)
        return Target(name, wanted, shown.format(value), met)

    def at_most(name: str, limit: float, unit: str, value: float | None) -> Target:
        return target(name, f"≤ {limit:g} {unit}", value, "{:,.3g} " + unit, value is not None and value <= limit)

    def at_least(name: str, limit: float, value: float | None) -> Target:
        return target(name, f"≥ {limit:g} ×", value, "{:,.1f} ×", value is not None and value >= limit)

    idle_case = next(iter(results.cases("idle")), "")
    swing = [
        most - least
        for case in results.cases("blocked")
        if (most := median("blocked", case, "memory_max_mb")) is not None
        and (least := median("blocked", case, "memory_min_mb")) is not None
    ]
    return [
        at_most("producer, CPU per request, 32 connections", 20, "µs", median("producer", "32 connections", "cpu_us")),
        at_least("producer, requests/s beside the baseline", 6, results.ratio("producer", "32 connections", "rate")),
        at_most("consumer, CPU per message of 5.4 rows", 20, "µs", median("consumer", "backlog", "cpu_us")),
        at_least("consumer, messages/s beside the baseline", 8, results.ratio("consumer", "backlog", "rate")),
        at_most("HTTP → CSV, 1,000 calls", 0.5, "s", median("end to end", "1,000 calls", "seconds")),
        at_most("p99 at half of the highest rate", 10, "ms", median("latency", "half of its highest rate", "p99_ms")),
        at_most(f"memory, {idle_case}", 150, "MB", median("idle", idle_case, "memory_mb")),
        at_most("memory, blocked broker: most − least", 50, "MB", max(swing, default=None)),
    ]


def record_line(record: Record) -> str:
    """One line for the terminal."""
    known = [(*VALUES[name], value) for name, value in record.values.items() if name in VALUES]
    shown = [f"{title} {form.format(value)}" for title, form, value in known]
    return f"{record.section:<11} {record.case:<34} {record.subject:<19} " + " · ".join(shown)


def table(results: Results, topic: Topic) -> list[list[str]]:
    """Title row, then a row for each case and subject: medians, the range of the rounds beside rates."""
    measured = {name for record in results.records if record.section == topic.section for name in record.values}
    names = [name for name in topic.values if name in measured]
    rows = [["", "", *(VALUES[name][0] for name in names), "beside the baseline"]]
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
    rule = ["---", "---"] + ["---:"] * (len(first) - 2)
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
        f"[tests/bench](../tests/bench) — take turns on the same broker, {rounds} rounds each. Figures are medians, "
        "with the range of the rounds in brackets; the last column says how many times better than the baseline: "
        f"more per second, or less time or memory. Load: {load_text}. CPU is user + sys of the process itself, "
        "from /proc.",
        "![Throughput](throughput.svg)\n\n![Latency](latency.svg)",
        "## Targets",
        markdown_table(target_rows(results)),
    ]
    for topic in TOPICS:
        if results.cases(topic.section):
            parts += [f"## {topic.title}", topic.text, markdown_table(table(results, topic))]
    parts += ["## Machine and versions", "\n".join(f"- {name}: {value}" for name, value in machine.items())]
    return "\n\n".join(parts) + "\n"


def write(path: Path, results: Results, machine: dict[str, str], load_text: str, rounds: int) -> None:
    path.write_text(markdown(results, machine, load_text, rounds), encoding="utf-8")
