"""A RabbitMQ node for tests, which they can kill, freeze and restart."""

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import trustme

from scripts import rabbitmq
from tests.support.polling import wait_until


class RabbitMQ(rabbitmq.RabbitMQ):
    """A node as in `make run`, with what only a test does to a broker."""

    tls_port = 0
    ca_file = Path()

    def offer_tls(self) -> None:
        """Let the next start listen at `tls_port` too, with a certificate by the CA in `ca_file`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.tls_port, self.ca_file = rabbitmq.free_port(), self.directory / "ca.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        server = authority.issue_cert("127.0.0.1")
        server.private_key_pem.write_to_path(self.directory / "key.pem")
        (self.directory / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in server.cert_chain_pems))
        (self.directory / "rabbitmq.conf").write_text(
            f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
            f"ssl_options.cacertfile = {self.ca_file}\n"
            f"ssl_options.certfile = {self.directory}/cert.pem\n"
            f"ssl_options.keyfile = {self.directory}/key.pem\n"
        )

    def is_up(self) -> bool:
        """Return whether it greets a client at every port; raise BrokerError when it has ended."""
        return super().is_up() and (not self.tls_port or listens(self.tls_port))

    def eval(self, expression: str) -> str:
        """Return the value of an Erlang expression, as `rabbitmqctl eval` does, at a fiftieth of its CPU.

        Raise BrokerError if it has none.
        """
        done = subprocess.run(
            [rabbitmq.erlang_tool("erl_call"), "-sname", self.name, "-r", "-e"],
            env=self._environment(),
            input=f"{expression}.\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if not done.stdout.startswith("{ok, "):
            raise rabbitmq.BrokerError(f"{self.name}: {expression}: {done.stdout}{done.stderr}")
        return done.stdout.removeprefix("{ok, ").removesuffix("}")

    def define(self, **definitions: list[dict[str, object]]) -> None:
        """Import definitions: vhosts, users, permissions, policies, parameters. They replace those of the same name."""
        text = json.dumps(json.dumps(definitions))  # twice, since the escapes of JSON are Erlang's, too
        assert self.eval(f"rabbit_definitions:import_raw(<<{text}>>)") == "ok"

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """Set a limit that any memory in use exceeds."""
        self.eval("vm_memory_monitor:set_vm_memory_high_watermark(1.0e-6)")
        try:
            yield
        finally:
            self.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")

    def close_connections(self) -> None:
        """Close the connections of all clients cleanly."""
        self.eval('rabbit_networking:close_all_connections("test")')

    def sync_new_queues(self) -> None:
        """Call it between the first declare of a quorum queue and `kill`.

        Ra writes its directory of queues, a DETS table, up to 3 s late. Measured with 3.10.8: if the node is killed
        before that, the queue never has a leader again, and its confirmed messages are gone.
        """
        self.eval("[dets:sync(Table) || Table <- dets:all()]")

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Return once the node greets a client. No-op if it runs."""
        if not self.is_running:
            super().start(timeout_seconds)

    def kill(self) -> None:
        """kill -9 of the Erlang VM."""
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        self.process = None

    def pause(self) -> None:
        """Freeze the VM: connections stay open, and get no answers."""
        self._signal(signal.SIGSTOP)
        assert self.process is not None
        threads = Path(f"/proc/{self.process.pid}/task")

        def all_have_stopped() -> bool:
            return all(each.read_text().rpartition(")")[2].split()[0] == "T" for each in threads.glob("*/stat"))

        # A signal stops no thread at once: a busy one can still answer.
        wait_until("every thread has stopped", all_have_stopped)

    def resume(self) -> None:
        """Undo `pause`. No-op if the node does not run."""
        if self.is_running:
            self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()  # a frozen VM would not handle the signal
        super().stop()

    def drain(self) -> None:
        """Do what comes before a stop in a rolling upgrade: send clients away, move leaders to other nodes."""
        self._tool("rabbitmq-upgrade", "drain", timeout_seconds=60)

    def restart(self) -> None:
        """Stop cleanly and start, on the same ports and data."""
        self.stop()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, "the node does not run"
        self.process.send_signal(number)


def listens(port: int) -> bool:
    """Return whether a connection is accepted there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False
