"""Initialization shared by the convolutional networks."""

from __future__ import annotations

from torch import nn

__all__ = ["kaiming_"]


def kaiming_(model: nn.Module) -> None:
    """Fill every convolution with normal(0, 2 / fan_out), in place, from the global generator.

    Source: K. He et al., "Delving Deep into Rectifiers", ICCV 2015, eq. (14).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
