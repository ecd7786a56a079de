"""The report of a run: targets, ratios and charts, from records made up here."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import charts, report
from tests.bench.bare_amqp import Confirms
from tests.bench.results import BASELINE, BRIDGE_TUNED, FLOOR, HALF_LOAD, LIMIT, PLAIN, PREDLOG, SMALL, Record, Results

RATES = {PREDLOG: 8000.0, BRIDGE_TUNED: 5000.0, BASELINE: 1000.0, PLAIN: 4000.0, FLOOR: 10_000.0}


def made_up(baseline_cpu_us: float = 700.0) -> Results:
    cpu_us = {PREDLOG: 50.0, BRIDGE_TUNED: 40.0, BASELINE: baseline_cpu_us, PLAIN: 100.0, FLOOR: 25.0}
    records = [Record("producer", "32 connections", s, {"rate": r, "cpu_us": cpu_us[s]}) for s, r in RATES.items()]
    for subject, factor in {PREDLOG: 1.0, BRIDGE_TUNED: 2.0, BASELINE: 4.0, LIMIT: 0.5}.items():
        values = {"offered": 500.0, "p50_ms": factor, "p99_ms": 3 * factor, "p999_ms": 9 * factor}
        records.append(Record("latency", HALF_LOAD, subject, values))
    return Results(records)


def met(results: Results, name: str) -> bool | None:
    return next(target.met for target in report.targets(results) if target.name == name)


@pytest.mark.parametrize(("baseline_cpu_us", "expected"), [(700.0, True), (699.0, False)])
def test_a_target_is_met_at_its_limit_and_missed_below(baseline_cpu_us: float, expected: bool) -> None:
    first, second, *_ = report.targets(made_up(baseline_cpu_us))
    assert (first.met, second.met) == (True, expected)


def test_a_target_not_measured_is_neither_met_nor_missed() -> None:
    assert {target.met for target in report.targets(Results())} == {None}


def test_the_worst_case_of_the_latency_counts() -> None:
    results = made_up()
    assert met(results, "p99 at equal offered load, the worst case")
    for subject, p99_ms in ((PREDLOG, 5.0), (BASELINE, 4.0)):
        results.records.append(Record("latency", f"{SMALL}, all of the baseline's best", subject, {"p99_ms": p99_ms}))
    assert met(results, "p99 at equal offered load, the worst case") is False


def test_the_page_says_what_the_fast_lane_buys() -> None:
    page = report.markdown(made_up(), {"machine": "none"}, "no load", 3)
    assert "as many per second with 1/2.0 of the CPU" in page


def test_the_page_says_how_far_the_floor_is() -> None:
    page = report.markdown(made_up(), {"machine": "none"}, "no load", 3)
    assert "predlog compared with the floor" in page
    assert "as many per second with 2.0" in page


@pytest.mark.parametrize("results", [made_up(), Results()], ids=["measured", "nothing measured"])
def test_the_charts_are_small_and_well_formed(tmp_path: Path, results: Results) -> None:
    charts.write(tmp_path, results)
    for path in (tmp_path / "benchmarks.svg", tmp_path / "latency.svg"):
        root = ElementTree.parse(path).getroot()
        texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(path.read_text().splitlines()) < 200
        assert any("predlog" in text for text in texts) == bool(results.records)


def test_bare_confirms_count_each_tag_once() -> None:
    confirms = Confirms()
    assert [confirms.add(2, False), confirms.add(3, True), confirms.add(4, False)] == [[2], [1, 3], [4]]
    assert confirms.count == 4
