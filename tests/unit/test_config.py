"""Settings."""

from __future__ import annotations

import contextlib
import io

import pytest

from common.config import (
    FORMER,
    LEAST_DEDUP_WINDOW,
    SECRETS,
    ConsumerSettings,
    ProducerSettings,
    S,
    Settings,
    describe,
    former_settings,
    load,
    parser_for,
    read_again,
)
from common.errors import SettingError

FILES = {
    "/run/url": "amqps://user:hidden@broker/\n",
    "/run/tokens": "shop-1:hidden,other\r\n",
    "/run/empty": "\n",
    "/run/words": "hidden words\n",
}


def read(path: str) -> str:
    if path == "/run/binary":
        return b"\xff".decode()
    try:
        return FILES[path]
    except KeyError:
        raise PermissionError(13, "Permission denied", path) from None


def made(kind: type[S], *argv: str, **environ: str) -> S:
    return load(kind, parser_for(kind, "prog", "").parse_args(argv), environ, read)


def producer(*argv: str, **environ: str) -> ProducerSettings:
    return made(ProducerSettings, *argv, **environ)


def consumer(*argv: str, **environ: str) -> ConsumerSettings:
    return made(ConsumerSettings, *argv, **environ)


def test_the_defaults_are_the_contracts() -> None:
    ours = producer()
    assert (ours.amqp_url, ours.queue_name) == ("amqp://guest:guest@localhost:5672/", "predictions")
    assert (ours.http_host, ours.http_port, ours.max_body_bytes, ours.workers) == ("127.0.0.1", 8000, 8 * 2**20, 1)
    assert (ours.confirm_timeout_ms, ours.max_unconfirmed, ours.shutdown_timeout_ms) == (10_000, 4096, 10_000)
    eater = consumer()
    assert (eater.csv_file, eater.prefetch_count, eater.batch_max_rows) == ("data/data.csv", 500, 5000)
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


def test_rabbitmq_host_is_the_originals_and_amqp_url_wins() -> None:
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
        ("CONFIRM_TIMEOUT_MS", "9" * 400), ("EVENTS_PER_MESSAGE", "1001"), ("EVENTS_PER_MESSAGE", "0"),
        ("QUEUE_NAME", "\udcff"), ("QUEUE_NAME", "a=b"), ("API_TOKEN", ","), ("PROTECT_PAGES", "1"),
        ("HTTP_HOST", "*"), ("HEALTH_HOST", "*"),
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
    assert consumer("--rotate-gzip").rotate_gzip
    assert not consumer("--rotate-gzip", "0").rotate_gzip


@pytest.mark.parametrize("value", ["nan", "high", "inf"])
def test_a_threshold_that_is_not_a_number_is_refused(value: str) -> None:
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
        made(kind, "--help")
    text = " ".join(out.getvalue().split())
    for name in kind.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert text.count("(default") >= len(kind.__dataclass_fields__)


def test_a_small_dedup_window_is_raised_to_the_least() -> None:
    assert consumer(DEDUP_WINDOW="0").dedup_window == LEAST_DEDUP_WINDOW
    assert consumer(DEDUP_WINDOW=str(LEAST_DEDUP_WINDOW + 1)).dedup_window == LEAST_DEDUP_WINDOW + 1


def test_a_secret_is_the_text_of_its_file() -> None:
    ours = producer("--amqp-url-file", "/run/url", API_TOKEN_FILE="/run/tokens", PROTECT_PAGES="1")
    assert (ours.amqp_url, ours.api_token) == ("amqps://user:hidden@broker/", "shop-1:hidden,other")
    assert "AMQP_URL_FILE=/run/url" in describe(ours)
    assert "API_TOKEN_FILE=/run/tokens" in describe(ours)
    assert not any(part in describe(ours) for part in ("hidden", "broker", "other"))


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("path", ["/run/missing", "/run/empty", "/run/words", "/run/binary"])
def test_a_secret_file_that_cannot_be_used_is_named(name: str, path: str) -> None:
    with pytest.raises(SettingError, match=f"^{name.upper()}_FILE is '{path}'") as error:
        producer(**{f"{name}_file".upper(): path})
    assert "hidden" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_secret_and_its_file_exclude_each_other() -> None:
    with pytest.raises(SettingError, match="AMQP_URL and AMQP_URL_FILE are both set"):
        consumer(AMQP_URL="amqp://h/", AMQP_URL_FILE="/run/url")
    with pytest.raises(SettingError, match="API_TOKEN and API_TOKEN_FILE are both set"):
        producer("--api-token", "x", API_TOKEN_FILE="/run/tokens")


def test_secret_files_are_read_again_and_nothing_else() -> None:
    before = producer(AMQP_URL_FILE="/run/url", API_TOKEN="kept", HTTP_PORT="9")
    after = read_again(before, lambda path: "amqp://other/")
    assert (after.amqp_url, after.api_token, after.http_port) == ("amqp://other/", "kept", 9)
    with pytest.raises(SettingError, match="AMQP_URL_FILE is '/run/url'"):
        read_again(before, lambda path: "half a pass")


def test_settings_of_1_0_that_went_are_named_together() -> None:
    flags = parser_for(ConsumerSettings, "prog", "").parse_args(["--max-headers", "7"])
    assert former_settings(flags, {"HEAD_TIMEOUT_MS": "1", "BODY_TIMEOUT_MS": ""}) == "HEAD_TIMEOUT_MS, MAX_HEADERS"
    assert load(ConsumerSettings, flags, {name.upper(): "?" for name in FORMER}, read) == consumer()


def test_a_flag_is_never_the_beginning_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    """The producer has no --partition, which must not become --partitions."""
    with pytest.raises(SystemExit) as end:
        producer("--partition", "2")
    assert end.value.code == 2
    assert "--partition" in capsys.readouterr().err
