"""VGG-16 with batch normalization.

Source: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
table 1, configuration D; batch normalization after every convolution as usual.
"""

from __future__ import annotations

from torch import nn

from fqtstats.models.initialization import kaiming_

__all__ = ["vgg16"]

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, convolutions; each ends with 2x2 max pooling


def vgg16(channels: int, num_classes: int, size: tuple[int, int], small: bool) -> nn.Sequential:
    """Images [N, C, H, W] to logits [N, classes].

    Args:
        channels: input channels.
        num_classes: classes.
        size: H and W; a stage pools only while at least 2 pixels are left in both directions.
        small: one linear layer after global average pooling, for images of at most 64 pixels; else the paper's three.
    """
    layers: list[nn.Module] = []
    height, width = size
    for out, convolutions in STAGES:
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        if min(height, width) >= 2:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    if small:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    else:
        layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
        layers += [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(0.5)]
        layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4096, num_classes)]
    model = nn.Sequential(*layers)
    kaiming_(model)
    return model
