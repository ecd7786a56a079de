"""One connection to RabbitMQ through aiormq, opened in bounded time and kept up until cancelled.

Independent of HTTP, CSV and what is in a message. Hot frames are in lane.py, queues in topology.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp.exceptions import PAMQPException

from common.amqp.address import Address, masked_url, parse_address
from common.amqp.codec import HOT_CHANNEL
from common.amqp.lane import CONNECT_TIMEOUT_SECONDS, FastLane, FastLaneFactory, LaneListener
from common.errors import StartupError

log = logging.getLogger("predlog.amqp")

HANDSHAKE_TIMEOUT_SECONDS = 5.0  # of TCP, TLS and AMQP with one address
CALL_TIMEOUT_SECONDS = 10.0  # of one call on an open connection
CLOSE_TIMEOUT_SECONDS = 1.5
HEARTBEAT_SECONDS = 10  # aiormq takes the broker for dead after three missed ones
BACKOFF_FIRST_SECONDS, BACKOFF_MOST_SECONDS = 0.1, 3.0
SETTLED_SECONDS = 5.0  # after a connection that lived this long, the back-off starts again
REPEAT_SECONDS = 60.0  # before the same trouble is logged again
_UNKNOWN_ISSUER = (18, 19, 20, 21)  # OpenSSL's verify codes: a certificate that is self-signed, or by an unknown CA

# What aiormq, pamqp and the socket raise when a call on an open connection fails; AMQPError alone does not cover them.
CONNECTION_ERRORS = (aiormq.AMQPError, PAMQPException, OSError, RuntimeError, asyncio.IncompleteReadError)
# Refusals of the broker that waiting does not fix, and what each means. At the first connection, one ends the process
# with one line. Later the link keeps trying, since an operator may be changing a password or a permission.
_REFUSALS = {
    "Login was refused": "refused user or password; correct AMQP_URL",
    "ACCESS_REFUSED|NOT_ALLOWED": "denies access",
    "inequivalent arg": "says that the queue exists with other arguments; delete it, or set QUEUE_NAME to another name",
    "PRECONDITION_FAILED|RESOURCE_LOCKED": "refuses to declare the queue",
}
# Refusals that pass: a limit of the user, the vhost or the node, and a vhost that restarts.
_PASSES = re.compile(r"NOT_ALLOWED.*(limit \(|has reached the maximum|is down$)")


class NoLink(ConnectionError):
    """No host of the URL gave a connection. The text is one line for a person."""


class LinkListener(LaneListener, Protocol):
    """The user of a connection that is kept up."""

    async def up(self, link: Link) -> None:
        """Set up a new connection: declare, consume. An exception makes it a failed attempt."""

    def down(self, reason: str) -> None:
        """Note that there is no connection, and why. Called after a loss and after each failed attempt."""


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
        """Close in order if the broker answers in time; else abort. aiormq alone could wait forever."""
        closing = quiet_task(self.connection.close())
        try:
            if self.lane.lost is None:
                await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_SECONDS)
        finally:
            self.lane.fail("closed")
        await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_SECONDS)


def quiet_task(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run `work` as a task that asyncio does not report if nobody looks at its exception."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def cancelled() -> bool:
    """Return whether the running task was cancelled. aiormq can report a loss as CancelledError too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# Opening

_look_ups: dict[str, asyncio.Task[list[Any]]] = {}  # of host names; the last one of each


async def _candidates(address: Address) -> list[tuple[Address, str]]:
    """Return pairs of `address` and an IP address, one for each that its only host has. Raise OSError.

    There is one look-up of a name at a time: uvloop has two threads for them, and one name must not occupy both.
    """
    ((host, _),) = address.hosts
    if host not in _look_ups or _look_ups[host].done():
        _look_ups[host] = quiet_task(asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM))
    async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
        found = await asyncio.shield(_look_ups[host])
    return [(address, place[0]) for *_, place in found]


async def open_link(url: str, name: str, listener: LaneListener, high_water_bytes: int = 2**20) -> Link:
    """Connect to one host of `url`, and open the hot channel. Raise NoLink, or StartupError if waiting does not help.

    All addresses of all hosts are tried in random order, so that many processes spread over a cluster. Each takes
    HANDSHAKE_TIMEOUT_SECONDS at most, and the look-ups before CONNECT_TIMEOUT_SECONDS. The channel has no confirms yet:
    see `topology.begin_publishing`.
    """
    address = parse_address(url)
    looked_up = [_candidates(address.only(*host)) for host in address.hosts]
    found = await asyncio.gather(*looked_up, return_exceptions=True)
    errors = [each for each in found if isinstance(each, BaseException)]
    candidates = [one for each in found if not isinstance(each, BaseException) for one in each]
    random.shuffle(candidates)
    for one, ip in candidates:
        try:
            return await _open_one(one, name, FastLaneFactory(listener, ip, one.hosts[0][1]), high_water_bytes)
        except Exception as error:  # aiormq raises many kinds, StopAsyncIteration among them
            log.debug("%s: no connection to %s", name, ip, exc_info=True)
            errors.append(error)
    worst = next(filter(_is_hopeless, errors), errors[-1])
    raise (StartupError if _is_hopeless(worst) else NoLink)(explain(worst, url))


async def _open_one(address: Address, name: str, factory: FastLaneFactory, high_water_bytes: int) -> Link:
    """Open a link to the only host of `address`."""
    lane = factory.lane
    heartbeat = "" if "heartbeat=" in address.query else f"heartbeat={HEARTBEAT_SECONDS}&"
    url = f"{address.url}{'&' if address.query else '?'}{heartbeat}name=predlog-{name}"
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_SECONDS):
            connection = await aiormq.connect(url, transport_factory=factory)
            channel = await connection.channel(HOT_CHANNEL, publisher_confirms=False)
    except (Exception, asyncio.CancelledError) as error:
        telling = _telling(error, lane)
        lane.fail("not opened")
        if cancelled():  # aiormq can turn our cancellation into the error of a loss
            raise asyncio.CancelledError from None
        raise telling from None
    link = Link(connection, channel, lane)
    lane.negotiated(link.frame_max, high_water_bytes)
    connection.closing.add_done_callback(lambda _: lane.fail("connection closed"))
    channel.closing.add_done_callback(lambda _: lane.fail("channel closed"))
    return link


def _telling(error: BaseException, lane: FastLane) -> BaseException:
    """Return the error that says most about a failure. For a loss, aiormq raises any error, even CancelledError."""
    if isinstance(error, StartupError):
        return error
    if isinstance(error, aiormq.exceptions.AuthenticationError):
        return StartupError(f"the broker offers only these logins: {error.args[0]}; correct ?auth= in AMQP_URL")
    if lane.lost is not None or isinstance(error, asyncio.CancelledError):
        return ConnectionError((lane.lost or "the connection was cut").removeprefix("closed: "))
    return error


def _refusal(error: BaseException) -> str:
    """Return in words what the broker refuses; "" if it refuses nothing, or if the refusal passes."""
    said = str(error)
    if _PASSES.search(said):
        return ""
    return next((words for pattern, words in _REFUSALS.items() if re.search(pattern, said)), "")


def _is_hopeless(error: BaseException) -> bool:
    return isinstance(error, StartupError) or _refusal(error) != ""


def explain(error: BaseException, url: str) -> str:
    """Return one line for a person: what is wrong, and what to correct, if anything."""
    if isinstance(error, StartupError | NoLink):
        return str(error)
    shown = masked_url(url)
    if words := _refusal(error):
        return f"the broker at {shown} {words} ({error})"
    if isinstance(error, asyncio.TimeoutError):
        return f"the broker at {shown} does not answer"
    return f"no broker at {shown} ({_in_words(error)})"


def _in_words(error: BaseException) -> str:
    """Return what an error says. asyncio replaces the system's message with the address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "; name its CA with ?cafile=" if error.verify_code in _UNKNOWN_ISSUER else ""
        return f"its certificate is refused: {error.verify_message.rstrip('.')}{hint}"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS" if error.reason == "WRONG_VERSION_NUMBER" else f"TLS failed: {error.reason}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno > 0 else error.strerror or repr(error)
    said = ": ".join(str(part) for part in error.args if part)
    return said if said and isinstance(error, CONNECTION_ERRORS) else repr(error)


# Keeping up


async def keep_up(url: Callable[[], str], name: str, listener: LinkListener, high_water_bytes: int = 2**20) -> None:
    """Keep a connection up until cancelled: connect, let the listener set the link up, wait for its loss, repeat.

    `url` is called before each attempt. Raise StartupError if the first one fails and waiting does not help.
    """
    first, pause = True, BACKOFF_FIRST_SECONDS
    logged_at: dict[str, float] = {}  # by the text of a trouble
    loop = asyncio.get_running_loop()
    while True:
        link: Link | None = None
        began, where = loop.time(), url()  # a setting that can change while this runs
        try:
            link = await open_link(where, name, listener, high_water_bytes)
            await _set_up(listener, link)
            log.info("%s: connected%s to %s", name, "" if first else " again", masked_url(where))
            first, began = False, loop.time()
            trouble = f"connection lost: {await asyncio.shield(link.lane.gone)}; reconnecting"
        except (Exception, asyncio.CancelledError) as error:
            cause = error if link is None else _telling(error, link.lane)
            trouble = explain(cause, where)
            if first and _is_hopeless(cause):
                listener.down(trouble)
                raise StartupError(trouble) from None
            log.debug("%s: %s", name, trouble, exc_info=True)
            if not _is_hopeless(cause):
                trouble += "; waiting for it"
        finally:
            if link is not None:
                await link.close()
        if cancelled():
            raise asyncio.CancelledError
        listener.down(trouble)
        now = loop.time()
        if link is not None and now - began >= SETTLED_SECONDS:
            pause, logged_at = BACKOFF_FIRST_SECONDS, {}
        if now - logged_at.get(trouble, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            logged_at[trouble] = now
            log.warning("%s: %s", name, trouble)
        pause = min(2 * pause, BACKOFF_MOST_SECONDS)
        await asyncio.sleep(random.uniform(0.5, 1) * pause)  # processes cut off together must not return together


async def _set_up(listener: LinkListener, link: Link) -> None:
    """Let the listener set the link up. A loss meanwhile ends that, even if aiormq does not report it."""
    setting_up = asyncio.create_task(listener.up(link))
    link.lane.gone.add_done_callback(lambda _: setting_up.cancel())
    await setting_up
    if cancelled():  # aiormq can swallow a cancellation
        raise asyncio.CancelledError
