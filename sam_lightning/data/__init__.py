"""Files to batches."""

from sam_lightning.data.source import (
    ImageSource,
    Split,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    image_folder,
    svhn,
)

__all__ = [
    "ImageSource",
    "Split",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "image_folder",
    "svhn",
]
