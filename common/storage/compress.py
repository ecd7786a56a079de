"""The compression of rotated files in a thread that gives way to rows."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from common.storage.files import BLOCK_BYTES, explain_os_error, mode_of, open_regular, sync_directory


class Compressor:
    """A thread that compresses files, one after the other, by way of the file `part`."""

    def __init__(self, part: str, log: logging.Logger) -> None:
        self._part = part
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
        """Abandon the current file, and free the space of its part, when rows find no space."""
        self._gives_way.set()

    def close(self) -> None:
        """End the thread after the current file. The process does not wait for it."""
        self._queue.put(None)

    def _run(self) -> None:
        while path := self._queue.get():
            self._gives_way.clear()
            try:
                compress(path, self._part, self._gives_way.is_set)
            except OSError as error:
                self._log.warning("%s; it stays as it is until the next start", explain_os_error(error, path))


def compress(path: str, part: str, gives_way: Callable[[], bool] = lambda: False) -> None:
    """Replace the file `path` by `path`.gz, of the same mode.

    The plain file is removed only when the whole .gz is on disk under its name. After a kill it can be run again. Raise
    OSError, also when `gives_way` returns true between two blocks, and leave nothing behind then.
    """
    try:
        with (
            open(open_regular(path, os.O_RDONLY), "rb") as plain,
            open(open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode_of(path)), "wb") as target,
        ):
            with gzip.GzipFile(os.path.basename(path), "wb", 6, target) as zipped:
                while block := plain.read(BLOCK_BYTES):
                    if gives_way():
                        raise OSError(errno.ENOSPC, "not compressed, as rows need the space", path)
                    zipped.write(block)
            target.flush()
            os.fsync(target.fileno())
        os.rename(part, f"{path}.gz")
    except OSError:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_directory(path)
    with suppress(FileNotFoundError):  # removed meanwhile, as one of the oldest
        os.unlink(path)
