"""A RabbitMQ node for tests, which they may kill, freeze and restart."""

import signal

from scripts import rabbitmq


class RabbitMQ(rabbitmq.RabbitMQ):
    """start(), stop(), url and ctl() as in `make run`; and what only a test does to a broker."""

    def sync_new_queues(self) -> None:
        """Call it between the first declare of a quorum queue and `kill`.

        Ra writes its directory of queues, a DETS table, up to 3 s late. Measured with 3.10.8: a queue killed before
        that has no leader ever again, and its confirmed messages are gone.
        """
        self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def kill(self) -> None:
        """kill -9 of the Erlang VM."""
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        self.process = None

    def pause(self) -> None:
        """Freezes the VM: connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes `pause`."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.resume()  # a frozen VM would not hear it
        super().stop()

    def drain(self) -> None:
        """What comes before a stop in a rolling upgrade: clients are sent away, leaders move to other nodes."""
        self._tool("rabbitmq-upgrade", "drain", timeout_seconds=60)

    def restart(self) -> None:
        """An orderly stop and a start, on the same ports and data."""
        self.stop()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, "the node does not run"
        self.process.send_signal(number)
