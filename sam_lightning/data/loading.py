"""What a ``DataLoader`` asks for examples and for their order: data sets and samplers."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    get_worker_info,
)

from sam_lightning.config.cluster import number
from sam_lightning.data.augment import BatchAugment
from sam_lightning.data.augment.draws import Integers, on_device
from sam_lightning.data.augment.pipeline import BatchKey
from sam_lightning.data.prefetch import Prefetcher
from sam_lightning.data.seeding import draw_seed
from sam_lightning.data.source import Split

SAMPLERS = ("shuffled", "balanced")
AUTO = "auto"  # as the number of loading processes: ``suggested_workers`` where there is work
MOST_WORKERS = 16
_EPOCH = 40  # bits of a position in an epoch, below the number of the epoch


def suggested_workers(processes: int, batch_bytes: int) -> int:
    """How many loading processes each of the ``processes`` that train on this machine starts.

    Its share of the processors, less one, from 1 to ``MOST_WORKERS``; fewer if the batches that
    they hold ready would fill half of the shared memory, through which they pass. ``batch_bytes``
    are those of the batches of all processes together.
    """
    from joblib import cpu_count  # heeds affinity and the limits of containers

    if multiprocessing.current_process().daemon:  # which may start none
        return 0
    processors, own = cpu_count(), number("SLURM_CPUS_PER_TASK", 0)
    share = min(processors, own or processors)
    if not own or "TORCHELASTIC_RUN_ID" in os.environ:  # else each process is a task
        share //= processes
    most = min(MOST_WORKERS, max(1, share - 1))
    with suppress(OSError):  # a system without it
        shared = os.statvfs("/dev/shm")
        held = 3 * batch_bytes  # two batches are ready and one is made
        most = min(most, shared.f_bavail * shared.f_frsize // 2 // held)
    return most


class SplitDataset(Dataset[tuple[Tensor, Tensor]]):
    """A ``Split`` that serves a whole batch as one gather, to a loader that does not collate."""

    def __init__(self, split: Split) -> None:
        self.split = replace(split, names=None)  # to take names would wait for the device

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, keys: Any) -> tuple[Any, ...]:
        return self.load(keys)

    def load(self, indices: Any, seeds: Any = None) -> tuple[Tensor, Tensor]:
        """Images and labels; of images that are decoded when needed, parts by the seeds."""
        device = self.split.labels.device
        batch = self.split.take(on_device(np.asarray(indices), device))
        return batch.seen(seeds), batch.labels


class EpochOrder:
    """The order of the training images, over all ranks together: a function of (seed, epoch).

    Args:
        split: the training images.
        seed: of the orders.
        sampler: ``shuffled``: each image once. ``balanced``: each class that has images equally
            often, ceil(images / classes) times; a class takes turns through its images, in an order
            drawn for each turn.
        repeats: each image comes so many times in a row, and only the first of an order come at
            all, so that an epoch keeps its length; of a balanced one, each class is rounded up.
        window: number of shards whose images are mixed at a time; None: all shards.

    Raises:
        ValueError: ``window`` is below 1, or the images are in no shards.
    """

    def __init__(
        self, split: Split, seed: int, sampler: str, repeats: int = 1, window: int | None = None
    ) -> None:
        self.seed, self.repeats = seed, repeats
        labels, self._window = split.labels, window
        if window is not None and (window < 1 or split.shards is None):
            raise ValueError(f"window={window}: must be >= 1 for images in shards, else null")
        self._shards = None if split.shards is None else split.shards.numpy()
        self._used = np.flatnonzero(np.bincount(() if self._shards is None else self._shards))
        self._coming: tuple[tuple[int, int], Integers] | None = None
        self._length = self._count = len(labels)
        self._members: list[Tensor] = []
        if sampler == "balanced":
            classes = labels.unique().tolist()
            self._members = [(labels == c).nonzero().squeeze(1).cpu() for c in classes]
            self._quota = -(-self._count // (len(classes) * repeats))
            self._length = self._quota * len(classes) * repeats
        self._last: tuple[int, Integers, Integers | int, Integers] | None = None

    def __len__(self) -> int:
        return self._length

    def of(self, epoch: int) -> tuple[Integers, Integers | int]:
        """Index and number of copy of each example of an epoch; copies 0 if all are the first."""
        if self._last is None or self._last[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            windows = self._windows(epoch)
            indices, copies = self._drawn(generator)
            if self._shards is not None and self._window is not None:
                by_window = windows[self._shards[indices]].argsort(kind="stable")
                indices = indices[by_window]
                copies = copies if isinstance(copies, int) else copies[by_window]
            if self.repeats > 1:
                counted = np.arange(self._length)
                indices = indices[counted // self.repeats]
                copies = copies[counted // self.repeats] if self._members else 0
                copies = copies * self.repeats + counted % self.repeats
            self._last = epoch, indices, copies, windows
        return self._last[1:3]

    def at_once(self) -> int:
        """Number of shards that are needed at a time: those of a window and of the next, or all."""
        return min(len(self._used), 2 * (self._window or len(self._used)))

    def coming(self, epoch: int, position: int) -> Integers:
        """The numbers of shards in turn, from those in use at a position on, and of the next epoch.

        The array is the same one as long as they are the same.
        """
        assert self._shards is not None
        indices, _ = self.of(epoch)
        assert self._last is not None
        windows = self._last[3]
        first, last = windows[self._shards[indices[[min(position, len(indices) - 1), -1]]]].tolist()
        if self._coming is None or self._coming[0] != (epoch, first):
            following = self._windows(epoch + 1)
            rest = self._used[(first <= windows[self._used]) & (windows[self._used] <= last)]
            turns = [
                shards[of[shards].argsort(kind="stable")]
                for shards, of in ((rest, windows), (self._used, following))
            ]
            self._coming = (epoch, first), np.concatenate(turns)
        return self._coming[1]

    def _windows(self, epoch: int) -> Integers:
        """The number of the window that each shard is in."""
        count = int(self._used.max(initial=-1)) + 1
        if self._window is None:
            return np.zeros(count, np.int64)
        generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch))
        return torch.randperm(count, generator=generator).numpy() // self._window

    def _drawn(self, generator: torch.Generator) -> tuple[Integers, Any]:
        if not self._members:
            return torch.randperm(self._count, generator=generator).numpy(), 0
        indices, copies = [], []
        for members in self._members:
            count = len(members)
            turns = -(-self._quota // count)
            drawn = [torch.randperm(count, generator=generator) for _ in range(turns)]
            indices.append(members[torch.cat(drawn)[: self._quota]])
            copies.append(torch.arange(turns).repeat_interleave(count)[: self._quota])
        order = torch.randperm(self._quota * len(self._members), generator=generator)
        return torch.cat(indices)[order].numpy(), torch.cat(copies)[order].numpy()


class TrainDataset(SplitDataset):
    """A ``SplitDataset`` in the order of an epoch, with what loading processes do to the images.

    It takes the keys of a ``TrainSampler``, for a worker is not told when an epoch begins. Batches
    are (images, labels, ``BatchKey``).

    Args:
        split: the training images.
        order: of an epoch.
        augment: does its part for loading processes.
        batch_size: of all ranks together.
        world_size: number of ranks.

    Raises:
        ConfigError: there is no room for copies of the shards that are needed at a time.
    """

    def __init__(
        self,
        split: Split,
        order: EpochOrder,
        augment: BatchAugment,
        batch_size: int,
        world_size: int,
    ) -> None:
        super().__init__(split)
        self.order, self.augment = order, augment
        self.batch_size, self.world_size = batch_size, world_size
        self._total = -(-len(order) // world_size) * world_size  # as the sampler pads it
        self._copies: Prefetcher | None = getattr(split.stored, "copies", None)
        if self._copies is not None:
            self._copies.check(order.at_once())

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, keys: list[int]) -> tuple[Any, ...]:
        codes = np.array(keys)
        epoch, first = divmod(int(codes[0]), 1 << _EPOCH)
        positions = codes - (epoch << _EPOCH)
        batch, partners = first // self.batch_size, None
        if self.augment.mixes:
            positions, partners = self._with_partners(positions, batch)
        indices, copies = self.order.of(epoch)
        positions = positions % len(indices)  # ranks get equally many: the first ones once more
        indices = indices[positions]
        copies = copies if isinstance(copies, int) else copies[positions]
        key = BatchKey(epoch, batch, indices, copies, partners)
        stored, seeds = self.split.stored, None
        if not isinstance(stored, Tensor):
            seeds = self.augment.view_seeds(key)
            if self._copies is not None:
                worker = get_worker_info()
                workers = worker.num_workers if worker else 1
                # Other processes, which share the copies, may be so far behind.
                behind = (2 * workers + 2) * self.batch_size
                coming = self.order.coming(epoch, max(0, first - behind))
                self._copies.fetch_ahead(coming, workers)
        images, labels = self.load(indices, seeds)
        return self.augment.in_loader(images, key) if self.augment.loads else images, labels, key

    def _with_partners(self, positions: Integers, batch: int) -> tuple[Integers, Integers]:
        """Positions to load, and where among them the partner of each of the first ones is.

        An image's partner is half of the global batch further on, in turn. Ranks take turns too, so
        it is mostly on the same rank; if not, it is loaded for this.
        """
        start = batch * self.batch_size
        size = min(self.batch_size, self._total - start)
        partners = (positions - start + size // 2) % size
        if size // 2 % self.world_size == 0:
            return positions, partners // self.world_size
        return np.concatenate([positions, start + partners]), np.arange(
            len(positions), 2 * len(positions)
        )


# With overfit_batches Lightning replaces each sampler that is not sequential by one that knows
# neither ranks nor where an epoch continues.


class TrainSampler(DistributedSampler[Any], SequentialSampler):
    """The positions of a rank in the order of an epoch, every ``num_replicas``-th, with the epoch.

    The next epoch may start with its ``first``-th example. All epochs may be as the first one.
    """

    first = 0
    first_epoch_only = False

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch from now on."""
        super().set_epoch(0 if self.first_epoch_only else epoch)

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0
        begin = self.epoch << _EPOCH
        start = begin + self.rank + first * self.num_replicas
        return iter(range(start, begin + self.total_size, self.num_replicas))


class TrainLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A ``DataLoader`` that continues an epoch behind the batches done before a checkpoint.

    Lightning saves and restores the state of loaders that have these two methods.
    """

    done: Callable[[], int]  # how many batches were trained on, whatever was fetched in advance

    def state_dict(self) -> dict[str, int]:
        """The number of batches done in this epoch, 0 at its end."""
        return {"batches": self.done() % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration leave out the batches done."""
        assert isinstance(self.sampler, TrainSampler)
        assert self.batch_size is not None
        self.sampler.first = state["batches"] * self.batch_size


class EvalShard(DistributedSampler[int], SequentialSampler):
    """Every ``num_replicas``-th index, in order: over all ranks each one exactly once.

    A plain ``DistributedSampler`` repeats examples until all ranks have equally many, and metrics
    over them would be off. Lightning would put one in place of any other sampler.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def __len__(self) -> int:
        return len(self._indices())

    def _indices(self) -> range:
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]
