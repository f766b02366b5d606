"""Copies of shards at an address: the next ones are fetched ahead, those not needed soon removed.

Each loading process of a machine has a ``Prefetcher``, and all share a folder. They know of each
other only by files in it and locks, which end with a process however it ends.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.index import Shard
from sam_lightning.data.remote import claimed, copy, fetch, wait

THREADS = 4
PATIENCE = 300.0  # seconds that training waits for a shard; NCCL gives up after 600
PART_OF_FREE = 0.9  # of the disk


class Prefetcher:
    """The copies of shards.

    Args:
        address: where the shards are.
        folder: of their copies.
        files: the shards.
        limit: most bytes that the copies take; None: nine tenths of what they and nothing else
            could take on their disk.
        threads: most shards that the processes of a machine fetch ahead at a time.

    Raises:
        ConfigError: a shard is named as a file elsewhere.
    """

    def __init__(
        self,
        address: str,
        folder: Path,
        files: Sequence[Shard],
        limit: float | None = None,
        threads: int = THREADS,
    ) -> None:
        self.address, self.folder, self.files = address, folder, files
        self.limit, self.threads = limit, threads
        self.sizes = np.array([shard.size for shard in files])
        for shard in files:
            if os.path.basename(shard.name) != shard.name:
                raise ConfigError(f"data.root: {address}: {shard.name!r} is no name of a shard")
        self._at_once = 1
        self._coming = self._done = np.empty(0, np.int64)
        self._threads: list[threading.Thread] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_threads": []}  # each process has its own

    def check(self, count: int) -> None:
        """Refuse a limit that so many shards exceed, which are needed at a time."""
        self._at_once = count
        limit, needed = self._limit(self._here()), np.sort(self.sizes)[-count:].sum()
        if needed > limit:
            disk = f"null (there are {limit / 1e9:.3g} on the disk of {self.folder})"
            raise ConfigError(
                f"data.cache_gb={disk if self.limit is None else f'{limit / 1e9:g}'}: the {count} "
                f"shards that are needed at a time take {needed / 1e9:.3g}: twice data.window of "
                "them, or all without it; set more, or a smaller data.window"
            )

    def get(self, number: int) -> Path:
        """The copy of a shard, made now if there is none.

        Raises:
            ConfigError: as ``remote.fetch``, with ``PATIENCE``.
        """
        path = Path(self.folder, self.files[number].name)
        fetch(*self._way(number), patience=PATIENCE)
        return path

    def fetch_ahead(self, coming: np.ndarray, processes: int = 1) -> None:
        """Let threads copy the shards that are needed next, as far as the limit allows.

        What fails is tried again until it is there. Who needs it by then is told by ``get``.

        Args:
            coming: their numbers in turn, from those in use now on; the same array as long as
                they are the same.
            processes: that share the threads equally.
        """
        wanted = 1 if coming is self._coming else -(-self.threads // processes)
        self._coming = coming
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while coming is not self._done and len(self._threads) < wanted:
            self._threads.append(threading.Thread(target=self._take_turn, daemon=True))
            self._threads[-1].start()

    def _take_turn(self) -> None:
        for number in range(self.threads):  # those of all processes of this machine
            with claimed(Path(self.folder, f"thread-{number}")) as free:
                if free:
                    return self._copy_ahead()

    def _copy_ahead(self) -> None:
        failed = 0
        while True:
            coming, here = self._coming, self._here()
            missing = [n for n in self._soon(coming, self._limit(here)) if not here.get(n)]
            if not missing:
                self._done = coming
                return
            busy = True
            for number in missing:
                try:
                    mine = copy(*self._way(number))
                    failed, busy = 0, busy and not mine
                except Exception:
                    failed, busy = failed + 1, False
                    time.sleep(wait(failed))
                if self._coming is not coming:
                    busy = False
                    break
            if busy:  # other threads are at all of them
                return

    def _way(self, number: int) -> tuple[str, Path, str, Callable[[], None]]:
        """The first arguments of ``copy`` and ``fetch``."""
        name, _, sha256 = self.files[number]
        path = Path(self.folder, name)
        return f"{self.address}/{name}", path, sha256, partial(self._make_room, number)

    def _here(self) -> dict[int, bool]:
        """The numbers of the shards that are copied, or are being copied: whether they are done."""
        names = set(os.listdir(self.folder))
        return {
            number: shard.name in names
            for number, shard in enumerate(self.files)
            if shard.name in names or f"{shard.name}.lock" in names
        }

    def _limit(self, here: dict[int, bool]) -> float:
        if self.limit is not None:
            return self.limit
        done = sum(int(self.sizes[number]) for number, is_done in here.items() if is_done)
        return done + PART_OF_FREE * shutil.disk_usage(self.folder).free

    def _soon(self, coming: np.ndarray, limit: float) -> list[int]:
        """The next shards in turn: all if they fit, or else half of what fits.

        The other half is left to copies that are used again in the next epoch.
        """
        numbers = np.array([*dict.fromkeys(coming.tolist())], np.int64)
        ends = self.sizes[numbers].cumsum()
        fits = len(ends) if (ends <= limit).all() else max(self._at_once, (ends <= limit / 2).sum())
        return numbers[:fits].tolist()

    def _make_room(self, number: int) -> None:
        """Remove copies until one more fits, the one that is needed last first.

        Those that are needed soon stay, even if a shard that is needed now then exceeds the limit.
        """
        here = self._here() | {number: False}
        limit = self._limit(here)
        excess = sum(int(self.sizes[n]) for n in here) - limit
        if excess <= 0:
            return
        coming = self._coming
        soon = {*self._soon(coming, limit)}
        turn = {n: i for i, n in reversed([*enumerate(coming.tolist())])}
        others = [n for n, is_done in here.items() if is_done and n not in soon]
        for n in sorted(others, key=lambda n: -turn.get(n, len(coming))):
            if excess <= 0:
                return
            Path(self.folder, self.files[n].name).unlink(missing_ok=True)  # readers keep it open
            excess -= int(self.sizes[n])
