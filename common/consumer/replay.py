"""The consumer's commands on dead letters: list them, and publish them to the queue again.

A replay takes the file away from the consumer by renaming it, and removes letters from its end. Each one leaves the
file only after its confirm, and the file is whole at every moment. So a kill repeats one page at most, and the consumer
recognises those letters by their ids.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from itertools import accumulate

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp.commands import Basic

from common.amqp.address import masked_url
from common.amqp.link import CONNECTION_ERRORS, cancelled, explain, open_link
from common.amqp.topology import QUEUE_ARGUMENTS, dead_letter_queue, declare
from common.config import ConsumerSettings
from common.consumer import dead_letters
from common.consumer.dead_letters import TABLE_HEAD, printable, table_row
from common.consumer.leftovers import Deaf, messages_in
from common.errors import StartupError
from common.storage.files import explain_os_error, is_at, naming, sync_directory

PAGE_LETTERS = 16  # in memory and in flight at one time; each can be many megabytes
CONFIRM_TIMEOUT_SECONDS = 30.0  # of a page

Message = tuple[bytes, Basic.Properties]
# A page, and the number of letters in its source. It is removed, being confirmed, when the next one is asked for.
Pages = AsyncGenerator[tuple[list[Message], int], None]


def show(partitions: Sequence[ConsumerSettings]) -> int:
    """List the dead letters of all `partitions` on stdout, oldest first. Return the exit code. Raise OSError."""
    for settings in partitions:
        path, head = _path(settings), f"{TABLE_HEAD}\n"
        for each in filter(os.path.exists, (_taken(path), path)):
            with open(each, "rb") as file:
                for line in file:
                    print(head + table_row(dead_letters.parse(line)))
                    head = ""
        if head:
            print(f"no dead letters in {printable(path)}")
    return 0


async def replay(settings: ConsumerSettings) -> int:
    """Publish the dead letters to the queue again, and those of predlog 1.0. Return the exit code. Raise StartupError.

    Each keeps its id. The consumer can run meanwhile: what is still not an event returns to the file.
    """
    url, link = settings.amqp_url, None
    try:
        link = await open_link(url, "dead-letters-command", Deaf())
        await _replay(settings, link.connection)
    except aiormq.exceptions.DeliveryError:
        raise StartupError(f"the broker at {masked_url(url)} accepts no more messages for the queue (nack)") from None
    except (*CONNECTION_ERRORS, asyncio.CancelledError) as error:
        if cancelled():
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise StartupError(explain_os_error(error, error.filename)) from None
        lost = link and link.lane.lost
        raise StartupError(explain(ConnectionError(lost) if lost else error, url)) from None
    finally:
        if link is not None:
            await link.close()
    return 0


async def _replay(settings: ConsumerSettings, connection: AbstractConnection) -> None:
    path, queue_name, published = _path(settings), settings.queue_name, 0
    old = dead_letter_queue(queue_name)
    in_queue = await messages_in(connection, old) or 0
    sources = [_pages_of_file(path) for each in (_taken(path), path) if os.path.exists(each)]
    if in_queue:
        sources.append(_pages_of_queue(await connection.channel(), old, in_queue))
    if not sources:
        print(f"no dead letters in {printable(path)}")
        return
    channel = await connection.channel()
    await declare(channel, queue_name, QUEUE_ARGUMENTS)
    for pages in sources:
        done = 0
        async with aclosing(pages):
            async for page, total in pages:
                await _publish(channel, queue_name, page)
                done += len(page)
                if sys.stderr.isatty():
                    bar, end = "#" * (30 * done // total), "\r" if done < total else "\n"
                    print(f"[{bar:30}] {done}/{total}", end=end, file=sys.stderr, flush=True)
        published += done
    print(f"published {published} from {printable(path)} to '{queue_name}'")


async def _publish(channel: AbstractChannel, queue_name: str, page: Iterable[Message]) -> None:
    """Publish messages, persistent and mandatory, and wait until all are confirmed."""
    async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
        publishing = [
            channel.basic_publish(body, routing_key=queue_name, properties=properties, mandatory=True)
            for body, properties in page
        ]
        await asyncio.gather(*publishing)


async def _pages_of_file(path: str) -> Pages:
    """Yield the letters of one file, from its end, and remove it."""
    with open(_take(path), "r+b") as file:
        begins = list(accumulate(map(len, file), initial=0))  # of the lines, and the end
        for last in range(len(begins) - 1, 0, -PAGE_LETTERS):
            first = max(0, last - PAGE_LETTERS)
            file.seek(begins[first])
            letters = [dead_letters.parse(file.readline()) for _ in range(first, last)]
            yield [(letter.body, _properties(letter.id, "application/json")) for letter in letters], len(begins) - 1
            with naming(path):
                os.ftruncate(file.fileno(), begins[first])
        if is_at(file.fileno(), _taken(path)):
            os.unlink(_taken(path))


async def _pages_of_queue(channel: AbstractChannel, name: str, total: int) -> Pages:
    """Yield the first `total` dead letters of predlog 1.0, one by one, and ack them."""
    for _ in range(total):
        found = await channel.basic_get(name)
        if found.delivery_tag is None:  # another reader has the others
            return
        its = found.header.properties
        yield [(bytes(found.body), _properties(its.message_id, its.content_type))], total
        await channel.basic_ack(found.delivery_tag)


def _properties(message_id: str | None, content_type: str | None) -> Basic.Properties:
    return Basic.Properties(message_id=message_id, content_type=content_type, delivery_mode=2)


def _path(settings: ConsumerSettings) -> str:
    return dead_letters.file_of(os.path.realpath(settings.csv_file))


def _taken(path: str) -> str:
    """Return where a replay works on the dead letters that were at `path`."""
    return f"{path}.replay"


def _take(path: str) -> int:
    """Take the file of dead letters away from the consumer; return it open and locked. Raise StartupError, OSError.

    What an earlier replay left is taken first.
    """
    taken = _taken(path)
    source = taken if os.path.exists(taken) else path
    fd = os.open(source, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(fd, source) or (source == path and os.path.exists(taken)):
            raise BlockingIOError
        if source == path:
            os.rename(path, taken)
            sync_directory(path)
        return fd
    except BlockingIOError:
        os.close(fd)
        raise StartupError(f"{printable(taken)}: another replay, or the consumer, is using it; try again") from None
