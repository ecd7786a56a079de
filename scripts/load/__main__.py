"""The load tool's command line: `python -m scripts.load --url http://127.0.0.1:8000 --events 100000`."""

import argparse
import os
import random
import sys
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from scripts.load.checker import Verdict, check
from scripts.load.client import Connection, Target
from scripts.load.events import Events, Frames
from scripts.load.generator import Load, percentile, run_with_progress
from scripts.load.ledger import CUT, Ledger
from scripts.load.verify import opened, total_bytes

_QUIET_SECONDS = 2.0  # the consumer is taken to be done when the CSV has not grown for this long
_VERIFY_SECONDS = 600.0


def main() -> int:
    arguments = _arguments()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**9)
    try:
        target = Target.parse(arguments.url, os.environ.get("API_TOKEN", "").split(",")[0])
        events = Events(seed, Frames.parse(arguments.frames) if arguments.frames else None)
    except ValueError as error:
        console.print(f"load: {error}", style="red", markup=False)
        return 2
    try:
        load = uvloop.run(_run(arguments, target, events, console))
    except OSError as error:
        console.print(
            f"load: cannot reach {arguments.url}: {error}; is the producer running?", style="red", markup=False
        )
        return 1
    except KeyboardInterrupt:
        return 130
    good = load.wrong_answers == 0 and set(load.ledger.answers) <= {200, 503, 504, CUT}
    if arguments.verify is not None:
        verdict = _verify(arguments.verify, events, load.ledger, console)
        good = good and not (verdict.lost.count or verdict.duplicated.count or verdict.torn.count)
    return 0 if good else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.load",
        description="Posts self-identifying events to a producer, shows rate and latency, and checks the CSV. "
        "The token, if the producer wants one, is the first of API_TOKEN in the environment.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the producer (default %(default)s)")
    parser.add_argument("--events", type=int, default=10_000, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="in flight (default %(default)s)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="of these, per connection (default 1)")
    parser.add_argument("--frames", metavar="NxSIZE", help="5x20KB: five predictions of 20 KB (default 0 to 10 small)")
    parser.add_argument("--retries", action="store_true", help="send keys; repeat until 200, and some events again")
    parser.add_argument("--verify", type=Path, metavar="CSV", help="at the end, compare this file with the answers")
    parser.add_argument("--seed", type=int, help="same seed, same events: use it once per CSV (default random)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write each answer as a JSON line")
    return parser.parse_args()


async def _run(arguments: argparse.Namespace, target: Target, events: Events, console: Console) -> Load:
    (await Connection.open(target, 1.0)).close()
    log = arguments.log.open("w") if arguments.log else None
    load = Load(
        target, events, count=arguments.events, concurrency=arguments.concurrency, pipeline=arguments.pipeline,
        retries=arguments.retries, log=log,
    )  # fmt: skip
    columns = (TextColumn("load"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("load", total=arguments.events, now="")
        last = (started, 0)

        def show(load: Load) -> None:
            nonlocal last
            now, answered = time.monotonic(), load.ledger.answers[200]
            rate = (answered - last[1]) / max(now - last[0], 1e-3)
            last = (now, answered)
            p50, p99 = (percentile(load.recent_seconds, per_cent) * 1000 for per_cent in (50, 99))
            text = f"{rate:,.0f}/s  p50 {p50:.1f} ms  p99 {p99:.1f} ms"
            progress.update(task, completed=len(load.ledger), now=text)

        try:
            await run_with_progress(load, show)
        finally:
            if log is not None:
                log.close()
    _summary(load, time.monotonic() - started, console)
    return load


def _summary(load: Load, seconds: float, console: Console) -> None:
    ledger = load.ledger
    table = Table(show_header=False, box=None)
    table.add_row("events", f"{len(ledger):,} in {seconds:.2f} s")
    table.add_row("answered 200", f"{ledger.answers[200]:,} ({ledger.answers[200] / seconds:,.0f}/s)")
    for status, count in sorted(ledger.answers.items()):
        if status != 200:
            table.add_row("connection cut" if status == CUT else f"answered {status}", f"{count:,}")
    for per_cent in (50, 90, 99, 99.9):
        table.add_row(f"p{per_cent}", f"{percentile(load.latencies_seconds, per_cent) * 1000:.2f} ms")
    if load.gave_up:
        table.add_row("given up", f"{load.gave_up:,}")
    if load.wrong_answers:
        table.add_row("answered with another event", f"[red]{load.wrong_answers:,}")
    console.print(table)


def _verify(csv: Path, events: Events, ledger: Ledger, console: Console) -> Verdict:
    """Wait until the consumer has caught up, then compare. The file can have rows of others, which are only counted."""
    with console.status(f"waiting until {csv} stops growing"):
        give_up = time.monotonic() + _VERIFY_SECONDS
        size, since = total_bytes(csv), time.monotonic()
        while time.monotonic() < min(give_up, since + _QUIET_SECONDS):
            time.sleep(0.1)
            if (grown := total_bytes(csv)) != size:
                size, since = grown, time.monotonic()
    with console.status("comparing"):
        verdict = check(events, ledger, opened(csv))
    rows = verdict.rows - verdict.foreign.count
    console.print(
        f"{csv}: {ledger.accepted_events:,} events answered 200, {rows:,} rows of this run",
        markup=False,
    )
    prefix = events.prefix.decode()
    console.print(
        f"the rows of this run have a device_id that begins with {prefix}: filter them out, or stop the consumer, "
        "remove them from the file, and start it again",
        markup=False,
    )
    style = "red" if verdict.lost.count or verdict.duplicated.count or verdict.torn.count else "green"
    console.print(str(verdict).replace("foreign", "rows of others"), style=style, markup=False)
    return verdict


sys.exit(main())
