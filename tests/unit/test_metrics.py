"""Metrics: a scraper reads what was counted, and counting costs next to nothing."""

import mmap
import re
import shutil
import subprocess
from array import array
from collections.abc import MutableSequence
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.consumer import metrics as consumer
from common.metrics import LATENCY_SECONDS, Metrics
from common.producer import metrics as producer


def parse(text: bytes) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return the samples as prometheus_client's own parser reads them: name -> label pairs -> value."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def example() -> tuple[Metrics, list[int]]:
    metrics = Metrics()
    return metrics, [
        metrics.counter("edge_requests_total", "Requests.", route="/process", status="200"),
        metrics.gauge("edge_open", "Connections open now."),
        metrics.counter("edge_requests_total", "Requests.", route="/process", status="422"),
        metrics.gauge("edge_oldest_seconds", "Age of the oldest.", max),
        metrics.gauge("edge_ready", "1 while all are ready.", min),
    ]


def test_every_sample_is_read_back_with_its_labels_and_value() -> None:
    metrics, (ok, open_, bad, *_) = example()
    metrics.values[ok] += 1.0
    metrics.values[ok] += 1.0
    metrics.values[bad] += 1.0
    metrics.values[open_] = 0.25
    samples = parse(metrics.render())
    assert samples["edge_requests_total"] == {
        (("route", "/process"), ("status", "200")): 2.0,
        (("route", "/process"), ("status", "422")): 1.0,
    }
    assert samples["edge_open"] == {(): 0.25}


def test_a_family_is_one_block_with_one_help_and_type() -> None:
    lines = example()[0].render().decode().splitlines()
    names = [line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")]
    assert [line for line in lines if "edge_requests_total" in line] == lines[:4]
    assert lines[0] == "# HELP edge_requests_total Requests."
    assert lines[1] == "# TYPE edge_requests_total counter"
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(set(names))


def test_labels_survive_escaping() -> None:
    metrics = Metrics()
    hostile = 'a"b\\c\nd\\n{},="'
    metrics.gauge("edge_info", "What it is.", max, value=hostile)
    text = metrics.render()
    assert text.count(b"\n") == 3
    assert parse(text)["edge_info"] == {(("value", hostile),): 0.0}


@pytest.mark.parametrize(
    ("value", "le"), [(0.0, "1"), (1.0, "1"), (1.0000001, "2.5"), (2.5, "2.5"), (2.6, "+Inf"), (1e9, "+Inf")]
)
def test_a_value_is_counted_in_the_first_bucket_that_holds_it(value: float, le: str) -> None:
    metrics = Metrics()
    histogram = metrics.histogram("edge_seconds", "Latency.", (1.0, 2.5))
    before = metrics.counter("edge_after_total", "Must stay untouched.")
    histogram.observe(value)
    samples = parse(metrics.render())
    holding = [labels[0][1] for labels, count in samples["edge_seconds_bucket"].items() if count == 1.0]
    assert holding[0] == le
    assert holding[-1] == "+Inf"
    assert samples["edge_seconds_count"] == {(): 1.0}
    assert samples["edge_seconds_sum"] == {(): value}
    assert metrics.values[before] == 0.0


def test_buckets_are_cumulative_and_the_last_is_the_count() -> None:
    metrics = Metrics()
    histogram = metrics.histogram("edge_seconds", "Latency.", LATENCY_SECONDS)
    for i in range(1000):
        histogram.observe(i / 50)
    samples = parse(metrics.render())
    counts = list(samples["edge_seconds_bucket"].values())
    assert counts == sorted(counts)
    assert counts[-1] == samples["edge_seconds_count"][()] == 1000.0
    assert samples["edge_seconds_sum"][()] == pytest.approx(9990.0)


def test_several_processes_add_up_and_gauges_merge() -> None:
    metrics, (ok, open_, _, oldest, ready) = example()
    histogram = metrics.histogram("edge_seconds", "Latency.", (1.0,))
    workers = [array("d", bytes(8 * metrics.size)) for _ in range(3)]
    for n, values in enumerate(workers, start=1):
        values[ok] = values[open_] = values[oldest] = n
        values[ready] = n - 1
    metrics.values = workers[1]
    histogram.observe(0.5)
    samples = parse(metrics.render(workers))
    assert samples["edge_requests_total"][(("route", "/process"), ("status", "200"))] == 6.0
    assert samples["edge_open"] == {(): 6.0}
    assert samples["edge_oldest_seconds"] == {(): 3.0}
    assert samples["edge_ready"] == {(): 0.0}
    assert samples["edge_seconds_count"] == {(): 1.0}


def test_another_process_reads_what_is_counted_in_shared_memory() -> None:
    metrics, (ok, *_) = example()
    histogram = metrics.histogram("edge_seconds", "Latency.", (1.0,))
    metrics.values[ok] += 1.0
    shared = mmap.mmap(-1, 8 * metrics.size)
    metrics.bind(cast("MutableSequence[float]", memoryview(shared).cast("d")))
    metrics.values[ok] += 1.0
    histogram.observe(3.0)
    metrics.settle()
    seen_by_another = array("d", shared[:])
    assert (seen_by_another[ok], seen_by_another[-1]) == (2.0, 3.0)
    assert b'status="200"} 2\n' in metrics.render([seen_by_another])


def test_a_restarted_worker_keeps_counters_and_drops_gauges() -> None:
    metrics, (ok, *_) = example()
    left_behind = array("d", [41.0, 7.0, 0.0, 9.0, 1.0])
    metrics.values[ok] += 1.0
    metrics.bind(left_behind)
    assert list(metrics.values) == [42.0, 0.0, 0.0, 0.0, 0.0]
    assert metrics.values is left_behind


def test_values_of_another_layout_are_refused() -> None:
    metrics, _ = example()
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        metrics.bind(array("d", [0.0] * 4))
    with pytest.raises(ValueError, match="argument 2 is"):
        metrics.render([metrics.values, array("d", [0.0] * 4)])


def test_a_metric_is_registered_once() -> None:
    metrics, _ = example()
    with pytest.raises(ValueError, match="something else"):
        metrics.gauge("edge_requests_total", "Requests.")
    with pytest.raises(ValueError, match="registered already"):
        metrics.counter("edge_requests_total", "Requests.", status="200", route="/process")


@pytest.mark.parametrize("counters", [producer.Counters(), consumer.Counters()], ids=["producer", "consumer"])
def test_names_follow_the_conventions_of_prometheus(counters: producer.Counters | consumer.Counters) -> None:
    """https://prometheus.io/docs/practices/naming/"""
    for line in counters.metrics.render().decode().splitlines():
        if match := re.match("# TYPE (.*) (counter|gauge|histogram)$", line):
            assert re.fullmatch("(predlog|process)_[a-z_]+", match[1])
            assert match[1].endswith("_total") == (match[2] == "counter")


def test_large_and_fractional_values_are_written_exactly() -> None:
    metrics, (ok, open_, *_) = example()
    for value in (2.0**53 - 1, 0.1, 1e-9, 1.5e300, 12345678.9):
        metrics.values[ok] = metrics.values[open_] = value
        samples = parse(metrics.render())
        assert samples["edge_open"][()] == value
        assert samples["edge_requests_total"][(("route", "/process"), ("status", "200"))] == value


def test_promtool_finds_nothing_to_complain_about() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    metrics, _ = example()
    metrics.histogram("edge_seconds", "Latency.", LATENCY_SECONDS).observe(0.02)
    done = subprocess.run([promtool, "check", "metrics"], input=metrics.render(), capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
