"""A measuring instrument for fully quantized training: bias and variance of quantized gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fqtstats import policies
    from fqtstats.backends import Parity, parity
    from fqtstats.comparison import Comparison, compare, load_comparison
    from fqtstats.layers import Handle, fuse_, prepare_, quantized
    from fqtstats.measurement import measure
    from fqtstats.planning import plan
    from fqtstats.plans import Plan, load_plan
    from fqtstats.policy import Policy
    from fqtstats.profiles import Profile, load_profile
    from fqtstats.profiling import profile
    from fqtstats.quantizers import QUANTIZERS, Quantized, Quantizer, quantizer
    from fqtstats.random import Stream, stream
    from fqtstats.results import Result, load
    from fqtstats.training.loop import train
    from fqtstats.trainings import Training, load_training
    from fqtstats.verdicts.expectation import exact_mean
    from fqtstats.verdicts.products import ProductsReport, check_products
    from fqtstats.verdicts.unbiasedness import Verdict, assert_unbiased, check_unbiased

__version__ = "0.1.0"

__all__ = [
    "QUANTIZERS",
    "Comparison",
    "Handle",
    "Parity",
    "Plan",
    "Policy",
    "ProductsReport",
    "Profile",
    "Quantized",
    "Quantizer",
    "Result",
    "Stream",
    "Training",
    "Verdict",
    "assert_unbiased",
    "check_products",
    "check_unbiased",
    "compare",
    "exact_mean",
    "fuse_",
    "load",
    "load_comparison",
    "load_plan",
    "load_profile",
    "load_training",
    "measure",
    "parity",
    "plan",
    "policies",
    "prepare_",
    "profile",
    "quantized",
    "quantizer",
    "stream",
    "train",
]

# Imported when first asked for: torch takes seconds, which `fqtstats --help` and a mistyped option should not.
_HOMES = {
    "fqtstats.backends": ("Parity", "parity"),
    "fqtstats.comparison": ("Comparison", "compare", "load_comparison"),
    "fqtstats.layers": ("Handle", "fuse_", "prepare_", "quantized"),
    "fqtstats.measurement": ("measure",),
    "fqtstats.planning": ("plan",),
    "fqtstats.plans": ("Plan", "load_plan"),
    "fqtstats.policy": ("Policy",),
    "fqtstats.profiles": ("Profile", "load_profile"),
    "fqtstats.profiling": ("profile",),
    "fqtstats.quantizers": ("QUANTIZERS", "Quantized", "Quantizer", "quantizer"),
    "fqtstats.random": ("Stream", "stream"),
    "fqtstats.results": ("Result", "load"),
    "fqtstats.training.loop": ("train",),
    "fqtstats.trainings": ("Training", "load_training"),
    "fqtstats.verdicts.expectation": ("exact_mean",),
    "fqtstats.verdicts.products": ("ProductsReport", "check_products"),
    "fqtstats.verdicts.unbiasedness": ("Verdict", "assert_unbiased", "check_unbiased"),
}


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("fqtstats.policies")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'fqtstats' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
