"""The consumer's commands on dead letters: list them, and publish them to the queue again.

A replay takes the file away from the consumer by renaming it, and removes letters from its end: each one leaves it
only after its confirm, and the file is whole at every moment. So a kill repeats one page at most, and the consumer
knows those letters by their ids.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from io import BytesIO
from typing import Any, TextIO

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from common.amqp.address import masked_url
from common.amqp.link import CONNECTION_ERRORS, cancelled, explain, open_link
from common.amqp.topology import QUEUE_ARGUMENTS, dead_letter_queue, declare
from common.config import ConsumerSettings
from common.consumer import dead_letters
from common.consumer.dead_letters import TABLE_HEAD, Letter, printable, table_row
from common.consumer.leftovers import Deaf, messages_in
from common.errors import StartupError
from common.storage.files import naming, sync_directory, write_all

# A page is what is in memory and in flight at one time.
PAGE_LETTERS, PAGE_BYTES = 256, 16 * 1024 * 1024
CONFIRM_TIMEOUT_SECONDS = 30.0  # of a page
MOST_HEADER_BYTES = 131_072 - 8  # RabbitMQ closes the connection for a larger frame; this is its default

_BAR = 30  # characters

# What a copy must not repeat. A user_id other than our own closes the channel (406), an expiration would delete it; CC
# and BCC would also send it elsewhere.
_KEPT = ("content_type", "content_encoding", "priority", "correlation_id", "reply_to", "message_type", "app_id")
_DROPPED_HEADERS = frozenset({"CC", "BCC", "x-delivery-count", "x-acquired-count"})

Message = tuple[bytes, Basic.Properties]


# List


def show(partitions: Sequence[ConsumerSettings]) -> int:
    """List the dead letters of all `partitions` on stdout, oldest first. Return the exit code. Raise StartupError."""
    for settings in partitions:
        path, head = _path(settings), f"{TABLE_HEAD}\n"
        with _explained():
            for each in filter(os.path.exists, (_taken(path), path)):
                with open(each, "rb") as file:
                    for line in file:
                        letter = dead_letters.parse(line)
                        print(head + (table_row(letter) if letter is not None else "a damaged line"))
                        head = ""
        if head:
            print(f"no dead letters in {printable(path)}")
    return 0


# Replay


async def replay(settings: ConsumerSettings) -> int:
    """Publish the dead letters to the queue again, and those of predlog 1.0. Return the exit code. Raise StartupError.

    Each keeps its id. The consumer may run meanwhile: what is still no event comes back to the file.
    """
    path, queue_name = _path(settings), settings.queue_name
    async with _connection(settings.amqp_url) as connection:
        old = dead_letter_queue(queue_name)
        in_queue = await messages_in(connection, old) or 0
        with _explained():
            files = [each for each in (_taken(path), path) if os.path.exists(each)]
            total = sum(map(_count_lines, files)) + in_queue
            if not total:
                print(f"no dead letters in {printable(path)}")
                return 0
            channel = await connection.channel()
            await declare(channel, queue_name, QUEUE_ARGUMENTS)
            sources = [_pages_of_file(path) for _ in files]
            sources.append(_pages_of_queue(await connection.channel(), old, in_queue))
            with Progress(total, sys.stderr) as progress:
                for pages in sources:
                    async for page in pages:
                        await _publish(channel, queue_name, page)
                        progress.advance(len(page))
    print(f"published {progress.done} of {total} from {printable(path)} to '{queue_name}'")
    return 0


async def _publish(channel: AbstractChannel, queue_name: str, page: Sequence[Message]) -> None:
    """Publish messages, persistent and mandatory, and wait until all are confirmed."""
    async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
        publishing = [
            channel.basic_publish(body, routing_key=queue_name, properties=properties, mandatory=True)
            for body, properties in page
        ]
        await asyncio.gather(*publishing)


# Pages: each is removed when the next one is asked for, which means that all of it is confirmed.


async def _pages_of_file(path: str) -> AsyncIterator[list[Message]]:
    """Yield the letters of one file, from its end, and remove it."""
    fd = _take(path)
    try:
        while end := os.fstat(fd).st_size:
            begin, lines = _last_lines(fd, end)
            letters = [dead_letters.parse(line) for line in lines]
            _set_aside(path, [line for line, letter in zip(lines, letters, strict=True) if letter is None])
            yield [_message(letter) for letter in letters if letter is not None]
            with naming(path):
                os.ftruncate(fd, begin)
        if dead_letters.is_at(fd, _taken(path)):
            os.unlink(_taken(path))
    finally:
        os.close(fd)


async def _pages_of_queue(channel: AbstractChannel, name: str, left: int) -> AsyncIterator[list[Message]]:
    """Yield the first `left` dead letters of predlog 1.0, and ack them."""
    while left > 0:
        page, size = list[DeliveredMessage](), 0
        while len(page) < min(left, PAGE_LETTERS) and size < PAGE_BYTES:
            found = await channel.basic_get(name)
            if found.delivery_tag is None:
                break
            page.append(found)
            size += len(found.body)
        if not page:  # another reader has the others
            return
        yield [_old_message(found) for found in page]
        await channel.basic_ack(page[-1].delivery_tag or 0, multiple=True)
        await channel.queue_declare(name, passive=True)  # once it is answered, the ack before it has arrived
        left -= len(page)


def _path(settings: ConsumerSettings) -> str:
    return dead_letters.file_of(os.path.realpath(settings.csv_file))


def _taken(path: str) -> str:
    """Return where a replay works on the dead letters that were at `path`."""
    return f"{path}.replay"


def _take(path: str) -> int:
    """Take the file of dead letters away from the consumer; return it open and locked. Raise StartupError, OSError.

    What an earlier replay has left is taken first.
    """
    taken = _taken(path)
    if not os.path.exists(taken):
        with dead_letters.locked(path):
            if not os.path.exists(taken):  # now no other replay makes one
                os.rename(path, taken)
                sync_directory(path)
    fd = os.open(taken, os.O_RDWR)
    if not dead_letters.lock(fd):
        os.close(fd)
        raise StartupError(f"another replay works on {printable(taken)}")
    return fd


def _last_lines(fd: int, end: int) -> tuple[int, list[bytes]]:
    """Return the last lines before `end`, in order, as many as make a page, and where the first of them begins."""
    begin = max(0, end - PAGE_BYTES)
    text = os.pread(fd, end - begin, begin)
    while begin and text.count(b"\n") < 2:  # the last line is longer than a page
        before = max(0, begin - PAGE_BYTES)
        text, begin = os.pread(fd, begin - before, before) + text, before
    lines = BytesIO(text).readlines()
    lines = lines[1 if begin else 0 :][-PAGE_LETTERS:]  # the first may begin before
    return end - sum(map(len, lines)), lines


def _message(letter: Letter) -> Message:
    """Return a letter as a message with one event, with its properties as far as JSON could keep them."""
    theirs = letter.properties
    kept: dict[str, Any] = {name: theirs[name] for name in _KEPT if name in theirs}
    if isinstance(headers := theirs.get("headers"), dict):
        kept["headers"] = _repeatable(headers)
    if letter.line:
        kept["content_type"] = "application/json"
    own: dict[str, Any] = {"message_id": letter.id, "delivery_mode": 2}
    try:
        if "timestamp" in theirs:
            kept["timestamp"] = datetime.fromisoformat(theirs["timestamp"])
        properties = Basic.Properties(**kept, **own)
        header = ContentHeader(properties=properties).marshal()
        if len(header) > MOST_HEADER_BYTES:  # the broker would close the connection
            raise ValueError
    except (ValueError, TypeError, AttributeError, struct.error):  # edited by hand
        properties = Basic.Properties(**own)
    return letter.body, properties


def _set_aside(path: str, damaged: Sequence[bytes]) -> None:
    """Append lines that are no letters to a file of their own."""
    if not damaged:
        return
    aside = f"{path}.damaged"
    fd = os.open(aside, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        with naming(aside):
            write_all(fd, b"".join(line.removesuffix(b"\n") + b"\n" for line in damaged))
            os.fsync(fd)
    finally:
        os.close(fd)
    print(f"{len(damaged)} damaged line(s) were moved to {printable(aside)}", file=sys.stderr)


def _old_message(found: DeliveredMessage) -> Message:
    """Return the message that was dead-lettered by predlog 1.0, which added headers of its own."""
    properties: Any = found.header.properties
    properties.user_id = properties.expiration = properties.cluster_id = None
    properties.headers = _repeatable(properties.headers or {})
    return bytes(found.body), properties


def _repeatable(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in headers.items() if k not in _DROPPED_HEADERS and not k.startswith("x-predlog-")}


# Trouble, and progress


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[AbstractConnection]:
    """Open a connection for a command. Raise StartupError, with one line, for whatever goes wrong with it."""
    try:
        link = await open_link(url, "dead-letters-command", Deaf())
    except CONNECTION_ERRORS as error:
        raise StartupError(explain(error, url)) from None
    try:
        yield link.connection
    except aiormq.exceptions.DeliveryError:
        raise StartupError(f"the broker at {masked_url(url)} takes no more messages for the queue (nack)") from None
    except (*CONNECTION_ERRORS, asyncio.CancelledError) as error:
        if cancelled():
            raise
        why = link.lane.lost or str(error) or "no answer"
        raise StartupError(f"lost the broker at {masked_url(url)}: {why}") from None
    finally:
        await link.close()


@contextmanager
def _explained() -> Iterator[None]:
    """Raise StartupError for an error of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of the connection
            raise
        raise StartupError(f"{printable(os.fsdecode(error.filename))}: {error.strerror}") from None


def _count_lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


class Progress:
    """The progress of a command: a bar on a terminal, else a line every 5 s. Use it as a context manager."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.done = 0
        self.total = total
        self._stream = stream
        self._bar = stream.isatty()
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._draw()
        if self._bar:
            self._stream.write("\n")

    def advance(self, count: int) -> None:
        """Note that `count` more are done."""
        self.done += count
        if time.monotonic() - self._drawn >= (0.1 if self._bar else 5):
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        share = self.done / self.total
        rate = self.done / max(self._drawn - self._began, 1e-3)
        text = f"{self.done}/{self.total} {share:4.0%} {rate:.0f}/s"
        full = round(share * _BAR)
        self._stream.write(f"\r[{'#' * full}{'-' * (_BAR - full)}] {text}\x1b[K" if self._bar else f"{text}\n")
        self._stream.flush()
