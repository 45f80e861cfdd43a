"""Handwritten digits: 8 x 8 grey images embedded in scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from fqtstats.data.base import InMemory

__all__ = ["digits"]


def digits() -> InMemory:
    """1797 images [1, 8, 8] of 10 classes; every fifth one, from the first, is a test image (1437 train, 360 test).

    The source lists its images writer by writer, so both splits see the same writers, as in a random split. Pixels
    are standardized by the mean and standard deviation over all pixels of the training images.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (its test set).
    """
    pixels, labels = load_digits(return_X_y=True)
    is_test = np.arange(len(labels)) % 5 == 0
    mean, std = pixels[~is_test].mean(), pixels[~is_test].std()
    images = torch.from_numpy(((pixels - mean) / std).astype(np.float32)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    where = {"train": torch.from_numpy(~is_test), "test": torch.from_numpy(is_test)}
    return InMemory(
        name="digits",
        kind="image",
        num_classes=10,
        inputs={split: images[mask] for split, mask in where.items()},
        targets={split: targets[mask] for split, mask in where.items()},
    )
