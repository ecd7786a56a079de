"""Waits for a condition with a deadline, in place of sleeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

TIMEOUT_SECONDS = 45.0
_POLL_SECONDS = 0.02
_MOST_POLL_SECONDS = 0.25


def pause_seconds(began: float, least: float = _POLL_SECONDS) -> float:
    """Return when to look again: later, the longer it has taken. To look is work for who asks and who is asked."""
    return max(least, min((time.monotonic() - began) / 20, _MOST_POLL_SECONDS))


def wait_until(
    what: str,
    condition: Callable[[], object],
    timeout_seconds: float = TIMEOUT_SECONDS,
    explain: Callable[[], str] = lambda: "",
    poll_seconds: float = _POLL_SECONDS,
) -> None:
    """Poll `condition` until it is true.

    Raise AssertionError after the deadline, with `what` was waited for and what `explain` says.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_seconds, f"not within {timeout_seconds:.0f} s: {what}\n{explain()}"
        time.sleep(pause_seconds(began, poll_seconds))


async def until(
    what: str, condition: Callable[[], object | Awaitable[object]], timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Poll like `wait_until`, and let the event loop run. The condition may be a coroutine function."""
    began = time.monotonic()
    while True:
        result = condition()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert time.monotonic() < began + timeout_seconds, f"not within {timeout_seconds:.0f} s: {what}"
        await asyncio.sleep(pause_seconds(began, _POLL_SECONDS / 4))
