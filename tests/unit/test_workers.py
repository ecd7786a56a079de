"""The supervisor of worker processes, in processes of its own: it forks, and takes over their signals."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from common import workers
from common.config import ProducerSettings
from common.errors import SettingError, StartupError
from common.producer.processes import serve_all
from tests.conftest import ROOT

BEGIN = """
import logging, os, select, signal, sys, time
from common import workers
logging.basicConfig(format="%(message)s")
shutdown_seconds = 60
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one write: lines of two processes do not mix
"""
END = """
sys.exit(workers.supervise(2, work, shutdown_seconds))
"""

Supervise = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def supervise() -> Iterator[Supervise]:
    """`supervise(text of the function work(index, alive_fd))` → the supervisor of two such workers."""
    started: list[subprocess.Popen[str]] = []

    def start(work: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BEGIN + work + END]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().rstrip() for _ in range(count))


def test_a_worker_that_raises_is_logged_with_its_traceback(supervise: Supervise) -> None:
    supervisor = supervise("""
def work(index, alive_fd, replaces):
    if index == 1:
        raise ValueError("a bug in a worker")
    time.sleep(60)
""")
    _, said = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 1
    assert "worker 1 failed\nTraceback" in said
    assert "ValueError: a bug in a worker" in said


def test_workers_that_had_to_be_killed_give_exit_code_1(supervise: Supervise) -> None:
    supervisor = supervise("""
shutdown_seconds = workers.KILL_GRACE_SECONDS = 0.1
def work(index, alive_fd, replaces):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("ready")
    time.sleep(60)
""")
    lines(supervisor, 2)
    supervisor.terminate()
    _, said = supervisor.communicate(timeout=30)
    assert (supervisor.returncode, said) == (1, "2 worker(s) did not stop in time; killed\n")


def test_a_second_interrupt_kills_the_workers_at_once(supervise: Supervise) -> None:
    supervisor = supervise("""
def work(index, alive_fd, replaces):
    signal.signal(signal.SIGTERM, lambda *_: say("stopping"))
    say("ready")
    while True:
        time.sleep(60)
""")
    lines(supervisor, 2)
    supervisor.send_signal(signal.SIGINT)
    assert lines(supervisor, 2) == ["stopping", "stopping"]
    supervisor.send_signal(signal.SIGINT)
    _, said = supervisor.communicate(timeout=30)
    assert (supervisor.returncode, said) == (1, "2 worker(s) did not stop in time; killed\n")


def test_a_worker_that_crashes_while_it_stops_gives_exit_code_1(supervise: Supervise) -> None:
    supervisor = supervise("""
def work(index, alive_fd, replaces):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    say("ready")
    signal.sigwait({signal.SIGTERM})
    if index == 0:
        signal.raise_signal(signal.SIGKILL)
    return 0
""")
    lines(supervisor, 2)
    supervisor.terminate()
    assert supervisor.wait(30) == 1


def test_workers_that_stop_in_time_give_exit_code_0(supervise: Supervise) -> None:
    supervisor = supervise("""
def work(index, alive_fd, replaces):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    say("ready")
    signal.sigwait({signal.SIGTERM})
    return 0
""")
    lines(supervisor, 2)
    supervisor.terminate()
    _, said = supervisor.communicate(timeout=30)
    assert (supervisor.returncode, said) == (0, "")


def test_sighup_is_passed_on_to_every_worker(supervise: Supervise) -> None:
    supervisor = supervise("""
def work(index, alive_fd, replaces):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    say("ready")
    signal.sigwait({signal.SIGHUP})
    say("worker", index, "hears SIGHUP")
    time.sleep(60)
""")
    lines(supervisor, 2)
    supervisor.send_signal(signal.SIGHUP)
    assert lines(supervisor, 2) == ["worker 0 hears SIGHUP", "worker 1 hears SIGHUP"]
    assert supervisor.poll() is None
    supervisor.terminate()
    supervisor.wait(30)


def test_a_dead_worker_is_replaced_and_the_new_one_knows_it(supervise: Supervise) -> None:
    supervisor = supervise("""
workers.RESTART_SECONDS = 0.01
def work(index, alive_fd, replaces):
    say(index, os.getpid(), replaces)
    time.sleep(60)
""")
    before = lines(supervisor, 2)
    index, pid, replaces = before[1].split()
    assert replaces == "False"
    subprocess.run(["kill", "-KILL", pid], check=True)
    again, new_pid, replaces = lines(supervisor, 1)[0].split()
    assert (again, replaces) == (index, "True")
    assert new_pid != pid
    supervisor.terminate()
    supervisor.wait(30)


def test_every_worker_hears_of_a_killed_supervisor(supervise: Supervise) -> None:
    supervisor = supervise("""
def work(index, alive_fd, replaces):
    early = select.select([alive_fd], [], [], 0)[0]
    say("ready" if not early else "too early")
    select.select([alive_fd], [], [], 20)
    say("worker", index, "is alone:", os.read(alive_fd, 1))
    return 0
""")
    assert lines(supervisor, 2) == ["ready", "ready"]
    supervisor.kill()
    assert lines(supervisor, 2) == ["worker 0 is alone: b''", "worker 1 is alone: b''"]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "a..b", "x" * 64], ids=str)
def test_a_host_that_is_not_ours_is_one_line_that_names_it(host: str) -> None:
    with pytest.raises(StartupError) as refusal:
        workers.reserve_port(host, 8000)
    assert f"cannot listen on {host}:8000: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_port_in_use_is_one_line_even_if_it_is_shared() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: .*set HTTP_PORT"):
            workers.reserve_port("127.0.0.1", port)
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: .*set HEALTH_PORT"):
            workers.reserve_port("127.0.0.1", port, "HEALTH_PORT")


def test_workers_refuse_a_health_port_that_is_their_main_port() -> None:
    """The kernel would spread clients over both servers."""
    settings = ProducerSettings(amqp_url="amqp://127.0.0.1:1/", workers=2, http_host="127.0.0.1", health_port=8000)
    with pytest.raises(SettingError, match="HEALTH_PORT is the same as HTTP_PORT"):
        serve_all(settings, None)


def test_workers_that_end_together_are_not_signalled(supervise: Supervise) -> None:
    """Both have ended when the supervisor looks: the first one's end must not send SIGTERM to the pid of the second."""
    supervisor = supervise("""
reap = workers._reap
def reap_both(running):
    for pid in running:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return reap(running)
workers._reap = reap_both
def work(index, alive_fd, replaces):
    return 3
""")
    _, said = supervisor.communicate(timeout=20)
    assert (supervisor.returncode, said) == (3, "")


def test_a_drain_delay_is_added_to_the_shutdown_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor used to kill workers during their delay, and those that finished accepted work after it."""
    given: list[float] = []

    def supervise(count: int, work: object, shutdown_seconds: float) -> int:
        given.append(shutdown_seconds)
        return 0

    monkeypatch.setattr(workers, "supervise", supervise)
    settings = ProducerSettings(http_port=0, workers=2, drain_delay_ms=30_000, shutdown_timeout_ms=10_000)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert serve_all(settings, listener) == 0
    assert given == [40.0]
