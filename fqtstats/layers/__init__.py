"""Quantized layers and how they get into a model."""

from fqtstats.layers.fusion import fuse_
from fqtstats.layers.modules import QuantConv1d, QuantConv2d, QuantLinear
from fqtstats.layers.swap import BACKENDS, Handle, Unquantized, prepare_, quantized

__all__ = [
    "BACKENDS",
    "Handle",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "Unquantized",
    "fuse_",
    "prepare_",
    "quantized",
]
