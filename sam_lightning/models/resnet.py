"""Residual networks (He et al. 2016, arXiv 1512.03385) for small and for large images.

Module and parameter names are those of torchvision's ``resnet``, so its state dicts load as they
are where ``stem="imagenet"`` and ``width=64``.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from sam_lightning.models.onednn import subsample_first

Stem = Literal["cifar", "imagenet"]


def convolutions(channels: int, planes: int, stride: int, bottleneck: bool) -> list[nn.Conv2d]:
    """Two 3x3, or 1x1, 3x3 (with the stride, as in torchvision) and 1x1 to ``4 * planes``."""
    shapes = [(planes, 3, stride), (planes, 3, 1)]
    if bottleneck:
        shapes = [(planes, 1, 1), (planes, 3, stride), (4 * planes, 1, 1)]
    made = []
    for out, kernel, step in shapes:
        made.append(nn.Conv2d(channels, out, kernel, step, padding=kernel // 2, bias=False))
        channels = out
    return made


class Block(nn.Module):
    """Convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    expansion: ClassVar[int]

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        made = convolutions(in_channels, planes, stride, bottleneck=self.expansion > 1)
        for i, conv in enumerate(made, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample, out = None, planes * self.expansion
        if stride != 1 or in_channels != out:
            conv = nn.Conv2d(in_channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x expansion planes x H/stride x W/stride."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))  # type: ignore[operator]
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))  # type: ignore[operator]
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(Block):
    """Two 3x3 convolutions: ResNet-18 and 34."""

    expansion = 1


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions: ResNet-50 and deeper."""

    expansion = 4


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1 with a ``ValueError``."""
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{key}={size}: must be at least 1")


def init_convolutions(model: nn.Module) -> None:
    """Draw the weights of every convolution as in He et al. 2015, arXiv 1502.01852, by fan-out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pool, fully connected layer.

    A member of the family names its ``block`` and the number of ``layers`` (blocks) per stage.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        stem: ``cifar``: 3x3 convolution, no pooling, for images of about 32 pixels;
            ``imagenet``: 7x7 convolution of stride 2 and max pooling.
        zero_init_residual: start each block as the identity (Goyal et al. 2017, 1706.02677).

    Shapes: images N x in_channels x H x W -> logits N x num_classes.

    Raises:
        ValueError: unknown stem, or a size below 1.
    """

    block: ClassVar[type[Block]]
    layers: ClassVar[tuple[int, int, int, int]]

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        stem: Stem = "cifar",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        elif stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            raise ValueError(f"stem={stem}: allowed are cifar, imagenet")
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        out = self.block.expansion
        self.layer1 = self._stage(self.layers[0], width, width, stride=1)
        self.layer2 = self._stage(self.layers[1], width * out, 2 * width, stride=2)
        self.layer3 = self._stage(self.layers[2], 2 * width * out, 4 * width, stride=2)
        self.layer4 = self._stage(self.layers[3], 4 * width * out, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width * out, num_classes)
        init_convolutions(self)
        for block in self.modules():
            if zero_init_residual and isinstance(block, Block):
                last: Any = block.bn2 if block.expansion == 1 else block.bn3
                nn.init.zeros_(last.weight)
        subsample_first(self)

    def _stage(self, blocks: int, in_channels: int, planes: int, stride: int) -> nn.Sequential:
        first, out = self.block(in_channels, planes, stride), planes * self.block.expansion
        return nn.Sequential(first, *(self.block(out, planes, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class SAMResNet18(ResNet):
    """ResNet-18, the model this project trains by default."""

    block = BasicBlock
    layers = (2, 2, 2, 2)


class SAMResNet34(ResNet):
    """ResNet-34."""

    block = BasicBlock
    layers = (3, 4, 6, 3)


class SAMResNet50(ResNet):
    """ResNet-50."""

    block = Bottleneck
    layers = (3, 4, 6, 3)
