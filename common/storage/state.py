"""What the journal remembers of a file, as plain data. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CHUNK_BYTES = 64 << 10  # how much of the committed end is kept as a checksum to know the file again


@dataclass(frozen=True, slots=True)
class FileState:
    """How far a file is committed, and how to know it: crc32 of its last committed bytes, from `chunk_offset` on."""

    device: int
    inode: int
    committed_bytes: int
    chunk_offset: int
    chunk_crc32: int
    started_at: float  # Unix time of its first row, or at which the file was begun or taken over


class LastRun(NamedTuple):
    """What the journal says about the run before this one."""

    state: FileState
    clean: bool  # it ended in order: nothing was written that is not committed
    outdated: str = ""  # why the state may not be its last one, as far as the mark tells
