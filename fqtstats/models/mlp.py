"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

__all__ = ["mlp"]


def mlp(input_shape: Sequence[int], num_classes: int, width: int = 128) -> nn.Sequential:
    """Two hidden ReLU layers: inputs [N, *input_shape], logits [N, classes]."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )
