"""Pre-activation residual networks for small images.

Source: K. He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, fig. 4(e); widths and depths as in the
CIFAR networks of "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fqtstats.models.initialization import kaiming_

__all__ = ["PreActBlock", "PreActResNet"]


class PreActBlock(nn.Module):
    """BN, ReLU, conv, BN, ReLU, conv, plus the shortcut.

    The shortcut is the identity, or, where width or resolution changes, a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        return cast("Tensor", self.conv2(F.relu(self.norm2(self.conv1(activated)))) + residual)


class PreActResNet(nn.Module):
    """Three stages of widths 16, 32, 64 and ``depth = 6 blocks + 2`` layers.

    Args:
        channels: input channels.
        num_classes: classes.
        blocks: blocks per stage (3: 20 layers, 9: 56 layers).
    """

    def __init__(self, channels: int, num_classes: int, blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        stages, width = [], 16
        for out, first_stride in ((16, 1), (32, 2), (64, 2)):
            stage = []
            for k in range(blocks):
                stage.append(PreActBlock(width, out, first_stride if k == 0 else 1))
                width = out
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W], H and W >= 1, to logits [N, classes]."""
        x = F.relu(self.norm(self.stages(self.conv(x))))
        return cast("Tensor", self.head(x.mean((2, 3))))
