"""A real HAProxy in front of producers, with the configuration that deploy/ ships."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from scripts.rabbitmq import free_port
from tests.rabbitmq import listens
from tests.support.polling import wait_until

PROGRAM = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
needs_haproxy = pytest.mark.skipif(PROGRAM is None, reason="haproxy is not installed (Debian: apt-get install haproxy)")
SHIPPED = Path(__file__).parents[2] / "deploy" / "compose" / "haproxy.cfg"


@contextlib.contextmanager
def haproxy(directory: Path, urls: Sequence[str]) -> Iterator[str]:
    """The URL of a HAProxy in front of two producers, once it has found both ready."""
    assert PROGRAM is not None
    directory.mkdir()
    port = free_port()
    text = SHIPPED.read_text().replace("bind :8000", f"bind 127.0.0.1:{port}")
    for number, url in enumerate(urls, 1):
        address = f"producer{number}:8000"
        assert address in text
        text = text.replace(address, url.removeprefix("http://"))
    stats = directory / "stats.sock"
    (directory / "haproxy.cfg").write_text(text.replace("global\n", f"global\n    stats socket {stats}\n", 1))
    with (directory / "log").open("wb") as log:
        command = [PROGRAM, "-db", "-f", str(directory / "haproxy.cfg")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(
                "HAProxy listens", lambda: stats.exists() and listens(port), explain=(directory / "log").read_text
            )
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def wait_until_down(directory: Path, number: int) -> None:
    """Wait until the HAProxy of `directory` sends nothing more to this producer, counted from 1."""
    log = directory / "log"
    down = f"Server producers/producer{number} is DOWN"
    wait_until(f"{down!r} is in the log", lambda: down in log.read_text(), explain=log.read_text)
