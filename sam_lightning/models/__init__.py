"""Models: images in, logits out."""

from sam_lightning.models.lite import efficientnet_lite
from sam_lightning.models.pretrained import preprocessing
from sam_lightning.models.pyramidnet import PyramidNet
from sam_lightning.models.resnet import SAMResNet18, SAMResNet34, SAMResNet50
from sam_lightning.models.timm_models import timm_model
from sam_lightning.models.torchvision_models import torchvision_model
from sam_lightning.models.wide_resnet import WideResNet
from sam_lightning.optim.batch_norm import frozen_running_stats

__all__ = [
    "PyramidNet",
    "SAMResNet18",
    "SAMResNet34",
    "SAMResNet50",
    "WideResNet",
    "efficientnet_lite",
    "frozen_running_stats",
    "preprocessing",
    "timm_model",
    "torchvision_model",
]
