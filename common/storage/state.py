"""The journal's knowledge of a file, as plain data. Pure."""

from __future__ import annotations

from typing import NamedTuple

CHUNK_BYTES = 64 << 10  # of the committed end, whose checksum identifies the file


class FileState(NamedTuple):
    """How far a file is committed, and its identity: crc32 of its committed bytes from `chunk_offset` on."""

    device: int
    inode: int
    committed_bytes: int
    chunk_offset: int
    chunk_crc32: int
    started_at: float  # Unix time of its first row, or else of when the file was begun or taken over


class LastRun(NamedTuple):
    """The journal's record of the run before this one."""

    state: FileState
    clean: bool  # it ended in order, with everything written committed
    outdated: str = ""  # why the state is not its last one, by the mark; else ""
