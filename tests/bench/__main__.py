"""The macro-benchmark, `python -m tests.bench`: about twelve minutes on a private RabbitMQ, then docs/benchmarks.md.

QUICK=1 makes one short round; its figures are for development only. SECTIONS=producer,idle runs only those named. Both
write to a temporary folder. No time makes it pass or fail.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from scripts.rabbitmq import BrokerError
from tests.bench import charts, events, machine, report
from tests.bench.process import ROOT, TICKS_PER_SECOND
from tests.bench.results import Results
from tests.bench.sections import SECTIONS
from tests.bench.stage import BRIDGES, QUICK, Effort, Stage
from tests.rabbitmq import RabbitMQ

BUSY_LOAD = 1.0


def main() -> None:
    quick = os.environ.get("QUICK", "") not in ("", "0")
    names = [section.__name__ for section in SECTIONS]
    chosen = [name for name in os.environ.get("SECTIONS", "").split(",") if name] or names
    if unknown := set(chosen) - set(names):
        raise SystemExit(f"bench: SECTIONS has {', '.join(unknown)}, but there are only {', '.join(names)}")
    _check_tools()
    effort = QUICK if quick else Effort()
    effort = dataclasses.replace(effort, idle_connections=min(effort.idle_connections, _raise_open_files() - 500))
    whole = not quick and chosen == names
    results, start = Results(), time.monotonic()
    # /var/tmp is on a disk. /tmp can be in memory, where fsync costs nothing.
    with tempfile.TemporaryDirectory(prefix="predlog-bench-", dir="/var/tmp") as scratch:
        folder = Path(scratch)
        print("starting a private RabbitMQ …", flush=True)
        with RabbitMQ(folder / "rabbitmq") as broker:
            command = f"{'QUICK=1 ' if quick else ''}make bench"
            about = machine.describe(folder, broker.ctl("version").strip(), command)
            print("\n".join(f"  {name}: {value}" for name, value in about.items()), flush=True)
            if not BRIDGES:
                print("  note: mq-bridge is not installed, and is left out", flush=True)
            if os.getloadavg()[0] > BUSY_LOAD:
                print("  note: the machine is busy with something else, and the figures will show it", flush=True)
            stage = Stage(broker.url, broker.ctl, lambda: cpu_seconds_of(broker), folder, effort)
            for number, section in enumerate(SECTIONS, 1):
                if section.__name__ not in chosen:
                    continue
                print(f"\n[{number}/{len(SECTIONS)}] {(section.__doc__ or '').strip()}", flush=True)
                for record in section(stage, results):
                    results.records.append(record)
                    print(f"{_clock(time.monotonic() - start)}  {report.record_line(record)}", flush=True)
    _report(results, about, effort, ROOT / "docs" if whole else Path(tempfile.mkdtemp(prefix="predlog-bench-report-")))


def cpu_seconds_of(broker: RabbitMQ) -> float:
    assert broker.process is not None
    fields = Path(f"/proc/{broker.process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def _report(results: Results, about: dict[str, str], effort: Effort, folder: Path) -> None:
    print("\nMedians\n")
    for topic in report.TOPICS:
        if results.cases(topic.section):
            print(f"{topic.title}\n{report.text_table(report.table(results, topic))}\n")
    print(report.text_table(report.target_rows(results)))
    folder.mkdir(exist_ok=True)
    report.write(folder / "benchmarks.md", results, about, events.small().describe(), effort.rounds)
    charts.write(folder, results)
    print(f"\nwrote {folder}/benchmarks.md, benchmarks.svg, latency.svg")


def _check_tools() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("bench: wrk is missing, the program that makes the load; install it: apt-get install wrk")
    needed = ("fastapi", "uvicorn", "httptools", "aio_pika")
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"bench: no Python package {', '.join(missing)}; `make bench` installs requirements-dev.txt")


def _raise_open_files() -> int:
    """Allow as many open files as possible, for the connections here and in the programs started from here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1_000_000 if hard == resource.RLIM_INFINITY else hard


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (BrokerError, RuntimeError, TimeoutError) as error:
        sys.exit(f"bench: {error}")
