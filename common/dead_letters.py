"""Dead letters: bury what can never become rows, and the commands that list, replay and export what was buried.

Nothing here judges a message. Copies keep the original's properties octet by octet: pamqp decodes them with loss
(doubles, timestamps beyond the year 2106, text that is not UTF-8) and cannot read all that a broker takes.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import random
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, NamedTuple, TextIO

import aiormq
from aiormq.abc import DeliveredMessage
from pamqp import decode
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.frame import marshal

from common import amqp, event, frames
from common.config import ConsumerSettings, masked_url
from common.errors import StartupError

log = logging.getLogger("predlog.dead_letters")

CONFIRM_TIMEOUT_SECONDS = 10.0  # the clock stands still while the broker is blocked
ANSWER_TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 1.0
BACKOFF_SECONDS = 2.0
REFUSALS_BEFORE_BARE = 3
REASON_CHARS = 250

# A page of letters is what lies in memory, and on its way, at one time.
PAGE_LETTERS, PAGE_BYTES = 256, 16 * 1024 * 1024

# --- Properties, as they are on the wire ---

Properties = dict[str, bytes]  # by name; each value with its length in front, if it has one
Headers = dict[bytes, bytes]  # by name; each value with its type octet in front

# In the order of their flags from bit 15 down (4.2.6.1): short string, table, octet, or a timestamp of 8 octets.
_PROPERTIES = (
    ("content_type", "s"),
    ("content_encoding", "s"),
    ("headers", "t"),
    ("delivery_mode", "o"),
    ("priority", "o"),
    ("correlation_id", "s"),
    ("reply_to", "s"),
    ("expiration", "s"),
    ("message_id", "s"),
    ("timestamp", "T"),
    ("type", "s"),
    ("user_id", "s"),
    ("app_id", "s"),
    ("cluster_id", "s"),
)
# What a table may hold (4.2.5.5, and RabbitMQ's errata page), with its size; -1: a length of 4 octets says it.
_SIZES = dict(zip(b"tbBsuIilLfdDTVSAFx", (1, 1, 1, 2, 2, 4, 4, 8, 8, 4, 8, 5, 8, 0, -1, -1, -1, -1), strict=True))
_FRAME = Struct(">BHI")
_CONTENT = Struct(">HHQ")
_PERSISTENT = b"\x02"

# What a copy must not repeat. A user_id other than our own closes the channel (406), an expiration would delete a dead
# letter; CC and BCC would also send the copy elsewhere, even to the queue it was taken from.
_DROPPED_PROPERTIES = frozenset({"user_id", "expiration", "cluster_id"})
_DROPPED_HEADERS = frozenset({b"CC", b"BCC", b"x-delivery-count", b"x-acquired-count"})
_LEAST = frozenset({"content_type", "message_id", "delivery_mode"})
_OURS = b"x-predlog-"
_REASON, _TIME, _QUEUE, _USER = (_OURS + name for name in (b"reason", b"time", b"queue", b"user-id"))


def split_properties(header: bytes) -> tuple[Properties, Headers]:
    """The properties and, apart from them, the headers of a content header's payload. Raises frames.FrameError."""
    flags, at = int.from_bytes(header[12:14], "big"), 14
    properties: Properties = {}
    try:
        for index, (name, kind) in enumerate(_PROPERTIES):
            if flags & 0x8000 >> index:
                if kind == "s":
                    size = 1 + header[at]
                elif kind == "t":
                    size = 4 + int.from_bytes(header[at : at + 4], "big")
                else:
                    size = 1 if kind == "o" else 8
                properties[name] = header[at : at + size]
                at += size
    except IndexError:
        at = -1
    if at != len(header) or flags & 3:
        raise frames.FrameError("a content header whose properties do not add up")
    return properties, _split_table(properties.pop("headers", bytes(4))[4:])


def _split_table(table: bytes) -> Headers:
    headers: Headers = {}
    at = 0
    try:
        while at < len(table):
            start = at + 1 + table[at]
            name, size = table[at + 1 : start], _SIZES[table[start]]
            at = start + 1 + (size if size >= 0 else 4 + int.from_bytes(table[start + 1 : start + 5], "big"))
            headers[name] = table[start:at]
    except (IndexError, KeyError):
        at = -1
    if at != len(table):
        raise frames.FrameError("a table of headers that does not add up")
    return headers


def _table(headers: Headers) -> bytes:
    table = b"".join([bytes([len(name)]) + name + value for name, value in headers.items()])
    return len(table).to_bytes(4, "big") + table


def content_header(properties: Properties, headers: Headers, body_bytes: int) -> bytes:
    """A content header's payload: the inverse of `split_properties`."""
    have = properties | {"headers": _table(headers)} if headers else properties
    flags, values = 0, []
    for index, (name, _) in enumerate(_PROPERTIES):
        if name in have:
            flags |= 0x8000 >> index
            values.append(have[name])
    return _CONTENT.pack(60, 0, body_bytes) + flags.to_bytes(2, "big") + b"".join(values)


def _text(value: bytes) -> bytes:
    """A header's value: a long string."""
    return b"S" + len(value).to_bytes(4, "big") + value


def printable(text: str) -> str:
    """Text without anything that could forge a line, drive a terminal, or not be UTF-8."""
    return "".join([char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text])


# --- Copies ---


class Copy(NamedTuple):
    """A message to publish. `bare` has the least of properties, for a broker that refuses `header`."""

    header: bytes
    bare: bytes
    body: bytes


def dead_copy(delivery: frames.Delivery, queue_name: str, reason: str, now: datetime) -> Copy:
    """The copy of a message of `queue_name` for its dead letters. One without message_id gets one, for safe replays."""
    theirs = _tolerant(delivery.header)
    properties, headers = _repeatable(*theirs)
    if properties.get("message_id", b"\0") == b"\0":
        properties["message_id"] = b"\x20" + uuid.uuid4().hex.encode()
    ours = {
        _REASON: _text(printable(reason)[:REASON_CHARS].encode()),
        _TIME: _text(now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()),
        _QUEUE: _text(queue_name.encode()),
    }
    if user := theirs[0].get("user_id"):
        ours[_USER] = _text(user[1:])
    least = {name: value for name, value in properties.items() if name in _LEAST}
    size = len(delivery.body)
    return Copy(content_header(properties, headers | ours, size), content_header(least, ours, size), delivery.body)


def live_copy(letter: frames.Delivery) -> Copy:
    """The message that a dead letter was."""
    properties, headers = _repeatable(*_tolerant(letter.header))
    header = content_header(properties, headers, len(letter.body))
    return Copy(header, header, letter.body)


def _tolerant(header: bytes) -> tuple[Properties, Headers]:
    """`split_properties`, but nothing for what it refuses: there must be no message that cannot be buried."""
    try:
        return split_properties(header)
    except frames.FrameError:
        return {}, {}


def _repeatable(properties: Properties, headers: Headers) -> tuple[Properties, Headers]:
    kept = {name: value for name, value in properties.items() if name not in _DROPPED_PROPERTIES}
    theirs = {k: v for k, v in headers.items() if k not in _DROPPED_HEADERS and not k.startswith(_OURS)}
    return kept | {"delivery_mode": _PERSISTENT}, theirs


class Outbox:
    """Publishes copies on one link, persistent and mandatory; each has its own outcome.

    A returned message ends the link (fast_lane), so its future fails as all others do that are unconfirmed then.
    """

    def __init__(self, link: amqp.Link) -> None:
        self.blocked = ""  # the broker's reason while it takes no messages
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._unconfirmed: dict[int, tuple[asyncio.Future[None], float]] = {}  # by delivery tag: in order of age
        self._next_tag = 1
        self._unblocked_at = 0.0
        link.lane.on_confirms = self._confirm
        link.lane.on_blocked = self._block

    def publish(self, queue_name: str, copy: Copy, bare: bool = False) -> asyncio.Future[None]:
        """Done once the broker has the copy on disk; fails with ConnectionError (lost) or Nacked."""
        future: asyncio.Future[None] = self._loop.create_future()
        lane, frame_max = self._link.lane, self._link.frame_max
        if lane.lost is not None:
            _fail(future, ConnectionError(lane.lost))
            return future
        header = copy.bare if bare or 0 < frame_max < len(copy.header) + 8 else copy.header
        channel = frames.HOT_CHANNEL
        parts = [
            marshal(Basic.Publish(exchange="", routing_key=queue_name, mandatory=True), channel),
            _FRAME.pack(2, channel, len(header)) + header + b"\xce",
        ]
        most = frame_max - 8 if frame_max else 2**31 - 1
        parts += [marshal(ContentBody(copy.body[at : at + most]), channel) for at in range(0, len(copy.body), most)]
        self._unconfirmed[self._next_tag] = (future, self._loop.time())
        self._next_tag += 1
        lane.send(parts)
        return future

    async def wait(self, futures: Iterable[asyncio.Future[None]]) -> None:
        """Until all are done. A broker that neither confirms nor says why, for CONFIRM_TIMEOUT_SECONDS, is lost."""
        waiting = set(futures)
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=POLL_SECONDS)
            if waiting and self._unconfirmed and not self.blocked:
                _, since = next(iter(self._unconfirmed.values()))
                if self._loop.time() - max(since, self._unblocked_at) > CONFIRM_TIMEOUT_SECONDS:
                    self._link.lane.fail(f"no confirm within {CONFIRM_TIMEOUT_SECONDS:.0f} s")

    def fail(self, reason: str) -> None:
        """Nothing that is unconfirmed will be confirmed any more."""
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for future, _ in unconfirmed.values():
            _fail(future, ConnectionError(reason))

    def _confirm(self, confirms: list[frames.Confirm]) -> None:
        for tag, multiple, ok in confirms:
            covered = list(takewhile(tag.__ge__, self._unconfirmed)) if multiple else [tag]
            for each in covered:
                future, _ = self._unconfirmed.pop(each, (None, 0.0))
                if future is not None and not future.done():
                    if ok:
                        future.set_result(None)
                    else:
                        _fail(future, Nacked("the broker refused it (nack)"))

    def _block(self, reason: str) -> None:
        self.blocked = reason
        if reason:
            log.warning("the broker takes no messages: %s; waiting", reason)
        else:
            log.info("the broker takes messages again")
            self._unblocked_at = self._loop.time()


class Nacked(Exception):
    """The broker could not take a message."""


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may be gone: no complaint about an error that nobody heard


# --- Burying ---


class DeadLetters:
    """Buries messages in `<queue_name>.dead`, over a connection of its own that opens with the first of them."""

    def __init__(self, url: str, queue_name: str) -> None:
        self._url = url
        self._queue_name = queue_name
        self._dead = amqp.dead_letter_queue(queue_name)
        self._outbox: Outbox | None = None
        self._is_up = asyncio.Event()
        self._link_task: asyncio.Task[None] | None = None
        self._in_trouble = False

    async def bury(self, delivery: frames.Delivery, reason: str) -> None:
        """Returns once a copy of `delivery` is confirmed, whatever that takes. Any number may run at a time.

        The copy has the body and the properties of the original and the headers x-predlog-reason, x-predlog-time
        (RFC 3339, UTC) and x-predlog-queue.
        """
        if self._link_task is None:
            self._link_task = asyncio.create_task(self._keep_link())
        copy = dead_copy(delivery, self._queue_name, reason, datetime.now(UTC))
        refusals = 0
        while True:
            await self._is_up.wait()
            outbox = self._outbox
            assert outbox is not None
            future = outbox.publish(self._dead, copy, bare=refusals >= REFUSALS_BEFORE_BARE)
            await outbox.wait([future])
            error = future.exception()
            if error is None:
                if self._in_trouble:
                    log.info("dead letters reach '%s' again", self._dead)
                    self._in_trouble = False
                return
            if not self._in_trouble:
                log.warning("could not bury a message in '%s': %s; trying until it works", self._dead, error)
                self._in_trouble = True
            # Not known which of several copies the broker refused: after some rounds, the rest goes without.
            refusals += "PRECONDITION_FAILED" in str(error)
            if outbox is self._outbox and not isinstance(error, Nacked):
                self._down(str(error))
            await asyncio.sleep(random.uniform(0.1, 1) * BACKOFF_SECONDS if isinstance(error, Nacked) else 0)

    async def close(self) -> None:
        """Close the connection. Cancel the calls of `bury` first: none of them returns after this."""
        if self._link_task is not None:
            self._link_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._link_task
            self._down("closed")

    async def _keep_link(self) -> None:
        said = ""
        while True:
            try:
                await amqp.keep_up(self._url, "dead-letters", self._up, self._down)
            except StartupError as error:  # no reason to stop here: somebody may mend it
                if str(error) != said:
                    said = str(error)
                    log.warning("dead letters: %s; trying until it works", error)
            except Exception:
                log.exception("dead letters: unexpected; connecting again")
            await asyncio.sleep(random.uniform(0.5, 1) * BACKOFF_SECONDS)

    async def _up(self, link: amqp.Link) -> None:
        await amqp.declare(link.channel, self._dead, amqp.DEAD_LETTER_ARGUMENTS)
        self._outbox = Outbox(link)
        self._is_up.set()

    def _down(self, reason: str) -> None:
        self._is_up.clear()
        if self._outbox is not None:
            self._outbox.fail(reason)
            self._outbox = None


# --- Commands ---

Pages = AsyncGenerator[list[frames.Delivery], None]


async def show(settings: ConsumerSettings) -> int:
    """List the dead letters on stdout, oldest first, and leave them as they are. The exit code; raises StartupError."""
    dead = amqp.dead_letter_queue(settings.queue_name)
    async with _connection(settings.amqp_url) as source:
        if count := await _ready(source, dead):
            head = _row("ID", "REASON", "WHEN", "SIZE", "FIRST BYTES")
            await _pour(_look(source, dead, count), _line_of_table, sys.stdout.buffer, "stdout", head)
        else:
            print(f"no dead letters in '{dead}'")
    return 0


async def export(settings: ConsumerSettings, path: str) -> int:
    """Write the dead letters as JSON lines to the file `path` ("-": stdout), whole or not at all.

    They stay where they are. A line is {id, reason, time, size (bytes), headers, body}, or body_base64 for a body that
    is not UTF-8; id, reason and time are null when nobody set them. The exit code; raises StartupError.
    """
    dead = amqp.dead_letter_queue(settings.queue_name)
    async with _connection(settings.amqp_url) as source:
        pages = _look(source, dead, await _ready(source, dead) or 0)
        if path == "-":
            await _pour(pages, json_line, sys.stdout.buffer, "stdout")
            return 0
        with _replacing(path) as out:
            written = await _pour(pages, json_line, out, path)
    print(f"exported {written} from '{dead}' to {path}")
    return 0


async def replay(settings: ConsumerSettings) -> int:
    """Move the dead letters that are there now back to the queue. The exit code; raises StartupError.

    Each is acked only after its copy is confirmed, and keeps its message_id: what a kill in between leaves in both
    queues, the consumer drops the second time.
    """
    queue_name, dead = settings.queue_name, amqp.dead_letter_queue(settings.queue_name)
    async with _connection(settings.amqp_url) as source:
        count = await _ready(source, dead)
        if not count:
            print(f"no dead letters in '{dead}'")
            return 0
        with Progress(count, sys.stderr) as progress:
            try:
                async with _connection(settings.amqp_url) as target:
                    await amqp.declare(target.channel, queue_name, amqp.QUEUE_ARGUMENTS)
                    outbox = Outbox(target)
                    target.lane.on_lost = outbox.fail
                    async for page in _pages(source, dead, count):
                        moved, error = await _republish(page, outbox, queue_name)
                        source.lane.send([frames.acks((tag, False) for tag in moved)])
                        progress.advance(len(moved))
                        if error is not None:
                            raise error
                await _ready(source, dead)  # an answer on this channel: the acks before it have arrived
            except StartupError as stopped:
                left = f"moved {progress.done} of {count}, the others are still in '{dead}'"
                raise StartupError(f"{stopped}; {left}") from None
    print(f"moved {progress.done} of {count} from '{dead}' to '{queue_name}'")
    return 0


async def _republish(
    page: list[frames.Delivery], outbox: Outbox, queue_name: str
) -> tuple[list[int], BaseException | None]:
    """The delivery tags of those whose copies are confirmed, and what became of the others."""
    futures = [outbox.publish(queue_name, live_copy(letter)) for letter in page]
    await outbox.wait(futures)
    errors = [future.exception() for future in futures]
    moved = [letter.delivery_tag for letter, error in zip(page, errors, strict=True) if error is None]
    return moved, next(filter(None, errors), None)


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[amqp.Link]:
    """A link for a command. Whatever goes wrong with it is a StartupError, which says in one line what."""
    try:
        link = await amqp.open_link(url, "dead-letters-command")
    except amqp.CONNECTION_ERRORS as error:
        raise StartupError(amqp.explain(error, url)) from None

    def closed(closing: asyncio.Future[Any]) -> None:
        link.lane.fail(str((not closing.cancelled() and closing.exception()) or "closed"))

    link.connection.closing.add_done_callback(closed)
    link.channel.closing.add_done_callback(closed)
    try:
        yield link
    except aiormq.exceptions.ChannelAccessRefused as error:
        raise StartupError(amqp.explain(error, url)) from None
    except Nacked:
        raise StartupError(f"the broker at {masked_url(url)} takes no more messages for the queue (nack)") from None
    except amqp.CONNECTION_ERRORS as error:
        raise StartupError(f"lost the broker at {masked_url(url)}: {link.lane.lost or error or 'no answer'}") from None
    except asyncio.CancelledError:
        if amqp.cancelled():
            raise
        raise StartupError(f"lost the broker at {masked_url(url)}: {link.lane.lost or 'closed'}") from None
    finally:
        await link.close()


async def _ready(link: amqp.Link, queue_name: str) -> int | None:
    """How many messages wait in the queue; None if there is no such queue, and then the channel is closed."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            return (await link.channel.queue_declare(queue_name, passive=True)).message_count
    except aiormq.exceptions.ChannelNotFoundEntity:
        return None


async def _look(link: amqp.Link, queue_name: str, count: int) -> Pages:
    """`_pages` for those who take nothing: at the end all is put back in its order.

    A closed channel would put the pages back in any order, and RabbitMQ 3.10 does so with the messages of one nack when
    they are more than 32.
    """
    seen: list[int] = []
    try:
        async for page in _pages(link, queue_name, count):
            tags = [letter.delivery_tag for letter in page]
            seen += [*tags[31::32], tags[-1]]
            yield page
    finally:
        for tag in dict.fromkeys(seen) if link.lane.lost is None else ():
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                await link.channel.basic_nack(tag, multiple=True, requeue=True)


async def _pages(link: amqp.Link, queue_name: str, count: int) -> Pages:
    """The first `count` messages, unacked, a page at a time: no more than fits in PAGE_BYTES, if the largest of one
    page tells what the next may hold. Ends early when other readers have the rest.

    Each page has a consumer of its own, that is cancelled before the page is given out: what it was sent stays unacked
    on the channel, nothing piles up while the caller takes its time, and the next page begins behind it.
    """
    arrived: list[frames.Delivery] = []
    wake = asyncio.Event()

    def take(deliveries: list[frames.Delivery]) -> None:
        arrived.extend(deliveries)
        wake.set()

    link.lane.on_deliveries = take
    link.lane.on_lost = lambda _: wake.set()
    largest, more = PAGE_BYTES // 8, True  # nothing is known before the first page
    while count > 0 and more:
        size = min(count, PAGE_LETTERS, max(1, PAGE_BYTES // largest))
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            await link.channel.basic_qos(prefetch_count=size)
            consumer = await link.channel.basic_consume(queue_name, _never_called)
        while len(arrived) < size and more:
            if link.lane.lost is not None:
                raise ConnectionError(link.lane.lost)
            wake.clear()
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await wake.wait()
            except TimeoutError:
                more = bool(await _ready(link, queue_name))
        async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
            await link.channel.basic_cancel(consumer.consumer_tag or "")
        page = arrived.copy()
        arrived.clear()
        count -= len(page)
        if page:
            largest = max(1, *(len(letter.body) for letter in page))
            yield page


async def _never_called(_: DeliveredMessage) -> None: ...


async def _pour(
    pages: Pages, line: Callable[[frames.Delivery], bytes], out: BinaryIO, name: str, head: bytes = b""
) -> int:
    """Write a line for each letter; how many. In a thread: a pager may stop reading, and heartbeats must go on."""

    def write(data: bytes) -> None:
        try:
            out.write(data)
            out.flush()
        except OSError as error:
            raise StartupError(f"cannot write {name}: {error.strerror}") from error

    written = 0
    async with aclosing(pages):
        async for page in pages:
            try:
                await asyncio.to_thread(write, head + b"".join(map(line, page)))
            except StartupError as error:
                if out is sys.stdout.buffer and isinstance(error.__cause__, BrokenPipeError):  # `| head` has enough
                    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
                    break
                raise
            written += len(page)
            head = b""
    return written


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` in one step, on disk, if the block ends well. Raises StartupError."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _explained(path):
        if target.exists() and not target.is_file():  # a pipe, or /dev/null: nothing to take the place of
            out: BinaryIO = target.open("wb")
            beside = target
        else:
            out = beside.open("xb")
    try:
        with out:
            yield out
            if beside is not target:
                with _explained(path):
                    os.fsync(out.fileno())
                    beside.replace(target)
                    folder = os.open(target.parent, os.O_RDONLY)
                    try:
                        os.fsync(folder)
                    finally:
                        os.close(folder)
    except BaseException:
        if beside is not target:
            beside.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error.strerror}") from None


# --- What people and programs read ---

_WIDTHS = (32, 40, 24, 9)
_FIRST_BYTES = 40
_BAR = 30  # characters


def _row(*cells: str) -> bytes:
    cut = [cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(cells, _WIDTHS, strict=False)]
    message_id, reason, when, size = (cell.ljust(width) for cell, width in zip(cut, _WIDTHS, strict=True))
    return f"{message_id}  {reason}  {when}  {size.strip():>{_WIDTHS[3]}}  {cells[4]}\n".encode()


def _line_of_table(letter: frames.Delivery) -> bytes:
    message_id, reason, when = (printable(value or "-") for value in _account(letter)[:3])
    first = repr(letter.body[:_FIRST_BYTES])[2:-1][:_FIRST_BYTES]
    return _row(message_id, reason, when, str(len(letter.body)), first)


def json_line(letter: frames.Delivery) -> bytes:
    """A dead letter as one line of JSON; see `export`."""
    message_id, reason, when, headers = _account(letter)
    entry = {"id": message_id, "reason": reason, "time": when, "size": len(letter.body), "headers": headers}
    try:
        entry["body"] = letter.body.decode()
    except UnicodeDecodeError:
        entry["body_base64"] = base64.b64encode(letter.body).decode()
    return event.dumps(entry) + b"\n"


def _account(letter: frames.Delivery) -> tuple[str | None, str | None, str | None, dict[str, Any]]:
    """A dead letter's id, reason, time and headers, as its publishers wrote them."""
    properties, headers = _tolerant(letter.header)
    message_id = properties.get("message_id", b"")[1:].decode("utf-8", "replace")
    shown = {name.decode("utf-8", "replace"): _for_json(value) for name, value in headers.items()}
    return message_id or None, _string(headers, _REASON), _string(headers, _TIME), shown


def _string(headers: Headers, name: bytes) -> str | None:
    value = headers.get(name, b"")
    return value[5:].decode("utf-8", "replace") if value[:1] == b"S" else None


def _for_json(value: bytes) -> Any:
    """A header's value, or its octets in hexadecimal if JSON or pamqp has no form for it."""
    try:
        plain = _plain(decode.embedded_value(value)[1])
        event.dumps(plain)
    except Exception:  # whatever a publisher put in there, for example tables a thousand deep
        return value.hex()
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return str(value) if isinstance(value, Decimal) else value


class Progress:
    """How far a command is: a bar on a terminal, else a line now and then. Use it as a context manager."""

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
        """`count` more are done."""
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
