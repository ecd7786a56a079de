"""The file of dead letters that the broker does not take, next to the CSV and read from its beginning.

A line is a checksum and one message as JSON. A message is acked only after its append, so a line cut short by a crash
was not acked. The file exists only while letters wait in it. Everything is synchronous and for one thread.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from contextlib import suppress

from common.amqp.codec import Delivery
from common.consumer.prepare import Poison
from common.storage.files import checked, free_name, sync_directory, with_checksum, write_all

# Beyond this size messages stay unacked: poison must not fill the disk that the rows need.
MOST_BYTES = 1024 * 1024 * 1024
PAGE_LETTERS, PAGE_BYTES = 100, 16 * 1024 * 1024


class DamagedLine(Exception):
    """A line whose checksum is wrong."""


class Spill:
    """The file `path`, which may hold letters of an earlier run."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._read_bytes = 0  # of letters that were moved since the file was begun or opened
        self.bytes = 0
        with suppress(FileNotFoundError):
            self._open(os.O_RDWR)
            self._cut_torn_line()

    @property
    def waiting(self) -> bool:
        return self._fd >= 0

    def append(self, letters: Sequence[Poison]) -> int:
        """Make letters durable, in their order, as far as there is room; return how many. Raise OSError."""
        try:
            if self._fd < 0:
                self._open(os.O_RDWR | os.O_CREAT)
                sync_directory(self.path)
            text, count = bytearray(), 0
            for letter in letters:
                line = _line(letter)
                if self.bytes + len(text) + len(line) > MOST_BYTES:
                    break
                text += line
                count += 1
            try:
                write_all(self._fd, text)
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, self.bytes)
                raise
        except OSError as error:
            error.filename = error.filename or self.path
            raise
        self.bytes += len(text)
        return count

    def page(self) -> tuple[list[Poison], int]:
        """Return the oldest letters, and their size for `remove`. Raise OSError or DamagedLine."""
        text = os.pread(self._fd, PAGE_BYTES, self._read_bytes)
        while b"\n" not in text and self._read_bytes + len(text) < self.bytes:  # a letter larger than a page
            text += os.pread(self._fd, PAGE_BYTES, self._read_bytes + len(text))
        letters, size = [], 0
        for line in text.split(b"\n")[:-1][:PAGE_LETTERS]:
            size += len(line) + 1
            letters.append(_letter(line))
        return letters, size

    def remove(self, size: int) -> None:
        """Drop the first `size` bytes, and the file when it is empty. Raise OSError."""
        self._read_bytes += size
        if self._read_bytes >= self.bytes:
            os.unlink(self.path)
            self.close()

    def set_aside(self) -> str:
        """Rename the file for an operator to read, and start an empty one; return the new name. Raise OSError."""
        aside = free_name(f"{self.path}.damaged-")
        os.rename(self.path, aside)
        self.close()
        return aside

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.bytes, self._read_bytes = -1, 0, 0

    def _open(self, flags: int) -> None:
        self._fd = os.open(self.path, flags | os.O_APPEND, 0o644)
        self.bytes = os.fstat(self._fd).st_size

    def _cut_torn_line(self) -> None:
        end = self.bytes
        while end:
            start = max(0, end - PAGE_BYTES)
            at = os.pread(self._fd, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < self.bytes:
            os.ftruncate(self._fd, end)
            self.bytes = end
        if not self.bytes:
            os.unlink(self.path)
            self.close()


def _line(letter: Poison) -> bytes:
    delivery = letter.delivery
    record = {
        "kind": letter.kind,
        "reason": letter.reason,
        "header": base64.b64encode(delivery.header).decode(),
        "body": base64.b64encode(delivery.body).decode(),
    }
    return with_checksum(json.dumps(record).encode())


def _letter(line: bytes) -> Poison:
    text = checked(line)
    if text is None:
        raise DamagedLine("a damaged line")
    record = json.loads(text)
    header, body = (base64.b64decode(record[name]) for name in ("header", "body"))
    return Poison(Delivery(0, True, header, body), record["kind"], record["reason"])
