"""predlog's consumer without its fast lane: the same rows, store and journal, but `basic_consume` and `basic_ack`.

For the benchmark only: it shows what the fast lane buys. It has no reconnect, no drain and no dead letters.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import aiormq
from aiormq.abc import DeliveredMessage

from common.amqp.topology import QUEUE_ARGUMENTS, declare
from common.config import ConsumerSettings, load, parser_for
from common.event.ids import id_digest
from common.event.rows import csv_rows
from common.process import on_stop, read_file, run
from common.storage.store import Store

log = logging.getLogger("predlog.bench")


def _store(store: Store, messages: list[DeliveredMessage], low_prob_threshold: float) -> None:
    """Append the messages that are not stored yet, and sync."""
    texts: list[str] = []
    fresh: dict[bytes, None] = {}
    for message in messages:
        digest = id_digest(message.header.properties.message_id or "")
        if digest in fresh or store.seen(digest):
            continue
        fresh[digest] = None
        texts += csv_rows(message.body, low_prob_threshold)[0]
    store.append("".join(texts).encode(), list(fresh))


async def serve(settings: ConsumerSettings) -> None:
    loop, stop, wake = asyncio.get_running_loop(), on_stop(), asyncio.Event()
    store = Store.open(settings.csv_file, settings.dedup_window, settings.prefetch_count, log)
    connection = await aiormq.connect(settings.amqp_url)
    channel = await connection.channel()
    await declare(channel, settings.queue_name, QUEUE_ARGUMENTS)
    await channel.basic_qos(prefetch_count=settings.prefetch_count)
    waiting: list[DeliveredMessage] = []

    async def on_message(message: DeliveredMessage) -> None:
        waiting.append(message)
        wake.set()

    async def work() -> None:
        nonlocal waiting
        with ThreadPoolExecutor(1) as thread:
            while True:
                await wake.wait()
                wake.clear()
                batch, waiting = waiting, []
                await loop.run_in_executor(thread, _store, store, batch, settings.low_prob_threshold)
                await channel.basic_ack(batch[-1].delivery_tag or 0, multiple=True)

    await channel.basic_consume(settings.queue_name, on_message)
    working = asyncio.create_task(work())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        working.result()
    working.cancel()
    await connection.close()
    store.close()


if __name__ == "__main__":
    flags = parser_for(ConsumerSettings, "plain_consumer", "predlog's consumer on plain aiormq").parse_args([])
    settings = load(ConsumerSettings, flags, dict(os.environ), read_file)
    sys.exit(run("plain_consumer", lambda: serve(settings)))
