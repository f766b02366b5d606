"""Files to batches."""

from sam_lightning.data.image_folder import image_folder
from sam_lightning.data.source import ImageSource, Split
from sam_lightning.data.torchvision_sets import cifar10, cifar100, digits, fashion_mnist, svhn

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
