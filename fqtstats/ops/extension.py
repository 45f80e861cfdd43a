"""The compiled extension, and the list of its kernels.

This module alone imports the extension. Every operation also has a pure-torch fallback that gives identical numbers;
it runs on other devices, where the extension is not built, and where the environment variable ``FQTSTATS_NATIVE=0``
turns the extension off. ``FQTSTATS_ISA`` (``scalar``, ``avx2``, ``avx512``, ``avx512vnni``, ``avx512vbmi``) limits the
instruction set of the native kernels. Both are read once per process.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch  # noqa: F401  before the extension, which then shares torch's OpenMP thread pool

from fqtstats.errors import InputError

__all__ = ["Kernel", "isa", "kernels", "native_module"]


@functools.cache
def native_module() -> Any:
    """The compiled extension, or None where it is not in use.

    Raises:
        InputError: ``FQTSTATS_ISA`` names an instruction set that this machine does not have.
    """
    if os.environ.get("FQTSTATS_NATIVE", "1") == "0":
        return None
    try:
        native = importlib.import_module("fqtstats._native")
    except ImportError as error:
        warnings.warn(
            f"the compiled extension fqtstats._native cannot be imported ({error}); the slower pure-torch kernels give "
            "the same numbers. Install fqtstats with pip to build it, or set FQTSTATS_NATIVE=0 to silence this.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    try:
        native.isa()
    except ValueError as error:
        raise InputError(str(error)) from None
    return native


@dataclass(frozen=True, slots=True)
class Kernel:
    """One variant of one operation.

    Attributes:
        op: the operation.
        variant: an instruction set, or ``"torch"`` for the fallback.
        available: whether it runs on this machine.
        selected: whether calls on CPU tensors use it.
    """

    op: str
    variant: str
    available: bool
    selected: bool


def isa() -> str:
    """The instruction set that the native kernels may use, or ``"torch"`` where the extension is not in use."""
    native = native_module()
    return "torch" if native is None else str(native.isa())


def kernels() -> list[Kernel]:
    """Every variant of every operation that has a fallback, fastest first."""
    native = native_module()
    rows = [] if native is None else [Kernel(*row) for row in native.kernels()]
    listed: list[Kernel] = []
    for op in FALLBACKS:
        listed += [row for row in rows if row.op == op]
        listed.append(Kernel(op, "torch", True, native is None))
    return listed


FALLBACKS = ("philox_bits", "householder", "product8", "product1", "convolution8", "convolution1", "fused", "quantize")
"""Operations that can be had in torch operations, too; `peak`, which measures the processor, is none of them."""
