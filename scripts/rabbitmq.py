"""A private RabbitMQ node: one Erlang VM and its own epmd, on loopback ports, in a directory of its own.

Neither needs root, and neither meets another node, another epmd or the system's configuration. Both die with the thread
that started them (PR_SET_PDEATHSIG), so that a killed run leaves nothing behind.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

_LIB = Path("/usr/lib/rabbitmq/bin")  # the real scripts; those on PATH insist on root or the user rabbitmq
_ERLANG = "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none"  # busy waiting would only take CPU from the others
_STOP_TIMEOUT_SECONDS = 20.0
_LOCKED = 75  # our exit code of flock: EX_TEMPFAIL


class BrokerError(Exception):
    """The node did not start; one line for people."""


class Epmd:
    """The name server of Erlang nodes, on a loopback port of its own. Nodes of one cluster share one."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self._log = directory / "log" / "epmd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start epmd. No-op if it runs."""
        if self._process is None:
            self._process = _spawn(
                [erlang_tool("epmd"), "-port", str(self.port)], self.environment, self._log, signal.SIGKILL
            )

    def stop(self) -> None:
        """Stop epmd. No-op if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of epmd, and of the programs that ask it."""
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": path, "ERL_EPMD_PORT": str(self.port), "ERL_EPMD_ADDRESS": "127.0.0.1"}


class RabbitMQ:
    """A node whose data outlives it: `start` again on the same directory and what was durable is there."""

    def __init__(
        self, directory: Path, port: int = 0, name: str = "predlog", epmd: Epmd | None = None, erlang: str = ""
    ) -> None:
        """Choose the ports, which stay the same for the life of the object. `port` 0 takes a free one.

        `epmd` is one that others use too; `erlang` has more flags for the VM.
        """
        self.directory = directory.absolute()
        self.name = f"{name}@localhost"
        self.port, self._distribution_port = free_port(port), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self.process: subprocess.Popen[bytes] | None = None
        self._erlang = f"{_ERLANG} {erlang}"
        self._epmd = epmd or Epmd(self.directory)
        self._shares_epmd = epmd is not None

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Return once the node greets a client; raise BrokerError. Call it in the main thread (see above)."""
        deadline = time.monotonic() + timeout_seconds
        try:
            self.launch()
            while not self.is_up():
                if time.monotonic() > deadline:
                    raise BrokerError(f"the RabbitMQ node did not start: see {self._start_log}")
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Begin a start; see `is_up`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "rabbitmq.conf").touch()
        self._epmd.start()
        # The VM inherits the lock: two of them on one directory would destroy it, even when one is still stopping.
        lock = ["flock", "--no-fork", "--wait", str(_STOP_TIMEOUT_SECONDS), "--conflict-exit-code", str(_LOCKED)]
        server = [*lock, str(self.directory / "lock"), _script("rabbitmq-server")]
        self.process = _spawn(server, self._environment(), self._start_log, signal.SIGTERM)

    @property
    def is_running(self) -> bool:
        """Whether its VM was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def is_up(self) -> bool:
        """Return whether it greets a client; raise BrokerError when it has ended."""
        if self.process is None or (code := self.process.poll()) is None:
            return speaks_amqp(self.port)
        if code == _LOCKED:
            raise BrokerError(f"another RabbitMQ node runs in {self.directory}: stop it first")
        raise BrokerError(f"the RabbitMQ node did not start: see {self._start_log}")

    def stop(self) -> None:
        """Stop node and epmd cleanly, or by force when that takes too long. No-op if nothing runs."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        if not self._shares_epmd:
            self._epmd.stop()

    def ctl(self, *arguments: str, timeout_seconds: float = 60.0) -> str:
        """Run `rabbitmqctl` on this node and return what it prints; raise CalledProcessError."""
        return self._tool("rabbitmqctl", *arguments, timeout_seconds=timeout_seconds)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _tool(self, name: str, *arguments: str, timeout_seconds: float) -> str:
        done = subprocess.run(
            [_script(name), "--quiet", *arguments],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout_seconds,
        )
        return done.stdout

    @property
    def _start_log(self) -> Path:
        return self.directory / "log" / "start.log"

    def _environment(self) -> dict[str, str]:
        directory = str(self.directory)
        return {
            **self._epmd.environment,
            "LANG": "C.UTF-8",
            "HOME": directory,  # of the Erlang cookie
            "RUNNING_UNDER_SYSTEMD": "1",  # the script execs the VM: signals reach it, and SIGTERM is a clean stop
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": f"{directory}/mnesia",
            "RABBITMQ_LOG_BASE": f"{directory}/log",
            "RABBITMQ_CONF_ENV_FILE": f"{directory}/rabbitmq-env.conf",
            "RABBITMQ_CONFIG_FILE": f"{directory}/rabbitmq.conf",
            "RABBITMQ_CONFIG_FILES": f"{directory}/conf.d",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{directory}/advanced.config",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{directory}/config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/enabled_plugins",
            "RABBITMQ_PID_FILE": f"{directory}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": self._erlang,
        }


def is_installed() -> bool:
    """Return whether this machine can run a private node."""
    return os.access(_script("rabbitmq-server"), os.X_OK)


def speaks_amqp(port: int, host: str = "127.0.0.1", timeout_seconds: float = 2.0) -> bool:
    """Return whether an AMQP 0-9-1 broker answers the header with connection.start, 10.10 (section 4.2.2)."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_seconds) as connection:
        connection.settimeout(timeout_seconds)
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        start = connection.recv(11, socket.MSG_WAITALL)
        return start[:3] == b"\x01\x00\x00" and start[7:] == b"\x00\x0a\x00\x0a"
    return False


def free_port(wanted: int = 0) -> int:
    """Return `wanted` if it is free on the loopback interface, else any port that is.

    While this process runs, Linux gives it to nobody who asks for any port, because the bound socket stays open. But a
    server that binds it by its number and with SO_REUSEADDR, as servers do, can listen there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", wanted))
            port = int(probe.getsockname()[1])
            if sys.platform == "linux":
                probe.detach()
            return port
    return free_port()


def orphans_get(signal_number: signal.Signals) -> Callable[[], None]:
    """Return a `preexec_fn` that has the kernel send a signal to the child when the thread that started it ends."""
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(1, int(signal_number), 0, 0, 0)  # 1: PR_SET_PDEATHSIG


def _spawn(
    command: list[str], environment: dict[str, str], log: Path, on_orphaned: signal.Signals
) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is not for the broker
            preexec_fn=orphans_get(on_orphaned),
        )


def _script(name: str) -> str:
    return str(_LIB / name) if (_LIB / name).exists() else shutil.which(name) or name


def erlang_tool(name: str) -> str:
    """Return the path of a program that comes with Erlang."""
    bundled = sorted(Path("/usr/lib/erlang").glob(f"erts-*/bin/{name}"))
    return shutil.which(name) or (str(bundled[-1]) if bundled else name)
