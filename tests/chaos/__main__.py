"""The chaos run (`make chaos`): rounds of seeded trouble under load, then the comparison of every answer with the CSV.

Environment: SEED (same seed, same troubles in the same order; default: random), SECONDS (default 120), ROUNDS (a
number of rounds instead of a time), CLUSTER (a cluster of this many nodes instead of one broker), PICTURE (a file for
the picture of the run, as SVG). The exit code is 0 only if nothing was lost, duplicated, torn or foreign, and
everything came back on its own.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts.load.checker import Verdict
from scripts.load.events import BATCH_EVENTS, Events
from scripts.load.generator import GIVE_UP_SECONDS, Load, percentile
from scripts.load.ledger import CUT
from scripts.rabbitmq import BrokerError
from tests.chaos import cluster_troubles, picture, troubles
from tests.chaos.picture import Mark, Sample
from tests.chaos.stage import LoadThread, Stage, StageError
from tests.chaos.troubles import Play, Trouble
from tests.rabbitmq import RabbitMQ

EVENTS_PER_SECOND = 600.0
PIPELINE = 4
BURSTS = (1, 8, 64)  # events at the same moment, so that messages of one and of many events are cut by kills
KEYLESS_EVERY, LARGE_EVERY, BATCH_EVERY = 8, 301, 4
METRICS_SECONDS = 0.5


class Report(NamedTuple):
    seed: int
    rounds: int
    seconds: float
    trouble: Trouble
    load: Load
    verdict: Verdict
    slowest_recovery_seconds: float
    metrics: Counter[str]
    problems: list[str]
    samples: list[Sample]
    marks: list[Mark]

    @property
    def good(self) -> bool:
        return self.verdict.holds and not self.problems


class Limit(NamedTuple):
    """How long a run is: a number of rounds, or else of seconds."""

    rounds: int | None
    seconds: float

    def part_done(self, rounds: int, seconds: float) -> float:
        return rounds / self.rounds if self.rounds is not None else seconds / self.seconds


def main() -> int:
    console = Console(soft_wrap=True, highlight=False)
    try:
        seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1_000_000))
        rounds = int(os.environ["ROUNDS"]) if os.environ.get("ROUNDS") else None
        limit = Limit(rounds, float(os.environ.get("SECONDS") or 120))
        cluster_nodes = int(os.environ.get("CLUSTER") or 0)
    except ValueError as error:
        console.print(f"make chaos: SEED, ROUNDS, SECONDS and CLUSTER are numbers: {error}", style="red", markup=False)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="predlog-chaos-"))
    console.print(f"chaos: SEED={seed}, files in {directory}")
    good = False
    try:
        report = run(seed, limit, directory, console, cluster_nodes)
        show(report, console)
        if os.environ.get("PICTURE"):
            draw(report, Path(os.environ["PICTURE"]))
        good = report.good
    except (StageError, BrokerError, AssertionError) as error:
        console.print(f"make chaos: {error}", style="red", markup=False)
    except KeyboardInterrupt:
        return 130
    if good:
        shutil.rmtree(directory)
    else:
        cluster = f" CLUSTER={cluster_nodes}" * bool(cluster_nodes)
        console.print(f"again: make chaos SEED={seed}{cluster}; logs and CSV stay in {directory}")
    return 0 if good else 1


class _Display:
    """The progress bar, and what is read from the processes while the run waits for something."""

    def __init__(self, console: Console, stage: Stage, load: Load, limit: Limit) -> None:
        columns = (
            TextColumn("{task.fields[now]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=1.0, now="", counts="")
        self._stage = stage
        self._load = load
        self._limit = limit
        self._began = time.monotonic()
        self._metrics_due = 0.0
        self.rounds = 0
        self.samples: list[Sample] = []
        self.marks: list[Mark] = []

    def __enter__(self) -> Self:
        self._progress.start()
        self._stage.on_poll = self._poll
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def part_done(self) -> float:
        return self._limit.part_done(self.rounds, self.seconds)

    def say(self, now: str) -> None:
        """Show what happens now."""
        self._progress.update(self._task, now=now)

    def tell(self, line: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(line)

    def _poll(self) -> None:
        if time.monotonic() >= self._metrics_due:
            self._metrics_due = time.monotonic() + METRICS_SECONDS
            for service in self._stage.services:
                service.metrics()
            self.samples.append(Sample(self.seconds, self._load.accepted_predictions))
        answers = self._load.ledger.answers
        others = sum(answers.values()) - answers[200]
        p99_ms = percentile(self._load.recent_seconds, 99) * 1000
        counts = f"{answers[200]:,} x 200, {others:,} others, p99 {p99_ms:.0f} ms"
        self._progress.update(self._task, completed=min(1.0, self.part_done), counts=counts)


def run(
    seed: int,
    limit: Limit,
    directory: Path,
    console: Console,
    cluster_nodes: int = 0,
    kinds: Sequence[str] = (),
    broker: RabbitMQ | None = None,
    events: int = 0,
    rate: float = EVENTS_PER_SECOND,
) -> Report:
    """Raise StageError when even the end is not reached; the logs in `directory` then say why.

    `kinds` are the troubles of the first rounds, in place of the seed's choice. `broker` is used in place of a new one.
    It does not end before `events` events are accepted. `rate` is how many are sent each second.
    """
    settings = {"ROTATE_BYTES": "2000000", "ROTATE_GZIP": "1", "CONFIRM_TIMEOUT_MS": "5000"}
    if cluster_nodes:
        play = cluster_troubles.on_stage(directory, seed, cluster_nodes, **settings)
    else:
        play = troubles.on_stage(directory, seed, broker, **settings)
    trouble, stage = play.trouble, play.trouble.stage
    made_up = Events(seed, keyless_every=KEYLESS_EVERY, large_every=LARGE_EVERY, batch_every=BATCH_EVERY)
    load = Load(
        stage.targets(),
        made_up,
        concurrency=64,
        pipeline=PIPELINE,
        retries=True,
        rate=rate,
        bursts=BURSTS,
    )
    problems, slowest_seconds = [], 0.0
    try:
        with _Display(console, stage, load, limit) as display:
            display.say("starting")
            play.begin()
            thread = LoadThread(load)
            try:
                for kind in chain(kinds, _kinds(random.Random(seed), list(play.kinds))):
                    if display.part_done >= 1:
                        break
                    slowest_seconds = max(slowest_seconds, _round(kind, play, load, display))
            except StageError as error:
                problems.append(str(error))
            display.say("recovering")
            problems += _end(play, thread, events)
            metrics = sum((service.metrics() for service in stage.services), start=Counter[str]())
            display.say("stopping")
            for service in (*stage.standbys, *stage.consumers, *stage.producers):
                if service.alive and (code := service.stop()):
                    problems.append(f"{service.name} ended with {code} after SIGTERM")
            display.say("comparing")
            verdict = stage.verdict(made_up, load)
            return Report(
                seed,
                display.rounds,
                display.seconds,
                trouble,
                load,
                verdict,
                slowest_seconds,
                metrics,
                problems,
                display.samples,
                display.marks,
            )
    finally:
        stage.kill_all()
        play.end()


def _round(kind: str, play: Play, load: Load, display: _Display) -> float:
    """Make one trouble and undo it; return the seconds until all was ready, or 0 if it did not wait for that."""
    trouble, name = play.trouble, kind.replace("_", " ")
    display.say(f"round {display.rounds + 1}: {name}")
    # What happened before does not change what is chosen in this round.
    trouble.choose = random.Random(f"{trouble.seed}/{display.rounds}")
    load.slowest_seconds = 0.0
    display.marks.append(Mark(display.seconds, kills="kill" in kind))
    play.kinds[kind]()
    play.undo()
    display.rounds += 1
    if trouble.choose.random() < 0.25:  # the next trouble comes while this one is not over
        display.tell(f"{display.rounds:4} {name}")
        return 0.0
    undone = time.monotonic()
    trouble.stage.wait_until_ready()
    seconds = time.monotonic() - undone
    slowest = f"slowest event {load.slowest_seconds:.1f} s"
    display.tell(f"{display.rounds:4} {name:22} ready {seconds:.1f} s after it was undone, {slowest}")
    trouble.stage.sleep(trouble.choose.uniform(0.2, 1.0))
    trouble.note(f"an event through {name}", load.slowest_seconds)
    return seconds


def _end(play: Play, thread: LoadThread, events: int) -> list[str]:
    """Undo all, end the load, wait until everything is stored; return what is wrong besides the CSV."""
    stage, load = play.trouble.stage, thread.load
    play.undo()
    stage.wait_until_ready()
    stage.wait_until(f"{events} events are accepted", lambda: load.ledger.accepted_events >= events, 60)
    thread.finish(now=True)
    stage.wait_until_stored()
    problems = []
    if count := stage.dead_letters():
        problems.append(f"{count} dead letters")
    if load.wrong_answers:
        problems.append(f"{load.wrong_answers} answers 200 with another event")
    if load.gave_up:
        problems.append(f"{load.gave_up} events were not accepted within {GIVE_UP_SECONDS:.0f} s")
    if refusals := sorted(set(load.ledger.answers) - {200, 503, 504, CUT}):
        problems.append(f"answers {refusals} to good events")
    return problems


def _kinds(choose: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Every kind once in random order, and again."""
    while True:
        yield from choose.sample(kinds, len(kinds))


def show(report: Report, console: Console) -> None:
    load, verdict = report.load, report.verdict
    table = Table(
        title=f"chaos: seed {report.seed}, {report.rounds} rounds, {report.seconds:.0f} s", title_justify="left"
    )
    table.add_column("trouble")
    table.add_column("times", justify="right")
    for what, count in sorted(report.trouble.done.items()):
        table.add_row(what, f"{count:,}")
    console.print(table)
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    answers = load.ledger.answers
    table.add_row("kills", f"{kills_in(report):,}")
    table.add_row("events sent", f"{len(load.ledger):,}")
    table.add_row("of these in batches", f"{load.batches * BATCH_EVENTS:,}")
    table.add_row("events answered 200", f"{load.ledger.accepted_events:,}")
    messages = max(1, report.metrics["predlog_messages_total"])
    table.add_row("events a message, on average", f"{report.metrics['predlog_events_total'] / messages:.1f}")
    table.add_row(
        "answers 200 / 503 / 504 / cut", f"{answers[200]:,} / {answers[503]:,} / {answers[504]:,} / {answers[0]:,}"
    )
    table.add_row("rows in the CSV", f"{verdict.rows:,}")
    table.add_row("duplicates dropped, at least", f"{report.metrics['predlog_duplicates_total']:,}")
    table.add_row("slowest recovery", f"{report.slowest_recovery_seconds:.1f} s")
    for name, seconds in report.trouble.slowest_seconds.items():
        table.add_row(f"slowest: {name}", f"{seconds:.1f} s")
    for name, finding in verdict.findings.items():
        table.add_row(name, f"{finding.count:,}", style="red" if finding.count else "green")
    console.print(table)
    for problem in report.problems:
        console.print(problem, style="red", markup=False)
    for line in str(verdict).splitlines()[1:]:
        console.print(line, style="red", markup=False)


def kills_in(report: Report) -> int:
    return sum(count for what, count in report.trouble.done.items() if what.startswith("kill"))


def draw(report: Report, path: Path) -> None:
    findings = ", ".join(f"{finding.count} {name}" for name, finding in report.verdict.findings.items())
    accepted, rows = report.load.ledger.accepted_events, report.verdict.rows
    title = f"{kills_in(report)} kills, {accepted:,} events answered 200, {rows:,} rows in the CSV: {findings}"
    picture.draw(path, title, report.samples, report.marks, rows)


if __name__ == "__main__":
    sys.exit(main())
