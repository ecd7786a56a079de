"""aiormq: connect with a time limit, declare the topology, keep one connection up for ever. Hot frames are fast_lane's.

Nothing here knows HTTP, CSV or what is in a message.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp.exceptions import PAMQPException

from common.amqp.address import masked_url
from common.amqp.codec import HOT_CHANNEL
from common.amqp.transport import FastLane, FastLaneFactory
from common.errors import StartupError

log = logging.getLogger("predlog.amqp")

CONNECT_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 1.5
HEARTBEAT_SECONDS = 10  # aiormq takes the broker for dead after three missed ones
BACKOFF_FIRST_SECONDS, BACKOFF_MOST_SECONDS = 0.1, 3.0
SETTLED_SECONDS = 5.0  # a connection that lived so long begins its back-off anew

# What aiormq, pamqp and the socket raise when a connection fails; AMQPError alone does not cover them.
CONNECTION_ERRORS = (
    aiormq.AMQPError,
    PAMQPException,
    OSError,
    asyncio.TimeoutError,
    RuntimeError,
    asyncio.IncompleteReadError,
)


@dataclass(frozen=True, slots=True)
class Link:
    """One live connection with its channel and its fast lane."""

    connection: AbstractConnection
    channel: AbstractChannel
    lane: FastLane

    @property
    def frame_max(self) -> int:
        """Largest frame, bytes; 0: no limit."""
        return int(self.connection.connection_tune.frame_max or 0)

    async def close(self) -> None:
        """Say good-bye if the broker listens; never wait for one that does not."""
        try:
            if self.lane.lost is None:
                await asyncio.wait_for(asyncio.shield(self.connection.close()), CLOSE_TIMEOUT_SECONDS)
        except asyncio.CancelledError:
            if cancelled():
                raise
        except Exception as error:
            log.debug("while closing: %r", error)
        finally:
            self.lane.fail("closed")
            reaping = asyncio.ensure_future(_reap(self.connection))
            _reapings.add(reaping)
            reaping.add_done_callback(_reapings.discard)


_reapings: set[asyncio.Future[None]] = set()  # the loop itself holds no strong reference to a task


async def _reap(connection: AbstractConnection) -> None:
    """End aiormq's tasks of a connection whose transport is aborted; nobody waits for it."""
    try:
        await asyncio.wait_for(connection.close(), CLOSE_TIMEOUT_SECONDS)
    except (Exception, asyncio.CancelledError) as error:
        log.debug("while closing: %r", error)


async def closed() -> None:
    """Wait until aiormq's tasks of every closed link have ended. At the end of a process: else asyncio reports them."""
    if _reapings:
        await asyncio.wait(_reapings)


def cancelled() -> bool:
    """Whether the running task really was cancelled: aiormq may report a loss as CancelledError as well."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def open_link(url: str, name: str, high_water_bytes: int = 2**20) -> Link:
    """Connect and open the hot channel with confirms. Raises one of CONNECTION_ERRORS, and in bounded time."""
    factory = FastLaneFactory()
    join = "&" if "?" in url else "?"
    if "heartbeat=" not in url:
        url += f"{join}heartbeat={HEARTBEAT_SECONDS}"
        join = "&"
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            connection = await aiormq.connect(f"{url}{join}name=predlog-{name}", transport_factory=factory)
            channel = await connection.channel(channel_number=HOT_CHANNEL)
    except BaseException as error:
        said = factory.lane.lost if factory.lane is not None else None
        if factory.lane is not None:
            factory.lane.fail("not opened")
        if said is not None and "NOT_ALLOWED" in said:  # aiormq reports this answer to connection.open as a frame error
            raise aiormq.exceptions.ConnectionNotAllowed(said.removeprefix("closed: ")) from None
        if isinstance(error, asyncio.CancelledError) and not cancelled():
            raise ConnectionError("the connection was cut while opening") from None
        if type(error) is Exception:  # aiormq reports a cut during channel.open as a bare Exception
            raise ConnectionError("the connection was cut while opening") from None
        raise
    assert factory.lane is not None
    link = Link(connection, channel, factory.lane)
    link.lane.negotiated(link.frame_max, high_water_bytes)
    return link


def _lost(link: Link) -> asyncio.Future[str]:
    """The reason, once the link is of no more use, whoever notices it first."""
    lane, lost = link.lane, asyncio.get_running_loop().create_future()
    if lane.lost is not None:
        raise ConnectionError(lane.lost)
    lane.on_lost = lambda reason: None if lost.done() else lost.set_result(reason)
    link.connection.closing.add_done_callback(lambda _: lane.fail("connection closed"))
    link.channel.closing.add_done_callback(lambda _: lane.fail("channel closed"))
    return lost


def explain(error: BaseException, url: str) -> str:
    """What is wrong, in words, for the errors a person can mend."""
    if isinstance(error, StartupError):
        return str(error)
    shown = masked_url(url)
    if isinstance(error, aiormq.exceptions.ProbableAuthenticationError | aiormq.exceptions.AuthenticationError):
        return f"the broker at {shown} refused user or password; correct AMQP_URL"
    if isinstance(error, aiormq.exceptions.ConnectionNotAllowed | aiormq.exceptions.ChannelAccessRefused):
        return f"the broker at {shown} denies access: {error}"
    if isinstance(error, asyncio.TimeoutError):
        return f"the broker at {shown} does not answer"
    if isinstance(error, OSError) and error.strerror:
        return f"no broker at {shown} ({error.strerror})"
    said = ": ".join(str(part) for part in error.args if part) or repr(error)
    return f"no broker at {shown} ({said})"


# A restart does not mend these: the first connection ends the process with one line. Later ones wait: somebody may be
# in the middle of changing a password or a queue.
_HOPELESS = (
    aiormq.exceptions.ProbableAuthenticationError,
    aiormq.exceptions.AuthenticationError,
    aiormq.exceptions.ConnectionNotAllowed,
    aiormq.exceptions.ChannelAccessRefused,
)


async def keep_up(
    url: str,
    name: str,
    prepare: Callable[[Link], Awaitable[None]],
    on_down: Callable[[str], None],
    on_trouble: Callable[[str], None] = lambda trouble: None,
    high_water_bytes: int = 2**20,
) -> None:
    """Connect, `prepare` the link, wait until it is lost, call `on_down`, and again, until cancelled.

    Raises StartupError if the first connection fails for a reason that waiting does not mend. `on_down` hears of every
    link that was opened, with the reason, also when `prepare` failed; the link is closed by then. `on_trouble` hears
    why there is no link, of each attempt.
    """
    attempt, said, first = 0, "", True
    loop = asyncio.get_running_loop()
    while True:
        link: Link | None = None
        began = loop.time()
        trouble = ""
        try:
            link = await open_link(url, name, high_water_bytes)
            lost = _lost(link)
            await prepare(link)
            log.info("%s: connected%s to %s", name, "" if first else " again", masked_url(url))
            first, said, began = False, "", loop.time()
            trouble = f"connection lost: {await lost}; nothing under way is forgotten, connecting again"
        except (*_HOPELESS, StartupError) as error:
            trouble = explain(error, url)
            if first:
                raise StartupError(trouble) from None
        except CONNECTION_ERRORS as error:
            trouble = f"{explain(error, url)}; waiting for it"
        except asyncio.CancelledError:
            if cancelled():
                raise
            trouble = "the connection was cut; connecting again"
        except Exception as error:  # a bare one is aiormq's way to report a cut during a call
            if type(error) is not Exception:
                log.exception("%s: unexpected", name)
            trouble = "the connection was cut; connecting again"
        finally:
            if link is not None:
                link.lane.on_lost = lambda _: None
                await link.close()
        if cancelled():  # aiormq may turn our cancellation into the error of a loss at the same moment
            raise asyncio.CancelledError
        if link is not None:
            on_down(trouble)
        on_trouble(trouble)
        if trouble != said:
            log.warning("%s: %s", name, trouble)
        said = trouble
        attempt = 0 if link is not None and loop.time() - began >= SETTLED_SECONDS else attempt + 1
        # Jitter, so that processes cut off together do not come back together.
        await asyncio.sleep(
            random.uniform(0.5, 1) * min(BACKOFF_MOST_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(attempt, 10))
        )
