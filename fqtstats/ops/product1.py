"""Native matrix products of codes, one operand of 1 bit: population counts, or look-ups in tables of partial sums.

The operands' bits beyond a row's last code must be 0, as :class:`~fqtstats.ops.codes.Codes` prescribes.
"""

from __future__ import annotations

import torch

from fqtstats.errors import InputError
from fqtstats.ops.codes import Codes, array
from fqtstats.ops.extension import native_module

__all__ = ["PAIRS", "integer_product", "linear", "linear_grad_input", "linear_grad_weight"]

PAIRS = frozenset({(1, 1), (1, 2), (1, 4), (2, 1), (4, 1)})
"""Widths of the two operands that have a kernel."""


def linear(x: Codes, w: Codes, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """``y = x w^T + bias``; None for other widths."""
    return _product(x, w, False, False, bias)


def linear_grad_input(g: Codes, w: Codes) -> torch.Tensor | None:
    """``dx = g w``; None for other widths."""
    return _product(g, w, False, True, None)


def linear_grad_weight(g: Codes, x: Codes) -> torch.Tensor | None:
    """``dw = g^T x``; None for other widths."""
    return _product(g, x, True, True, None)


def integer_product(a: Codes, b: Codes, *, signs: bool = False, variant: str | None = None) -> torch.Tensor:
    """The sums ``sum_k a[m, k] b[n, k]`` of the codes themselves.

    Args:
        a: ``[M, K]``.
        b: ``[N, K]``.
        signs: of ``2 a - 1`` and ``2 b - 1`` instead; both have 1 bit.
        variant: instruction set; by default the fastest.

    Returns:
        ``[M, N]`` int32.

    Raises:
        InputError: the widths have no kernel, or the extension is not in use.
        TypeError: an operand is no codes.
    """
    for name, operand in (("a", a), ("b", b)):
        if not isinstance(operand, Codes):
            raise TypeError(f"{name} must be codes, got {type(operand).__name__}")
    native = native_module()
    if native is None or (a.bits, b.bits) not in PAIRS:
        raise InputError(
            f"no native product of {a.bits}-bit and {b.bits}-bit codes; widths {sorted(PAIRS)} have one where the "
            "extension is in use"
        )
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device="cpu")
    operands = *_codes(a, False), *_codes(b, False)
    native.product1_integers(*operands, signs, torch.get_num_threads(), out.numpy(), variant)
    return out


def _product(
    a: Codes, b: Codes, contract_a: bool, contract_b: bool, bias: torch.Tensor | None, variant: str | None = None
) -> torch.Tensor | None:
    """The product; ``contract_*`` says whether the contracted axis is axis 0 of the operand."""
    if (a.bits, b.bits) not in PAIRS or a.affine.magnitudes or b.affine.magnitudes:
        return None
    out = torch.empty(a.shape[int(contract_a)], b.shape[int(contract_b)], dtype=torch.float32, device="cpu")
    operands = *_codes(a, contract_a), *a.affine.arrays(), *_codes(b, contract_b), *b.affine.arrays()
    native_module().product1_multiply(*operands, array(bias), torch.get_num_threads(), out.numpy(), variant)
    return out


def _codes(x: Codes, contract_rows: bool) -> tuple[object, ...]:
    return x.data.numpy(), x.shape[1], x.bits, contract_rows
