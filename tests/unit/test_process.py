"""Log lines nobody's input can forge, one line for what ends a process, and signals."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import __version__, process
from common.errors import Fatal, SettingError, StartupError
from common.logs import JsonFormatter, TextFormatter
from common.process import inherited_socket, run
from tests.conftest import ROOT

HOSTILE = 'a\nb\rc\x00d\x1b[31me\x7ff\x9bg\x85h\u2028i\u2029j"k\\'
CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("predlog", logging.INFO, "", 0, message, arguments, None)


def test_a_text_log_line_has_no_control_character() -> None:
    """A text log line has no control character whatever is logged."""
    line = TextFormatter("p", colour=False).format(record("hears %s", HOSTILE))
    assert not CONTROLS & set(line)
    assert "a\\nb\\rc\\x00d\\x1b[31me\\x7ff\\x9bg\\x85h\\u2028i\\u2029j" in line


def test_a_json_log_line_reads_back_as_what_was_logged() -> None:
    """A json log line has no control character and reads back as what was logged."""
    line = JsonFormatter("p").format(record("hears %s", HOSTILE))
    assert not CONTROLS & set(line)
    assert json.loads(line)["message"] == f"hears {HOSTILE}"


@pytest.fixture
def collector() -> Iterator[None]:
    """The garbage collector of the tests as it was: what stays frozen at the end is reported as leaked by nanobind."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize(("kind", "exit_code"), [(Fatal, 1), (StartupError, 1), (SettingError, 2)])
def test_what_ends_a_process_is_one_line_and_an_exit_code(
    kind: type[Fatal], exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ends a process is one line without a traceback and an exit code."""

    async def main() -> int:
        raise kind("no\nsuch file")

    assert run("prog", main) == exit_code
    assert capsys.readouterr() == ("", "prog: no\\nsuch file\n")


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


def test_a_socket_of_systemds_is_for_the_process_it_names() -> None:
    assert inherited_socket({}, 7) is None
    assert inherited_socket({"LISTEN_PID": "8", "LISTEN_FDS": "1"}, 7) is None
    assert inherited_socket({"LISTEN_PID": "7", "LISTEN_FDS": "0"}, 7) is None
    with pytest.raises(StartupError, match="must be 1"):
        inherited_socket({"LISTEN_PID": "7", "LISTEN_FDS": "2"}, 7)


def test_a_socket_of_systemds_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens, and a program that this process executes does not inherit it by accident."""
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


@pytest.mark.parametrize("program", ["producer.py", "consumer.py"])
def test_pid_1_hears_sigterm_during_its_imports(program: str, tmp_path: Path) -> None:
    """The kernel drops what PID 1 has no handler for: it must have one before the packages are imported."""
    in_namespace = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*in_namespace, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace: unshare is missing, or this user may not make one")
    (tmp_path / "uvloop.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
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
