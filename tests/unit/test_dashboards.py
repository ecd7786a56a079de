"""The dashboard and alert rules in deploy/monitoring: PromQL over real metrics, alerts that fire when they should."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]

from common.consumer import metrics as consumer_metrics
from common.consumer.partitions import Board
from common.producer import metrics as producer_metrics

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target["expr"] for panel in PANELS for target in panel["targets"]]
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}
TEXTS = (
    producer_metrics.Counters(partitions=2).metrics.render(),
    consumer_metrics.Counters().metrics.render(),
    Board([0, 1]).metrics(),
)
NAMES = set(re.findall(r"^# TYPE (\S+)", b"".join(TEXTS).decode(), re.MULTILINE))
PROMTOOL = shutil.which("promtool")


def names_in(expression: str) -> set[str]:
    """Return the metrics that a PromQL expression reads, a histogram's without its suffix. Fail on a syntax error."""
    promql_parser.parse(expression.replace("$__rate_interval", "5m"))
    words = set(re.findall(r"\b(?:predlog|process)_[a-z_]+", re.sub(r'"[^"]*"', '""', expression)))
    return {word if word in NAMES else re.sub(r"_(bucket|sum|count)$", "", word) for word in words}


@pytest.mark.parametrize("expression", TARGETS + [rule["expr"] for rule in ALERTS.values()])
def test_an_expression_is_promql_over_metrics_that_exist(expression: str) -> None:
    names = names_in(expression)
    assert names
    assert names <= NAMES


def test_every_metric_is_on_the_dashboard() -> None:
    assert set().union(*map(names_in, TARGETS)) == NAMES


def test_the_dashboard_fits_any_data_source_name() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating"} <= DASHBOARD.keys()
    assert "id" not in DASHBOARD  # that of another Grafana would overwrite something
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    sources = [panel["datasource"] for panel in PANELS] + [
        t["datasource"] for panel in PANELS for t in panel["targets"]
    ]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    used = set(re.findall(r"\$\{?([a-z]+)\}?", json.dumps(DASHBOARD["panels"])))
    assert used == set(variables)


def test_panels_have_a_unit_a_description_and_their_own_place() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["description"], panel["title"]
        seconds = any(name.endswith("_seconds") for target in panel["targets"] for name in names_in(target["expr"]))
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert (unit == "s") == (seconds and "start_time" not in json.dumps(panel)), panel["title"]


def test_alerts_tell_people_what_and_how_bad() -> None:
    for name, rule in ALERTS.items():
        assert name.startswith("Predlog")
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


# What makes each alert fire: series (promtool's notation, one value per minute) in which all else is well.
WELL = {
    'predlog_info{process="producer", version="1", job="p", instance="p1"}': "1x40",
    'predlog_info{process="consumer", version="1", job="c", instance="c1"}': "1x40",
    'predlog_active{job="c", instance="c1"}': "1x40",
    'predlog_active{job="c", instance="standby"}': "0x40",
    'predlog_amqp_connected{job="c", instance="standby"}': "0x40",
    'predlog_store_ok{job="c", instance="standby"}': "1x40",
    'process_start_time_seconds{job="p", instance="p1"}': "1700000000x40",
    'predlog_amqp_connected{job="p", instance="p1"}': "1x40",
    'predlog_amqp_blocked{job="p", instance="p1"}': "0x40",
    'predlog_amqp_reconnects_total{job="p", instance="p1"}': "0 1x39",
    'predlog_http_requests_total{job="p", instance="p1", route="/process", status="200"}': "0+6000x40",
    'predlog_http_requests_total{job="p", instance="p1", route="/process", status="503"}': "0+60x40",
    'predlog_http_requests_total{job="p", instance="p1", route="/readyz", status="503"}': "0+60000x40",
    'predlog_refusals_total{job="p", instance="p1", reason="window_full"}': "0x40",
    'predlog_http_request_seconds_bucket{job="p", instance="p1", le="0.01"}': "0+6000x40",
    'predlog_http_request_seconds_bucket{job="p", instance="p1", le="2.5"}': "0+6000x40",
    'predlog_http_request_seconds_bucket{job="p", instance="p1", le="+Inf"}': "0+6000x40",
    'predlog_partition_up{job="p", instance="p1", partition="1"}': "1x10 0 1x40",
    'predlog_partition_ready{job="c", instance="c1", partition="1"}': "1x40",
    'predlog_partition_ready{job="c", instance="standby", partition="1"}': "0x40",
    'predlog_store_ok{job="c", instance="c1"}': "1x10 0 1x40",
    'predlog_stalled{job="c", instance="c1"}': "0x10 1 0x30",
    'predlog_oldest_unacked_seconds{job="c", instance="c1"}': "0 2 5 1 1x40",
    'predlog_dead_letters_total{job="c", instance="c1", reason="not_an_event"}': "3x40",
}
TROUBLES = {
    "PredlogProducerMissing": {'predlog_info{process="producer", version="1", job="p", instance="p1"}': "1 stale"},
    "PredlogConsumerMissing": {'predlog_info{process="consumer", version="1", job="c", instance="c1"}': "1 stale"},
    "PredlogNoActiveConsumer": {'predlog_active{job="c", instance="c1"}': "1x20 0x20"},
    "PredlogRestartLoop": {'process_start_time_seconds{job="p", instance="p1"}': "1700000000+90x40"},
    "PredlogBrokerAway": {'predlog_amqp_connected{job="p", instance="p1"}': "1x20 0x20"},
    "PredlogPartitionDown": {'predlog_partition_up{job="p", instance="p1", partition="1"}': "1x20 0x20"},
    "PredlogPartitionNotConsumed": {'predlog_partition_ready{job="c", instance="c1", partition="1"}': "1x20 0x20"},
    "PredlogBrokerBlocked": {'predlog_amqp_blocked{job="p", instance="p1"}': "0x20 1x20"},
    "PredlogReconnects": {'predlog_amqp_reconnects_total{job="p", instance="p1"}': "0+1x40"},
    "PredlogServerErrors": {
        'predlog_http_requests_total{job="p", instance="p1", route="/process", status="503"}': "0+600x40"
    },
    "PredlogWindowFull": {'predlog_refusals_total{job="p", instance="p1", reason="window_full"}': "0+5x40"},
    "PredlogSlowAnswers": {'predlog_http_request_seconds_bucket{job="p", instance="p1", le="0.01"}': "0+5900x40"},
    "PredlogStoreNotOk": {'predlog_store_ok{job="c", instance="c1"}': "1x20 0x20"},
    "PredlogStalled": {'predlog_stalled{job="c", instance="c1"}': "0x20 1x20"},
    "PredlogOldestUnacked": {'predlog_oldest_unacked_seconds{job="c", instance="c1"}': "0+5x40"},
    "PredlogDeadLetters": {'predlog_dead_letters_total{job="c", instance="c1", reason="not_an_event"}': "3x30 4x10"},
}


def promtool(*arguments: str | Path) -> None:
    if PROMTOOL is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_alert_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", MONITORING / "alerts.yaml")


def test_prometheus_accepts_the_scrape_configuration() -> None:
    """The rule file that it names is next to it."""
    promtool("check", "config", MONITORING / "prometheus.yml")


def test_every_alert_has_its_trouble() -> None:
    assert TROUBLES.keys() == ALERTS.keys()


def test_an_alert_fires_in_its_trouble_only(tmp_path: Path) -> None:
    """One scenario for each alert, and one without any trouble; each asserts all alerts at its end."""
    scenarios = []
    for trouble in (None, *TROUBLES):
        series = WELL | (TROUBLES[trouble] if trouble else {})
        fires = [{"labels": f'{{alertname="{trouble}"}}', "value": 1}] if trouble else []
        scenarios.append(
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "35m",
                        "exp_samples": fires,
                    }
                ],
            }
        )
    tests = {"rule_files": [str(MONITORING / "alerts.yaml")], "evaluation_interval": "1m", "tests": scenarios}
    path = tmp_path / "alerts_test.yaml"
    path.write_text(yaml.safe_dump(tests))
    promtool("test", "rules", path)
