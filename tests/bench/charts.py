"""The two charts: benchmarks.svg, the figures that matter most, and latency.svg, latency at equal load."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.results import (
    BASELINE,
    BRIDGE_TUNED,
    FEW,
    HALF_LOAD,
    IMAGES,
    IMAGES_CASE,
    MANY,
    PREDLOG,
    SINGLE,
    SMALL,
    Results,
)

COLOURS = {PREDLOG: "#0b6bcb", SINGLE: "#7fb3e6", BRIDGE_TUNED: "#d9822b", BASELINE: "#9aa4ae"}
PANELS = (  # title, section, case, value, form
    ("32 connections, events/s", "producer", FEW, "rate", "{:,.0f}"),
    ("256 connections, events/s", "producer", MANY, "rate", "{:,.0f}"),
    ("5 images of 20 KB, events/s", "producer", IMAGES_CASE, "rate", "{:,.0f}"),
    ("p99 at equal load, ms (less is better)", "latency", HALF_LOAD, "p99_ms", "{:,.1f}"),
)
pyplot.rcParams |= {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "predlog",  # the same figures give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
}


def write(folder: Path, results: Results) -> None:
    """Draw what was measured. What was not measured is left out."""
    _overview(folder / "benchmarks.svg", results)
    _latency(folder / "latency.svg", results)


def _overview(path: Path, results: Results) -> None:
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(12, 2.6), layout="constrained")
    for axes, (title, section, case, value, form) in zip(panels, PANELS, strict=True):
        shown = {s: m for s in COLOURS if (m := results.median(section, case, s, value)) is not None}
        bars = axes.barh(list(shown), list(shown.values()), color=[COLOURS[subject] for subject in shown])
        axes.bar_label(bars, [form.format(m) for m in shown.values()], padding=3)
        axes.set(title=title, xticks=[])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        if axes is not panels[0]:
            axes.set_yticks([])
    _save(path, figure, "HTTP → RabbitMQ: predlog compared with mq-bridge (Rust), tuned, and FastAPI + aio-pika")


def _latency(path: Path, results: Results) -> None:
    """For each load a stroke from p50 to p99.9 for each program, with a dot at p99."""
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for axes, kind in zip(panels, (SMALL, IMAGES), strict=True):
        _strokes(axes, results, [case for case in results.cases("latency") if case.startswith(kind)])
        axes.set(title=f"{kind}: p50 to p99.9, dot at p99, ms", yscale="log", xlabel="events offered per second")
    handles, names = panels[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    if unique:
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False)
    _save(path, figure, "Latency at equal offered load")


def _strokes(axes: Axes, results: Results, cases: list[str]) -> None:
    offered = []
    for column, case in enumerate(cases):
        offered.append(next(m for s in COLOURS if (m := results.median("latency", case, s, "offered")) is not None))
        for position, subject in enumerate(COLOURS):
            p50, p99, p999 = (results.median("latency", case, subject, f"p{name}_ms") for name in ("50", "99", "999"))
            if p50 is not None and p99 is not None and p999 is not None:
                x = column + (position - 1.5) * 0.15
                axes.vlines(x, p50, p999, color=COLOURS[subject], linewidth=3)
                axes.plot(x, p99, "o", color=COLOURS[subject], label=subject)
    axes.set_xticks(range(len(cases)), [f"{rate:,.0f}" for rate in offered])


def _save(path: Path, figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
