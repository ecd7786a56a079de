"""Dead letters: what can never become rows, as lines of JSON in `<csv>.dead-letters`.

Each append opens the file by its path and remembers nothing about it, so anyone can empty, move or delete it at any
time. replay.py takes letters out. Everything is synchronous.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from common.amqp.properties import readable_properties
from common.consumer.prepare import Poison
from common.event.ids import id_digest
from common.storage.files import is_at, mode_of, naming, open_regular, sync_directory, write_all

MOST_ID_BYTES = 255  # of a message_id (AMQP 0-9-1, 4.2.5.3)
_ROW = "{:32.32}  {:40.40}  {:24.24}  {:>9}  {}"
TABLE_HEAD = _ROW.format("ID", "WHY", "WHEN", "SIZE", "FIRST BYTES")


class Letter(NamedTuple):
    """A dead letter, read from its line."""

    when: str  # RFC 3339, UTC
    why: str
    id: str
    body: bytes


def file_of(csv_path: str) -> str:
    return f"{csv_path}.dead-letters"


def size_of(csv_path: str) -> int:
    """Return the size of the dead letters of a CSV, in bytes; 0 if there are none."""
    with suppress(OSError):
        return os.stat(file_of(csv_path)).st_size
    return 0


# Writing


def append(csv_path: str, poison: Sequence[Poison]) -> None:
    """Make letters durable, all or none. Raise OSError.

    They are written again if the file was taken away or removed meanwhile, so that none is left only in a file that
    nobody reads. A letter without an id gets a random one, by which the consumer recognises a second copy.
    """
    path, when = file_of(csv_path), datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    lines = [_line(each, when) for each in poison]
    in_place = False
    while not in_place:
        fd = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode_of(csv_path))
        try:
            with naming(path):
                _append(fd, path, lines)
            in_place = is_at(fd, path)
        finally:
            os.close(fd)


def _append(fd: int, path: str, lines: Sequence[bytes]) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it fails while a replay takes the file away
    size = os.fstat(fd).st_size
    try:
        if size and os.pread(fd, 1, size - 1) != b"\n":  # a crash cut the last line, which was not acked
            write_all(fd, b"\n")
        for line in lines:
            write_all(fd, line)
        os.fsync(fd)
        if not size:
            sync_directory(path)
    except OSError:
        with suppress(OSError):
            os.ftruncate(fd, size)
        raise


def _line(poison: Poison, when: str) -> bytes:
    entry: dict[str, Any] = {"when": when, "why": poison.why, "id": _text_id(poison.id)}
    if poison.line:
        entry["line"] = poison.line
    if poison.header:
        entry["properties"] = readable_properties(poison.header)
    try:
        entry["body"] = poison.body.decode()
    except UnicodeDecodeError:
        entry["body_base64"] = base64.b64encode(poison.body).decode()
    # Not by orjson, which takes less depth than what `readable_properties` returns.
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _text_id(event_id: bytes | None) -> str:
    if event_id is None:
        return uuid.uuid4().hex
    with suppress(UnicodeDecodeError):
        if len(event_id) <= MOST_ID_BYTES:
            return event_id.decode()
    return id_digest(event_id).hex()  # under which the journal would know it


# Reading


def parse(line: bytes) -> Letter:
    """Return the letter in a line of the file. A damaged line becomes the body of one."""
    try:
        entry = json.loads(line)
        body = (
            base64.b64decode(entry["body_base64"], validate=True) if "body_base64" in entry else entry["body"].encode()
        )
        when, why, letter_id = (entry[name] + "" for name in ("when", "why", "id"))  # TypeError unless all are strings
        if len(letter_id.encode()) <= MOST_ID_BYTES:
            return Letter(when, why, letter_id, body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    text = line.rstrip(b"\r\n")
    return Letter("", "a damaged line", id_digest(text).hex(), text)


def printable(text: str) -> str:
    """Replace what could forge a line, drive a terminal, or is not valid Unicode."""
    return "".join([char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text])


def table_row(letter: Letter) -> str:
    """Return a dead letter as one line of a table, under TABLE_HEAD."""
    first = repr(letter.body[:40])[2:-1]
    return _ROW.format(*map(printable, (letter.id, letter.why, letter.when)), len(letter.body), first)
