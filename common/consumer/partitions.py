"""The partitions that a consumer serves, and the settings of each."""

from __future__ import annotations

import os.path
import re
from dataclasses import replace

from common.amqp.topology import queue_names
from common.config import ConsumerSettings
from common.errors import SettingError

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def served(settings: ConsumerSettings) -> dict[int, ConsumerSettings]:
    """Return the settings of each partition that PARTITION names, by its number. Raise SettingError."""
    count = settings.partitions
    numbers = _numbers(settings.partition, count)
    if count == 1:
        return {0: settings}
    if not _file_name(settings.csv_file):
        raise SettingError(f"CSV_FILE is {settings.csv_file!r}, but must name a file: each partition gets one like it")
    names = queue_names(settings.queue_name, count)
    return {
        number: replace(settings, queue_name=names[number], csv_file=csv_file(settings.csv_file, number))
        for number in numbers
    }


def csv_file(path: str, number: int) -> str:
    """Return the CSV of a partition: data/data.2.csv for data/data.csv and 2."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}.{number}{suffix}"


def _file_name(path: str) -> bool:
    name = os.path.basename(path)
    return name not in ("", ".", "..") and not os.path.normpath(path).startswith(("/dev/", "/proc/"))


def _numbers(text: str, count: int) -> list[int]:
    if not text:
        return list(range(count))
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise SettingError(f"PARTITION is {text!r}, but must be empty or like 2, 0-3 or 0,4")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first or last >= count:
            which = f"from 0 to {count - 1}" if count > 1 else "0"
            raise SettingError(f"PARTITION is {text!r}, but with PARTITIONS={count} it must be {which}")
        numbers.update(range(first, last + 1))
    return sorted(numbers)
