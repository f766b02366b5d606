"""What happens to training images, by ``_target_``: one object for each entry of ``conf/augment``.

Three kinds of objects. A plain callable takes one image, uint8 C x H x W, in the loading processes:
any transform of ``torchvision.transforms.v2`` is one. A ``BatchTransform`` takes whole batches on
their device. A ``BatchMix`` mixes each image of a batch with another.
"""

from sam_lightning.data.augment.base import BatchMix, BatchTransform
from sam_lightning.data.augment.color import ColorJitter
from sam_lightning.data.augment.draws import Draws
from sam_lightning.data.augment.erasing import Cutout, RandomErasing
from sam_lightning.data.augment.geometry import RandomCrop, RandomHorizontalFlip
from sam_lightning.data.augment.mixing import CutMix, MixedLabels, Mixup
from sam_lightning.data.augment.pipeline import BatchAugment, crop_flip
from sam_lightning.data.augment.policies import AutoAugment, RandAugment, TrivialAugment

__all__ = [
    "AutoAugment",
    "BatchAugment",
    "BatchMix",
    "BatchTransform",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "Draws",
    "MixedLabels",
    "Mixup",
    "RandAugment",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "TrivialAugment",
    "crop_flip",
]
