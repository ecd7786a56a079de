"""The files of one CSV, found and opened: the live one and the rotated ones."""

import gzip
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast


def csv_files(csv: Path) -> list[Path]:
    """Return `data.csv`, or `data.0.csv`, `data.1.csv`, … of partitions, each with its rotated files."""
    partitions = csv.parent.glob(f"{csv.stem}.*{csv.suffix}")
    own = [path for path in sorted(partitions) if path.suffixes[-2][1:].isdecimal()]
    return [found for each in (csv, *own) for found in _with_rotated(each)]


def _with_rotated(csv: Path) -> list[Path]:
    """Return `data.csv`, `data-<UTC>.csv`, `data-<UTC>.csv.gz`. A file with and without .gz counts once."""
    packed = sorted(csv.parent.glob(f"{csv.stem}-*{csv.suffix}.gz"))
    plain = sorted(csv.parent.glob(f"{csv.stem}-*{csv.suffix}"))
    return packed + [path for path in plain if path.with_name(f"{path.name}.gz") not in packed] + [csv] * csv.exists()


def opened(csv: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Yield each file in turn, open until the next one is asked for."""
    for path in csv_files(csv):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield path.name, cast(BinaryIO, stream)


def total_bytes(csv: Path) -> int:
    """Return the size of all files. A file that disappears meanwhile counts as 0."""
    total = 0
    for path in csv_files(csv):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
