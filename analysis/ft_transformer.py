"""Measuring a model that this project did not write: the FT-Transformer, in its authors' own package.

Run from the root of the repository::

    pip install rtdl_revisiting_models
    fqtstats measure --model analysis.ft_transformer:model --data analysis.ft_transformer:data

Source: Y. Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data" (arXiv 2106.11959).
"""

from __future__ import annotations

import torch
from rtdl_revisiting_models import FTTransformer
from sklearn.datasets import load_digits
from torch import nn


class OnFeatures(nn.Module):
    """Calls the FT-Transformer with one argument, as the measurement does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, 10]`` of features ``[N, 64]``; there are no categorical ones."""
        logits: torch.Tensor = self.net(features, None)
        return logits


def model() -> nn.Module:
    """A small FT-Transformer for the 64 pixels of a digit, as initialized."""
    options = {**FTTransformer.get_default_kwargs(n_blocks=1), "d_block": 32, "attention_n_heads": 4}
    return OnFeatures(FTTransformer(n_cont_features=64, cat_cardinalities=[], d_out=10, **options))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels ``[N, 64]`` and digits ``[N]``."""
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
