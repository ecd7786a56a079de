"""The two charts of the README: throughput.svg and latency.svg.

On a background of their own, so that they read the same on a light and on a dark page; text is drawn as paths, so that
it fits wherever it is shown.
"""

# ruff: noqa: RUF001 - the typography is for people

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.results import BASELINE, LIMIT, PREDLOG, Results

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"
COLOURS = {PREDLOG: "#0b6bcb", BASELINE: "#b0b7be", LIMIT: "#e8ebee"}
WEIGHTS = {PREDLOG: "bold", BASELINE: "normal"}
BAR = 0.36

# (section, case, what a reader sees)
THROUGHPUT = (
    ("producer", "1 connection", "POST → confirm\n1 connection"),
    ("producer", "32 connections", "POST → confirm\n32 connections"),
    ("producer", "256 connections", "POST → confirm\n256 connections"),
    ("consumer", "backlog", "queue → CSV\nbacklog"),
    ("end to end", "32 connections", "POST → CSV\n32 connections"),
)
LATENCY = (
    ("latency", "half of its highest rate", "POST → confirm\nat half of its highest rate"),
    ("end to end", "1,000 requests/s", "POST → row in the CSV\nat 1,000 requests/s"),
)


def write(folder: Path, results: Results) -> None:
    """Draws what was measured; what was not is left out."""
    matplotlib.rcParams |= {"svg.hashsalt": "predlog", "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK}
    for name, figure in (("throughput", throughput(results)), ("latency", latency(results))):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor=PAPER)
        plt.close(figure)


def throughput(results: Results) -> Figure:
    """A pair of bars for each case; RabbitMQ's own limit stands behind them where it was measured."""
    cases = [c for c in THROUGHPUT if results.median(c[0], c[1], PREDLOG, "rate") is not None]
    figure, axes = _figure(len(cases), "Messages per second", "longer is better; both with confirms and quorum queues")
    highest = max((r.values["rate"] for r in results.records if "rate" in r.values), default=1.0)
    for row, (section, case, _) in enumerate(cases):
        limit = results.median(section, case, LIMIT, "rate")
        if limit is not None:
            axes.barh(row, limit, height=2 * BAR + 0.12, color=COLOURS[LIMIT], zorder=1)
            axes.text(highest * 1.25, row, f"alone {limit:,.0f}", va="center", ha="right", color=FAINT, zorder=3)
        for offset, subject in ((-BAR / 2, PREDLOG), (BAR / 2, BASELINE)):
            rate = results.median(section, case, subject, "rate")
            if rate is None:
                continue
            axes.barh(row + offset, rate, height=BAR, color=COLOURS[subject], zorder=2)
            label = f"{rate:,.0f}"
            cpu = results.median(section, case, subject, "cpu_us")
            if cpu is not None:
                label += f"   {cpu:,.0f} µs CPU each"
            ratio = results.ratio(section, case, "rate")
            if subject == PREDLOG and ratio:
                label += f"   ×{ratio:.1f}"
            axes.text(rate + highest * 0.01, row + offset, label, va="center", weight=WEIGHTS[subject], zorder=3)
    axes.set_xlim(0, highest * 1.25)
    axes.set_yticks(range(len(cases)), [label for _, _, label in cases])
    _legend(figure, [PREDLOG, BASELINE, LIMIT])
    return figure


def latency(results: Results) -> Figure:
    """A line from p50 to p99 for each program, on a logarithmic scale."""
    cases = [c for c in LATENCY if results.median(c[0], c[1], PREDLOG, "p99_ms") is not None]
    subtitle = "further left is better; open loop, from the moment each request was due; logarithmic"
    figure, axes = _figure(len(cases), "Latency, from p50 to p99", subtitle)
    shown: list[float] = []
    for row, (section, case, _) in enumerate(cases):
        for offset, subject in ((-BAR / 2, PREDLOG), (BAR / 2, BASELINE)):
            p50 = results.median(section, case, subject, "p50_ms")
            p99 = results.median(section, case, subject, "p99_ms")
            if p50 is None or p99 is None:
                continue
            shown += (p50, p99)
            axes.plot([p50, p99], [row + offset] * 2, color=COLOURS[subject], linewidth=5, solid_capstyle="round")
            label = f"   {_ms(p50)} – {_ms(p99)}"
            offered = results.median(section, case, subject, "offered")
            if offered is not None:
                label += f"   at {offered:,.0f} requests/s"
            axes.text(p99, row + offset, label, va="center", weight=WEIGHTS[subject])
    axes.set_xscale("log")
    if shown:
        low, high = min(shown) / 1.5, max(shown)
        axes.set_xlim(low, high * (high / low) ** 0.8)
    axes.set_yticks(range(len(cases)), [label for _, _, label in cases])
    _legend(figure, [PREDLOG, BASELINE])
    return figure


def _figure(rows: int, title: str, subtitle: str) -> tuple[Figure, Axes]:
    height = 1.3 + 0.85 * max(rows, 1)
    figure, axes = plt.subplots(figsize=(9, height))
    figure.subplots_adjust(left=0.23, right=0.98, top=1 - 0.75 / height, bottom=0.5 / height)
    figure.text(0.02, 1 - 0.3 / height, title, size=14, weight="bold")
    figure.text(0.02, 1 - 0.55 / height, subtitle, size=9, color=FAINT)
    axes.set_ylim(max(rows, 1) - 0.5, -0.5)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False, which="both")
    axes.set_facecolor(PAPER)
    return figure, axes


def _legend(figure: Figure, subjects: list[str]) -> None:
    """Names in their colours along the bottom."""
    x = 0.23
    for subject in subjects:
        figure.text(x, 0.12 / figure.get_figheight(), "■", color=COLOURS[subject], size=12)
        figure.text(x + 0.022, 0.13 / figure.get_figheight(), subject, size=9, color=INK)
        x += 0.06 + 0.0115 * len(subject)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
