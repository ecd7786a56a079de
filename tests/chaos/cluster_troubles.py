"""Every kind of trouble of a chaos round on a cluster: nodes that die, freeze, are cut off and upgraded.

Two producers that know every node, partitions whose queues have a member on each, and two consumers that share them.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.chaos.stage import ROOT, Service, Stage, make_consumer, make_producer
from tests.chaos.troubles import Play, Trouble
from tests.cluster import NET_TICKTIME_SECONDS, Cluster
from tests.rabbitmq import RabbitMQ

PARTITIONS = 4
# In this time the others notice a silent node, and a minority notices that it is one. An idle machine needs a fifth.
NOTICED_SECONDS = 10.0 * NET_TICKTIME_SECONDS
FAILOVER_SECONDS = 60.0


class ClusterStage(Stage):
    """Each consumer has its own half of the partitions, so the end of one does not affect the other's."""

    def __init__(self, directory: Path, nodes: int, **settings: str) -> None:
        self.cluster = Cluster(directory / "rabbitmq", nodes)
        data = directory / "data"
        queues = {f"predictions.{index}": data / f"data.{index}.csv" for index in range(PARTITIONS)}
        url = self.cluster.url + "?heartbeat=2"
        common = {"AMQP_URL": url, "PARTITIONS": str(PARTITIONS), "CSV_FILE": str(data / "data.csv"), **settings}
        producers = [make_producer(f"producer-{letter}", directory, common) for letter in "ab"]
        shares = {"a": f"0-{PARTITIONS // 2 - 1}", "b": f"{PARTITIONS // 2}-{PARTITIONS - 1}"}
        command = [str(ROOT / "consumer.py")]
        consumers = [
            make_consumer(f"consumer-{letter}", directory, {**common, "PARTITION": share}, command)
            for letter, share in shares.items()
        ]
        super().__init__(directory, self.cluster.nodes[0].url, queues, producers, consumers)


class ClusterTrouble(Trouble):
    """What happens to nodes, to the processes, and to several of them at once."""

    stage: ClusterStage

    def node(self) -> RabbitMQ:
        return self.choose.choice(self.stage.cluster.nodes)

    def kill(self, *who: RabbitMQ | Service) -> None:
        """kill -9, at a random moment of the next half second."""
        self.stage.sleep(self.choose.uniform(0, 0.5))
        for each in who:
            self.done[f"kill -9 {each.name.partition('-')[0] if isinstance(each, Service) else 'node'}"] += 1
            each.kill()

    def wait_until_away(self, node: RabbitMQ) -> None:
        """Wait until the others work without it."""
        watcher = self.choose.choice(self.stage.cluster.others(node))
        self.stage.wait_until(
            f"{watcher.name} takes {node.name} for dead",
            lambda: node.name not in self.stage.cluster.running(watcher),
            NOTICED_SECONDS,
        )

    def wait_until_paused(self, node: RabbitMQ) -> None:
        """Wait until it serves nobody, as one of a minority. RabbitMQ 4.3 pauses none: wait until it knows that."""
        cluster = self.stage.cluster
        self.stage.wait_until(
            f"{node.name} pauses",
            lambda: not node.is_up() or cluster.running(node) == {node.name},
            NOTICED_SECONDS,
        )

    def fail_over(self, what: str) -> None:
        """Wait until all are ready again while a node is away; note how long that takes."""
        began = time.monotonic()
        for service in (*self.stage.producers, *self.stage.consumers):
            self.stage.wait_until(f"{service.name} is ready with {what}", service.is_ready_or_raise, FAILOVER_SECONDS)
        self.note(f"ready with {what}", time.monotonic() - began)

    def wait_for_rows(self, what: str) -> None:
        """Wait until every partition gets rows while a node is away; note how long that takes.

        Without consumer_disconnected_timeout, RabbitMQ 4.3 delivers nothing to some of them for a minute.
        """
        began = time.monotonic()
        paths = [csv.with_name(f"{csv.name}.committed") for csv in self.stage.queues.values()]
        marks = {path: path.stat().st_mtime_ns for path in paths}
        for mark, before in marks.items():
            self.stage.wait_until(f"{mark.name} moves with {what}", partial(_moved, mark, before), FAILOVER_SECONDS / 2)
        self.note(f"rows in every partition with {what}", time.monotonic() - began)


def _moved(path: Path, before: int) -> bool:
    return path.stat().st_mtime_ns != before


def kill_node(trouble: ClusterTrouble) -> None:
    trouble.kill(trouble.node())
    trouble.wait_for_rows("a node killed")
    trouble.fail_over("a node killed")


def kill_node_for_a_moment(trouble: ClusterTrouble) -> None:
    """The node returns before all others have noticed."""
    trouble.kill(trouble.node())
    trouble.stage.sleep(trouble.choose.uniform(0, 1))


def kill_node_and_process(trouble: ClusterTrouble) -> None:
    processes = (*trouble.stage.producers, *trouble.stage.consumers)
    trouble.kill(trouble.node(), trouble.choose.choice(processes))


def kill_majority(trouble: ClusterTrouble) -> None:
    """There is no quorum, so nobody accepts anything until it is back."""
    survivor = trouble.node()
    trouble.kill(*trouble.stage.cluster.others(survivor))
    trouble.wait_until_paused(survivor)
    for producer in trouble.stage.producers:
        trouble.stage.wait_until(f"{producer.name} says 503", partial(_is_unready, producer), FAILOVER_SECONDS)
    trouble.stage.sleep(trouble.choose.uniform(0.5, 3))


def _is_unready(service: Service) -> bool:
    return not service.is_ready()


def kill_all_nodes(trouble: ClusterTrouble) -> None:
    trouble.kill(*trouble.stage.cluster.nodes)
    trouble.stage.sleep(trouble.choose.uniform(0, 1))


def kill_everything(trouble: ClusterTrouble) -> None:
    everything: list[RabbitMQ | Service] = [
        *trouble.stage.cluster.nodes,
        *trouble.stage.producers,
        *trouble.stage.consumers,
    ]
    trouble.kill(*trouble.choose.sample(everything, len(everything)))


def freeze_node(trouble: ClusterTrouble) -> None:
    """It is frozen for longer than the tick time: the others take it for dead. It returns as if nothing had been."""
    node = trouble.node()
    trouble.done["node frozen"] += 1
    node.pause()
    try:
        trouble.fail_over("a node frozen")
        trouble.wait_until_away(node)
        trouble.stage.sleep(trouble.choose.uniform(0, 3))
    finally:
        node.resume()


def freeze_node_for_a_moment(trouble: ClusterTrouble) -> None:
    node = trouble.node()
    trouble.done["node frozen for less than the tick time"] += 1
    node.pause()
    trouble.stage.sleep(trouble.choose.uniform(0.5, 2))
    node.resume()


def cut_off_node(trouble: ClusterTrouble) -> None:
    """A network partition between the nodes: the minority pauses, whatever its clients see."""
    node = trouble.node()
    trouble.done["node cut off from the others"] += 1
    trouble.stage.cluster.cut_off(node)
    trouble.wait_until_paused(node)
    trouble.fail_over("a node cut off")
    trouble.stage.sleep(trouble.choose.uniform(0, 3))
    trouble.stage.cluster.rejoin(node)


def upgrade_nodes(trouble: ClusterTrouble) -> None:
    """As in a rolling upgrade, each node in turn stops cleanly, once all queues have all of their members."""
    trouble.done["rolling restart of the nodes"] += 1
    cluster = trouble.stage.cluster
    for node in trouble.choose.sample(cluster.nodes, len(cluster.nodes)):
        if trouble.choose.random() < 0.5:
            node.drain()
        node.stop()
        node.start()
        cluster.wait_until_replicated(node, trouble.stage.queues)


def upgrade_processes(trouble: ClusterTrouble) -> None:
    for service in (*trouble.stage.producers, *trouble.stage.consumers):
        if service.alive:
            trouble.stop(service)
            service.start()
            trouble.stage.wait_until_ready(service)


def kill_processes(trouble: ClusterTrouble) -> None:
    processes = (*trouble.stage.producers, *trouble.stage.consumers)
    trouble.kill(*trouble.choose.sample(processes, trouble.choose.randrange(1, len(processes) + 1)))


def close_connections(trouble: ClusterTrouble) -> None:
    trouble.done["connections closed by a node"] += 1
    trouble.stage.cluster.close_connections(trouble.node())


Kind = Callable[[ClusterTrouble], None]
KINDS: tuple[Kind, ...] = (
    kill_node, kill_node_for_a_moment, kill_node_and_process, kill_majority, kill_all_nodes, kill_everything,
    freeze_node, freeze_node_for_a_moment, cut_off_node, upgrade_nodes, upgrade_processes, kill_processes,
    close_connections,
)  # fmt: skip


def undo(trouble: ClusterTrouble) -> None:
    """Start whatever is down, and unite nodes that split, as an operator has to."""
    stage = trouble.stage
    stage.cluster.start()
    if restarted := stage.cluster.unite():
        trouble.done["node restarted because its Mnesia had split off"] += restarted
    for service in (*stage.producers, *stage.consumers):
        if not service.alive:
            service.start()


def on_stage(directory: Path, seed: int, nodes: int, **settings: str) -> Play:
    """Settings are environment variables of all processes."""
    stage = ClusterStage(directory, nodes, **settings)
    trouble = ClusterTrouble(stage, seed)

    def begin() -> None:
        undo(trouble)
        stage.wait_until_ready()
        nodes = stage.cluster.nodes
        stage.cluster.wait_until_replicated(nodes[0], stage.queues)
        if min(len(nodes), len(stage.queues)) > 1:
            stage.cluster.spread_leaders()
        stage.cluster.sync_new_queues()

    kinds = {kind.__name__: partial(kind, trouble) for kind in KINDS}
    return Play(trouble, kinds, begin, partial(undo, trouble), stage.cluster.kill)
