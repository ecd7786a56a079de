"""The consumer's health port, for one process and for several, without a socket."""

from __future__ import annotations

from typing import Any, cast

import pytest

from common.consumer import partitions
from common.consumer.metrics import Counters
from common.consumer.partitions import Board
from common.errors import HttpError
from common.health import Health
from common.http.exchange import Exchange
from common.http.parser import Limits, Request, RequestParser


class FakeExchange:
    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []

    def answer(self, status: int, body: bytes, content_type: bytes = b"", extra: bytes = b"") -> None:
        self.answers.append((status, body))


def ask(health: Health, target: str, method: str = "GET") -> tuple[int, bytes]:
    parser = RequestParser(Limits())
    parser.receive_data(f"{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    request = cast(Request, parser.next_request())
    exchange = FakeExchange()
    try:
        health.check(request.head)
        health.handle(request, cast(Exchange, exchange))
    except HttpError as error:
        return error.status, error.detail.encode()
    (answer,) = exchange.answers
    return answer


def test_the_pages_say_what_they_are_told() -> None:
    reason = ""
    health = Health(lambda: reason, lambda: b"metrics")
    assert ask(health, "/readyz")[0] == 200
    reason = "standby: another consumer owns the CSV"
    assert ask(health, "/readyz") == (503, reason.encode())
    assert ask(health, "/healthz")[0] == 200, "not ready is alive"
    assert ask(health, "/metrics") == (200, b"metrics")


@pytest.mark.parametrize(
    ("target", "method", "status"), [("/", "GET", 404), ("/process", "POST", 404), ("/readyz", "POST", 405)]
)
def test_nothing_else_is_served(target: str, method: str, status: int) -> None:
    assert ask(Health(lambda: "", lambda: b""), target, method)[0] == status


def test_each_partition_that_cannot_continue_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board([2, 5])
    assert board.not_ready() == "partition 2: starting; partition 5: starting"
    board.report(0, "")
    board.report(1, "cannot store: data.5.csv: No space left on device")
    assert board.not_ready() == "partition 5: cannot store: data.5.csv: No space left on device"
    board.report(1, "")
    assert board.not_ready() == ""
    monkeypatch.setattr(partitions, "STALE_SECONDS", -1.0)
    assert "partition 2: its process has not answered" in board.not_ready()


def test_a_long_reason_is_cut_and_harms_no_other() -> None:
    board = Board([0, 1])
    board.report(1, "")
    board.report(0, "ü" * 5000)
    assert board.not_ready().startswith("partition 0: üü")
    assert "partition 1" not in board.not_ready()


def test_the_metrics_of_all_partitions_are_added_up() -> None:
    board = Board([0, 3])
    for index, rows in enumerate((5.0, 7.0)):
        counters: Any = Counters()
        counters.metrics.bind(board.rows[index])
        counters.metrics.values[counters.rows] += rows
        board.report(index, "" if index else "starting")
    lines = board.metrics().decode().splitlines()
    assert "predlog_rows_total 12" in lines
    assert 'predlog_partition_rows_total{partition="3"} 7' in lines
    assert 'predlog_partition_ready{partition="0"} 0' in lines
    assert 'predlog_partition_ready{partition="3"} 1' in lines
