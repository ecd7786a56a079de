"""Moving messages that can never become rows to the queue of dead letters, each until its copy is confirmed.

Nothing here validates a message, knows its format (message.py), or reads dead letters (commands.py).
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime

from common.amqp.codec import Confirm, Delivery, publish_frames
from common.amqp.link import Link, keep_up
from common.amqp.topology import DEAD_LETTER_ARGUMENTS, dead_letter_queue, declare
from common.amqp.window import ConfirmWindow
from common.consumer.dead_letters.message import Copy, dead_copy
from common.errors import StartupError

log = logging.getLogger("predlog.dead_letters")

CONFIRM_TIMEOUT_SECONDS = 10.0  # the clock stands still while the broker is blocked
NACKS_SECONDS = 10.0
POLL_SECONDS = 1.0
BACKOFF_SECONDS = 2.0
REFUSALS_BEFORE_BARE = 3


class Outbox:
    """A publisher of copies on one link, persistent and mandatory. Each copy has its own outcome.

    A returned message ends the link (lane.py), so its future fails, as do all that are unconfirmed then.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._window = ConfirmWindow[tuple[asyncio.Future[None], float]](self._settle)  # with the time of publishing
        self._blocked = ""  # the broker's reason while it takes no messages
        self._unblocked_at = 0.0
        self._nacked_since: float | None = None  # time of the first nack after the last ack
        link.lane.gone.add_done_callback(lambda gone: self._fail_all(gone.result()))

    def publish(self, queue_name: str, copy: Copy, bare: bool = False) -> asyncio.Future[None]:
        """Publish a copy; return a future that is done once the broker has it on disk.

        It fails with ConnectionError (lost) or Nacked.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        lane, frame_max = self._link.lane, self._link.frame_max
        if lane.lost is not None:
            _fail(future, ConnectionError(lane.lost))
            return future
        header = copy.bare if bare or 0 < frame_max < len(copy.header) + 8 else copy.header
        lane.send(publish_frames(queue_name, header, copy.body, frame_max))
        self._window.add((future, self._loop.time()))
        return future

    async def wait(self, futures: Iterable[asyncio.Future[None]]) -> None:
        """Wait until all are done. End a link without a confirm for CONFIRM_TIMEOUT_SECONDS, unless it is blocked."""
        waiting = set(futures)
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=POLL_SECONDS)
            oldest = self._window.oldest()
            if waiting and oldest is not None and not self._blocked:
                _, since = oldest
                if self._loop.time() - max(since, self._unblocked_at) > CONFIRM_TIMEOUT_SECONDS:
                    self._link.lane.fail(f"no confirm within {CONFIRM_TIMEOUT_SECONDS:.0f} s")

    def confirms(self, confirms: list[Confirm]) -> None:
        """Give each copy its outcome. End a link with only nacks for NACKS_SECONDS (see publisher.py)."""
        self._window.confirms(confirms)
        if self._nacked_since is not None and self._loop.time() - self._nacked_since > NACKS_SECONDS:
            self._link.lane.fail("the broker refuses every copy (nack)")

    def _settle(self, sent: tuple[asyncio.Future[None], float], ok: bool) -> None:
        future, _ = sent
        if not ok:
            self._nacked_since = self._nacked_since or self._loop.time()
            _fail(future, Nacked("the broker refused it (nack)"))
            return
        self._nacked_since = None
        if not future.done():
            future.set_result(None)

    def blocked(self, reason: str) -> None:
        """Stop the clock of `wait` while the broker takes no messages."""
        self._blocked = reason
        if reason:
            log.warning("the broker takes no messages: %s; waiting", reason)
        else:
            log.info("the broker takes messages again")
            self._unblocked_at = self._loop.time()

    def _fail_all(self, reason: str) -> None:
        for future, _ in self._window.take():
            _fail(future, ConnectionError(reason))


class OutboxListener:
    """The listener of a link for copies. `outbox` is that of the current link, or None."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None

    def open(self, link: Link) -> Outbox:
        """Begin with a new link."""
        self.outbox = Outbox(link)
        return self.outbox

    def confirms(self, confirms: list[Confirm]) -> None:
        if self.outbox is not None:
            self.outbox.confirms(confirms)

    def blocked(self, reason: str) -> None:
        if self.outbox is not None:
            self.outbox.blocked(reason)

    def deliveries(self, deliveries: list[Delivery]) -> None:
        """Ignore them: nothing is consumed on this link."""


class Nacked(Exception):
    """The broker nacked a message."""


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as retrieved: the waiter may be gone, and asyncio would report it


class DeadLetters(OutboxListener):
    """The mover of messages to `<queue_name>.dead`, over a connection of its own that the first of them opens."""

    def __init__(self, url: str, queue_name: str) -> None:
        super().__init__()
        self._url = url
        self._queue_name = queue_name
        self._dead = dead_letter_queue(queue_name)
        self._is_up = asyncio.Event()
        self._link_task: asyncio.Task[None] | None = None
        self.trouble = ""  # why the last copy was not confirmed, or ""

    async def move(self, delivery: Delivery, reason: str) -> None:
        """Retry until a copy of `delivery` is confirmed. Any number of calls may run at a time.

        The copy has the body and the properties of the original and the headers x-predlog-reason, x-predlog-time
        (RFC 3339, UTC) and x-predlog-queue.
        """
        if self._link_task is None:
            self._link_task = asyncio.create_task(self._keep_link())
        copy = dead_copy(delivery, self._queue_name, reason, datetime.now(UTC), uuid.uuid4().hex.encode())
        refusals = 0
        while True:
            while (outbox := self.outbox) is None:  # it may be down again before a waiter wakes
                await self._is_up.wait()
            future = outbox.publish(self._dead, copy, bare=refusals >= REFUSALS_BEFORE_BARE)
            await outbox.wait([future])
            error = future.exception()
            if error is None:
                if self.trouble:
                    log.info("dead letters reach '%s' again", self._dead)
                    self.trouble = ""
                return
            if not self.trouble:
                log.warning("a message could not be dead-lettered to '%s': %s; retrying", self._dead, error)
            self.trouble = str(error)
            # It is unknown which of several copies the broker refused. After some attempts, the rest go out bare.
            refusals += "PRECONDITION_FAILED" in str(error)
            if isinstance(error, Nacked):
                await asyncio.sleep(random.uniform(0.1, 1) * BACKOFF_SECONDS)
            elif outbox is self.outbox:
                self.down(str(error))

    async def close(self) -> None:
        """Close the connection. Cancel the calls of `move` first: none of them returns after this."""
        if self._link_task is not None:
            self._link_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._link_task
            self.down("closed")

    async def _keep_link(self) -> None:
        said = ""
        while True:
            try:
                await keep_up(self._url, "dead-letters", self)
            except StartupError as error:  # not fatal here: an operator may fix it while rows are stored
                if str(error) != said:
                    said = str(error)
                    log.warning("dead letters: %s; retrying", error)
            except Exception:
                log.exception("dead letters: unexpected; connecting again")
            await asyncio.sleep(random.uniform(0.5, 1) * BACKOFF_SECONDS)

    async def up(self, link: Link) -> None:
        """Declare the queue of the dead letters."""
        await declare(link.channel, self._dead, DEAD_LETTER_ARGUMENTS)
        self.open(link)
        self._is_up.set()

    def down(self, reason: str) -> None:
        """Let the calls of `move` wait for the next link."""
        self._is_up.clear()
        self.outbox = None
