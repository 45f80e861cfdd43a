"""Integer matrix products of codes of any width, by native kernels.

Their equation, their layouts and why they are exact: ``native/kernels/product8/product8.h``.
"""

from __future__ import annotations

import torch

from fqtstats.errors import InputError
from fqtstats.ops.codes import Codes, array
from fqtstats.ops.extension import native_module

__all__ = ["integer_product", "linear", "linear_grad_input", "linear_grad_weight"]

_INT32_MAX = 2**31 - 1


def linear(x: Codes, w: Codes, bias: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.linear`, for checked arguments; None where magnitudes do not fit bytes."""
    return _product(x, w, bias, x.shape[0], w.shape[0], x.shape[1], True, True)


def linear_grad_input(g: Codes, w: Codes) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.linear_grad_input`, likewise."""
    return _product(g, w, None, g.shape[0], w.shape[1], g.shape[1], True, False)


def linear_grad_weight(g: Codes, x: Codes) -> torch.Tensor | None:
    """:func:`fqtstats.ops.products.linear_grad_weight`, likewise."""
    return _product(g, x, None, g.shape[1], x.shape[1], g.shape[0], False, False)


def integer_product(
    a: torch.Tensor | Codes, b: torch.Tensor | Codes, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``sum_k a[m, k] b[n, k]``, exact: ``[M, N]`` int32.

    Args:
        a: ``[M, K]`` uint8 or int8 on the CPU, contiguous along either axis (so that a transposed view will do); or
            codes, of any width, which stand for themselves: steps and zero points are left aside.
        b: ``[N, K]``, likewise.
        out: ``[M, N]`` int32, contiguous; where the result goes.

    Raises:
        InputError: the shapes do not fit, or K is so large that int32 could overflow: with ``|a| <= A`` and
            ``|b| <= B`` for every value of their types, K may be ``(2^31 - 1) // (A B)`` at most: 33025 for uint8
            times uint8, 65793 for uint8 times int8, 131071 for int8 times int8.
        TypeError: an operand is neither uint8 nor int8 nor codes, or not on the CPU.
        ValueError: an operand is not contiguous along an axis.
    """
    (a_data, a_bits, a_most), (b_data, b_bits, b_most) = _raw("a", a), _raw("b", b)
    a_shape, b_shape = tuple(a.shape), tuple(b.shape)
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[1] != b_shape[1]:
        raise InputError(f"expected a [M, K] and b [N, K], got {list(a_shape)} and {list(b_shape)}")
    (m, k), n = a_shape, b_shape[0]
    limit = _INT32_MAX // (a_most * b_most)
    if k > limit:
        raise InputError(
            f"K = {k} may overflow int32: with values up to {a_most} and {b_most} in size, K may be {limit} at most; "
            "add up products of slices of K in int64"
        )
    if out is None:
        out = torch.empty(m, n, dtype=torch.int32, device="cpu")
    native = native_module()
    if native is None:
        return out.copy_(_exact(a) @ _exact(b).t())
    native.product8_integer(a_data.numpy(), b_data.numpy(), k, a_bits, b_bits, out.numpy(), torch.get_num_threads())
    return out


def _raw(name: str, x: torch.Tensor | Codes) -> tuple[torch.Tensor, int, int]:
    """The data, the width of its codes (0: plain integers), the largest magnitude."""
    if isinstance(x, Codes):
        return x.data, x.bits, (1 << x.bits) - 1
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.dtype not in (torch.uint8, torch.int8):
        got = f"{x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be uint8 or int8 on the CPU, or codes, got {got}")
    return x, 0, 128 if x.dtype == torch.int8 else 255


def _exact(x: torch.Tensor | Codes) -> torch.Tensor:
    return (x.unpack() if isinstance(x, Codes) else x).double()


def _product(
    a: Codes,
    b: Codes,
    bias: torch.Tensor | None,
    m: int,
    n: int,
    k: int,
    a_inner: bool,
    b_inner: bool,
    variant: str | None = None,
) -> torch.Tensor | None:
    """``[m, n]``, of operands that the contracted index runs along in memory (inner), or across."""
    if not (a.fits_bytes and b.fits_bytes):
        return None
    out = torch.empty(m, n, dtype=torch.float32, device="cpu")
    native_module().product8_affine(
        a.data.numpy(),
        b.data.numpy(),
        k,
        a.bits,
        b.bits,
        a.affine.magnitudes,
        b.affine.magnitudes,
        a_inner,
        b_inner,
        *a.affine.arrays(),
        *b.affine.arrays(),
        array(bias),
        out.numpy(),
        torch.get_num_threads(),
        variant,
    )
    return out
