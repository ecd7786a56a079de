"""Counters, gauges and histograms over one flat array of floats, and their text in Prometheus' format.

Pure: no clock, no I/O. The layout is fixed before the first count, so the array can live in memory that several
worker processes share, one array each. The worker that is scraped merges all of them.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
LATENCY_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BATCH_ROWS = (1.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 50000.0)

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})  # in the value of a label

Merge = Callable[[Iterable[float]], float]


@dataclass(slots=True)
class _Family:
    help: str
    type: str
    merge: Merge
    bounds: tuple[float, ...] = ()  # of a histogram only
    samples: dict[str, int] = field(default_factory=dict)  # first index, by label set: `{route="/process"}`, or nothing


class Metrics:
    """A set of metrics. Count with `metrics.values[index] += 1.0`, set a gauge with `metrics.values[index] = x`."""

    def __init__(self) -> None:
        self.values: MutableSequence[float] = array("d")
        self._families: dict[str, _Family] = {}
        self._histograms: list[Histogram] = []

    @property
    def size(self) -> int:
        """The number of floats that one process needs."""
        return len(self.values)

    def counter(self, name: str, help: str, /, **labels: str) -> int:
        """Register a counter, whose name ends in _total, or another label set of it; return its index."""
        return self._register(name, labels, _Family(help, "counter", sum), 1)

    def gauge(self, name: str, help: str, merge: Merge = sum, /, **labels: str) -> int:
        """Register a gauge, or another label set of it; return its index. `merge` (sum, max, min) is over processes."""
        return self._register(name, labels, _Family(help, "gauge", merge), 1)

    def histogram(self, name: str, help: str, bounds: Sequence[float], /) -> "Histogram":
        """Register a histogram with ascending, inclusive upper `bounds`. A bucket for +Inf is added."""
        start = self._register(name, {}, _Family(help, "histogram", sum, tuple(bounds)), len(bounds) + 2)
        histogram = Histogram(start, tuple(bounds))
        self._histograms.append(histogram)
        return histogram

    def settle(self) -> None:
        """Count the observed values in their buckets in `values`. Call it a few times a second."""
        for histogram in self._histograms:
            histogram.settle(self.values)

    def bind(self, values: MutableSequence[float]) -> None:
        """Continue counting in `values`, of `size` floats. Call it once, after the last registration.

        What `values` already holds was counted by a dead predecessor of this process. Counters continue from there,
        since Prometheus reads a total that falls as a restart of all processes. Gauges start again.
        """
        gauges = {i for f in self._families.values() if f.type == "gauge" for i in f.samples.values()}
        for i, (value, before) in enumerate(zip(self.values, values, strict=True)):
            values[i] = value if i in gauges else value + before
        self.values = values

    def render(self, all_values: Sequence[Sequence[float]] = ()) -> bytes:
        """Return the text exposition (format 0.0.4) of the values of all processes, by default of this one only."""
        self.settle()
        columns = list(zip(*(all_values or (self.values,)), strict=True))
        lines: list[str] = []
        for name, family in self._families.items():
            lines += f"# HELP {name} {family.help}", f"# TYPE {name} {family.type}"
            for labels, start in family.samples.items():
                if not family.bounds:
                    lines.append(f"{name}{labels} {_number(family.merge(columns[start]))}")
                    continue
                end = start + len(family.bounds) + 1
                cumulative = [_number(count) for count in accumulate(map(sum, columns[start:end]))]
                les = (*map(_number, family.bounds), "+Inf")
                lines += (f'{name}_bucket{{le="{le}"}} {count}' for le, count in zip(les, cumulative, strict=True))
                lines += f"{name}_sum {_number(sum(columns[end]))}", f"{name}_count {cumulative[-1]}"
        return "\n".join((*lines, "")).encode()

    def _register(self, name: str, labels: dict[str, str], family: _Family, floats: int) -> int:
        known = self._families.setdefault(name, family)
        text = ",".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in sorted(labels.items()))
        text = text and f"{{{text}}}"
        if (known.type, known.merge) != (family.type, family.merge) or text in known.samples:
            raise ValueError(f"{name}{text} is registered already, or as something else")
        known.samples[text] = start = len(self.values)
        self.values += array("d", bytes(8 * floats))
        return start


class Histogram:
    """Counts by bucket, not cumulative, and then the sum, from index `start` in the values of its Metrics.

    `observe` takes one value, in the unit that the metric's name ends with. Sorting many into their buckets
    at once costs a fifth of sorting each as it comes.
    """

    __slots__ = ("_bounds", "_noted", "_start", "observe")

    def __init__(self, start: int, bounds: tuple[float, ...]) -> None:
        self._bounds = (*bounds, inf)
        self._start = start
        self._noted: list[float] = []
        self.observe: Callable[[float], None] = self._noted.append

    def settle(self, values: MutableSequence[float]) -> None:
        """Count in `values` what was observed since the last call."""
        if not self._noted:
            return
        self._noted.sort()
        below = 0
        for at, bound in enumerate(self._bounds, self._start):
            upto = bisect_right(self._noted, bound)
            values[at] += upto - below
            below = upto
        values[self._start + len(self._bounds)] += sum(self._noted)
        self._noted.clear()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)
