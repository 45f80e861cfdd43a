"""Operations with native kernels, each with a pure-torch fallback that gives identical numbers."""

from fqtstats.ops.extension import Kernel, isa, kernels, native_module
from fqtstats.ops.philox import philox_bits, philox_bits_torch

__all__ = ["Kernel", "isa", "kernels", "native_module", "philox_bits", "philox_bits_torch"]
