"""A process under measurement: start, ready, CPU and memory of it and its children from /proc, stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Process:
    """`command` as a process in the project's folder, its output in a file. A context manager: SIGTERM at the end."""

    def __init__(self, command: Sequence[str], settings: Mapping[str, str], log_file: Path) -> None:
        base = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self._log_file = log_file
        self._name = " ".join(Path(word).name for word in command[:3])
        with log_file.open("ab") as log:
            self._popen = subprocess.Popen(
                command, cwd=ROOT, env=base | dict(settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self, port: int, timeout_seconds: float = 30) -> None:
        """Wait until GET /readyz on `port` is answered without 5xx; raise RuntimeError with the end of the log."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500:  # mq-bridge has no such page, and listens once it has its broker
                    return
            except (OSError, urllib.error.URLError):
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{self._name} was not ready within {timeout_seconds:.0f} s:\n{self.log_tail()}")

    def check(self) -> None:
        """Raise RuntimeError with the end of the log when the process has ended."""
        if self._popen.poll() is not None:
            raise RuntimeError(f"{self._name} ended with code {self._popen.returncode}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return self._log_file.read_text(errors="replace")[-1500:]

    def cpu_seconds(self) -> float:
        """Return user + sys so far, of the process and its living children."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS_PER_SECOND

    def memory_mb(self) -> float:
        """Return the resident memory now, MB (10**6 bytes)."""
        return self._status_mb("VmRSS")

    def peak_memory_mb(self) -> float:
        """Return the peak of the resident memory, MB (10**6 bytes)."""
        return self._status_mb("VmHWM")

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and its living children."""
        for pid in self._pids():
            os.kill(pid, number)

    def stop(self, timeout_seconds: float = 20) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()

    def _status_mb(self, field: str) -> float:
        total_kib = 0
        for pid in self._pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(field + ":"):
                    total_kib += int(line.split()[1])
        return total_kib * 1024 / 1e6

    def _pids(self) -> list[int]:
        self.check()
        found = [self._popen.pid]
        for pid in found:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        return found
