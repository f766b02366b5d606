"""Images made of noise, of CIFAR's shape or larger: only number and shape cost time."""

from functools import partial

import lightning as L
import torch

from sam_lightning.data import ImageSource, Split
from sam_lightning.data.datamodule import ImageDataModule

BATCH_SIZE = 128


def noise(count: int, side: int = 32) -> Split:
    """``count`` square colour images in ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(10, (count,), generator=generator))


def source(train: int, val: int, side: int = 32) -> ImageSource:
    """A data set whose test set is its validation set."""
    held_out = noise(val, side)
    return ImageSource(noise(train, side), held_out, [str(c) for c in range(10)], held_out)


def data_module(
    train: int,
    val: int = 512,
    trainer: L.Trainer | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    side: int = 32,
    **options: object,
) -> ImageDataModule:
    """The data module of a run, set up; a trainer tells where it trains."""
    read = partial(source, train, val, side)
    data = ImageDataModule(read, batch_size, **options)  # type: ignore[arg-type]
    data.trainer = trainer
    data.setup("fit")
    return data
