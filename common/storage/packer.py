"""The compression of rotated files in a thread that gives way to rows, and the removal of what a crash left.

A file is `<stem>-<UTC time><suffix>` once it is rotated, `….gz` once it is compressed, and `….gz.part` in between.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from common.storage.files import BLOCK_BYTES, explain_os_error, sync_directory


class Packer:
    """A thread that compresses files, one after the other."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._queue = SimpleQueue[str | None]()  # None ends the thread
        self._thread: threading.Thread | None = None
        self._gives_way = threading.Event()

    def put(self, path: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gzip", daemon=True)
            self._thread.start()
        self._queue.put(path)

    def give_way(self) -> None:
        """Abandon the current file, and free the space of its .gz.part, when rows find no space."""
        self._gives_way.set()

    def close(self) -> None:
        """End the thread after the current file. The process does not wait for it."""
        self._queue.put(None)

    def _run(self) -> None:
        while path := self._queue.get():
            self._gives_way.clear()
            try:
                compress(path, self._gives_way.is_set)
            except OSError as error:
                self._log.warning("%s; it stays as it is until the next start", explain_os_error(error, path))


def compress(path: str, gives_way: Callable[[], bool] = lambda: False) -> None:
    """Replace the file `path` by `path`.gz.

    The plain file is removed only when the whole .gz is on disk under its name. After a kill it can be run again. Raise
    OSError, also when `gives_way` returns true between two blocks, and leave nothing behind then.
    """
    part = f"{path}.gz.part"
    try:
        with open(path, "rb") as plain, open(part, "wb") as target:
            with gzip.GzipFile(os.path.basename(path), "wb", 6, target) as packed:
                while block := plain.read(BLOCK_BYTES):
                    if gives_way():
                        raise OSError(errno.ENOSPC, "not compressed, as rows need the space", path)
                    packed.write(block)
            target.flush()
            os.fsync(target.fileno())
        os.rename(part, f"{path}.gz")
    except OSError:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_directory(path)
    os.unlink(path)


def clean_up(csv_path: str) -> None:
    """Remove temporary files that a crash left."""
    folder, name = os.path.split(csv_path)
    stem, suffix = map(re.escape, os.path.splitext(name))
    own = re.compile(
        rf"{stem}-{_TIME}{suffix}\.gz\.part|{re.escape(name)}\.uncommitted-{_TIME}\.part|{re.escape(name)}\.journal\.new"
    )
    for entry in os.listdir(folder):
        if own.fullmatch(entry):
            os.unlink(os.path.join(folder, entry))


def rotated_files(csv_path: str) -> list[str]:
    """Return the uncompressed rotated files of a CSV, oldest first."""
    folder, name = os.path.split(csv_path)
    stem, suffix = map(re.escape, os.path.splitext(name))
    rotated = re.compile(rf"{stem}-{_TIME}{suffix}")
    return [os.path.join(folder, entry) for entry in sorted(os.listdir(folder)) if rotated.fullmatch(entry)]


_TIME = r"\d{8}T\d{6}Z(-\d+)?"
