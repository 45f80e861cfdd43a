"""How well a network predicts a whole split."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fqtstats import models
from fqtstats.data.base import Data

__all__ = ["Score", "evaluate", "evaluation_split", "right"]

_BATCH = 256
"""Samples at a time."""


class Score(NamedTuple):
    """Mean cross entropy (nats) and the share of right predictions, over all targets (for tokens: all positions)."""

    loss: float
    accuracy: float


def evaluation_split(data: Data) -> str | None:
    """The split that is not trained on; None if there is none."""
    return next((split for split in ("test", "val") if split in data.splits), None)


def right(logits: torch.Tensor, targets: torch.Tensor) -> int:
    """Number of targets at which the largest logit is right."""
    return int((logits.argmax(-1) == targets).sum())


def evaluate(model: nn.Module, data: Data, split: str = "test") -> Score:
    """The model's score on a split, in evaluation mode; its training mode is put back.

    Raises:
        InputError: logits and targets do not match.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    loss, found, count = 0.0, 0, 0
    try:
        with torch.no_grad():
            for inputs, targets in data.batches(_BATCH, seed=0, split=split):
                logits, wanted = model(inputs.to(device)), targets.to(device)
                loss += float(models.cross_entropy(logits, wanted)) * targets.numel()
                found += right(logits, wanted)
                count += targets.numel()
    finally:
        model.train(was_training)
    return Score(loss / count, found / count)
