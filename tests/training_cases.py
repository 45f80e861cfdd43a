"""Training batches that the tests of backends share: a model, a batch and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fqtstats import models
from fqtstats.data import data
from fqtstats.models.preact_resnet import PreActResNet


class Digits(nn.Module):
    """Strides, a depthwise and an even "same" convolution, and a convolution on a reflected border."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.even = nn.Conv2d(12, 12, 2, padding="same")
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.rows = nn.Conv1d(12, 8, 3, padding=2, dilation=2)
        self.out = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.down(x))
        x = x + self.depthwise(F.relu(self.even(x)))
        return self.out(self.rows(x.flatten(2)).mean(2))


def case(name, samples=24):
    """Model, batch and loss of a training step."""
    source = data("text" if name == "transformer" else "digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if name == "cnn":
            model = Digits()
        elif name == "resnet":
            model = PreActResNet(1, 10, 1)
        else:
            model = models.build(name, source, seed=0)
    batch = next(iter(source.batches(4 if name == "transformer" else samples, seed=0)))
    return model, batch, models.loss
