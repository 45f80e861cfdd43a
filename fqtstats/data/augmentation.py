"""Random changes of training images. The numbers of a sample depend on (seed, epoch, index of the sample) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqtstats.random import stream

__all__ = ["CROP_NUMBERS", "CropAndFlip", "crop_box", "numbers"]

ATTEMPTS = 10
CROP_NUMBERS = 2 * ATTEMPTS + 2
"""Random numbers that :func:`crop_box` takes."""


def numbers(indices: Tensor, count: int, *, seed: int, epoch: int) -> Tensor:
    """Uniform numbers in [0, 1): float64 [N, count], the row of a sample from a stream of its own.

    Args:
        indices: of the samples in the split, int64 [N].
        count: numbers for each sample.
        seed, epoch: of the experiment, and which pass over the data.
    """
    streams = (
        stream(seed=seed, step=epoch, layer="data", site="augmentation/train", call=index) for index in indices.tolist()
    )
    # float32 would round products such as 9 (1 - 2^-24) up to 9.
    return torch.stack([s.uniform(count).double() for s in streams])


@dataclass(frozen=True)
class CropAndFlip:
    """Shifts by up to ``pad`` pixels in both directions, with zeros from outside, and mirrors half of the images.

    On normalized images, whose mean is zero. Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR
    2016, section 4.2: 4 pixels on each side, a random crop of that or of its mirror image.

    Attributes:
        pad: pixels on each side.
    """

    pad: int = 4
    count = 3
    """Random numbers for each sample."""

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Images [N, C, H, W] of the same shape, for ``drawn`` [N, 3] in [0, 1)."""
        height, width = images.shape[2:]
        padded = torch.nn.functional.pad(images, [self.pad] * 4)
        shifts = (drawn[:, :2] * (2 * self.pad + 1)).long().tolist()
        cropped = torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, (top, left) in zip(padded, shifts, strict=True)
            ]
        )
        return torch.where(drawn[:, 2].view(-1, 1, 1, 1) < 0.5, cropped.flip(3), cropped)


def crop_box(size: tuple[int, int], drawn: Sequence[float]) -> tuple[int, int, int, int]:
    """A random part of an image: 8 to 100 % of its area, sides in a ratio of 3/4 to 4/3.

    Source: C. Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6. As usual (torchvision's
    RandomResizedCrop) the logarithm of the ratio is uniform, and after ten parts that stick out of the image it is the
    largest one in the centre whose ratio is allowed.

    Args:
        size: width and height of the image in pixels.
        drawn: :data:`CROP_NUMBERS` numbers in [0, 1).

    Returns:
        left, top, right and bottom.
    """
    width, height = size
    for attempt in range(ATTEMPTS):
        area = width * height * (0.08 + 0.92 * drawn[2 * attempt])
        ratio = math.exp(math.log(4 / 3) * (2 * drawn[2 * attempt + 1] - 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(u * (free + 1)) for u, free in zip(drawn[-2:], (width - w, height - h), strict=True))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
