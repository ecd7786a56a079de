"""The lines of the journal, written and read, without I/O.

Each line is a checksum and one JSON record. The first one has the version, and the generation of the run that wrote
the file. Lines of ids follow, then commits with their ids. A fence begins a later run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from operator import itemgetter
from struct import iter_unpack
from typing import Any

from common.errors import StartupError
from common.storage.files import checked, with_checksum
from common.storage.recovery import FileState

ID_BYTES = 16
VERSION = 2  # of the format; version 1 is that of predlog 1.0.0, whose lines have no version
_to_json = json.JSONEncoder(separators=(",", ":")).encode


class JournalCorrupt(Exception):
    """A journal that exists, and does not say what was committed."""


def first_line(generation: int) -> bytes:
    return with_checksum(b'{"version":%d,"generation":%d}' % (VERSION, generation))


def ids_line(ids: bytes | bytearray) -> bytes:
    return with_checksum(b'{"ids":"%b"}' % ids.hex().encode())


def commit_line(state: FileState, ids: bytes, clean: bool, prefetch_count: int) -> bytes:
    record = {"file": state._asdict(), "clean": clean, "prefetch_count": prefetch_count}
    return with_checksum(b'%b,"ids":"%b"}' % (_to_json(record)[:-1].encode(), ids.hex().encode()))


def fence_line(generation: int) -> bytes:
    return with_checksum(b'{"fence":%d}' % generation)


def split_ids(packed: bytes | bytearray) -> Iterable[bytes]:
    return map(itemgetter(0), iter_unpack(f"{ID_BYTES}s", packed))


class Reading:
    """What the lines of a journal say, taken one by one. `ids` has the last ones of the window, packed."""

    def __init__(self, path: str, dedup_window: int, prefetch_count: int) -> None:
        self.path = path
        self._dedup_window = dedup_window
        self._damaged = False  # the line before; a torn commit if nothing but a fence follows
        self._fenced = False
        self._state: FileState | None = None
        self.prefetch_count = prefetch_count
        self.generation = 0
        self.clean = False
        self.ids = bytearray()

    def last_commit(self) -> FileState:
        """Return the state of the last commit. Raise JournalCorrupt if there is none."""
        if self._state is None:
            raise JournalCorrupt("no whole line")
        return self._state

    def take(self, line: bytes) -> None:
        """Take a line without its end. Raise JournalCorrupt, and StartupError for a newer version."""
        text = checked(line)
        if text is None:
            self._damaged = True
            return
        try:
            self._take(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise JournalCorrupt(f"not a journal of this version ({error!r})") from error

    def _take(self, record: dict[str, Any]) -> None:
        if "fence" in record:
            self.generation, self._damaged, self._fenced = int(record["fence"]), False, True
            return
        if int(record.get("version", 1)) > VERSION:
            raise StartupError(
                f"{self.path}: its format {record['version']} is that of a newer predlog, and this one reads "
                f"up to {VERSION}: upgrade, or move the journal and its CSV away together"
            )
        if self._fenced:
            return  # a commit after the fence
        if self._damaged:
            raise JournalCorrupt("a damaged line")
        self.generation = int(record.get("generation", self.generation))
        self.ids += bytes.fromhex(record.get("ids", ""))
        if "file" in record:
            state = FileState(**record["file"])
            if not 0 <= state.chunk_offset <= state.committed_bytes or len(self.ids) % ID_BYTES:
                raise ValueError("impossible numbers")
            self.prefetch_count = max(self.prefetch_count, int(record["prefetch_count"]))
            del self.ids[: max(0, len(self.ids) - ID_BYTES * window(self._dedup_window, self.prefetch_count))]
            if state.committed_bytes:  # 0 in older lines that only carry ids
                self._state, self.clean = state, bool(record["clean"])


def window(dedup_window: int, prefetch_count: int) -> int:
    """Return the number of ids that are kept.

    The broker can redeliver `prefetch_count` messages, and as many others can be committed meanwhile. The largest
    `prefetch_count` ever used counts, because what was unacked under it can still be redelivered.
    """
    return max(dedup_window, 2 * prefetch_count)
