"""What the figures were measured on: hardware, kernel and versions, in words."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PREDLOG_PACKAGES = ("aiormq", "pamqp", "uvloop", "orjson")
BASELINE_PACKAGES = ("fastapi", "pydantic", "uvicorn", "uvloop", "httptools", "aio-pika", "orjson")


def describe(folder: Path, rabbitmq_version: str, command: str) -> dict[str, str]:
    """Name → value, in the order to show them. `folder` holds the broker's data and the CSV files."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    file_system = _first_line("stat", "-f", "-c", "%T", str(folder))
    return {
        "command": f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{len(os.sched_getaffinity(0))} cores, {model}, {memory_kib * 1024 / 1e9:.0f} GB memory; "
        f"load average before: {os.getloadavg()[0]:.1f}",
        "system": f"{_system()}, Linux {platform.release()}, {file_system} for the broker's data and the CSV",
        "RabbitMQ": f"{rabbitmq_version}, quorum queues, one node",
        "Python": platform.python_version(),
        "predlog": ", ".join(f"{name} {version(name)}" for name in PREDLOG_PACKAGES),
        "baseline": ", ".join(f"{name} {version(name)}" for name in BASELINE_PACKAGES),
        "load": _first_line("wrk", "-v").split(" [")[0],
    }


def _system() -> str:
    names = dict(line.split("=", 1) for line in _lines("/etc/os-release") if "=" in line)
    return names.get("PRETTY_NAME", "unknown system").strip('"')


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()
