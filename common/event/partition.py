"""Which partition a device belongs to. Pure."""

from __future__ import annotations

from zlib import crc32


def partition_of(device_id: str, partitions: int) -> int:
    """Return crc32 of the UTF-8 of a `device_id` in normal form (unsigned, as zlib has it), modulo `partitions`.

    Other publishers must do the same: so a device's rows are in one file, and a retry meets the ids of the first try.
    """
    return crc32(device_id.encode()) % partitions
