"""The lock: one owner, which ends with its process; and one that still runs is told even where flock does nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import StartupError
from common.storage import lock as lock_module
from common.storage.lock import Lock


def test_only_one_process_has_the_lock_and_its_pid_is_in_it(tmp_path: Path) -> None:
    path = str(tmp_path / "made" / "for me" / "data.csv")
    first, second = Lock(path), Lock(path)
    assert first.acquire()
    assert not second.acquire()
    assert Path(first.path).read_text().split()[0] == f"{os.getpid()}"
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


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """A process that owns a lock, as far as its signature says."""
    if (pid := os.fork()) == 0:
        signal.pause()
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def sign(path: Path, pid: int, here: str | None = None) -> None:
    started = lock_module._started(pid)
    path.with_name("data.csv.lock").write_text(f"{pid} {here or lock_module._here()} {started}\n")


def test_an_owner_that_still_runs_is_named(tmp_path: Path, elsewhere: int) -> None:
    """Its lock could be had, so flock has no effect: the later one stops with one line."""
    path = tmp_path / "data.csv"
    sign(path, elsewhere)
    with pytest.raises(StartupError, match=f"process {elsewhere} owns it and still runs, although") as caught:
        Lock(str(path)).acquire()
    assert "\n" not in str(caught.value)


def test_a_process_with_the_number_of_the_owner_is_not_it(tmp_path: Path, elsewhere: int) -> None:
    path = tmp_path / "data.csv"
    sign(path, elsewhere)
    signature = path.with_name("data.csv.lock")
    signature.write_text(signature.read_text().rpartition(" ")[0] + " 17\n")
    assert Lock(str(path)).acquire()


@pytest.mark.parametrize("signature", ["", "1234\n", "nonsense", "a b c d e f"])
def test_without_a_signature_the_lock_decides(tmp_path: Path, signature: str) -> None:
    """A clean stop leaves none, and predlog 1.0.0 wrote its process number only."""
    (tmp_path / "data.csv.lock").write_text(signature)
    assert Lock(str(tmp_path / "data.csv")).acquire()


class Clock:
    seconds = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    return clock


def test_an_owner_in_another_container_is_watched(tmp_path: Path, clock: Clock) -> None:
    """After a crash there: nothing is written, so the lock is taken when a second has passed."""
    path = tmp_path / "data.csv"
    sign(path, 1, "another-boot pid:[1]")
    lock = Lock(str(path))
    assert not lock.acquire()
    clock.seconds = 0.9
    assert not lock.acquire()
    clock.seconds = 1.1
    assert lock.acquire()


def test_an_owner_elsewhere_that_writes_is_told(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "data.csv"
    sign(path, 1, "another-boot pid:[1]")
    lock = Lock(str(path))
    assert not lock.acquire()
    path.with_name("data.csv.journal").write_bytes(b"a commit")
    with pytest.raises(StartupError, match="on another machine or in another container"):
        lock.acquire()


def test_a_standby_takes_over_at_once_from_anywhere(tmp_path: Path) -> None:
    """It was refused the lock before, so flock works, and the owner has ended."""
    path = tmp_path / "data.csv"
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    sign(path, 1, "another-boot pid:[1]")
    standby = Lock(str(path))
    assert not standby.acquire()
    os.close(fd)
    assert standby.acquire()


def test_a_removed_lock_file_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    lock = Lock(str(path))
    assert lock.acquire()
    os.unlink(lock.path)
    lock.renew()
    assert not Lock(str(path)).acquire()


def test_a_lock_that_another_took_is_not_renewed(tmp_path: Path) -> None:
    path = str(tmp_path / "data.csv")
    lock, other = Lock(path), Lock(path)
    assert lock.acquire()
    os.unlink(lock.path)
    assert other.acquire()
    with pytest.raises(OSError, match="is in use by another consumer"):
        lock.renew()
