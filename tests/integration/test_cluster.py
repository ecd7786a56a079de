"""The cluster for tests does what it says: only then can a run of trouble on it be believed."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import aiormq

from common.amqp.topology import QUEUE_ARGUMENTS
from scripts.rabbitmq import speaks_amqp
from tests.cluster import Cluster

QUEUES = ("test.0", "test.1", "test.2")


async def declare(url: str, queue_names: Iterable[str]) -> None:
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    for name in queue_names:
        await channel.queue_declare(name, durable=True, arguments=dict(QUEUE_ARGUMENTS))
    await connection.close()


def test_a_cluster_spreads_queues_and_outlives_its_nodes(tmp_path: Path) -> None:
    """Leaders and members of queues on every node; a minority that pauses; a killed node that returns."""
    with Cluster(tmp_path) as cluster:
        first, second, third = cluster.nodes
        asyncio.run(declare(first.url, QUEUES))
        cluster.wait_until_replicated(first, QUEUES)
        cluster.sync_new_queues()
        assert {queue.leader for queue in cluster.queues(first).values()} == {node.name for node in cluster.nodes}

        cluster.cut_off(third)
        while speaks_amqp(third.port):  # ends, or the test's time does
            pass
        assert cluster.running(first) == {first.name, second.name}
        cluster.rejoin(third)
        cluster.wait_until_up(third)

        third.kill()
        asyncio.run(declare(second.url, QUEUES))  # as a quorum is there
        third.start()
        cluster.wait_until_replicated(third, QUEUES)
