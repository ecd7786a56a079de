"""Settings as frozen dataclasses, made from flags and an environment mapping. Pure: the caller passes `read_file`.

A field's metadata holds its help text, which names the unit. The environment variable is the field's name in capitals.
The flag is the same with dashes, and wins over the variable. A secret can be in a file, whose path is `NAME_FILE`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from common import __version__
from common.amqp.address import is_host, masked_url, parse_address
from common.errors import SettingError
from common.http.parser import Limits
from common.http.tokens import parse_tokens

DEFAULT_AMQP_URL = "amqp://guest:guest@localhost:5672/"
SECRETS = ("amqp_url", "api_token")
# Settings of 1.0 that are constants now. A variable or flag that is still set is reported, and has no effect.
FORMER = (
    *("max_unconfirmed_bytes", "max_head_bytes", "max_target_bytes", "max_headers", "max_chunk_overhead_bytes"),
    *("max_pipelined", "head_timeout_ms", "body_timeout_ms", "write_timeout_ms"),
)
FORMER_WARNING = "no longer settings, and ignored: %s"

# A producer that reconnects publishes again what is unconfirmed: 4,096 events by default. This covers four producers.
LEAST_DEDUP_WINDOW = 16_384

_LIMITS = Limits()
_MOST = 2**40  # the largest value of a setting; a test starts and drains with it


def _setting(default: Any, text: str, *, low: float = 0, high: float = _MOST) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of both processes."""

    amqp_url: str = _setting(
        "",
        "broker address, amqp:// or amqps:// (TLS; ?cafile=PATH), of one host or several (host1:5672,host2:5672) "
        f"(default {DEFAULT_AMQP_URL})",
    )
    amqp_url_file: str = _setting("", "file with the value of AMQP_URL (SIGHUP reads it again)")
    rabbitmq_host: str = _setting("", "broker host, used when AMQP_URL is not set")
    partitions: int = _setting(1, "queues that events are spread over, each with a CSV of its own", low=1, high=1024)
    queue_name: str = _setting("predictions", "queue of events")
    log_level: str = _setting("info", "least severe level that is logged: debug, info, warning or error")
    log_format: str = _setting("text", "text for people, json for machines")
    shutdown_timeout_ms: int = _setting(10_000, "how long a stop may take to finish accepted work, ms")
    health_port: int = _setting(0, "port that serves only /healthz, /readyz and /metrics (0: off)", high=65535)
    health_host: str = _setting("127.0.0.1", "address of the health port")


@dataclass(frozen=True, slots=True)
class ProducerSettings(Settings):
    """The settings of the producer."""

    http_host: str = _setting("127.0.0.1", "address to listen on")
    http_port: int = _setting(8000, "port to listen on (0: any free one)", high=65535)
    workers: int = _setting(1, "processes that share the port", low=1, high=256)
    confirm_timeout_ms: int = _setting(10_000, "wait for the broker's confirm before 504, ms", low=1)
    max_unconfirmed: int = _setting(4096, "events without a confirm before 503", low=1)
    events_per_message: int = _setting(
        64, "most events that share one message and one confirm, under load (1: each alone)", low=1, high=1000
    )
    max_body_bytes: int = _setting(_LIMITS.body_bytes, "largest request body, also after gzip, bytes (413)", low=1)
    max_preds: int = _setting(4_000, "most predictions in one event (422)", low=1)
    max_connections: int = _setting(16_000, "open client connections before 503 and close", low=1)
    idle_timeout_ms: int = _setting(75_000, "time before an idle connection is closed, ms", low=1)
    drain_delay_ms: int = _setting(0, "how long a stop keeps listening while /readyz answers 503, ms")
    allowed_hosts: str = _setting("", "Host values to serve, separated by commas; others get 403 (empty: all)")
    cors_origins: str = _setting("", "origins whose pages may POST, separated by commas (empty: none but our own)")
    api_token: str = _setting("", "bearer token(s) for POST, separated by commas (empty: no authentication)")
    api_token_file: str = _setting("", "file with the value of API_TOKEN (SIGHUP reads it again)")
    protect_pages: bool = _setting(False, "1: /metrics, /docs and /openapi.json also need the token")
    tls_cert: str = _setting("", "PEM file of the certificate chain, for HTTPS (SIGHUP reloads it)")
    tls_key: str = _setting("", "PEM file of the certificate's private key")


@dataclass(frozen=True, slots=True)
class ConsumerSettings(Settings):
    """The settings of the consumer."""

    partition: str = _setting("", "partitions to serve, such as 2, 0-3 or 0,4 (empty: all)")
    csv_file: str = _setting("data/data.csv", "the CSV file; its journal and lock are in the same folder")
    prefetch_count: int = _setting(500, "messages that the broker sends before it waits for acks", low=1, high=65535)
    batch_max_rows: int = _setting(5000, "rows that fill a batch", low=1)
    flush_interval_ms: int = _setting(50, "longest time that a row waits for its batch, ms", high=600_000)
    low_prob_threshold: float = _setting(0.25, "predictions below it get the tag low_prob", low=-1e308, high=1e308)
    dedup_window: int = _setting(
        200_000, f"how many message ids are remembered to drop duplicates (at least {LEAST_DEDUP_WINDOW})"
    )
    dedup_warn_seconds: int = _setting(60, "warn when message ids are forgotten sooner than this, s (0: never)")
    rotate_bytes: int = _setting(0, "start a new CSV when the current one reaches this size, bytes (0: off)")
    rotate_interval: int = _setting(0, "start a new CSV at this interval, counted from UTC midnight, s (0: off)")
    rotate_gzip: bool = _setting(False, "1: compress rotated files")
    rotate_keep: int = _setting(0, "how many rotated files to keep; older ones are removed (0: keep all)")


S = TypeVar("S", bound=Settings)

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})

_HOST = r"[a-zA-Z0-9.\-]+|\[[0-9a-fA-F:.]+\]"
_ORIGIN = rf"https?://(?:{_HOST})(?::[0-9]{{1,5}})?"
_FORMS = {  # the pattern of a value, and the same in words
    # The alphabet is that of pamqp, narrower than RabbitMQ's. AMQP allows 255 bytes; ".1023.dead" takes 10 of them.
    "queue_name": (r"[\w\-.:@#,/+ ]{1,245}", "1 to 245 of these characters: A-Z a-z 0-9 - _ . : @ # , / + and space"),
    "log_level": ("(?i:debug|info|warning|error)", "debug, info, warning or error"),
    "log_format": ("(?i:text|json)", "text or json"),
    "allowed_hosts": (f"(?:(?:{_HOST})?(?:,|$))*", "host names without a port, separated by commas"),
    "cors_origins": (f"(?:(?:{_ORIGIN})?(?:,|$))*", "origins such as https://dash.example:8443, separated by commas"),
}


def _fault(name: str, text: str) -> str:
    """Return what is wrong with the text of a setting, as words that follow its name; "" if nothing is."""
    if name in SECRETS:
        try:
            (parse_address if name == "amqp_url" else parse_tokens)(text)
        except ValueError as error:
            return str(error)
    if name.endswith("_host") and not is_host(text):
        return "must be an address, such as 0.0.0.0 or ::, or a host name, without a port"
    pattern, wanted = _FORMS.get(name, ("(?s:.*)", ""))
    return "" if re.fullmatch(pattern, text, re.ASCII) else f"must be {wanted}"


def _convert(item: Field[Any], text: str) -> Any:
    """Return the value of a setting. Raise SettingError with one line that names the variable."""
    default: Any = item.default
    value: Any = text
    low, high = item.metadata["low"], item.metadata["high"]
    if isinstance(default, str):
        fault = _fault(item.name, text)
    elif isinstance(default, bool):
        value = text.lower() in _TRUE
        fault = "" if value or text.lower() in _FALSE else "must be 1 or 0"
    else:
        kind = "number" if isinstance(default, float) else "whole number"
        fault = f"must be a {kind} from {low} to {high}"
        with suppress(ValueError):
            value = type(default)(text)
            fault = "" if low <= value <= high else fault  # nan is not
    if fault:
        shown = "" if item.name in SECRETS else f"is {text!r}, but "
        raise SettingError(f"{item.name.upper()} {shown}{fault}")
    return value


def parser_for(cls: type[Settings], prog: str, description: str) -> argparse.ArgumentParser:
    """Return an ArgumentParser with one flag for each setting of `cls`. Its --help prints defaults and units."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Each flag is also an environment variable: --queue-name is QUEUE_NAME.",
        allow_abbrev=False,  # --partition must not set PARTITIONS
    )
    parser.add_argument("--version", action="version", version=f"predlog {__version__}")
    for item in fields(cls):
        text = item.metadata["help"]
        if item.name != "amqp_url":
            shown = int(item.default) if isinstance(item.default, bool) else item.default
            text += f" (default {shown if shown != '' else 'none'})"
        switch: dict[str, Any] = {"nargs": "?", "const": "1"} if isinstance(item.default, bool) else {}
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, metavar="VALUE", help=text.replace("%", "%%"), **switch)
    for name in FORMER:
        parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS)
    return parser


def former_settings(flags: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """Return the names of settings of 1.0 that are set and have no effect, separated by commas."""
    found = [name.upper() for name in FORMER if getattr(flags, name) is not None or environ.get(name.upper())]
    return ", ".join(sorted(found))


def load(cls: type[S], flags: argparse.Namespace, environ: Mapping[str, str], read_file: Callable[[str], str]) -> S:
    """Return the settings from parsed flags and an environment. Raise SettingError for the first bad value.

    `read_file` returns the text of a file, or raises OSError or UnicodeError.
    """
    values: dict[str, Any] = {}
    for item in fields(cls):
        flag = getattr(flags, item.name)
        if text := environ.get(item.name.upper(), "") if flag is None else flag:
            values[item.name] = _convert(item, text)
    if "dedup_window" in values:
        values["dedup_window"] = max(values["dedup_window"], LEAST_DEDUP_WINDOW)
    for name in SECRETS:
        if name in values and f"{name}_file" in values:
            raise SettingError(f"{name.upper()} and {name.upper()}_FILE are both set: set one of them")
    if "amqp_url" not in values:
        host = values.get("rabbitmq_host", "localhost")
        values["amqp_url"] = f"amqp://guest:guest@{f'[{host}]' if ':' in host else host}:5672/"
    if bool(values.get("tls_cert")) != bool(values.get("tls_key")):
        raise SettingError("TLS_CERT and TLS_KEY go together: set both, or neither")
    if values.get("protect_pages") and not (values.get("api_token") or values.get("api_token_file")):
        raise SettingError("PROTECT_PAGES needs API_TOKEN or API_TOKEN_FILE: otherwise, the pages are open to all")
    return read_again(cls(**values), read_file)


def read_again(settings: S, read_file: Callable[[str], str]) -> S:
    """Return the settings with the secrets read again from their files. Raise SettingError if one cannot be used."""
    found: dict[str, Any] = {}
    for item in fields(settings):
        if item.name in SECRETS and (path := getattr(settings, f"{item.name}_file")):
            try:
                if not (text := read_file(path).rstrip("\r\n")):
                    raise ValueError("it is empty")
                found[item.name] = _convert(item, text)
            except (OSError, ValueError, SettingError) as error:  # ValueError: it is not UTF-8, or a path with a NUL
                why = getattr(error, "strerror", None) or error
                raise SettingError(f"{item.name.upper()}_FILE is {path!r}, which cannot be used: {why}") from None
    return replace(settings, **found)


def describe(settings: Settings) -> str:
    """Return the effective settings on one line: secrets masked, and not shown at all if they are in a file."""
    shown = []
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in SECRETS and value:
            in_file = getattr(settings, f"{item.name}_file")
            value = "" if in_file else masked_url(value) if item.name == "amqp_url" else "***"
        if value != "":
            shown.append(f"{item.name.upper()}={int(value) if isinstance(value, bool) else value}")
    return " ".join(shown)
