"""The two charts: benchmarks.svg, the figures that matter most, and latency.svg, latency at equal load.

On a background of their own, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from tests.bench.results import BASELINE, BRIDGE_TUNED, HALF_LOAD, IMAGES, IMAGES_CASE, LIMIT, PREDLOG, SMALL, Results

PAPER, INK, FAINT, RULE = "#ffffff", "#1f2328", "#6e7781", "#e4e7eb"
COLOURS = {PREDLOG: "#0b6bcb", BRIDGE_TUNED: "#d9822b", BASELINE: "#9aa4ae", LIMIT: "#1f2328"}
NAMES = {PREDLOG: "predlog", BRIDGE_TUNED: "mq-bridge (Rust)", BASELINE: "FastAPI + aio-pika", LIMIT: "RabbitMQ alone"}
TITLES = {SMALL: "Small events", IMAGES: f"Events with {IMAGES}"}
BARS = (PREDLOG, BRIDGE_TUNED, BASELINE)
STROKES = (PREDLOG, BRIDGE_TUNED, BASELINE, LIMIT)
WIDTH, MARGIN = 900, 24
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def write(folder: Path, results: Results) -> None:
    """Draws what was measured; what was not is left out."""
    (folder / "benchmarks.svg").write_text(overview(results), encoding="utf-8")
    (folder / "latency.svg").write_text(latency(results), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    subtitle: str
    section: str
    case: str
    value: str
    form: str


PANELS = (
    _Panel(TITLES[SMALL], "events/s, longer is better", "producer", "32 connections", "rate", "{:,.0f}/s"),
    _Panel(TITLES[IMAGES], "events/s, longer is better", "producer", IMAGES_CASE, "rate", "{:,.0f}/s"),
    _Panel("Latency at equal load", "p99, shorter is better", "latency", HALF_LOAD, "p99_ms", "{:,.1f} ms"),
)


def overview(results: Results) -> str:
    """Three panels of bars, the programs below each other in the same order."""
    panel_width = (WIDTH - 2 * MARGIN - 2 * 36) / 3
    parts = [
        _text(MARGIN, 36, "HTTP → RabbitMQ, each event confirmed", 17, weight="bold"),
        _text(
            MARGIN,
            56,
            "quorum queue, answered after the publisher confirm; broker and load on the same machine",
            12,
            FAINT,
        ),
    ]
    panels = [panel for panel in PANELS if results.all(panel.section, panel.case, PREDLOG, panel.value)]
    for number, panel in enumerate(panels):
        left = MARGIN + number * (panel_width + 36)
        parts += _bars(results, panel, left, 92, panel_width)
    if any(results.all(panel.section, panel.case, BRIDGE_TUNED, panel.value) for panel in PANELS):
        parts.append(_text(MARGIN, 268, "mq-bridge, tuned: it validates nothing and gives no message an id", 11, FAINT))
    return _svg(286, "predlog compared with mq-bridge and FastAPI", parts)


def _bars(results: Results, panel: _Panel, left: float, top: float, width: float) -> Iterator[str]:
    subtitle = panel.subtitle
    offered = results.median(panel.section, panel.case, PREDLOG, "offered")
    if offered is not None:
        subtitle = f"{subtitle}; {offered:,.0f} events/s"
    yield _text(left, top, panel.title, 14, weight="bold")
    yield _text(left, top + 17, subtitle, 11, FAINT)
    measured = {s: results.median(panel.section, panel.case, s, panel.value) for s in BARS}
    longest = max((value for value in measured.values() if value), default=1.0)
    y = top + 40
    for subject, value in measured.items():
        if value is None:
            continue
        bold = "bold" if subject == PREDLOG else "normal"
        yield _text(left, y, NAMES[subject], 12, weight=bold)
        yield _rect(left, y + 6, max(2.0, (width - 76) * value / longest), 14, COLOURS[subject])
        x = left + (width - 76) * value / longest + 6
        yield _text(x, y + 17.5, panel.form.format(value), 12, weight=bold)
        cpu = results.median(panel.section, panel.case, subject, "cpu_us")
        if cpu is not None:
            yield _text(left + width, y, f"{cpu:,.0f} µs CPU each", 11, FAINT, anchor="end")
        y += 42


def latency(results: Results) -> str:
    """For each load a stroke from p50 to p99.9 for each program, with a dot at p99; logarithmic."""
    height, top, bottom = 400, 128, 62
    panel_width = (WIDTH - 2 * MARGIN - 60) / 2
    parts = [
        _text(MARGIN, 36, "Latency at equal offered load", 17, weight="bold"),
        _text(MARGIN, 56, "each line from p50 to p99.9, the dot is p99; lower is better, logarithmic", 12, FAINT),
    ]
    x = float(MARGIN)
    for subject in STROKES:
        if any(results.all("latency", case, subject, "p99_ms") for case in results.cases("latency")):
            parts += [_rect(x, 71, 12, 12, COLOURS[subject]), _text(x + 18, 81.5, NAMES[subject], 12)]
            x += 44 + 6.6 * len(NAMES[subject])
    for number, kind in enumerate((SMALL, IMAGES)):
        cases = [case for case in results.cases("latency") if case.startswith(kind)]
        left = MARGIN + number * (panel_width + 60)
        parts += _strokes(results, kind, cases, left, top, panel_width, height - top - bottom)
    return _svg(height, "Latency at equal offered load", parts)


def _strokes(
    results: Results, kind: str, cases: Sequence[str], left: float, top: float, width: float, height: float
) -> Iterator[str]:
    names = ("p50_ms", "p99_ms", "p999_ms")
    shown = [m for case in cases for s in STROKES for name in names if (m := results.median("latency", case, s, name))]
    yield _text(left, top - 12, TITLES[kind], 14, weight="bold")
    if not shown:
        return
    low, high = log10(min(shown)) - 0.1, log10(max(shown)) + 0.1

    def y(milliseconds: float) -> float:
        return top + height * (high - log10(milliseconds)) / (high - low)

    plot_left = left + 52
    for power in range(ceil(low), floor(high) + 1):
        yield _line(plot_left, y(10.0**power), left + width, y(10.0**power), RULE, 1)
        label = f"{10.0**power:g} ms" if power < 3 else f"{10 ** (power - 3):g} s"
        yield _text(plot_left - 8, y(10.0**power) + 4, label, 11, FAINT, anchor="end")
    step = (left + width - plot_left) / len(cases)
    for column, case in enumerate(cases):
        middle = plot_left + step * (column + 0.5)
        offered = next(m for s in STROKES if (m := results.median("latency", case, s, "offered")) is not None)
        yield _text(middle, top + height + 20, f"{offered:,.0f}/s", 12, anchor="middle")
        for position, subject in enumerate(STROKES):
            p50, p99, p999 = (results.median("latency", case, subject, name) for name in names)
            if p50 is None or p99 is None or p999 is None:
                continue
            x = middle + (position - (len(STROKES) - 1) / 2) * min(14.0, step / 5)
            yield _line(x, y(p50), x, y(p999), COLOURS[subject], 3)
            yield _circle(x, y(p99), 4.5, COLOURS[subject])
    yield _text(plot_left, top + height + 40, "events offered per second", 11, FAINT)


def _svg(height: float, title: str, parts: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img" '
        f'font-family="{FONT}">'
    )
    frame = f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{PAPER}"/>'
    return "\n".join((head, f"<title>{escape(title)}</title>", frame, *parts, "</svg>\n"))


def _text(
    x: float, y: float, text: str, size: float, fill: str = INK, weight: str = "normal", anchor: str = "start"
) -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"'
    if weight != "normal":
        attributes += f' font-weight="{weight}"'
    if anchor != "start":
        attributes += f' text-anchor="{anchor}"'
    return f"<text {attributes}>{escape(text)}</text>"


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:g}" rx="2" fill="{fill}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}" stroke-linecap="round"/>'


def _circle(x: float, y: float, radius: float, fill: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" stroke="{PAPER}"/>'
