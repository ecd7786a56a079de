"""The report of a run: targets, ratios and charts, from records made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.bare_amqp import Confirms
from tests.bench.results import (
    BASELINE,
    BRIDGE_TUNED,
    FEW,
    FLOOR,
    HALF_LOAD,
    PREDLOG,
    SINGLE,
    SMALL,
    Record,
    Results,
)

RATES = {PREDLOG: 10_000.0, SINGLE: 6000.0, BRIDGE_TUNED: 5000.0, BASELINE: 1000.0, FLOOR: 8000.0}


CPU_US = {PREDLOG: 50.0, SINGLE: 60.0, BRIDGE_TUNED: 40.0, BASELINE: 700.0, FLOOR: 34.0}


def made_up(rate: float = 10_000.0) -> Results:
    rates = RATES | {PREDLOG: rate}
    records = [Record("producer", FEW, s, {"rate": r, "cpu_us": CPU_US[s]}) for s, r in rates.items()]
    for subject, factor in {PREDLOG: 1.0, SINGLE: 1.0, BRIDGE_TUNED: 2.0, BASELINE: 4.0}.items():
        values = {"offered": 500.0, "p50_ms": factor, "p99_ms": 3 * factor, "p999_ms": 9 * factor}
        records.append(Record("latency", HALF_LOAD, subject, values))
    return Results(records)


def met(results: Results, name: str) -> bool | None:
    return next(target.met for target in report.targets(results) if target.name == name)


@pytest.mark.parametrize(("rate", "expected"), [(10_000.0, True), (9_999.0, False)])
def test_a_target_is_met_at_its_limit_and_missed_below(rate: float, expected: bool) -> None:
    assert report.targets(made_up(rate))[0].met == expected


def test_a_target_not_measured_is_neither_met_nor_missed() -> None:
    assert {target.met for target in report.targets(Results())} == {None}


def test_the_worst_case_of_the_latency_counts() -> None:
    results = made_up()
    assert met(results, "the same, to the baseline")
    for subject, p99_ms in ((PREDLOG, 5.0), (BASELINE, 4.0)):
        results.records.append(Record("latency", f"{SMALL}, all of the baseline's best", subject, {"p99_ms": p99_ms}))
    assert met(results, "the same, to the baseline") is False


def test_the_page_has_no_targets() -> None:
    page = report.markdown(made_up(), {"machine": "none"}, "no load", 3)
    assert "10,000" in page
    assert "target" not in page


@pytest.mark.parametrize("results", [made_up(), Results()], ids=["measured", "nothing measured"])
def test_the_charts_show_what_was_measured(tmp_path: Path, results: Results) -> None:
    from tests.bench import charts  # matplotlib, which each worker would load

    charts.write(tmp_path, results)
    for path in (tmp_path / "benchmarks.svg", tmp_path / "latency.svg"):
        assert ("predlog" in path.read_text().replace("predlog compared", "")) == bool(results.records)


def test_bare_confirms_count_each_tag_once() -> None:
    confirms, counts = Confirms(), []
    for tag, multiple in ((2, False), (3, True), (4, False)):
        confirms.add(tag, multiple)
        counts.append(confirms.count)
    assert counts == [1, 3, 4]
