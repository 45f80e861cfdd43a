"""Residual networks.

Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; the bottleneck's stride is in
its 3x3 convolution, as in every current implementation (the paper has it in the first 1x1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fqtstats.models.initialization import kaiming_

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]


class _Block(nn.Module):
    """A residual branch, the shortcut (identity, or 1x1 convolution and BN where the shape changes), then ReLU."""

    def __init__(self, branch: nn.Sequential, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + (x if self.shortcut is None else self.shortcut(x)))


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        branch = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        super().__init__(branch, in_channels, width, stride)


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions; the output is four times as wide."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        branch = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        super().__init__(branch, in_channels, 4 * width, stride)


class ResNet(nn.Module):
    """A stem, four stages of widths 64 to 512, average pooling and a linear layer.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks per stage.
        channels: input channels.
        num_classes: classes.
        small: 3x3 stem without downsampling, for images of at most 64 pixels; else 7x7 with stride 2 and max pooling.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], channels: int, num_classes: int, small: bool
    ) -> None:
        super().__init__()
        stem: list[nn.Module] = [
            nn.Conv2d(channels, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(channels, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ]
        if not small:
            stem.append(nn.MaxPool2d(3, 2, 1))
        self.stem = nn.Sequential(*stem)
        stages, in_channels = [], 64
        for s, depth in enumerate(depths):
            stage = []
            for k in range(depth):
                stage.append(block(in_channels, 64 << s, 2 if s > 0 and k == 0 else 1))
                in_channels = block.expansion * (64 << s)
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(in_channels, num_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W], H and W >= 1, to logits [N, classes]."""
        return cast("Tensor", self.head(self.stages(self.stem(x)).mean((2, 3))))
