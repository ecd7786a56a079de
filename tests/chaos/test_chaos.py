"""A short chaos run, an aimed kill at every step, and the proof that a missing step is found."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from scripts.load.checker import Verdict
from scripts.load.events import Events
from scripts.load.generator import Load
from tests.chaos.__main__ import Limit, run
from tests.chaos.faulty_consumer import RECOVERING, ROTATING, STORING
from tests.chaos.stage import LoadThread, Service, SingleStage
from tests.chaos.troubles import SingleTrouble
from tests.rabbitmq import RabbitMQ

EVENTS = Events(seed=11, keyless_every=8, batch_every=4)


@pytest.fixture
def stage(tmp_path: Path, broker: RabbitMQ, queue_name: str) -> Iterator[SingleStage]:
    stage = SingleStage(tmp_path, broker, queue_name, ROTATE_GZIP="1")
    stage.producer.start()
    stage.wait_until_ready(stage.producer)
    yield stage
    stage.kill_all()


def finish(stage: SingleStage, thread: LoadThread, *, now: bool, **environment: str) -> Verdict:
    """Let a consumer without a fault take what is left."""
    stage.consumer.start(**environment)
    thread.finish(now=now)
    stage.wait_until_stored()
    assert stage.consumer.stop() == 0
    return stage.verdict(EVENTS, thread.load)


def test_the_promise_holds_through_an_aimed_kill_at_every_step(stage: SingleStage) -> None:
    thread = LoadThread(Load(stage.targets(), EVENTS, concurrency=16, retries=True, rate=150))
    trouble = SingleTrouble(stage, seed=1)
    trouble.reached_seconds = 60.0  # here every point is reached
    for point in STORING:
        trouble.aim(point, 3, "power", FLUSH_INTERVAL_MS="5")
    for point in ("in-commit", "in-write", "write-to-fsync"):
        trouble.aim(point, 3, FLUSH_INTERVAL_MS="5")
    for point in RECOVERING:  # from the rows that the last kill left behind
        trouble.aim(point, 1)
    for point in ROTATING:
        trouble.aim(point, 2, ROTATE_BYTES="10000")
    verdict = finish(stage, thread, now=True)
    assert verdict.holds, str(verdict)
    reached = {name.removeprefix("kill -9 at ").removesuffix(" + power cut") for name in trouble.done}
    assert reached == {*STORING, *RECOVERING, *ROTATING}
    assert thread.load.ledger.accepted_events > 500
    assert verdict.rows > 1500


@pytest.mark.parametrize(
    ("mutation", "fault", "findings"),
    [
        ("ack-before-fsync", "write-to-fsync:4", {"lost"}),
        ("no-fsync", "commit-to-ack:4:power", {"lost"}),
        ("no-dedup", "commit-to-ack:4", {"duplicated"}),
        ("no-cut", "write-to-fsync:4", {"duplicated"}),
        ("no-cut", "in-write:4", {"torn"}),
        ("line-unsettled", "after-ack:4", {"lost"}),
        ("id-forgotten", "commit-to-ack:4", {"duplicated"}),
    ],
)
def test_a_missing_step_is_found(stage: SingleStage, mutation: str, fault: str, findings: set[str]) -> None:
    thread = LoadThread(Load(stage.targets(), EVENTS, count=2000, concurrency=64, retries=True))
    # From a backlog, whose messages have many events each: a single event can have no row to duplicate.
    stage.wait_until("a backlog", lambda: thread.load.ledger.accepted_events >= 1000, 60)
    stage.consumer.start(CHAOS_MUTATION=mutation, CHAOS_FAULT=fault, PREFETCH_COUNT="5")
    assert stage.consumer.wait_for_death(60)
    verdict = finish(stage, thread, now=False, CHAOS_MUTATION=mutation)
    found = {name for name, finding in verdict.findings.items() if finding.count}
    assert findings <= found, str(verdict)


def test_two_consumers_without_locks_lose_nothing(stage: SingleStage) -> None:
    """flock has no effect. The later one takes over, and the earlier one stops with one line before it acks."""
    a, b = stage.consumer, stage.standby

    def said(service: Service) -> list[str]:
        return [line for line in service.log_path.read_text().splitlines() if "flock has no effect" in line]

    a.start(CHAOS_FLOCK="off")
    stage.wait_until_ready()
    thread = LoadThread(Load(stage.targets(), EVENTS, concurrency=16, retries=True, rate=400))
    stage.wait_until("rows come", lambda: a.metrics()["predlog_rows_total"] > 500, 60)
    a.send(signal.SIGSTOP)  # in the middle of anything
    b.start(CHAOS_FLOCK="off")
    stage.wait_until_ready(b)
    a.send(signal.SIGCONT)
    assert a.wait_for_death(60), "it continues to write beside the other"
    assert a.exit_code == 1
    assert len(said(a)) == 1
    stage.take_over()
    stage.wait_until("enough is accepted", lambda: thread.load.ledger.accepted_events > 500, 60)
    thread.finish(now=True)
    stage.wait_until_stored()
    assert b.stop() == 0
    verdict = stage.verdict(EVENTS, thread.load)
    assert verdict.holds, str(verdict)
    assert thread.load.ledger.accepted_events > 500


def test_a_clock_set_back_delays_no_rotation(stage: SingleStage) -> None:
    """The clock goes back a day while it runs, and another over its restart; rotation is due every second."""
    thread = LoadThread(Load(stage.targets(), EVENTS, concurrency=4, retries=True, rate=50))

    def rotated() -> int:
        return len(list(stage.csv.parent.glob("data-*.csv.gz")))

    stage.consumer.start(ROTATE_INTERVAL="1", CHAOS_CLOCK="0,-86400,-86400,-86400")
    stage.wait_until("two rotations", lambda: rotated() >= 2, 60)
    stage.consumer.kill()
    before = rotated()
    stage.consumer.start(ROTATE_INTERVAL="1", CHAOS_CLOCK="-172800")
    stage.wait_until("two more", lambda: rotated() >= before + 2, 60)
    stage.consumer.kill()
    verdict = finish(stage, thread, now=True)
    assert verdict.holds, str(verdict)


def test_the_promise_holds_through_a_short_seeded_run(tmp_path: Path, node: RabbitMQ) -> None:
    kinds = ("freeze_broker", "stand_by", "rename_csv")
    limit, console = Limit(rounds=3, seconds=0), Console(quiet=True)
    report = run(1, limit, tmp_path, console, kinds=kinds, broker=node, events=500, rate=100)
    assert report.good, (str(report.verdict), report.problems)
    assert report.rounds == 3
