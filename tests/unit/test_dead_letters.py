"""The file of dead letters: what is in a line, and what becomes of the file when others touch it."""

from __future__ import annotations

import fcntl
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.consumer import dead_letters
from common.consumer.dead_letters import append, parse, printable, table_row
from common.consumer.prepare import Poison
from common.event.ids import id_digest
from tests.support.deliveries import delivery


def poison(body: bytes = b"not JSON", line: int = 0, event_id: bytes | None = b"an id", **properties: Any) -> Poison:
    return Poison("not_json", "it is not JSON", event_id, line, delivery(1, body, **properties).header, body)


@pytest.fixture
def csv_file(tmp_path: Path) -> str:
    path = tmp_path / "data.csv"
    path.write_bytes(b"")
    return str(path)


def lines_of(csv_file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{csv_file}.dead-letters").read_bytes().splitlines()]


def test_a_line_says_when_why_and_what(csv_file: str) -> None:
    append(csv_file, [poison("é\n\0".encode(), 3, content_type="text/x", headers={"camera": 7})])
    [line] = lines_of(csv_file)
    when = datetime.fromisoformat(line.pop("when"))
    assert timedelta(0) <= datetime.now(UTC) - when < timedelta(seconds=30)
    theirs = {"content_type": "text/x", "headers": {"camera": 7}, "message_id": f"{1:032x}"}
    assert line.pop("properties").items() >= theirs.items()
    assert line == {"why": "it is not JSON", "id": "an id", "line": 3, "body": "é\n\0"}


def test_a_body_that_is_not_text_is_kept_octet_by_octet(csv_file: str) -> None:
    body = bytes(range(256)) * 1000
    append(csv_file, [poison(body)])
    letter = parse(Path(f"{csv_file}.dead-letters").read_bytes())
    assert letter.body == body
    assert "body" not in lines_of(csv_file)[0]


def test_a_letter_without_an_id_gets_one(csv_file: str) -> None:
    append(csv_file, [poison(event_id=None), poison(event_id=None)])
    assert [len(line["id"]) for line in lines_of(csv_file)] == [32, 32]
    assert len({line["id"] for line in lines_of(csv_file)}) == 2


def test_an_id_that_is_not_text_is_known_by_its_digest(csv_file: str) -> None:
    append(csv_file, [poison(event_id=b"\xff")])
    assert id_digest(lines_of(csv_file)[0]["id"]) == id_digest(b"\xff")


def test_a_header_that_cannot_be_read_is_kept_too(csv_file: str) -> None:
    append(csv_file, [poison()._replace(header=b"\x00\x3c\x00\x00" + bytes(8) + b"\x20\x00\xff")])
    assert lines_of(csv_file)[0]["properties"] == {"undecoded": "003c000000000000000000002000ff"}


@pytest.mark.parametrize("depth", [100, 250, 254, 255, 256, 300, 450, 900, 980, 1000, 2000])
def test_headers_of_any_depth_become_a_letter(csv_file: str, depth: int) -> None:
    table = b"\x01aI" + bytes(4)  # {"a": 0}
    for _ in range(depth):
        table = b"\x01aF" + len(table).to_bytes(4) + table
    header = b"\x00\x3c\x00\x00" + bytes(8) + b"\x20\x00" + len(table).to_bytes(4) + table
    append(csv_file, [poison()._replace(header=header)])
    [line] = Path(f"{csv_file}.dead-letters").read_bytes().splitlines()
    assert parse(line).body == poison().body


def test_the_file_has_the_mode_of_the_csv(csv_file: str) -> None:
    os.chmod(csv_file, 0o600)
    append(csv_file, [poison()])
    assert Path(f"{csv_file}.dead-letters").stat().st_mode & 0o777 == 0o600


def test_an_append_is_whole_or_nothing(csv_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append(csv_file, [poison(b"first")])
    written = 0

    def full(fd: int, data: bytes) -> None:
        nonlocal written
        written += 1
        os.write(fd, data[: len(data) // written])
        if written == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(dead_letters, "write_all", full)
    with pytest.raises(OSError, match="No space") as raised:
        append(csv_file, [poison(b"second"), poison(b"third")])
    assert raised.value.filename == f"{csv_file}.dead-letters"
    assert [line["body"] for line in lines_of(csv_file)] == ["first"]


def test_a_line_cut_by_a_crash_takes_no_other_with_it(csv_file: str) -> None:
    Path(f"{csv_file}.dead-letters").write_bytes(b'{"when":"2026')
    append(csv_file, [poison()])
    cut, whole = Path(f"{csv_file}.dead-letters").read_bytes().splitlines()
    assert [parse(line).why for line in (cut, whole)] == ["a damaged line", "it is not JSON"]


@pytest.mark.parametrize("change", ["emptied", "deleted", "moved"])
def test_a_change_of_the_file_loses_no_later_letter(csv_file: str, change: str) -> None:
    path = Path(f"{csv_file}.dead-letters")
    append(csv_file, [poison(b"before")])
    if change == "emptied":
        os.truncate(path, 0)
    elif change == "deleted":
        path.unlink()
    else:
        path.rename(f"{csv_file}.old")
    append(csv_file, [poison(b"after")])
    assert [line["body"] for line in lines_of(csv_file)] == ["after"]


def test_a_letter_is_never_only_in_a_file_taken_away(csv_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is renamed during the append, which then writes again under the same id."""
    path = Path(f"{csv_file}.dead-letters")
    append(csv_file, [poison(b"before")])

    def taken_away(fd: int) -> None:
        monkeypatch.undo()
        os.fsync(fd)
        path.rename(f"{csv_file}.taken")

    monkeypatch.setattr(os, "fsync", taken_away)
    append(csv_file, [poison(b"after", event_id=None)])
    [letter] = lines_of(csv_file)
    assert letter["body"] == "after"
    assert letter["id"].encode() in Path(f"{csv_file}.taken").read_bytes()


def test_while_a_replay_takes_the_file_an_append_fails(csv_file: str) -> None:
    """The append is then repeated, and no half of a line is replayed."""
    append(csv_file, [poison(b"before")])
    with open(f"{csv_file}.dead-letters", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError) as raised:
            append(csv_file, [poison(b"after")])
    assert raised.value.filename == f"{csv_file}.dead-letters"
    append(csv_file, [poison(b"after")])
    assert [line["body"] for line in lines_of(csv_file)] == ["before", "after"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)], ids=["folder", "fifo"])
def test_what_is_not_a_file_is_an_error_that_names_it(csv_file: str, make: Any) -> None:
    path = Path(f"{csv_file}.dead-letters")
    make(path)
    with pytest.raises(OSError, match="regular") as raised:
        append(csv_file, [poison()])
    assert raised.value.filename == str(path)


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{", b"[]", b"{}", b'{"when":1}', b"\xff", b'{"when":"","why":"","id":""}'),
        b'{"when":"","why":"","id":"","body":7}',
        b'{"when":"","why":"","id":"%b","body":""}' % (b"x" * 256),
        b'{"when":"","why":"","id":7,"body":""}',
        b'{"when":"","why":"","id":"","body_base64":"?"}',
    ],
)
def test_a_damaged_line_is_a_letter_of_its_own(line: bytes) -> None:
    letter = parse(line + b"\n")
    assert (letter.why, letter.body) == ("a damaged line", line)
    assert letter == parse(line)


def test_the_table_drives_no_terminal() -> None:
    line = b'{"when":"now","why":"\\u001b[2J","id":"\\r\\ud800","properties":{},"body":"\\u001b]0;x"}'
    letter = parse(line)
    assert table_row(letter).isprintable()
    assert printable("a\x1b\u202e\udcff") == "a\N{REPLACEMENT CHARACTER}" + 2 * "\N{REPLACEMENT CHARACTER}"
