"""One connection to RabbitMQ through aiormq, opened in bounded time and kept up until cancelled.

Nothing here knows HTTP, CSV or what is in a message. Hot frames are in lane.py, queues in topology.py.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp.exceptions import PAMQPException

from common.amqp.address import Address, masked_url, parse_address
from common.amqp.codec import HOT_CHANNEL
from common.amqp.lane import FastLane, FastLaneFactory, LaneListener
from common.errors import StartupError

log = logging.getLogger("predlog.amqp")

T = TypeVar("T")

RESOLVE_TIMEOUT_SECONDS = 5.0
HANDSHAKE_TIMEOUT_SECONDS = 5.0  # of TLS and AMQP; the TCP connect before it has a bound of its own
STAGGER_SECONDS = 1.0  # before the next address is tried as well (RFC 8305)
CALL_TIMEOUT_SECONDS = 10.0  # of one call on an open connection
CLOSE_TIMEOUT_SECONDS = 1.5
HEARTBEAT_SECONDS = 10  # aiormq takes the broker for dead after three missed ones
LAST_WORDS_SECONDS = 0.5
BACKOFF_FIRST_SECONDS, BACKOFF_MOST_SECONDS = 0.1, 3.0
SETTLED_SECONDS = 5.0  # after a connection that lived this long, the back-off starts again

# What aiormq, pamqp and the socket raise when a connection fails; AMQPError alone does not cover them.
CONNECTION_ERRORS = (
    aiormq.AMQPError,
    PAMQPException,
    OSError,
    asyncio.TimeoutError,
    RuntimeError,
    asyncio.IncompleteReadError,
)
# A restart does not fix these. At the first connection they end the process with one line. Later they are retried, as
# an operator may be changing a password or a right.
_HOPELESS = (
    aiormq.exceptions.ProbableAuthenticationError,
    aiormq.exceptions.AuthenticationError,
    aiormq.exceptions.ConnectionNotAllowed,
    aiormq.exceptions.ChannelAccessRefused,
)


class LinkListener(LaneListener, Protocol):
    """The user of a connection that is kept up."""

    async def up(self, link: Link) -> None:
        """Set up a new connection: declare, consume. An exception makes it a failed attempt."""

    def down(self, reason: str) -> None:
        """Take note that there is no connection, and why. Called after a loss and after each failed attempt."""


@dataclass(frozen=True, slots=True)
class Link:
    """One live connection with its hot channel and its fast lane."""

    connection: AbstractConnection
    channel: AbstractChannel
    lane: FastLane

    @property
    def frame_max(self) -> int:
        """The largest frame, in bytes; 0 is no limit."""
        return int(self.connection.connection_tune.frame_max or 0)

    async def close(self) -> None:
        """Close in order if the broker answers in time; else abort."""
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
    """End aiormq's tasks of a connection whose transport is aborted, in the background."""
    try:
        await asyncio.wait_for(connection.close(), CLOSE_TIMEOUT_SECONDS)
    except (Exception, asyncio.CancelledError) as error:
        log.debug("while closing: %r", error)


async def closed() -> None:
    """Wait until aiormq's tasks of all closed links have ended, so that asyncio does not report them at the end."""
    if _reapings:
        await asyncio.wait(_reapings)


def cancelled() -> bool:
    """Tell whether the running task was cancelled. aiormq may report a loss as CancelledError too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# Opening


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One address to try: the URL with the host's name, which TLS verifies, and a socket address of that host."""

    address: Address
    family: int
    socket_address: tuple[Any, ...]


_lookups: dict[tuple[str, int], asyncio.Future[list[Any]]] = {}  # of names, in flight


async def _candidates(address: Address) -> list[_Candidate]:
    """Return every address of its only host. Raise OSError when there is none.

    Look-ups of one name at the same time are one: uvloop has two threads for look-ups, and one name without an answer
    must not occupy both.
    """
    ((host, port),) = address.hosts

    def ended(lookup: asyncio.Future[Any]) -> None:
        del _lookups[host, port]
        _error_of(lookup)  # marks it as retrieved: all waiters may be gone, and asyncio would report it

    lookup = _lookups.get((host, port))
    if lookup is None:
        found = asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        lookup = _lookups[host, port] = asyncio.ensure_future(found)
        lookup.add_done_callback(ended)
    async with asyncio.timeout(RESOLVE_TIMEOUT_SECONDS):
        addresses = await asyncio.shield(lookup)
    return [_Candidate(address, family, socket_address) for family, _, _, _, socket_address in addresses]


async def open_link(url: str, name: str, listener: LaneListener, high_water_bytes: int = 2**20) -> Link:
    """Connect to the first host of `url` that answers, and open the hot channel with confirms.

    Raise one of CONNECTION_ERRORS, or StartupError, in bounded time. Addresses are tried in random order, so that many
    processes spread over a cluster. When one does not answer within STAGGER_SECONDS, or a name is not resolved in that
    time, the next one is tried as well, and the first to be ready wins.
    """
    address = parse_address(url)
    resolving = {asyncio.ensure_future(_candidates(address.only(*host))) for host in address.hosts}
    untried: list[_Candidate] = []
    trying: set[asyncio.Task[Link]] = set()
    errors: list[BaseException] = []
    try:
        await asyncio.wait(resolving, timeout=STAGGER_SECONDS)
        while True:
            for candidates in _take_done(resolving, errors):
                untried += candidates
            random.shuffle(untried)
            if untried:
                trying.add(asyncio.ensure_future(_open_one(untried.pop(), name, listener, high_water_bytes)))
            if not trying and not resolving:
                break
            await asyncio.wait(
                trying | resolving,
                timeout=STAGGER_SECONDS if untried else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            opened = _take_done(trying, errors)
            for spare in opened[1:]:
                spare.lane.fail("another one was ready first")
            if opened:
                return opened[0]
    finally:
        for task in trying:
            task.add_done_callback(_abort)
        for waiting in (*trying, *resolving):
            waiting.cancel()
        if trying or resolving:
            await asyncio.wait(trying | resolving)
    raise next((error for error in errors if isinstance(error, (*_HOPELESS, StartupError))), errors[-1])


def _take_done(tasks: set[asyncio.Task[T]], errors: list[BaseException]) -> list[T]:
    """Take out of `tasks` what has ended: return the results, and add what was raised to `errors`."""
    ended = [task for task in tasks if task.done()]
    tasks.difference_update(ended)
    errors += [error for task in ended if (error := _error_of(task)) is not None]
    return [task.result() for task in ended if _error_of(task) is None]


def _abort(task: asyncio.Task[Link]) -> None:
    """Abort a connection that was ready at the moment its task was cancelled."""
    if _error_of(task) is None:
        task.result().lane.fail("another one was ready first")


def _error_of(task: asyncio.Future[Any]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def _open_one(candidate: _Candidate, name: str, listener: LaneListener, high_water_bytes: int) -> Link:
    factory = FastLaneFactory(listener, candidate.family, candidate.socket_address)
    url = candidate.address.url
    join = "&" if "?" in url else "?"
    if "heartbeat=" not in url:
        url += f"{join}heartbeat={HEARTBEAT_SECONDS}"
        join = "&"
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_SECONDS):
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
    connection.closing.add_done_callback(lambda _: link.lane.fail("connection closed"))
    channel.closing.add_done_callback(lambda _: link.lane.fail("channel closed"))
    return link


def explain(error: BaseException, url: str) -> str:
    """Return one line for a person that says what is wrong, and what to correct if anything."""
    if isinstance(error, StartupError):
        return str(error)
    shown = masked_url(url)
    if isinstance(error, aiormq.exceptions.ProbableAuthenticationError | aiormq.exceptions.AuthenticationError):
        return f"the broker at {shown} refused user or password (ACCESS_REFUSED); correct AMQP_URL"
    if isinstance(error, aiormq.exceptions.ConnectionNotAllowed | aiormq.exceptions.ChannelAccessRefused):
        return f"the broker at {shown} denies access: {error}"
    if isinstance(error, asyncio.TimeoutError):
        return f"the broker at {shown} does not answer"
    if isinstance(error, OSError) and error.strerror:
        return f"no broker at {shown} ({error.strerror})"
    said = ": ".join(str(part) for part in error.args if part) or repr(error)
    return f"no broker at {shown} ({said})"


# Keeping up


async def keep_up(url: str, name: str, listener: LinkListener, high_water_bytes: int = 2**20) -> None:
    """Keep a connection up until cancelled: connect, let the listener set the link up, wait for its loss, repeat.

    Raise StartupError if the first attempt fails for a reason that waiting does not fix.
    """
    attempt, said, first = 0, "", True
    loop = asyncio.get_running_loop()
    while True:
        link: Link | None = None
        began = loop.time()
        trouble = ""
        try:
            link = await open_link(url, name, listener, high_water_bytes)
            await _up(listener, link)
            log.info("%s: connected%s to %s", name, "" if first else " again", masked_url(url))
            first, said, began = False, "", loop.time()
            trouble = (
                f"connection lost: {await asyncio.shield(link.lane.gone)}; nothing in flight is lost; reconnecting"
            )
        except (*_HOPELESS, StartupError) as error:
            trouble = explain(error, url)
            if first:
                listener.down(trouble)
                raise StartupError(trouble) from None
        except CONNECTION_ERRORS as error:
            trouble = f"{explain(error, url)}; waiting for it"
        except asyncio.CancelledError:
            if cancelled():
                raise
            trouble = "the connection was cut; reconnecting"
        except Exception as error:  # aiormq reports a cut during a call as a bare Exception
            if type(error) is not Exception:
                log.exception("%s: unexpected", name)
            trouble = "the connection was cut; reconnecting"
        finally:
            if link is not None:
                await link.close()
        if cancelled():  # aiormq may turn our cancellation into the error of a loss at the same moment
            raise asyncio.CancelledError
        listener.down(trouble)
        if trouble != said:
            log.warning("%s: %s", name, trouble)
        said = trouble
        attempt = 0 if link is not None and loop.time() - began >= SETTLED_SECONDS else attempt + 1
        # Jitter, so that processes cut off together do not come back together.
        await asyncio.sleep(
            random.uniform(0.5, 1) * min(BACKOFF_MOST_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(attempt, 10))
        )


async def _up(listener: LinkListener, link: Link) -> None:
    """Let the listener set the link up. A loss meanwhile ends that, even if aiormq does not report it."""
    setting_up = asyncio.create_task(listener.up(link))
    try:
        waited: list[asyncio.Future[Any]] = [setting_up, link.lane.gone]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not setting_up.done():  # the call that met the loss may give a better reason
            await asyncio.wait({setting_up}, timeout=LAST_WORDS_SECONDS)
    finally:
        if not setting_up.done():
            setting_up.cancel()
            await asyncio.wait({setting_up})
        if not setting_up.cancelled():
            setting_up.exception()  # else asyncio logs it, when this was cancelled
    if link.lane.lost is not None and not _is_hopeless(setting_up):
        raise ConnectionError(link.lane.lost)
    if setting_up.cancelled():
        raise ConnectionError("the connection was cut")
    setting_up.result()


def _is_hopeless(task: asyncio.Task[None]) -> bool:
    """Tell whether the task failed for a reason that explains the loss better than the loss itself."""
    return not task.cancelled() and isinstance(task.exception(), (*_HOPELESS, StartupError))
