"""The partition of a device. Pure."""

from __future__ import annotations

from zlib import crc32


def partition_of(device_id: str, partitions: int) -> int:
    """Return zlib's unsigned crc32 of the UTF-8 bytes of a `device_id` in normal form, modulo `partitions`.

    Other publishers must use the same function: it keeps a device's rows in one file, where a retry meets the ids of
    the first attempt.
    """
    return crc32(device_id.encode()) % partitions
