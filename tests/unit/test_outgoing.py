"""Poison whose link is lost while it is put into the file: its delivery tags mean other messages by then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from common.amqp.codec import Delivery
from common.consumer.dead_letters.mover import DeadLetters
from common.consumer.dead_letters.outgoing import Outgoing
from common.consumer.dead_letters.spill import Spill
from common.consumer.metrics import Counters
from common.consumer.prepare import Poison


async def never(*arguments: object) -> None:
    await asyncio.Event().wait()


async def nothing() -> None: ...


def poison(tag: int, body: bytes) -> Poison:
    return Poison(Delivery(tag, False, b"", body), "not_json", "why")


async def test_a_tag_of_a_lost_link_is_not_acked_on_the_next(tmp_path: Path) -> None:
    acked: list[int] = []

    async def in_thread(call: Callable[..., Any], *arguments: object) -> Any:
        result = call(*arguments)
        if call == spill.append and not acked:
            outgoing.forget()  # the link is lost meanwhile, and the next delivers another message under the same tag
            outgoing.take([poison(1, b"of the next link")])
        return result

    mover = cast(DeadLetters, SimpleNamespace(move=never, close=nothing))
    spill = Spill(str(tmp_path / "spill"))
    outgoing = Outgoing(mover, spill, in_thread, acked.extend, Counters())
    outgoing.take([poison(1, b"of the lost link"), poison(2, b"also")])
    await outgoing.spill()
    assert acked == []
    assert [held.delivery.body for _, held, _ in outgoing.held.values()] == [b"of the next link"]
    await outgoing.close()
    spill.close()
