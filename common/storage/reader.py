"""The committed rows of a CSV, for readers beside the consumer."""

from __future__ import annotations

from collections.abc import Iterator


def committed_rows(csv_path: str) -> Iterator[bytes]:
    """Yield the committed bytes of a CSV, header included, in blocks. Raise OSError if there is no CSV."""
    with open(csv_path, "rb") as file:
        while block := file.read(1 << 20):
            yield block
