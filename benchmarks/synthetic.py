"""Images of CIFAR's shape made of noise: only their number and their shape cost time."""

from functools import partial

import lightning as L
import torch

from sam_lightning.data import ImageSource, Split
from sam_lightning.data.datamodule import ImageDataModule

BATCH_SIZE = 128


def noise(count: int) -> Split:
    """``count`` colour images of 32 x 32 in ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(10, (count,), generator=generator))


def source(train: int, val: int) -> ImageSource:
    """A data set whose test set is its validation set."""
    held_out = noise(val)
    return ImageSource(noise(train), held_out, [str(c) for c in range(10)], held_out)


def data_module(
    train: int, val: int = 512, trainer: L.Trainer | None = None, **options: object
) -> ImageDataModule:
    """The data module of a run, set up; a trainer tells where it trains."""
    data = ImageDataModule(partial(source, train, val), BATCH_SIZE, **options)  # type: ignore[arg-type]
    data.trainer = trainer
    data.setup("fit")
    return data
