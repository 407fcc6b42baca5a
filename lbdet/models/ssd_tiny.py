"""A small SSD for small pictures: 0.3 million parameters, trained from nothing in a minute on two cores.

It is made of torchvision's parts, so what holds for torchvision's SSD300 (losses, anchors, post-processing)
holds for it. Batch norm follows every convolution but the predictors.

    stage    stride  channels  layers                                    predictors at 96 x 96
    stem          2        16  3x3
    stage1        4        32  3x3
    stage2        8        64  3x3, residual block of two 3x3            12 x 12 x 2 anchors
    stage3       16       128  3x3, residual block of two separable      6 x 6 x 2
    stage4       32       128  separable                                 3 x 3 x 2
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import Conv2dNormActivation

SIZE = (96, 96)
"""Width and height that every picture is resized to."""


class Separable(nn.Sequential):
    """A depthwise 3x3 convolution with the stride, and a pointwise one; each has batch norm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(
            Conv2dNormActivation(channels_in, channels_in, 3, stride, groups=channels_in),
            Conv2dNormActivation(channels_in, channels_out, 1),
        )


class Residual(nn.Module):
    """Add the output of two layers to their input; the shape stays."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class TinyBackbone(nn.Module):
    """Five stages that each halve a `[N, 3, H, W]`; returns the last three, with strides 8, 16 and 32."""

    out_channels = (64, 128, 128)

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, 16, 3, 2)
        self.stage1 = Conv2dNormActivation(16, 32, 3, 2)
        self.stage2 = nn.Sequential(
            Conv2dNormActivation(32, 64, 3, 2),
            Residual(Conv2dNormActivation(64, 64, 3), Conv2dNormActivation(64, 64, 3)),
        )
        self.stage3 = nn.Sequential(
            Conv2dNormActivation(64, 128, 3, 2),
            Residual(Separable(128, 128), Separable(128, 128)),
        )
        self.stage4 = Separable(128, 128, 2)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        stride8 = self.stage2(self.stage1(self.stem(x)))
        stride16 = self.stage3(stride8)
        stride32 = self.stage4(stride16)
        return OrderedDict([("stride8", stride8), ("stride16", stride16), ("stride32", stride32)])


def ssd_tiny(num_classes: int) -> SSD:
    """Build the detector with random weights, drawn from torch's global generator.

    Pictures of any size are resized to 96 x 96. The anchors are squares of 18 to 50 % of a side.

    Args:
        num_classes: with background, so at least 2.
    """
    backbone = TinyBackbone()
    anchors = DefaultBoxGenerator([[], [], []], scales=[0.18, 0.28, 0.42, 0.60])
    head = SSDHead(list(backbone.out_channels), anchors.num_anchors_per_location(), num_classes)
    return SSD(backbone, anchors, SIZE, num_classes, head=head)
