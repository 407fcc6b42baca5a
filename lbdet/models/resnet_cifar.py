"""The residual network for CIFAR's 32 x 32 pictures: 20 layers, 0.27 million weights.

    stage    channels  size  layers
    conv1       16      32   3x3
    layer1      16      32   3 blocks of two 3x3
    layer2      32      16   3 blocks of two 3x3, the first with stride 2
    layer3      64       8   3 blocks of two 3x3, the first with stride 2
    fc                   1   global average, linear

Where a block halves the size its shortcut takes every second pixel and appends channels of zeros (the paper's
option A), so shortcuts have no weights. Batch norm follows every convolution.

Reference:
    He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", section 4.2, arXiv 1512.03385.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions of the input to the input: `[N, C, H, W]` -> `[N, C', H / s, W / s]`."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        stride, new_channels = self.conv1.stride[0], out.shape[1] - x.shape[1]
        shortcut = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, new_channels))
        return self.relu(out + shortcut)


class ResNet20(nn.Module):
    """`[N, 3, H, W]` -> logits `[N, num_classes]`; H and W are 32 in the paper, others work."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, BasicBlock(channels, channels, 1), BasicBlock(channels, channels, 1))


def resnet20_cifar(num_classes: int) -> ResNet20:
    """Build the network with random weights, drawn from torch's global generator."""
    return ResNet20(num_classes)
