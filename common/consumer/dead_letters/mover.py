"""Dead letters: bury what can never become rows, until the broker has confirmed the copy.

Nothing here judges a message, knows what is in one (letters.py), or reads dead letters (dead_letter_commands.py).
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import takewhile
from struct import Struct

from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.frame import marshal

from common.amqp.codec import HOT_CHANNEL, Confirm, Delivery
from common.amqp.link import Link, keep_up
from common.amqp.topology import DEAD_LETTER_ARGUMENTS, dead_letter_queue, declare
from common.consumer.dead_letters.message import Copy, dead_copy
from common.errors import StartupError

log = logging.getLogger("predlog.dead_letters")

CONFIRM_TIMEOUT_SECONDS = 10.0  # the clock stands still while the broker is blocked
POLL_SECONDS = 1.0
BACKOFF_SECONDS = 2.0
REFUSALS_BEFORE_BARE = 3

_FRAME = Struct(">BHI")


class Outbox:
    """Publishes copies on one link, persistent and mandatory; each has its own outcome.

    A returned message ends the link (fast_lane), so its future fails as all others do that are unconfirmed then.
    """

    def __init__(self, link: Link) -> None:
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
        channel = HOT_CHANNEL
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

    def _confirm(self, confirms: list[Confirm]) -> None:
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


class DeadLetters:
    """Buries messages in `<queue_name>.dead`, over a connection of its own that opens with the first of them."""

    def __init__(self, url: str, queue_name: str) -> None:
        self._url = url
        self._queue_name = queue_name
        self._dead = dead_letter_queue(queue_name)
        self._outbox: Outbox | None = None
        self._is_up = asyncio.Event()
        self._link_task: asyncio.Task[None] | None = None
        self._in_trouble = False

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Returns once a copy of `delivery` is confirmed, whatever that takes. Any number may run at a time.

        The copy has the body and the properties of the original and the headers x-predlog-reason, x-predlog-time
        (RFC 3339, UTC) and x-predlog-queue.
        """
        if self._link_task is None:
            self._link_task = asyncio.create_task(self._keep_link())
        copy = dead_copy(delivery, self._queue_name, reason, datetime.now(UTC), uuid.uuid4().hex.encode())
        refusals = 0
        while True:
            while (outbox := self._outbox) is None:  # it may be down again before a waiter wakes
                await self._is_up.wait()
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
            if isinstance(error, Nacked):
                await asyncio.sleep(random.uniform(0.1, 1) * BACKOFF_SECONDS)
            elif outbox is self._outbox:
                self._down(str(error))

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
                await keep_up(self._url, "dead-letters", self._up, self._down)
            except StartupError as error:  # no reason to stop here: somebody may mend it
                if str(error) != said:
                    said = str(error)
                    log.warning("dead letters: %s; trying until it works", error)
            except Exception:
                log.exception("dead letters: unexpected; connecting again")
            await asyncio.sleep(random.uniform(0.5, 1) * BACKOFF_SECONDS)

    async def _up(self, link: Link) -> None:
        await declare(link.channel, self._dead, DEAD_LETTER_ARGUMENTS)
        self._outbox = Outbox(link)
        self._is_up.set()

    def _down(self, reason: str) -> None:
        self._is_up.clear()
        if self._outbox is not None:
            self._outbox.fail(reason)
            self._outbox = None
