"""Dead letters: what can never become rows, as lines of JSON in `<csv>.dead-letters`.

Nothing here remembers anything about the file: each append opens it by its path, so that anyone may empty, move or
delete it at any time. replay.py takes letters out. Everything is synchronous.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from common.amqp.properties import readable_properties
from common.consumer.prepare import Poison
from common.event.document import write_json
from common.event.ids import id_digest
from common.storage.files import mode_of, naming, open_regular, sync_directory, write_all

LOCK_SECONDS = 1.0  # a replay holds the lock for the time of a rename
_LOCK_POLL_SECONDS = 0.005


class Letter(NamedTuple):
    """A dead letter, read from its line."""

    when: str  # RFC 3339, UTC
    why: str
    id: str
    line: int  # in its message, from 1; 0 for a whole message
    properties: dict[str, Any]  # of the AMQP message
    body: bytes


def file_of(csv_path: str) -> str:
    return f"{csv_path}.dead-letters"


def size_of(csv_path: str) -> int:
    """Return the size of the dead letters of a CSV, in bytes; 0 without any."""
    try:
        return os.stat(file_of(csv_path)).st_size
    except OSError:
        return 0


def append(csv_path: str, poison: Sequence[Poison]) -> None:
    """Make letters durable, all or none. Raise OSError.

    A letter without an id gets a random one, by which the consumer recognises a second copy of its replay.
    """
    path, when = file_of(csv_path), datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with naming(path), locked(path, os.O_CREAT, mode_of(csv_path)) as fd:
        size = os.fstat(fd).st_size
        try:
            if size and os.pread(fd, 1, size - 1) != b"\n":  # a crash cut the last line, which was not acked
                write_all(fd, b"\n")
            for each in poison:
                write_all(fd, _line(each, when))
            os.fsync(fd)
            if not size:
                sync_directory(path)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, size)
            raise


@contextmanager
def locked(path: str, flags: int = 0, mode: int | None = None) -> Iterator[int]:
    """Open the file that is at `path`, and keep others from renaming it or appending to it meanwhile. Raise OSError."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        fd = open_regular(path, os.O_RDWR | os.O_APPEND | flags, mode)
        try:
            if lock(fd) and is_at(fd, path):
                yield fd
                return
        finally:
            os.close(fd)
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "is locked by another program", path)
        time.sleep(_LOCK_POLL_SECONDS)


def lock(fd: int) -> bool:
    """Take the lock on an open file, or return False at once when another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: str) -> bool:
    """Tell whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _line(poison: Poison, when: str) -> bytes:
    entry: dict[str, Any] = {"when": when, "why": poison.why, "id": _text_id(poison.id)}
    if poison.line:
        entry["line"] = poison.line
    entry["properties"] = readable_properties(poison.header)
    try:
        entry["body"] = poison.body.decode()
    except UnicodeDecodeError:
        entry["body_base64"] = base64.b64encode(poison.body).decode()
    return write_json(entry) + b"\n"


def _text_id(event_id: bytes | None) -> str:
    try:
        return uuid.uuid4().hex if event_id is None else event_id.decode()
    except UnicodeDecodeError:
        return id_digest(event_id or b"").hex()  # under which the journal would know it


def parse(line: bytes) -> Letter | None:
    """Return the letter in a line of the file; None if the line is damaged."""
    try:
        entry = json.loads(line)
        body = (
            base64.b64decode(entry["body_base64"], validate=True) if "body_base64" in entry else entry["body"].encode()
        )
        when, why, letter_id = (entry[name] + "" for name in ("when", "why", "id"))  # TypeError unless all are strings
        if len(letter_id.encode()) > 255:  # longer than a message_id
            return None
        return Letter(when, why, letter_id, int(entry.get("line", 0)), dict(entry["properties"]), body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


_FIRST_CHARS = 40


def printable(text: str) -> str:
    """Replace what could forge a line, drive a terminal, or is not valid Unicode."""
    return "".join([char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text])


def _row(letter_id: str, why: str, when: str, size: object, first: str) -> str:
    return f"{_cut(letter_id, 32):32}  {_cut(why, 40):40}  {_cut(when, 24):24}  {size:>9}  {first}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


TABLE_HEAD = _row("ID", "WHY", "WHEN", "SIZE", "FIRST BYTES")


def table_row(letter: Letter) -> str:
    """Return a dead letter as one line of a table, under TABLE_HEAD."""
    first = repr(letter.body[:_FIRST_CHARS])[2:-1][:_FIRST_CHARS]
    letter_id, why, when = map(printable, (letter.id, letter.why, letter.when))
    return _row(letter_id, why, when, len(letter.body), first)
