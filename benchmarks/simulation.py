"""The prefetcher of this package over a simulated storage, in simulated time.

``sam_lightning.data.prefetch`` runs as it is: threads, claims, tries, limit. Its clock and threads
are those of ``World``, and its files come from ``Storage`` by fsspec. Copies are real files of some
bytes, which stand for shards of ``Plan.shard_mb``.
"""

import hashlib
import heapq
import itertools
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fsspec  # type: ignore[import-untyped]
import numpy as np
import torch

from sam_lightning.data import prefetch, remote
from sam_lightning.data.index import Shard
from sam_lightning.data.loading import EpochOrder
from sam_lightning.data.source import Split

GROUPS = 64  # groups of images in a shard; a group is loaded at a time
STEPS = 16  # of a transfer, after each of which its share of the bandwidth is computed again


class World:
    """A clock, and threads of which one runs at a time: time passes when all of them wait."""

    def __init__(self) -> None:
        self.now, self._over = 0.0, False
        self._due: list[tuple[float, int, threading.Event]] = []
        self._waiting: set[threading.Event] = set()
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the others run for so long."""
        event = threading.Event()
        self.wake(event, seconds)
        self.wait(event)

    def wake(self, event: threading.Event, seconds: float = 0.0) -> None:
        """Let the thread that waits for an event go on after so long."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), event))

    def wait(self, event: threading.Event) -> None:
        """Let the others run until this thread is woken."""
        self._next()
        self._begin(event)

    def _begin(self, event: threading.Event) -> None:
        self._waiting.add(event)
        if not self._over:
            event.wait()
        self._waiting.discard(event)
        if self._over:
            raise SystemExit  # ends this thread alone

    def _next(self) -> None:
        if self._due and not self._over:
            self.now, _, event = heapq.heappop(self._due)
            event.set()

    def thread(self, target: Callable[[], object], daemon: bool = True) -> Any:
        """As ``threading.Thread``."""
        begin, alive = threading.Event(), [True]

        def run() -> None:
            with suppress(SystemExit):
                self._begin(begin)
                target()
            alive[0] = False
            self._next()

        def start() -> None:
            self.wake(begin)
            self._threads.append(threading.Thread(target=run, daemon=daemon))
            self._threads[-1].start()

        return SimpleNamespace(start=start, is_alive=lambda: alive[0])

    def run(self, targets: list[Callable[[], object]]) -> None:
        """Run these side by side to their ends, and then end all threads that they started."""
        left, done, errors = len(targets), threading.Event(), []

        def one(target: Callable[[], object]) -> None:
            nonlocal left
            try:
                target()
                left -= 1
            except Exception as error:
                errors.append(error)
            if not left or errors:
                self._over = True
                done.set()

        for target in targets:
            self.thread(partial(one, target)).start()
        self._next()
        done.wait()
        for event in [*self._waiting]:
            event.set()
        for thread in self._threads:
            thread.join()
        if errors:
            raise errors[0]


@dataclass
class Storage:
    """What fails and how fast the rest is.

    Attributes:
        mb_per_s: of all requests together, which share it equally.
        request_mb_per_s: of a request alone.
        latency: seconds before the first byte.
        fails, stalls: shares of requests that end in an error, or send nothing until the reader
            gives up.
        outage: second when it begins and second when it ends; all requests fail between.
    """

    mb_per_s: float = 1e9
    request_mb_per_s: float = 1e9
    latency: float = 0.0
    fails: float = 0.0
    stalls: float = 0.0
    outage: tuple[float, float] = (0.0, 0.0)
    sent: Counter[str] = field(default_factory=Counter)  # files, whole
    requests: int = 0
    active: int = 0

    def send(self, world: World, draw: random.Random, name: str, mb: float) -> None:
        """Take the time that a file takes."""
        self.requests += 1
        world.sleep(self.latency)
        luck = draw.random()
        if luck < self.stalls:
            world.sleep(remote.SILENCE)
            raise OSError("silence")
        if luck < self.stalls + self.fails:
            raise OSError("503")
        self.active += 1
        try:
            for _ in range(STEPS):
                if self.outage[0] <= world.now < self.outage[1]:
                    raise OSError("503")
                rate = min(self.request_mb_per_s, self.mb_per_s / self.active)
                world.sleep(mb / STEPS / rate)
        finally:
            self.active -= 1
        self.sent[name] += 1


@dataclass
class Plan:
    """A training run.

    Attributes:
        mb_per_s: images that all machines train on together in a second, in megabytes.
        machines: each of them reads all shards, and waits for the others at each batch.
        shards, shard_mb: number and size.
        window: shards that are mixed at a time; None: all.
        cache_gb, threads: ``data.cache_gb`` and ``data.fetch_threads`` of a machine.
        epochs: how often all shards are needed.
    """

    mb_per_s: float
    machines: int = 1
    shards: int = 256
    shard_mb: float = 256.0
    window: int | None = 16
    cache_gb: float = 1e9
    threads: int = prefetch.THREADS
    epochs: int = 1


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        start: seconds before the first batch.
        waited: seconds that training waited for shards afterwards.
        trained: seconds that it did not.
        most_gb: most that the copies of a machine took.
        storage: with what was sent.
    """

    start: float
    waited: float
    trained: float
    most_gb: float
    storage: Storage


def simulate(plan: Plan, storage: Storage) -> Outcome:
    """Train once.

    Raises:
        ConfigError: as training raises it.
    """
    world, draw = World(), random.Random(0)
    names = [f"train-{i:06}.tar" for i in range(plan.shards)]
    size = int(plan.shard_mb * 1e6)
    files = [Shard(name, size, hashlib.sha256(name.encode()).hexdigest()) for name in names]
    waits, most = [0.0, 0.0], 0.0  # before the first batch and afterwards

    class Simulated(fsspec.AbstractFileSystem):
        protocol, cachable = "simulated", False

        def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
            nonlocal most
            name = rpath.rpartition("/")[2]
            here = [*Path(lpath).parent.glob("train-*.tar"), *Path(lpath).parent.glob("*.part")]
            most = max(most, (len(here) + 1) * size / 1e9)
            Path(lpath).touch()
            storage.send(world, draw, name, plan.shard_mb)
            Path(lpath).write_text(name)

    count = plan.shards * GROUPS
    shards = torch.arange(plan.shards).repeat_interleave(GROUPS)
    split = Split(
        torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count).long(), shards=shards
    )
    order = EpochOrder(split, 0, "shuffled", window=plan.window)
    batch = GROUPS
    seconds = batch / GROUPS * plan.shard_mb / plan.mb_per_s
    waiting: list[threading.Event] = []

    def together() -> None:
        if len(waiting) < plan.machines - 1:
            waiting.append(event := threading.Event())
            world.wait(event)
            return
        for event in waiting:
            world.wake(event)
        waiting.clear()

    def machine(folder: Path) -> None:
        folder.mkdir()
        limit = plan.cache_gb * 1e9
        copies = prefetch.Prefetcher("simulated://set", folder, files, limit, plan.threads)
        copies.check(order.at_once())
        first = True
        for epoch in range(plan.epochs):
            for position in range(0, count, batch):
                copies.fetch_ahead(order.coming(epoch, max(0, position - 2 * batch)))
                began = world.now
                for number in np.unique(order.of(epoch)[0][position : position + batch] // GROUPS):
                    copies.get(int(number))
                together()
                waits[not first] += (world.now - began) / plan.machines
                first = False
                world.sleep(seconds)

    fsspec.register_implementation("simulated", Simulated, clobber=True)
    with tempfile.TemporaryDirectory() as root:
        threads = SimpleNamespace(Thread=world.thread)
        with (
            patch.object(remote, "time", world),
            patch.object(remote.log, "disabled", True),
            patch.object(prefetch, "time", world),
            patch.object(prefetch, "threading", threads),
        ):
            machines = [Path(root, str(i)) for i in range(plan.machines)]
            world.run([partial(machine, folder) for folder in machines])
    return Outcome(waits[0], waits[1], plan.epochs * count / batch * seconds, most, storage)
