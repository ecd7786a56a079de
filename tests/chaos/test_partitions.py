"""The procedure that changes PARTITIONS (docs/scaling.md), under load."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import carry_ids
from scripts.load.checker import check
from scripts.load.events import Events
from scripts.load.generator import Load
from scripts.load.verify import opened
from tests.chaos.stage import ROOT, LoadThread, Stage, make_consumer, make_producer
from tests.rabbitmq import RabbitMQ
from tests.support.polling import wait_until

EVENTS = Events(seed=15, keyless_every=8, batch_every=4)


@pytest.fixture
def stages(tmp_path: Path, broker: RabbitMQ, queue_name: str) -> Iterator[dict[int, Stage]]:
    """The same producer and consumer with one partition and with four."""
    csv = tmp_path / "data.csv"
    common = {"AMQP_URL": broker.url, "QUEUE_NAME": queue_name}
    producer = make_producer("producer", tmp_path, common)
    consumer = make_consumer("consumer", tmp_path, {**common, "CSV_FILE": str(csv)}, [str(ROOT / "consumer.py")])
    queues = {
        1: {queue_name: csv},
        4: {f"{queue_name}.{index}": tmp_path / f"data.{index}.csv" for index in range(4)},
    }
    stages = {count: Stage(tmp_path, broker.url, queues[count], [producer], [consumer]) for count in queues}
    yield stages
    stages[1].kill_all()


def start(stage: Stage, partitions: int) -> None:
    for service in stage.services:
        service.start(PARTITIONS=str(partitions))
    stage.wait_until_ready()


def accept(load: Load, events: int) -> None:
    """Wait until this many more are accepted."""
    enough = load.ledger.accepted_events + events
    wait_until(f"{events} events are accepted", lambda: load.ledger.accepted_events >= enough)


def test_a_change_of_partitions_loses_and_duplicates_nothing(stages: dict[int, Stage], tmp_path: Path) -> None:
    """One grows to four and shrinks back while clients retry; some retries are of events stored before the change."""
    start(stages[1], 1)
    thread = LoadThread(Load(stages[1].targets(), EVENTS, concurrency=16, retries=True, rate=300))
    for before, after in ((1, 4), (4, 1)):
        accept(thread.load, 400)
        ((producer,), (consumer,)) = stages[before].producers, stages[before].consumers
        assert producer.stop() == 0
        stages[before].wait_until_stored()
        assert consumer.stop() == 0
        assert (
            carry_ids.main(["--csv-file", str(tmp_path / "data.csv"), "--from", str(before), "--to", str(after)]) == 0
        )
        start(stages[after], after)
    accept(thread.load, 400)
    thread.finish(now=True)
    stages[1].wait_until_stored()
    assert all(csv.stat().st_size > 10_000 for stage in stages.values() for csv in stage.queues.values())
    verdict = check(EVENTS, thread.load.ledger, opened(tmp_path / "data.csv"))  # and those of the partitions
    assert verdict.holds, str(verdict)
    assert [*stages[1].misplaced(EVENTS), *stages[4].misplaced(EVENTS)] == []
