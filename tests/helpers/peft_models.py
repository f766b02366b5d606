"""A network of which peft trains low-rank additions and the head."""

import peft
from torch import nn

from sam_lightning.models import SAMResNet18


def lora(num_classes: int, in_channels: int) -> nn.Module:
    """A narrow ResNet-18 with LoRA on its convolutions."""
    model = SAMResNet18(num_classes, in_channels, width=4)
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], modules_to_save=["fc"])
    return peft.get_peft_model(model, config)
