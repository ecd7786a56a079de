"""The original's own test over real HTTP, 1,000 calls; here each row is compared with what was sent."""

import asyncio
import time
from collections.abc import Callable

from scripts.load.checker import check
from scripts.load.client import Target
from scripts.load.events import HEADER, Events
from scripts.load.generator import Load
from tests.conftest import Start

CALLS = 1000
DEADLINE_SECONDS = 30.0


async def test_1000_concurrent_calls_become_exactly_their_rows(
    producer: Start, consumer: Start, record_property: Callable[[str, object], None]
) -> None:
    target, csv_file = Target.parse(producer().url), consumer().csv_file
    events = Events(seed=1000)
    expected_bytes = len(HEADER) + sum(len(row) for number in range(CALLS) for row in events.rows(number))

    started = time.monotonic()
    load = Load(target, events, count=CALLS, concurrency=32)
    await load.run()
    answered = time.monotonic()
    while csv_file.stat().st_size < expected_bytes and time.monotonic() < answered + DEADLINE_SECONDS:
        await asyncio.sleep(0.005)
    written = time.monotonic()

    assert load.ledger.answers == {200: CALLS}
    assert load.wrong_answers == 0
    with csv_file.open("rb") as file:
        verdict = check(events, load.ledger, [(csv_file.name, file)])
    assert verdict.holds, str(verdict)
    assert csv_file.stat().st_size == expected_bytes
    record_property(
        f"{CALLS} calls over HTTP, {verdict.rows} rows",
        f"answered in {answered - started:.2f} s, all in the CSV after {written - started:.2f} s",
    )
