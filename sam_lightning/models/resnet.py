"""Residual networks (He et al. 2016, arXiv 1512.03385) for small and for large images.

Module and parameter names are those of torchvision's ``resnet``, so its state dicts load as they
are where ``stem="imagenet"`` and ``width=64``.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from sam_lightning.models.onednn import subsample_first

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = projection(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x planes x H/stride x W/stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as in torchvision) and 1x1 convolutions: ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x 4 planes x H/stride x W/stride."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The 1x1 shortcut where a block changes shape, else None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


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

    block: ClassVar[type[BasicBlock] | type[Bottleneck]]
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
            if zero_init_residual and isinstance(block, BasicBlock | Bottleneck):
                last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
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
