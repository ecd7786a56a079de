import io
import os
from pathlib import Path
from typing import Any, cast

import pytest

from common.consumer.dead_letters import commands
from common.consumer.dead_letters.commands import Progress
from common.errors import StartupError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(TypeError), commands._replacing(str(path)) as out:
        out.writelines([b"half", cast(Any, None)])
    assert path.read_text() == "old"
    with commands._replacing(str(path)) as out:
        out.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    wanted = str(tmp_path / "none" / "out")
    with pytest.raises(StartupError, match=f"^cannot write {wanted}: No such file or directory$"):  # noqa: SIM117
        with commands._replacing(wanted):
            pass


def test_a_device_is_written_to_and_not_replaced() -> None:
    with commands._replacing("/dev/null") as out:
        out.write(b"x")
    assert not Path("/dev/null").is_file()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_only() -> None:
    """Progress is a bar on a terminal and plain lines elsewhere."""
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with Progress(4, stream) as progress:
            progress.advance(3)
    assert terminal.getvalue().startswith("\r[")
    assert terminal.getvalue().count("\n") == 1
    assert "3/4  75%" in terminal.getvalue()
    assert pipe.getvalue().startswith("0/4   0%")
    assert pipe.getvalue().splitlines()[-1].startswith("3/4  75%")
    assert "\r" not in pipe.getvalue()
