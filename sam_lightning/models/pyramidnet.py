"""Pyramidal residual networks (Han et al. 2017, arXiv 1610.02915) with ShakeDrop."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sam_lightning.models.resnet import check_sizes, convolutions, init_convolutions


class ShakeDrop(nn.Module):
    """Scale a residual branch at random, its gradient by another factor (Yamada et al. 2019).

    Each image draws b, which is 1 with probability p and else 0, alpha in [-1, 1] and beta in
    [0, 1]. The branch is multiplied by b + alpha - b alpha, its gradient by b + beta - b beta, and
    in evaluation the branch by p (arXiv 1802.02375, equation 6; per image as google-research/sam).

    Args:
        p: probability that the branch of an image is left as it is, in [0, 1].

    Shapes: N x ... -> the same.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Branch to scaled branch."""
        if not self.training:
            return self.p * x
        shape = (3, len(x), *[1] * (x.ndim - 1))
        drawn, alpha, beta = torch.rand(shape, device=x.device, dtype=torch.float32).unbind()
        stays = drawn < self.p
        forward = torch.where(stays, 1.0, 2 * alpha - 1).to(x.dtype)
        backward = torch.where(stays, 1.0, beta).to(x.dtype)
        # forward * x, of which only backward * x has a gradient
        return torch.addcmul(backward * x, x.detach(), forward - backward)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"p={self.p:.4g}"


def branch(channels: int, planes: int, stride: int, bottleneck: bool) -> nn.Sequential:
    """A block's convolutions between BatchNorms, with a ReLU before each but the first."""
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
    for i, conv in enumerate(convolutions(channels, planes, stride, bottleneck)):
        layers += [nn.ReLU(inplace=True)] if i else []
        layers += [conv, nn.BatchNorm2d(conv.out_channels)]
    return nn.Sequential(*layers)


class PyramidBlock(nn.Module):
    """A branch without ReLU at its ends, shaken, and a shortcut without weights.

    The shortcut is averaged over 2x2 pixels where the stride is 2; its new channels are zeros.
    """

    def __init__(self, branch: nn.Module, new_channels: int, stride: int, p: float) -> None:
        super().__init__()
        self.branch = branch
        self.shakedrop = ShakeDrop(p) if p < 1 else nn.Identity()
        # An odd side is rounded up, as by a convolution of stride 2.
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x (C + new_channels) x H/stride x W/stride."""
        shortcut = pad(self.pool(x), (0, 0, 0, 0, 0, self.new_channels))
        return self.shakedrop(self.branch(x)) + shortcut


class PyramidNet(nn.Module):
    """PyramidNet-depth: channels grow evenly from block to block, not at three stages.

    Block k of L has 16 + k alpha / L channels, rounded; its branch is left as it is with
    probability 1 - (1 - p_last) k / L, ShakeDrop's linear decay.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        depth: number of convolutions on the longest path and the last layer: 6 n + 2, or 9 n + 2
            with bottlenecks.
        alpha: channels within the last block above the 16 of the first convolution.
        bottleneck: 1x1, 3x3 and 1x1 convolutions in a block, with four times as many outputs.
        p_last: ShakeDrop's p_L, in [0, 1]; 1 is no ShakeDrop.

    Shapes: images N x in_channels x H x W -> logits N x num_classes.

    Raises:
        ValueError: depth is of another form, a size below 1, or p_last is no probability.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        depth: int = 110,
        alpha: int = 270,
        bottleneck: bool = False,
        p_last: float = 0.5,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 9 if bottleneck else 6)  # in each of three stages
        if blocks < 1 or rest:
            form = "9 n + 2, as 164 and 272 are" if bottleneck else "6 n + 2, as 20 and 110 are"
            raise ValueError(f"depth={depth}: must be {form}, for bottleneck={bottleneck}")
        check_sizes(num_classes=num_classes, in_channels=in_channels, alpha=alpha)
        if not 0 <= p_last <= 1:
            raise ValueError(f"p_last={p_last}: must be in [0, 1]")
        expansion = 4 if bottleneck else 1
        channels = 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        pyramid = []
        for k in range(1, 3 * blocks + 1):
            planes = round(16 + k * alpha / (3 * blocks))
            stride = 2 if k in (blocks + 1, 2 * blocks + 1) else 1
            p = 1 - (1 - p_last) * k / (3 * blocks)
            out = expansion * planes
            layers = branch(channels, planes, stride, bottleneck)
            pyramid.append(PyramidBlock(layers, out - channels, stride, p))
            channels = out
        self.blocks = nn.Sequential(*pyramid)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = self.blocks(self.bn1(self.conv1(images)))
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))
