"""Settings."""

from __future__ import annotations

import contextlib
import io

import pytest

from common.config import LEAST_DEDUP_WINDOW, ConsumerSettings, ProducerSettings, Settings, describe, parse
from common.errors import SettingError


def producer(*argv: str, **environ: str) -> ProducerSettings:
    return parse(ProducerSettings, "producer.py", "", argv, environ)


def consumer(*argv: str, **environ: str) -> ConsumerSettings:
    return parse(ConsumerSettings, "consumer.py", "", argv, environ)


def test_the_defaults_are_the_contract_s() -> None:
    made = producer()
    assert (made.amqp_url, made.queue_name) == ("amqp://guest:guest@localhost:5672/", "predictions")
    assert (made.http_host, made.http_port, made.max_body_bytes, made.workers) == ("127.0.0.1", 8000, 8 * 2**20, 1)
    assert (made.confirm_timeout_ms, made.max_unconfirmed, made.shutdown_timeout_ms) == (10_000, 4096, 10_000)
    eater = consumer()
    assert (eater.csv_file, eater.prefetch_count, eater.batch_max_rows) == ("data/data.csv", 2000, 5000)
    assert (eater.flush_interval_ms, eater.low_prob_threshold, eater.dedup_window, eater.health_port) == (
        50,
        0.25,
        200_000,
        0,
    )


def test_a_flag_wins_over_the_variable() -> None:
    assert producer("--http-port", "9", HTTP_PORT="8").http_port == 9
    assert producer(HTTP_PORT="8").http_port == 8


def test_an_empty_variable_is_an_unset_one() -> None:
    assert producer(HTTP_PORT="", LOG_LEVEL="").http_port == 8000


def test_rabbitmq_host_is_the_original_s_way_and_amqp_url_wins() -> None:
    assert producer(RABBITMQ_HOST="broker").amqp_url == "amqp://guest:guest@broker:5672/"
    assert producer(RABBITMQ_HOST="broker", AMQP_URL="amqp://a:b@c/").amqp_url == "amqp://a:b@c/"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "http"), ("HTTP_PORT", "65536"), ("HTTP_PORT", "-1"), ("WORKERS", "0"), ("LOG_LEVEL", "loud"),
        ("MAX_BODY_BYTES", "8MiB"), ("API_TOKEN", "two words"), ("AMQP_URL", "localhost:5672"), ("AMQP_URL", "amqp://h:x/"),
        ("AMQP_URL", "http://h/"), ("TLS_CERT", "only-this.pem"), ("PROTECT_PAGES", "maybe"), ("QUEUE_NAME", "q" * 251),
        ("HTTP_HOST", "a..b"), ("AMQP_URL", "amqp://a..b/"), ("RABBITMQ_HOST", "localhost:5673"),
        ("RABBITMQ_HOST", "a b"), ("RABBITMQ_HOST", "user@host"), ("RABBITMQ_HOST", "host/x"),
        ("HTTP_HOST", "127.0.0.1:80"),
        ("CONFIRM_TIMEOUT_MS", "9" * 400), ("EVENTS_PER_MESSAGE", "1001"), ("EVENTS_PER_MESSAGE", "0"), ("QUEUE_NAME", "\udcff"),
        ("QUEUE_NAME", "a=b"), ("API_TOKEN", ","), ("PROTECT_PAGES", "1"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(SettingError) as error:
        producer(**{name: value})
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_an_ipv6_address_is_a_broker_host() -> None:
    assert producer(RABBITMQ_HOST="::1").amqp_url == "amqp://guest:guest@[::1]:5672/"


def test_a_switch_needs_no_value() -> None:
    assert parse(ConsumerSettings, "prog", "", ["--rotate-gzip"], {}).rotate_gzip
    assert not parse(ConsumerSettings, "prog", "", ["--rotate-gzip", "0"], {}).rotate_gzip


@pytest.mark.parametrize("value", ["nan", "high", "inf"])
def test_a_threshold_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(SettingError, match="LOW_PROB_THRESHOLD"):
        consumer(LOW_PROB_THRESHOLD=value)


def test_secrets_are_in_no_message() -> None:
    shown = describe(producer(AMQP_URL="amqps://user:hidden@h:1/v?cafile=x", API_TOKEN="hidden"))
    assert "hidden" not in shown
    assert "AMQP_URL=amqps://user:***@h:1/v" in shown
    for bad in ("amqp:/user:hidden@h", "amqp://user:hidden@h:x/"):
        with pytest.raises(SettingError) as error:
            producer(AMQP_URL=bad)
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize("kind", [ProducerSettings, ConsumerSettings])
def test_help_prints_every_setting_with_its_default(kind: type[Settings]) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse(kind, "prog", "", ["--help"], {})
    text = " ".join(out.getvalue().split())
    for name in kind.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert text.count("(default") >= len(kind.__dataclass_fields__)


def test_a_small_dedup_window_is_raised_to_the_least() -> None:
    assert consumer(DEDUP_WINDOW="0").dedup_window == LEAST_DEDUP_WINDOW
    assert consumer(DEDUP_WINDOW=str(LEAST_DEDUP_WINDOW + 1)).dedup_window == LEAST_DEDUP_WINDOW + 1
