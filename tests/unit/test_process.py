"""Log lines that no input can forge, one line for what ends a process, and signals."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from common import __version__, process
from common.errors import Fatal, SettingError, StartupError
from common.logs import LineFormatter
from common.process import end, first_of, inherited_socket, run
from tests.conftest import ROOT
from tests.fuzz.loop_delay import delay_of

HOSTILE = 'a\nb\rc\x00d\x1b[31me\x7ff\x9bg\x85h\u2028i\u2029j"k\\'
CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("predlog", logging.INFO, "", 0, message, arguments, None)


def test_a_text_log_line_has_no_control_character() -> None:
    line = LineFormatter("p", in_json=False).format(record("hears %s", HOSTILE))
    assert not CONTROLS & set(line)
    assert "a\\nb\\rc\\x00d\\x1b[31me\\x7ff\\x9bg\\x85h\\u2028i\\u2029j" in line


def test_a_json_log_line_reads_back_as_what_was_logged() -> None:
    line = LineFormatter("p", in_json=True).format(record("hears %s", HOSTILE))
    assert not CONTROLS & set(line)
    assert json.loads(line)["message"] == f"hears {HOSTILE}"


@pytest.fixture
def after_run() -> Iterator[None]:
    """Restore the collector and SIGHUP: nanobind reports what stays frozen at the end as leaked."""
    yield
    gc.enable()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.usefixtures("after_run")
@pytest.mark.parametrize(("kind", "exit_code"), [(Fatal, 1), (StartupError, 1), (SettingError, 2)])
def test_what_ends_a_process_is_one_line_and_an_exit_code(
    kind: type[Fatal], exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> int:
        raise kind("no\nsuch file")

    assert run("prog", main) == exit_code
    assert capsys.readouterr() == ("", "prog: no\\nsuch file\n")


@pytest.mark.usefixtures("after_run")
@pytest.mark.parametrize("fault", [ValueError("a bug"), asyncio.CancelledError("a bug")], ids=repr)
def test_a_bug_of_ours_is_one_record_with_its_traceback(fault: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        raise fault

    assert run("prog", main) == 1
    assert [(record.levelname, record.exc_info and record.exc_info[1]) for record in caplog.records] == [
        ("CRITICAL", fault)
    ]


async def fails(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("fault", [ValueError("a bug"), StartupError("no such host")], ids=repr)
async def test_a_task_that_fails_ends_the_process_or_is_logged(
    fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The code that waits for a task gets its exception, which is then not logged."""
    task, endless = asyncio.create_task(fails(fault)), asyncio.create_task(asyncio.sleep(1000))

    async def main() -> None:
        try:
            await first_of(asyncio.Event(), task, endless)
        finally:
            await end(task, endless)

    with pytest.raises(type(fault)):
        await main()
    assert not caplog.records
    await end(asyncio.create_task(asyncio.sleep(1000)), task)
    (record,) = caplog.records
    assert str(fault) in caplog.text
    assert bool(record.exc_info) == isinstance(fault, ValueError)


CANNOT_LISTEN = "HEALTH_HOST=203.0.113.1 HEALTH_PORT=8080"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("program", "mistake", "exit_code", "named"),
    [
        ("producer.py", "TLS_CERT=/no/cert.pem TLS_KEY=/no/key.pem", 1, "/no/cert.pem"),
        ("producer.py", "TLS_CERT=/no/cert.pem TLS_KEY=/no/key.pem WORKERS=2", 1, "/no/cert.pem"),
        ("producer.py", "API_TOKEN_FILE=/no/tokens", 2, "/no/tokens"),
        ("consumer.py", "AMQP_URL_FILE=/no/url", 2, "/no/url"),
        ("consumer.py", CANNOT_LISTEN, 1, "203.0.113.1:8080"),
    ],
)
def test_an_operators_mistake_is_one_line(
    program: str, mistake: str, exit_code: int, named: str, form: str, tmp_path: Path
) -> None:
    environment = dict(item.split("=", 1) for item in mistake.split())
    command = [sys.executable, str(ROOT / program), "--log-format", form, "--log-level", "error"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == exit_code
    (line,) = done.stderr.splitlines()
    assert named in line
    if exit_code == 1 and form == "json":
        assert named in json.loads(line)["message"]


@pytest.mark.parametrize(
    ("program", "mistake"), [("producer.py", "TLS_CERT=/no TLS_KEY=/no"), ("consumer.py", CANNOT_LISTEN)]
)
def test_former_settings_are_one_warning_at_the_start(program: str, mistake: str, tmp_path: Path) -> None:
    """The mistake ends the process after the warning."""
    environment = {"MAX_HEADERS": "9", "MAX_PIPELINED": "9", **dict(item.split("=", 1) for item in mistake.split())}
    command = [sys.executable, str(ROOT / program), "--write-timeout-ms", "5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    (line,) = (line for line in done.stderr.splitlines() if " warning " in line)
    assert line.endswith("no longer settings, and ignored: MAX_HEADERS, MAX_PIPELINED, WRITE_TIMEOUT_MS")


class Ticks:
    """A loop whose clock stands still, and whose timers are called by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tick: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.tick = callback


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generation of each garbage collection during a test."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


@pytest.mark.usefixtures("after_run")
def test_a_collection_looks_at_a_bounded_number_of_objects(collections: list[int]) -> None:
    """Python begins none, however many objects are made. Objects that are too many for one are never looked at."""
    loop = Ticks()
    process.Collector(cast(asyncio.AbstractEventLoop, loop))
    collections.clear()
    kept = [[list[int]() for _ in range(process.NEW_OBJECTS + 100)]]
    loop.tick()
    assert collections == [2]
    while len(gc.get_objects()) <= process.MOST_OBJECTS:
        kept.append([[] for _ in range(process.NEW_OBJECTS - 100)])
    loop.tick()
    assert collections == [2]
    assert len(gc.get_objects()) < process.NEW_OBJECTS
    kept.append([[] for _ in range(process.MOST_OBJECTS + 100)])
    loop.tick()
    assert collections == [2]


@pytest.mark.usefixtures("after_run")
def test_cycles_are_freed_also_while_little_happens(collections: list[int]) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    loop = Ticks()
    process.Collector(cast(asyncio.AbstractEventLoop, loop))
    collections.clear()
    cycle = weakref.ref(Cycle())
    loop.tick()
    assert cycle() is not None
    assert collections == []
    loop.now += process.COLLECT_SECONDS + 1
    loop.tick()
    assert cycle() is None


def test_what_clients_send_leaves_the_collector_nothing() -> None:
    """Requests, good or bad, and their connections are freed as soon as they are over: none is part of a cycle."""
    event = (
        b'{"device_id":"d","client_id":"c","created_at":"t","data":{"license_id":"l",'
        b'"preds":[{"image_frame":"f","prob":1,"tags":["x"]}]}}'
    )
    head = b"POST %b HTTP/1.1\r\nHost: h\r\n%bContent-Length: %d\r\n\r\n"
    kinds = [
        head % (b"/process", b"", len(event)) + event,
        head % (b"/process/batch", b"", len(event) + 5) + b"[%b,{}]" % event,
        head % (b"/process", b"Content-Encoding: gzip\r\n", 3) + b"bad",
        head % (b"/process", b"", 1) + b"{",
        head % (b"/process", b"", 100) + b"half",
        b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n",
        b"no request\r\n\r\n",
    ]
    found = []
    for times in (1, 20):
        before = garbage_until_now()
        delay_of(kinds * times)
        found.append(garbage_until_now() - before)
    assert found[1] < found[0] + 20


def garbage_until_now() -> int:
    gc.collect()
    return sum(generation["collected"] for generation in gc.get_stats())


STOPPING = """
import asyncio, sys
from common import process
async def main():
    stop = process.on_stop()
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await asyncio.sleep(60)
sys.exit(process.run("prog", main))
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_stopping_ends_the_process_at_once(first: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPING], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == "stopping\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == -signal.SIGINT
        finally:
            process.kill()


def test_a_socket_from_systemd_is_for_the_process_it_names() -> None:
    assert inherited_socket({}, 7) is None
    assert inherited_socket({"LISTEN_PID": "8", "LISTEN_FDS": "1"}, 7) is None
    assert inherited_socket({"LISTEN_PID": "7", "LISTEN_FDS": "0"}, 7) is None
    with pytest.raises(StartupError, match="must be 1"):
        inherited_socket({"LISTEN_PID": "7", "LISTEN_FDS": "2"}, 7)


def test_a_socket_from_systemd_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens, but a program that this process executes does not inherit it."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        fd = os.dup(held.fileno())
        os.set_inheritable(fd, True)
        monkeypatch.setattr(process, "_FIRST_INHERITED", fd)
        found = inherited_socket({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, 7)
        assert found is not None
        assert found.getsockname() == held.getsockname()
        assert not found.get_inheritable()
        found.close()


@pytest.mark.parametrize("program", ["producer.py", "consumer.py"])
def test_version_is_one_line(program: str) -> None:
    said = subprocess.run([sys.executable, program, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == f"predlog {__version__}\n"


SLOW_IMPORT = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize("program", ["producer.py", "consumer.py"])
def test_an_interrupt_during_the_imports_is_no_traceback(program: str, tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text(SLOW_IMPORT)
    command, env = [sys.executable, str(ROOT / program)], {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (-signal.SIGINT, "")


@pytest.mark.parametrize("program", ["producer.py", "consumer.py"])
def test_pid_1_hears_sigterm_during_its_imports(program: str, tmp_path: Path) -> None:
    """The kernel drops a signal that PID 1 has no handler for, so it needs one before the packages are imported."""
    in_namespace = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace: unshare is missing, or this user may not make one")
    (tmp_path / "uvloop.py").write_text(SLOW_IMPORT)
    command = [*in_namespace, sys.executable, str(ROOT / program)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as unshare:
        try:
            assert unshare.stdout is not None
            assert unshare.stdout.readline() == "importing\n"
            pid = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
            os.kill(pid, signal.SIGTERM)
            assert unshare.wait(10) == 0
        finally:
            unshare.kill()
