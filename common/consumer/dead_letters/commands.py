"""The consumer's commands on dead letters: show, export and replay them, a page at a time.

The format of a letter, as bytes or as text, is in message.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

import aiormq

from common.amqp.address import masked_url
from common.amqp.codec import Confirm, Delivery, ack_frames
from common.amqp.lane import LaneListener
from common.amqp.link import CALL_TIMEOUT_SECONDS, CONNECTION_ERRORS, Link, cancelled, explain, open_link
from common.amqp.topology import QUEUE_ARGUMENTS, consume, dead_letter_queue, declare
from common.config import ConsumerSettings
from common.consumer.dead_letters.message import TABLE_HEAD, json_line, live_copy, table_row
from common.consumer.dead_letters.mover import Nacked, OutboxListener
from common.errors import StartupError

POLL_SECONDS = 1.0

# A page is what is in memory and in flight at one time.
PAGE_LETTERS, PAGE_BYTES = 256, 16 * 1024 * 1024

_BAR = 30  # characters

Pages = AsyncGenerator[list[Delivery], None]


async def show(settings: ConsumerSettings) -> int:
    """List the dead letters on stdout, oldest first, and leave them. Return the exit code. Raise StartupError."""
    dead = dead_letter_queue(settings.queue_name)
    arrivals = _Arrivals()
    async with _connection(settings.amqp_url, arrivals) as source:
        if count := await _ready(source, dead):
            await _pour(_look(source, arrivals, dead, count), count, table_row, sys.stdout.buffer, "stdout", TABLE_HEAD)
        else:
            print(f"no dead letters in '{dead}'")
    return 0


async def export(partitions: Sequence[ConsumerSettings], path: str) -> int:
    """Write the dead letters of all `partitions` as JSON lines to the file `path` ("-": stdout), whole or not at all.

    They stay in their queues. `message.json_line` makes the lines. Return the exit code. Raise StartupError.
    """
    if path == "-":
        for settings in partitions:
            await _export_one(settings, sys.stdout.buffer, "stdout")
        return 0
    with _replacing(path) as out:
        counts = [await _export_one(settings, out, path) for settings in partitions]
    for settings, count in zip(partitions, counts, strict=True):
        print(f"exported {count} from '{dead_letter_queue(settings.queue_name)}' to {path}")
    return 0


async def _export_one(settings: ConsumerSettings, out: BinaryIO, name: str) -> int:
    """Write the dead letters of one partition; return how many."""
    dead = dead_letter_queue(settings.queue_name)
    arrivals = _Arrivals()
    async with _connection(settings.amqp_url, arrivals) as source:
        count = await _ready(source, dead) or 0
        await _pour(_look(source, arrivals, dead, count), count, json_line, out, name)
    return count


async def replay(settings: ConsumerSettings) -> int:
    """Move the present dead letters back to the queue. Return the exit code. Raise StartupError.

    Each is acked only after its copy is confirmed, and keeps its message_id. A kill in between leaves a letter in both
    queues, and the consumer drops the second copy.
    """
    queue_name, dead = settings.queue_name, dead_letter_queue(settings.queue_name)
    arrivals, copies = _Arrivals(), OutboxListener()
    async with _connection(settings.amqp_url, arrivals) as source:
        count = await _ready(source, dead)
        if not count:
            print(f"no dead letters in '{dead}'")
            return 0
        with Progress(count, sys.stderr) as progress:
            try:
                async with _connection(settings.amqp_url, copies) as target:
                    await declare(target.channel, queue_name, QUEUE_ARGUMENTS)
                    outbox = copies.open(target)
                    async for page in _pages(source, arrivals, dead, count):
                        futures = [outbox.publish(queue_name, live_copy(letter)) for letter in page]
                        await outbox.wait(futures)
                        errors = [future.exception() for future in futures]
                        source.lane.send([ack_frames(_moved(page, errors))])
                        progress.advance(errors.count(None))
                        if error := next(filter(None, errors), None):
                            raise error
                await _ready(source, dead)  # once it is answered, the acks before it have arrived
            except StartupError as stopped:
                left = f"moved {progress.done} of {count}, the others are still in '{dead}'"
                raise StartupError(f"{stopped}; {left}") from None
    print(f"moved {progress.done} of {count} from '{dead}' to '{queue_name}'")
    return 0


def _moved(page: list[Delivery], errors: list[BaseException | None]) -> Iterator[tuple[int, bool]]:
    """Yield the acks of letters without an error, one for all of them before the first error.

    RabbitMQ may drop some of many acks: beyond 32 that a quorum queue has not taken yet, the channel keeps them until
    there is room, and forgets them when it is closed (3.10, rabbit_fifo_client).
    """
    first_error = next((index for index, error in enumerate(errors) if error is not None), len(page))
    if first_error:
        yield page[first_error - 1].delivery_tag, True
    for letter, error in zip(page[first_error:], errors[first_error:], strict=True):
        if error is None:
            yield letter.delivery_tag, False


@asynccontextmanager
async def _connection(url: str, listener: LaneListener) -> AsyncIterator[Link]:
    """Open a link for a command. Raise StartupError, with one line, for whatever goes wrong with it."""
    try:
        link = await open_link(url, "dead-letters-command", listener)
    except CONNECTION_ERRORS as error:
        raise StartupError(explain(error, url)) from None
    try:
        yield link
    except aiormq.exceptions.ChannelAccessRefused as error:
        raise StartupError(explain(error, url)) from None
    except Nacked:
        raise StartupError(f"the broker at {masked_url(url)} takes no more messages for the queue (nack)") from None
    except (*CONNECTION_ERRORS, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and cancelled():
            raise
        why = link.lane.lost or str(error) or "no answer"
        raise StartupError(f"lost the broker at {masked_url(url)}: {why}") from None
    finally:
        await link.close()


async def _ready(link: Link, queue_name: str) -> int | None:
    """Return how many messages wait in the queue; None if it does not exist, which closes the channel."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            return (await link.channel.queue_declare(queue_name, passive=True)).message_count
    except aiormq.exceptions.ChannelNotFoundEntity:
        return None


async def _look(link: Link, arrivals: _Arrivals, queue_name: str, count: int) -> Pages:
    """Yield pages as `_pages` does; at the end put all letters back in their order."""
    nacks: list[int] = []
    try:
        async for page in _pages(link, arrivals, queue_name, count):
            tags = [letter.delivery_tag for letter in page]
            nacks += dict.fromkeys([*tags[31::32], tags[-1]])
            yield page
    finally:
        if link.lane.lost is None:
            await _put_back(link, queue_name, nacks)


async def _put_back(link: Link, queue_name: str, nacks: list[int]) -> None:
    """Put back all that was delivered on the link. Each of `nacks` is the last delivery tag of up to 32 of one page.

    RabbitMQ 3.10 changes the order when one nack returns more than 32 messages or those of two consumers, when more
    than 32 nacks are in flight, and when a channel is closed.
    """
    ready, alone = await _ready(link, queue_name) or 0, True
    for at in range(0, len(nacks), 16):
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            for tag in nacks[at : at + 16]:
                await link.channel.basic_nack(tag, multiple=True, requeue=True)
        returned = ready + tag  # delivery tags count from 1
        deadline = time.monotonic() + POLL_SECONDS
        while alone and (await _ready(link, queue_name) or 0) < returned:
            alone = time.monotonic() < deadline  # otherwise another reader takes them
            await asyncio.sleep(0.005)


class _Arrivals:
    """The listener of a link that reads a queue. `letters` have arrived since the last `take`."""

    def __init__(self) -> None:
        self.letters: list[Delivery] = []
        self.wake = asyncio.Event()

    def deliveries(self, deliveries: list[Delivery]) -> None:
        self.letters += deliveries
        self.wake.set()

    def take(self) -> list[Delivery]:
        """Take out all that has arrived."""
        taken, self.letters = self.letters, []
        return taken

    def confirms(self, confirms: list[Confirm]) -> None:
        """Ignore it: nothing is published on this link."""

    def blocked(self, reason: str) -> None:
        """Ignore it: nothing is published on this link."""


async def _pages(link: Link, arrivals: _Arrivals, queue_name: str, count: int) -> Pages:
    """Yield the first `count` messages, unacked, a page at a time. End early when other readers have the rest.

    The largest message of a page decides how many the next one may have within PAGE_BYTES. Each page has a consumer of
    its own, which is cancelled before the page is yielded. Its messages stay unacked on the channel, no more arrive
    while the caller works, and the next page begins behind them.
    """
    link.lane.gone.add_done_callback(lambda _: arrivals.wake.set())
    largest, more = PAGE_BYTES // 8, True  # nothing is known before the first page
    while count > 0 and more:
        size = min(count, PAGE_LETTERS, max(1, PAGE_BYTES // largest))
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await link.channel.basic_qos(prefetch_count=size)
            consumer_tag = await consume(link.channel, queue_name)
        while len(arrivals.letters) < size and more:
            if link.lane.lost is not None:
                raise ConnectionError(link.lane.lost)
            arrivals.wake.clear()
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await arrivals.wake.wait()
            except TimeoutError:
                more = bool(await _ready(link, queue_name))
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await link.channel.basic_cancel(consumer_tag)
        page = arrivals.take()
        count -= len(page)
        if page:
            largest = max(1, *(len(letter.body) for letter in page))
            yield page


async def _pour(
    pages: Pages, count: int, line: Callable[[Delivery], bytes], out: BinaryIO, name: str, head: bytes = b""
) -> None:
    """Write a line for each of `count` letters, or until the reader of stdout has enough. Raise StartupError.

    Writing is done in a thread: a pager may stop reading, and heartbeats must continue.
    """

    def write(data: bytes) -> None:
        out.write(data)
        out.flush()

    written = 0
    async with aclosing(pages):
        async for page in pages:
            try:
                await asyncio.to_thread(write, head + b"".join(map(line, page)))
            except OSError as error:
                if isinstance(error, BrokenPipeError) and out is sys.stdout.buffer:  # `| head` has enough
                    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
                    return
                raise StartupError(f"cannot write {name}: {error.strerror}") from None
            written += len(page)
            head = b""
    if written < count:
        raise StartupError(f"only {written} of {count} dead letters: another reader holds the others; try again later")


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` atomically if the block succeeds. Raise StartupError."""
    target = Path(os.path.realpath(path))
    special = os.path.exists(target) and not os.path.isfile(target)  # a pipe or /dev/null is written to, not replaced
    beside = target if special else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _explained(path):
        out = beside.open("wb" if special else "xb")
    with out:
        if special:
            yield out
            return
        try:
            yield out
            with _explained(path):
                out.flush()
                os.fsync(out.fileno())
                beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error.strerror}") from None


class Progress:
    """The progress of a command: a bar on a terminal, else a line every 5 s. Use it as a context manager."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.done = 0
        self._total = total
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
        share = self.done / self._total
        rate = self.done / max(self._drawn - self._began, 1e-3)
        text = f"{self.done}/{self._total} {share:4.0%} {rate:.0f}/s"
        full = round(share * _BAR)
        self._stream.write(f"\r[{'#' * full}{'-' * (_BAR - full)}] {text}\x1b[K" if self._bar else f"{text}\n")
        self._stream.flush()
