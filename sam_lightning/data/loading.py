"""What a ``DataLoader`` asks for examples and for their order: data sets and samplers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sam_lightning.data.augment import BatchAugment
from sam_lightning.data.seeding import draw_seed
from sam_lightning.data.source import Split


class SplitDataset(Dataset[tuple[Tensor, Tensor]]):
    """A ``Split`` that serves a whole batch as one gather, to a loader that does not collate."""

    def __init__(self, split: Split) -> None:
        self.split = replace(split, names=None)  # to take names would wait for the device

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[Any]) -> tuple[Tensor, Tensor]:
        device = self.split.labels.device
        # Pinned, or the copy of the indices would wait until the device has done its work.
        given = torch.tensor(indices, pin_memory=device.type == "cuda")
        batch = self.split.take(given.to(device, non_blocking=device.type == "cuda"))
        return batch.images, batch.labels


class TransformedDataset(SplitDataset):
    """A ``SplitDataset`` with the slow half of an augmentation, done by loading processes.

    It takes the keys of an ``EpochSampler``: a worker is not told when an epoch begins. What it
    draws depends on the seed (each rank has its own), the epoch and the images of the batch alone.
    """

    def __init__(self, split: Split, augment: BatchAugment, seed: int) -> None:
        super().__init__(split)
        self.augment = augment
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        indices = [index for _, index in keys]
        images, labels = super().__getitems__(indices)
        seed = draw_seed(self.seed, keys[0][0], *indices)
        generator = torch.Generator(images.device).manual_seed(seed)
        return self.augment.transform(images, generator), labels


class TrainSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` whose next epoch may start with its ``first``-th example."""

    first = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        return islice(super().__iter__(), first, None)


class EpochSampler(TrainSampler):
    """A ``TrainSampler`` that yields (epoch, index)."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(repeat(self.epoch), super().__iter__(), strict=False)


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


class EvalShard(DistributedSampler[int]):
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
