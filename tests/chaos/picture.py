"""The picture of a chaos run: predictions answered 200 over time, the rows at the end, and a mark for each trouble."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """What was counted `seconds` after the start."""

    seconds: float
    answered: int  # predictions of events that were answered 200


class Mark(NamedTuple):
    """A trouble, and whether it killed a process."""

    seconds: float
    kills: bool


def draw(path: Path, title: str, samples: list[Sample], marks: list[Mark], rows: int) -> None:
    """Write an SVG file."""
    import matplotlib  # half a second, which most runs save

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "predlog", "font.size": 9}
    figure, axes = pyplot.subplots(figsize=(12, 3.4), layout="constrained")
    seconds = [sample.seconds for sample in samples]
    axes.plot(seconds, [each.answered for each in samples], color="#0b6bcb", label="predictions answered 200")
    axes.plot(
        seconds[-1:], [rows] * len(seconds[-1:]), "o", color="#d9822b", label=f"{rows:,} rows in the CSV at the end"
    )
    for kills, colour, label in ((True, "#c03030", "one or several kills"), (False, "#9aa4ae", "another trouble")):
        at = [mark.seconds for mark in marks if mark.kills == kills]
        axes.plot(at, [0] * len(at), "|", color=colour, markersize=14, markeredgewidth=1.2, label=label, clip_on=False)
    axes.set(xlabel="seconds", ylim=(0, None), xlim=(0, None), title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
