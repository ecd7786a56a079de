"""Durable files, folders and lines, their names, and their errors in words. Independent of what is in a line."""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from common.errors import DiskTrouble, StartupError

BLOCK_BYTES = 1 << 20
_MAY_END = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBUSY)  # EBUSY: another consumer has the file, and can end


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in an OSError about a file descriptor, which does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def open_regular(path: str, flags: int, mode: int | None = None) -> int:
    """Open a regular file. Raise OSError for anything else, at once for a FIFO too.

    With O_CREAT, a new file has exactly `mode`; None is 0644 without what the umask forbids.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            text = "is not a regular file: move it away, or set CSV_FILE to another place"
            raise OSError(errno.EINVAL, text, path)
        mode = None
    except FileNotFoundError:
        pass
    fd = os.open(path, flags | os.O_NONBLOCK, 0o644 if mode is None else mode)
    if mode is not None:
        os.fchmod(fd, mode)
    return fd


def mode_of(path: str) -> int | None:
    """Return the permission bits of a file; None if that fails."""
    with suppress(OSError):
        return stat.S_IMODE(os.stat(path).st_mode)
    return None


def is_at(fd: int, path: str) -> bool:
    """Return whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write `data`. After an OSError, any part of it can be in the file."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def with_checksum(text: bytes) -> bytes:
    """Return `text` as a line that begins with its crc32."""
    return b"%08x %b\n" % (zlib.crc32(text), text)


def checked(line: bytes) -> bytes | None:
    """Return the text of a line without its line end and checksum; None if the checksum is wrong."""
    checksum, _, text = line.partition(b" ")
    return text if checksum == b"%08x" % zlib.crc32(text) else None


def utc_now() -> str:
    """Return the UTC time as file names have it."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def free_name(prefix: str) -> str:
    """Return `prefix` + UTC time, with a number if that name is taken. Safe under the consumer's lock."""
    name = utc = prefix + utc_now()
    number = 0
    while os.path.lexists(name):
        number += 1
        name = f"{utc}-{number}"
    return name


def sync_directory(path: str) -> None:
    """Sync the folder of `path`, which makes creations, renames and removals in it durable."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: str) -> None:
    """Make the folder `path` and those above it, durably."""
    if not os.path.isdir(path):
        make_directory(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(path)


def startup_error(error: OSError, path: str, notes: Sequence[str] = ()) -> StartupError | DiskTrouble:
    """Return the error to raise at a start: DiskTrouble if a retry can help, else StartupError."""
    kind = DiskTrouble if error.errno in _MAY_END else StartupError
    return kind(explain_os_error(error, path) + (f" ({'; '.join(notes)})" if notes else ""))


def explain_os_error(error: OSError, path: str) -> str:
    """Return one line for a person: where, what is wrong, what to do."""
    advice = {
        errno.EACCES: f"let uid {os.geteuid()} read and write there",
        errno.EPERM: f"let uid {os.geteuid()} read and write there",
        errno.EROFS: "mount it writable, or set CSV_FILE to another place",
        errno.ENOTDIR: "set CSV_FILE to a file in a folder",
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
    }.get(error.errno or 0)
    line = f"{error.filename or path}: {error.strerror or error}"
    return f"{line}; {advice}" if advice else line
