"""A RabbitMQ cluster for tests: real nodes on one machine, which a test can kill, freeze, restart and cut off.

Ports, cookie, epmd and directories are its own; it needs neither root nor containers. RabbitMQ 3.10 to 4.x.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from scripts.rabbitmq import BrokerError, Epmd
from tests.rabbitmq import RabbitMQ
from tests.support.polling import wait_until

NET_TICKTIME_SECONDS = 4
"""The others take a silent node for dead after this, give or take a quarter; RabbitMQ's default is 60."""

T = TypeVar("T")

# One scheduler per node: a start takes a fifth less CPU. RabbitMQ 4.3 waits that long for a consumer whose node is
# gone, before a queue has another active one; 60 s by default.
_ERLANG = "+S 1:1 -rabbit consumer_disconnected_timeout 1000"
_COOKIE, _WRONG_COOKIE = "predlog-tests", "cut-off"
_CONFIGURATION = f"""\
net_ticktime = {NET_TICKTIME_SECONDS}
queue_leader_locator = balanced
cluster_partition_handling = """
_VIEW = re.compile(r"\{'([\w-]+@\w+)',\s*(\[[^\]]*\]),\s*(\[[^\]]*\])\}")
_QUEUES = (
    "[{binary_to_list(element(4, amqqueue:get_name(Queue))), rabbit_amqqueue:info(Queue, [leader, online])}"
    " || Queue <- rabbit_amqqueue:list()]"
)
_QUEUE = re.compile(r'\{"([^"]+)",\s*\[\{leader,\s*([^}]*)\},\s*\{online,\s*\[([^\]]*)')


def _running_on(node: str) -> str:
    """Return an Erlang expression: the nodes that `node` sees running. The name of the call changed in 3.12."""
    call = f"rpc:call({node}, rabbit_nodes, {{}}, [])"
    return f"(case {call.format('list_running')} of L when is_list(L) -> L; _ -> {call.format('all_running')} end)"


class Queue(NamedTuple):
    """A quorum queue, as one node sees it: names of nodes."""

    leader: str
    online: set[str]


class Cluster:
    """Nodes that find one another by their configuration. Start it whole; after that, any node can come and go."""

    def __init__(self, directory: Path, size: int = 3, partition_handling: str = "pause_minority") -> None:
        """`partition_handling` is RabbitMQ's cluster_partition_handling."""
        self._epmd = Epmd(directory)
        self._is_founded = False
        self.nodes = [
            RabbitMQ(directory / f"node-{index}", name=f"predlog-{index}", epmd=self._epmd, erlang=_ERLANG)
            for index in range(size)
        ]
        self.url = f"amqp://guest:guest@{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}/"
        for node in self.nodes:
            node.directory.mkdir(parents=True, exist_ok=True)
            cookie = node.directory / ".erlang.cookie"
            cookie.write_text(_COOKIE)
            cookie.chmod(0o400)
        founder = self.nodes[0]
        for node in self.nodes:
            lines = [_CONFIGURATION + partition_handling]
            if node is not founder:
                lines += [
                    f"cluster_formation.classic_config.nodes.{index} = {peer.name}"
                    for index, peer in enumerate((founder, node))
                ]
            (node.directory / "rabbitmq.conf").write_text("\n".join(lines) + "\n")

    def start(self, timeout_seconds: float = 90.0) -> None:
        """Start every node that does not run; return when all of them greet a client. See also `unite`."""
        try:
            if not self._is_founded:  # in 3.10 nodes that found one together wait up to 18 s for one another's locks
                self.nodes[0].start(timeout_seconds)
                self._is_founded = True
            for node in self.nodes:
                if not node.is_running:
                    node.launch()
            self.wait_until_up(*self.nodes, timeout_seconds=timeout_seconds)
        except BaseException:
            self.kill()
            raise

    def unite(self, timeout_seconds: float = 60.0) -> int:
        """Wait until each node sees all; restart those whose Mnesia has split off. Return how many.

        A node that was frozen for longer than the tick time splits off (3.10.8): its connections are back so quickly
        that pause_minority never finds it alone.
        """
        restarted = 0

        def is_whole() -> bool:
            nonlocal restarted
            whole = True
            for node, (running, partitions) in self._views().items():
                if len(partitions) > len(self.nodes) // 2:
                    node.restart()
                    restarted += 1
                    return False
                whole = whole and running == self._names and not partitions
            return whole

        wait_until("all nodes are one cluster", is_whole, timeout_seconds)
        return restarted

    def kill(self) -> None:
        """End everything: kill -9 of every node, and of the epmd."""
        for node in self.nodes:
            if node.is_running:
                node.kill()
        self._epmd.stop()

    def __enter__(self) -> Self:
        self.start()
        self.unite()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def wait_until_up(self, *nodes: RabbitMQ, timeout_seconds: float = 60.0) -> None:
        """Wait until each of them greets a client."""
        for node in nodes:
            wait_until(f"{node.name} greets a client", node.is_up, timeout_seconds)

    def others(self, node: RabbitMQ) -> list[RabbitMQ]:
        """Return all other nodes."""
        return [other for other in self.nodes if other is not node]

    def running(self, node: RabbitMQ) -> set[str]:
        """Return the names of the nodes that this one sees running, itself included."""
        return _names(_patiently(node.eval, _running_on("node()")))

    def cut_off(self, node: RabbitMQ) -> None:
        """Make a network partition: this node on one side, the others on the other. Clients still reach both.

        The distribution refuses a new connection whose cookie does not match, whichever side opens it.
        """
        self._each_other(node, f"erlang:set_cookie(Node, '{_WRONG_COOKIE}'), erlang:disconnect_node(Node)")

    def rejoin(self, node: RabbitMQ) -> None:
        """Undo `cut_off`."""
        self._each_other(node, f"erlang:set_cookie(Node, '{_COOKIE}'), net_adm:ping(Node)")

    def close_connections(self, node: RabbitMQ) -> None:
        """Close the connections of this node's clients."""
        _patiently(node.close_connections)

    def queues(self, node: RabbitMQ) -> dict[str, Queue]:
        """Return the quorum queues by name."""
        text = _patiently(node.eval, _QUEUES)
        return {name: Queue(leader.strip("'"), _names(online)) for name, leader, online in _QUEUE.findall(text)}

    def wait_until_replicated(self, node: RabbitMQ, queue_names: Iterable[str], timeout_seconds: float = 30.0) -> None:
        """Wait until each of these quorum queues has a leader, and a member online on every node."""
        wanted = sorted(queue_names)

        def is_replicated() -> bool:
            queues = self.queues(node)
            return all(
                (queue := queues.get(name)) is not None and queue.leader in self._names and queue.online == self._names
                for name in wanted
            )

        wait_until(f"{', '.join(wanted)} on every node", is_replicated, timeout_seconds)

    def spread_leaders(self) -> None:
        """Do `rabbitmq-queues rebalance quorum` until more than one node leads queues.

        Queues that are declared at the same moment can all get their leader on one node.
        """

        def is_spread() -> bool:
            _patiently(self.nodes[0].eval, 'rabbit_amqqueue:rebalance(quorum, ".*", ".*")')
            return len({queue.leader for queue in self.queues(self.nodes[0]).values()}) > 1

        wait_until("leaders on more than one node", is_spread, poll_seconds=1.0)

    def sync_new_queues(self) -> None:
        """Do RabbitMQ.sync_new_queues for every node: each member has such a table."""
        tables = "Table <- rpc:call(Node, dets, all, [])"
        expression = f"[rpc:call(Node, dets, sync, [Table]) || Node <- {self._erlang_names}, {tables}]"
        _patiently(self.nodes[0].eval, expression)

    def _views(self) -> dict[RabbitMQ, tuple[set[str], set[str]]]:
        """For each node: the nodes that it sees running, and those from which its Mnesia is split.

        RabbitMQ 4.3 has no Mnesia, and nothing that could be split.
        """
        split = "case rpc:call(Node, rabbit_node_monitor, partitions, []) of P when is_list(P) -> P; _ -> [] end"
        views = f"{{Node, {_running_on('Node')}, {split}}}"
        text = _patiently(self.nodes[0].eval, f"[{views} || Node <- {self._erlang_names}]")
        seen = {name: (_names(running), _names(split)) for name, running, split in _VIEW.findall(text)}
        return {node: seen.get(node.name, (set(), set())) for node in self.nodes}

    @property
    def _names(self) -> set[str]:
        return {node.name for node in self.nodes}

    @property
    def _erlang_names(self) -> str:
        return "[" + ", ".join(f"'{name}'" for name in sorted(self._names)) + "]"

    def _each_other(self, node: RabbitMQ, expressions: str) -> None:
        others = ", ".join(f"'{other.name}'" for other in self.others(node))
        _patiently(node.eval, f"[begin {expressions} end || Node <- [{others}]]")


def _patiently(command: Callable[..., T], *arguments: str) -> T:
    """Run `command`, with retries: it can fail under load and just after a restart."""
    for _ in range(3):
        try:
            return command(*arguments)
        except (subprocess.SubprocessError, BrokerError) as failure:
            error = failure
            time.sleep(1.0)
    said = str(getattr(error, "stderr", "") or error).strip()
    raise BrokerError(f"{command.__name__} failed three times: {said}")


def _names(text: str) -> set[str]:
    return set(re.findall(r"[\w-]+@\w+", text))
