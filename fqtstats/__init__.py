"""A measuring instrument for fully quantized training: bias and variance of quantized gradients."""

from fqtstats import policies
from fqtstats.layers import Handle, prepare_, quantized
from fqtstats.measurement import measure
from fqtstats.policy import Policy
from fqtstats.quantizers import QUANTIZERS, Quantized, Quantizer, quantizer
from fqtstats.random import Stream, stream
from fqtstats.results import Result, load

__version__ = "0.1.0"

__all__ = [
    "QUANTIZERS",
    "Handle",
    "Policy",
    "Quantized",
    "Quantizer",
    "Result",
    "Stream",
    "load",
    "measure",
    "policies",
    "prepare_",
    "quantized",
    "quantizer",
    "stream",
]
