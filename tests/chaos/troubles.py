"""Every kind of trouble of a round on one broker: each is a function, which makes it and leaves the undoing to the run.

All choices come from the given random generator, so that a seed repeats them; only the moments differ.
"""

import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.chaos.faulty_consumer import RECOVERING, ROTATING, STORING
from tests.chaos.stage import Service, SingleStage, Stage, StageError
from tests.rabbitmq import RabbitMQ

REACHED_SECONDS = 6.0  # in which a consumer under load passes any fault point, on a machine that is not busy
_DEAD_AT = -signal.SIGKILL


class Trouble:
    """The stage, the choices, and the account of what was done to whom."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.seed = seed
        self.choose = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.slowest_seconds: dict[str, float] = {}  # of what was waited for while something was away

    def note(self, what: str, seconds: float) -> None:
        """Note the time. The report has the longest."""
        self.slowest_seconds[what] = max(self.slowest_seconds.get(what, 0.0), seconds)

    def stop(self, service: Service) -> None:
        """Send SIGTERM once it is up: before it handles signals, it simply dies of one."""
        self.stage.wait_until(f"{service.name} is up", lambda: service.page("/healthz") is not None, 20)
        self.done[f"{service.name.partition('-')[0]} stopped cleanly"] += 1
        if code := service.stop():
            raise StageError(f"{service.name} ended with {code} after SIGTERM: see {service.log_path}")


class Play(NamedTuple):
    """What a run needs: everything is started by `begin`, comes back by `undo`; `end` ends the broker."""

    trouble: Trouble
    kinds: Mapping[str, Callable[[], None]]
    begin: Callable[[], None]
    undo: Callable[[], None]
    end: Callable[[], None]


class SingleTrouble(Trouble):
    """What happens to one broker, one producer, one CSV."""

    stage: SingleStage
    reached_seconds = REACHED_SECONDS

    def kill(self, *who: str) -> None:
        """kill -9, at a random moment of the next half second."""
        self.stage.sleep(self.choose.uniform(0, 0.5))
        for name in who:
            self.done[f"kill -9 {name}"] += 1
            if name == "broker":
                self.stage.broker.kill()
            elif name == "producer":
                self.stage.producer.kill()
            else:
                self.stage.consumer.kill()

    def start_consumer(self, **environment: str) -> None:
        """Start it, with settings of its own in each life."""
        prefetch, flush = self.choose.choice((20, 300, 2000)), self.choose.choice((5, 50))
        chosen = {"PREFETCH_COUNT": str(prefetch), "FLUSH_INTERVAL_MS": str(flush)}
        self.stage.consumer.start(**{**chosen, **environment})

    def aim(self, point: str, passage: int, *options: str, **environment: str) -> None:
        """Let a consumer kill itself at this point. Not every point is always passed."""
        self.start_consumer(CHAOS_FAULT=":".join((point, str(passage), *options)), **environment)
        deadline = time.monotonic() + self.reached_seconds
        while self.stage.consumer.alive and time.monotonic() < deadline:
            self.stage.sleep(0.05)
        if self.stage.consumer.alive:
            self.stage.consumer.kill()
            self.done["kill -9 consumer"] += 1
        elif self.stage.consumer.exit_code == _DEAD_AT:
            self.done[f"kill -9 at {point}" + " + power cut" * bool(options)] += 1
        else:
            raise StageError(f"consumer ended with {self.stage.consumer.exit_code}: see {self.stage.consumer.log_path}")

    def aim_while_recovering(self) -> None:
        for point in self.choose.sample(list(RECOVERING), self.choose.randrange(3)):
            self.aim(point, 1)


def kill_producer(trouble: SingleTrouble) -> None:
    """Kill it, or one of its workers if it has any: the others continue."""
    workers = trouble.stage.producer.workers() if trouble.stage.producer.alive else []
    if not workers:
        trouble.kill("producer")
        return
    trouble.done["kill -9 producer worker"] += 1
    os.kill(trouble.choose.choice(workers), signal.SIGKILL)


def kill_consumer(trouble: SingleTrouble) -> None:
    trouble.kill("consumer")


def kill_broker(trouble: SingleTrouble) -> None:
    trouble.kill("broker")
    trouble.stage.sleep(trouble.choose.uniform(0, 1))


def kill_everything(trouble: SingleTrouble) -> None:
    trouble.kill(*trouble.choose.sample(("broker", "producer", "consumer"), 3))


def restart_broker(trouble: SingleTrouble) -> None:
    trouble.done["broker restarted"] += 1
    trouble.stage.broker.stop()
    trouble.stage.sleep(trouble.choose.uniform(0, 1))


def freeze_broker(trouble: SingleTrouble) -> None:
    """It is frozen for longer than the heartbeat: each side takes the other for dead."""
    trouble.done["broker frozen"] += 1
    trouble.stage.broker.pause()
    trouble.stage.sleep(trouble.choose.uniform(5, 8))
    trouble.stage.broker.resume()


def freeze_consumer(trouble: SingleTrouble) -> None:
    """It is frozen for longer than the heartbeat: the broker requeues its messages, and its acks come too late."""
    trouble.done["consumer frozen"] += 1
    trouble.stage.consumer.send(signal.SIGSTOP)
    trouble.stage.sleep(trouble.choose.uniform(4, 7))
    trouble.stage.consumer.send(signal.SIGCONT)


def stand_by(trouble: SingleTrouble) -> None:
    stage = trouble.stage
    if not stage.standby.alive:
        stage.standby.start()
    stage.wait_until("the standby is up", lambda: stage.standby.page("/healthz") is not None, 20)
    trouble.kill("consumer")
    stage.take_over()
    trouble.done["standby takes over"] += 1


def cut_connections(trouble: SingleTrouble) -> None:
    trouble.done["connections closed by the broker"] += 1
    trouble.stage.ctl("close_all_connections", "chaos")


def memory_alarm(trouble: SingleTrouble) -> None:
    trouble.done["memory alarm"] += 1
    trouble.stage.ctl("set_vm_memory_high_watermark", "0.000001")
    trouble.stage.sleep(trouble.choose.uniform(0.5, 2))
    if trouble.choose.random() < 0.5:
        trouble.kill(trouble.choose.choice(("producer", "consumer")))
    trouble.stage.ctl("set_vm_memory_high_watermark", "0.4")


def reject_publishes(trouble: SingleTrouble) -> None:
    """A policy makes the broker refuse what it has no room for, until it is cleared."""
    stage = trouble.stage
    trouble.done["policy reject-publish"] += 1
    limit = f'{{"max-length": {trouble.choose.choice((1, 30))}, "overflow": "reject-publish"}}'
    (queue_name,) = stage.queues
    stage.ctl("set_policy", "chaos", f"^{queue_name}$", limit, "--apply-to", "queues")
    stage.consumer.send(signal.SIGSTOP)  # so that the queue is full
    stage.sleep(trouble.choose.uniform(1, 3))
    stage.consumer.send(signal.SIGCONT)
    if trouble.choose.random() < 0.5:
        stage.sleep(trouble.choose.uniform(0, 1))
    stage.ctl("clear_policy", "chaos")


def revoke_rights(trouble: SingleTrouble) -> None:
    """Revoke all rights, or only that to write. An open connection can keep them until it is closed."""
    stage = trouble.stage
    if not (stage.producer.alive and stage.consumer.alive):
        return
    stage.wait_until_ready()  # one without rights from the beginning ends with a message
    trouble.done["rights revoked"] += 1
    stage.ctl("set_permissions", "guest", *trouble.choose.choice((("^$", "^$", "^$"), (".*", "^$", ".*"))))
    if trouble.choose.random() < 0.7:
        stage.ctl("close_all_connections", "chaos")
    stage.sleep(trouble.choose.uniform(0.5, 3))
    stage.ctl("set_permissions", "guest", ".*", ".*", ".*")


def jump_the_clock(trouble: SingleTrouble) -> None:
    """The consumer's clock jumps by up to a day, back and forth while it runs, and over its restart."""
    day = 86_400
    offsets = [str(trouble.choose.choice((-day, -3600, -1, 0, 1, 3600, day))) for _ in range(3)]
    trouble.kill("consumer")
    trouble.done["clock jumps"] += 1
    trouble.start_consumer(CHAOS_CLOCK=",".join(offsets), ROTATE_INTERVAL="2")
    trouble.stage.sleep(trouble.choose.uniform(2, 5))
    if trouble.choose.random() < 0.7:
        trouble.kill("consumer")


def full_disk(trouble: SingleTrouble) -> None:
    """The CSV cannot grow beyond a size that a write reaches in its middle."""
    stage = trouble.stage
    if not stage.consumer.alive:
        return
    stage.wait_until_ready(stage.consumer)  # one that starts without room to write ends with a message
    trouble.done["disk full"] += 1
    limit = trouble.choose.randrange(200_000)
    with suppress(FileNotFoundError):  # in the middle of a rotation
        limit += stage.csv.stat().st_size
    resource.prlimit(stage.consumer.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    stage.sleep(trouble.choose.uniform(1, 4))
    if trouble.choose.random() < 0.3:
        trouble.kill("consumer")
    else:
        resource.prlimit(stage.consumer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def stop_in_order(trouble: SingleTrouble) -> None:
    for service in trouble.choose.sample((trouble.stage.producer, trouble.stage.consumer), 2):
        if service.alive:
            trouble.stop(service)


def rename_csv(trouble: SingleTrouble) -> None:
    """Do what logrotate does, with its SIGHUP, without it, or with a kill instead."""
    stage = trouble.stage
    if not stage.consumer.alive:
        return
    trouble.done["CSV renamed by another program"] += 1
    with suppress(FileNotFoundError):  # in the middle of a rotation
        stage.csv.rename(stage.csv.with_name(f"data-renamed-{sum(trouble.done.values())}.csv"))
    what = trouble.choose.randrange(3)
    if what == 0:
        # A process that has only just begun to start dies of it, as any process does.
        stage.wait_until(f"{stage.consumer.name} is up", lambda: stage.consumer.page("/healthz") is not None, 20)
        stage.consumer.send(signal.SIGHUP)
    elif what == 1:
        trouble.kill("consumer")


def aimed_kills(trouble: SingleTrouble) -> None:
    trouble.stage.consumer.kill()
    for point in trouble.choose.sample(list(STORING), 2):
        trouble.aim(point, trouble.choose.randrange(3, 12))
        trouble.aim_while_recovering()


def power_cuts(trouble: SingleTrouble) -> None:
    trouble.stage.consumer.kill()
    for point in trouble.choose.sample(list(STORING), 2):
        trouble.aim(point, trouble.choose.randrange(3, 12), "power")
        trouble.aim_while_recovering()


def kills_while_rotating(trouble: SingleTrouble) -> None:
    trouble.stage.consumer.kill()
    for point in trouble.choose.sample(list(ROTATING), 2):
        trouble.aim(point, trouble.choose.randrange(1, 4), ROTATE_BYTES="50000")
        trouble.aim_while_recovering()


Kind = Callable[[SingleTrouble], None]
KINDS: tuple[Kind, ...] = (
    kill_producer, kill_consumer, kill_broker, kill_everything, restart_broker, freeze_broker, freeze_consumer,
    stand_by, cut_connections, memory_alarm, reject_publishes, revoke_rights, jump_the_clock, full_disk, stop_in_order,
    rename_csv, aimed_kills, power_cuts, kills_while_rotating,
)  # fmt: skip


def undo(trouble: SingleTrouble) -> None:
    """Start whatever is down, as an init system would."""
    stage = trouble.stage
    if stage.broker.process is None or stage.broker.process.poll() is not None:
        stage.broker.start()
    if not stage.producer.alive:
        stage.producer.start(WORKERS=str(trouble.choose.choice((1, 2))))
    if stage.standby.alive and not stage.consumer.alive:
        stage.take_over()
    if not stage.consumer.alive:
        trouble.start_consumer()


def on_stage(directory: Path, seed: int, broker: RabbitMQ | None = None, **settings: str) -> Play:
    """Start a broker unless one is given. Settings are environment variables of all processes."""
    stage = SingleStage(directory, broker or RabbitMQ(directory / "rabbitmq"), **settings)
    trouble = SingleTrouble(stage, seed)

    def begin() -> None:
        undo(trouble)
        stage.wait_until_ready()
        stage.broker.sync_new_queues()

    def end() -> None:
        if broker is not None:
            return
        if stage.broker.process is not None:
            stage.broker.kill()  # nobody needs its data any more
        stage.broker.stop()

    return Play(trouble, {kind.__name__: partial(kind, trouble) for kind in KINDS}, begin, partial(undo, trouble), end)
