"""The lock: one owner, which ends with its process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from common.storage.lock import Lock


def test_only_one_process_has_the_lock(tmp_path: Path) -> None:
    path = str(tmp_path / "made" / "for me" / "data.csv")
    first, second = Lock(path), Lock(path)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    first.release()
    assert second.acquire()
    second.release()


def test_the_lock_ends_with_its_process_even_by_sigkill(tmp_path: Path) -> None:
    path = str(tmp_path / "data.csv")
    ready, report = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            Lock(path).acquire()
            os.write(report, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    assert not Lock(path).acquire()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie, which its parent has not looked at yet
    assert Lock(path).acquire()
    os.waitpid(pid, 0)


@pytest.mark.parametrize("signature", ["", "1234\n", "1 another-boot pid:[1] 17\n", f"{os.getppid()} - - 17\n"])
def test_what_older_versions_wrote_into_the_lock_is_ignored(tmp_path: Path, signature: str) -> None:
    (tmp_path / "data.csv.lock").write_text(signature)
    assert Lock(str(tmp_path / "data.csv")).acquire()
