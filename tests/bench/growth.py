"""When a file grew: a thread that only looks at its size, every millisecond.

Which row became visible when is worked out afterwards from the offsets of the rows.
"""

from __future__ import annotations

import bisect
import threading
import time
from pathlib import Path
from types import TracebackType

from tests.bench.process import Process

POLL_SECONDS = 0.001


class Growth:
    """A context manager; `samples` are (time.perf_counter(), size in bytes) at each change of the size."""

    def __init__(self, path: Path) -> None:
        self.samples: list[tuple[float, int]] = [(time.perf_counter(), _size(path))]
        self.path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Growth:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            size = _size(self.path)
            if size != self.samples[-1][1]:
                self.samples.append((time.perf_counter(), size))

    @property
    def last(self) -> tuple[float, int]:
        return self.samples[-1]

    def wait_for_size(self, size: int, writer: Process, stalled_seconds: float = 30) -> float:
        """The moment at which the file had at least `size` bytes; raises RuntimeError when `writer` ends or stalls."""
        while self.last[1] < size:
            writer.check()
            if time.perf_counter() > self.last[0] + stalled_seconds:
                found = f"{self.path.name} has {self.last[1]:,} bytes, should have {size:,}, and does not grow"
                raise RuntimeError(f"{found}:\n{writer.log_tail()}")
            time.sleep(POLL_SECONDS)
        return self.reached(size)

    def wait_until_still(self, still_seconds: float = 1) -> float:
        """The moment of the last growth, once there has been none for `still_seconds`."""
        while time.perf_counter() < self.last[0] + still_seconds:
            time.sleep(0.02)
        return self.last[0]

    def reached(self, size: int) -> float:
        """The moment at which the file first had at least `size` bytes."""
        return self.samples[bisect.bisect_left(self.samples, size, key=lambda sample: sample[1])][0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
