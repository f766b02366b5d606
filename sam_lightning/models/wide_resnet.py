"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from torch import Tensor, nn

from sam_lightning.models.resnet import check_sizes, init_convolutions


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, with dropout between them."""

    def __init__(self, in_channels: int, planes: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        projects = stride != 1 or in_channels != planes
        self.shortcut = nn.Conv2d(in_channels, planes, 1, stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x planes x H/stride x W/stride."""
        activated = self.relu(self.bn1(x))
        # A projection reads the activated input, the identity the raw one, as in the authors' code.
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(self.dropout(self.relu(self.bn2(out))))
        return out + shortcut


class WideResNet(nn.Module):
    """WRN-depth-widen_factor; WRN-28-10 is the CIFAR model of the SAM paper.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        depth: number of convolutions on the longest path, 6 n + 4.
        widen_factor: multiplies the channels 16, 32, 64 of the three stages.
        dropout: probability between the convolutions of a block.

    Shapes: images N x in_channels x H x W -> logits N x num_classes.

    Raises:
        ValueError: depth is not 6 n + 4, a size below 1, or dropout is no probability.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        depth: int = 28,
        widen_factor: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: must be 6 n + 4, such as 16, 22, 28 or 40")
        check_sizes(num_classes=num_classes, in_channels=in_channels, widen_factor=widen_factor)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be in [0, 1)")
        channels = 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        for stage in range(3):
            planes = 16 * 2**stage * widen_factor
            blocks = nn.Sequential()
            for i in range((depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(PreActivationBlock(channels, planes, stride, dropout))
                channels = planes
            self.stages.append(blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = self.relu(self.bn(self.stages(self.conv1(images))))
        return self.fc(self.avgpool(x).flatten(1))
