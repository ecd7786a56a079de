"""Tests of a running deployment, only through its public interfaces: POST over HTTP, rows in the shared volume.

PRODUCER_URL and CSV_FILE say where they are; API_TOKEN or API_TOKEN_FILE has the token that POST needs. Each run makes
events that no other run has, so that it may be repeated on the same volume. The standard library and pytest only: the
image has no more.
"""

import asyncio
import csv
import io
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest

from scripts.load.client import Target
from scripts.load.events import Events, encode_row
from scripts.load.generator import Load

URL = os.environ.get("PRODUCER_URL", "http://127.0.0.1:8000")
CSV_FILE = Path(os.environ.get("CSV_FILE", "data/data.csv"))
TOKEN_FILE = os.environ.get("API_TOKEN_FILE")
TOKENS = Path(TOKEN_FILE).read_text().strip() if TOKEN_FILE else os.environ.get("API_TOKEN", "")
TOKEN = TOKENS.split(",")[0]
CALLS = 1000
DEADLINE_SECONDS = 30.0


@pytest.fixture(scope="module", autouse=True)
def ready() -> None:
    """Wait until it is ready: the container engine only knows that the producer is alive."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{URL}/readyz", timeout=15).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):  # 503
                error.close()
            if time.monotonic() > deadline:
                pytest.fail(f"{URL}/readyz: {error}")
        time.sleep(0.1)


@pytest.fixture
def events() -> Events:
    """Events that only this test of this run has."""
    return Events(random.SystemRandom().randrange(10**12))


def test_each_prediction_of_1000_calls_is_one_row(events: Events) -> None:
    load = Load(Target.parse(URL, TOKEN), events, count=CALLS, concurrency=32)
    asyncio.run(load.run())
    assert load.ledger.answers == {200: CALLS}
    assert load.wrong_answers == 0
    assert_rows(events, range(CALLS))


def test_a_retry_with_the_same_key_makes_no_second_row(events: Events) -> None:
    key = events.id(0).decode()
    for variant in range(3):  # the same event, written differently
        assert post(events.body(1, variant), {"Idempotency-Key": key})[0] == 200
    assert post(events.body(2))[0] == 200  # after them in the queue: once it is there, nothing is still to come
    assert_rows(events, [1, 2])


def test_a_malformed_event_is_a_422_and_adds_no_row(events: Events) -> None:
    event = json.loads(events.body(1))
    event["data"]["preds"] = [{"image_frame": "a", "prob": None, "tags": []}, {"image_frame": "b", "prob": 1}]
    status, answer = post(json.dumps(event).encode())
    assert status == 422
    faults = [fault["loc"] for fault in json.loads(answer)["detail"]]
    assert faults == [["body", "data", "preds", 0, "prob"], ["body", "data", "preds", 1, "tags"]]
    assert post(events.body(2))[0] == 200
    assert_rows(events, [2])


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"])
def test_the_pages_for_operators_answer(path: str) -> None:
    with urllib.request.urlopen(f"{URL}{path}", timeout=15) as response:
        assert response.status == 200


def post(body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Return status and body of the answer, whatever it is."""
    token = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
    headers = {"Content-Type": "application/json", **token, **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{URL}/process", body, headers), timeout=15) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def assert_rows(events: Events, numbers: range | list[int]) -> None:
    """Wait until the CSV has exactly the rows of these events, each once, whole and in order."""
    expected = {number: events.rows(number) for number in numbers if events.rows(number)}
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (found := rows_of(events)) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


def rows_of(events: Events) -> dict[int, list[bytes]]:
    """Return the rows of these events, by number, without those of others."""
    found = defaultdict(list)
    text = CSV_FILE.read_bytes().decode()
    text = text[: text.rfind("\r\n") + 2]  # a batch that is being written
    for cells in csv.reader(io.StringIO(text, newline=""), delimiter=";"):
        if (number := events.number(cells[0].encode())) is not None:
            found[number].append(encode_row(cells))
    return found
