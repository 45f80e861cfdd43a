"""Simulated against native: the same codes, and products within a proven bound of each other.

One training step runs on the native backend. Wherever a layer quantizes or multiplies, the simulated backend does the
same on the same numbers, with the same stream:

* codes: the bytes in storage (with what surrounds images) and the numbers that they decode to must be equal;
* products: with ``u = 2^-24``, K terms per sum, and ``M = sum (|ca - za| sa + |oa|) (|cb - zb| sb + |ob|) + |bias|``,

      |native - simulated| <= (K + 16) u M (1 + 2 K u)

  of which the native formula has 6 (``fqtstats/ops/products.py``), decoding the simulated operands 4, and summing K
  products in float32, in any order, K + 2. Where both are float32 sums of the same numbers it is ``2 K + 16``.
* with a transform of the rows (BHQ), undone after the product by the one and before it by the other, M is replaced by
  ``9 |T^-1| M``, and 16 grows by ``2 (log2 N + 8)``, the roundings of the transform: its intermediate sums are at most
  9 times what ``|T^-1|`` gives (groups of three rows), and ``(|T^-1| M)_i <= sqrt(N sum_j (T^-1_ij M_j)^2)``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from fqtstats.capture import LossFunction, Session
from fqtstats.determinism import single_thread
from fqtstats.layers import real
from fqtstats.layers.operand import Operand, images
from fqtstats.layers.product import PRODUCTS, Product, ProductName, how, integer
from fqtstats.layers.state import Call
from fqtstats.layers.swap import Skip, quantized
from fqtstats.ops.codes import Codes
from fqtstats.policy import Policy, QuantizerLike
from fqtstats.quantizers.base import Transform
from fqtstats.quantizers.storage import has_codes

__all__ = ["Parity", "parity"]

_PRODUCT_OF: dict[str, ProductName] = {
    "activation": "forward",
    "weight": "forward",
    "grad_input": "grad_input",
    "grad_weight": "grad_weight",
}


@dataclass(frozen=True, eq=False)
class Parity:
    """How the two backends compare on one batch.

    Attributes:
        table: one row per layer and product: ``layer``, ``product`` (``forward``, ``grad_input``, ``grad_weight``),
            ``arithmetic`` of the native one, ``codes`` compared (of input and weight, or of the incoming gradient),
            how many are ``differing``, ``elements`` of the result, the largest ``error`` in units of its bound, and in
            ``ulps`` of the largest element; ``ok``: no code differs, and the error is within its bound.
    """

    table: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return bool(self.table["ok"].all())

    def as_rows(self) -> list[dict[str, Any]]:
        """The table as plain data, one dictionary per row."""
        return [
            {str(name): value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
            for row in self.table.to_dict("records")
        ]


def parity(
    model: nn.Module,
    batch: object,
    loss_fn: LossFunction,
    policy: Policy,
    seed: int = 0,
    *,
    skip: Skip | None = None,
) -> Parity:
    """Run one forward and one quantized backward pass on the native backend and check it against the simulated one.

    Args:
        model: any module; it is not changed.
        batch: anything ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        policy: the quantizers.
        seed: seed of all random numbers.
        skip: layers to leave in full precision.

    Raises:
        InputError: bad input, as :func:`fqtstats.measure`.
    """
    inspector = _Inspector()
    with single_thread(), quantized(model, policy, skip, "native", seed) as handle:
        handle.shared.inspector = inspector
        with Session(model, handle, batch, loss_fn, seed) as session:
            session.draw(0)
        rows = [
            {"layer": layer, "product": name, **inspector.rows[layer, name].as_dict()}
            for layer in handle.layers
            for name in PRODUCTS
            if (layer, name) in inspector.rows
        ]
    return Parity(pd.DataFrame(rows))


@dataclass
class _Row:
    arithmetic: set[str] = field(default_factory=set)
    codes: int = 0
    differing: int = 0
    elements: int = 0
    error: float = 0.0
    ulps: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        ok = self.differing == 0 and self.error <= 1
        return asdict(self) | {"arithmetic": "; ".join(sorted(self.arithmetic)), "ok": ok}


@dataclass
class _Inspector:
    """Compares as the layers compute; calls of one layer share a row."""

    rows: dict[tuple[str, ProductName], _Row] = field(default_factory=dict)

    def _row(self, call: Call, name: ProductName) -> _Row:
        return self.rows.setdefault((call.layer.name, name), _Row())

    def operand(self, call: Call, place: str, q: QuantizerLike, x: torch.Tensor, draw: int, operand: Operand) -> None:
        if operand.stored is None:
            return
        assert has_codes(q)
        row = self._row(call, _PRODUCT_OF[place])
        codes = operand.stored.codes
        expected = q.encode(x, call.stream(place, draw)).codes().view(codes.shape)  # type: ignore[attr-defined]
        packed = Codes.pack(expected, codes.bits, codes.affine, codes.pad)
        numbers = images(call.quantize(q, place, x, draw))
        row.codes += expected.numel()
        row.differing += max(int((packed.data != codes.data).sum()), int((numbers != operand.decode()).sum()))

    def product(
        self, call: Call, name: ProductName, product: Product, a: Operand, b: Operand, last: Any, result: torch.Tensor
    ) -> None:
        row = self._row(call, name)
        row.arithmetic.add(how(product, name, a, b, result.dtype))
        simulated = getattr(product, name)(real, a.decode(), b.decode(), last).double()
        difference = (result.double() - simulated).abs()
        bound = _bound(product, name, a, b, last, result)
        units = torch.where(difference == 0, 0.0, difference / bound)  # NaN stays NaN
        row.elements += difference.numel()
        row.error = max(row.error, float(units.nan_to_num(nan=math.inf).max()))
        ulp = torch.finfo(result.dtype).eps * float(simulated.abs().max())
        row.ulps = max(row.ulps, float(difference.max()) / ulp if ulp > 0 else 0.0)


def _bound(
    product: Product, name: ProductName, a: Operand, b: Operand, last: Any, result: torch.Tensor
) -> torch.Tensor:
    """The module's bound on the difference, elementwise, float64."""
    on_codes = integer(product, name, a, b)
    left, right = (_magnitude(a), _magnitude(b)) if on_codes else (a.decode().double().abs(), b.decode().double().abs())
    bias = last.double().abs() if name == "forward" and last is not None else None
    size: torch.Tensor = getattr(product, name)(real, left, right, None if name == "forward" else last)
    unit = torch.finfo(result.dtype).eps / 2
    terms = product.terms(name, tuple(a.shape), tuple(b.shape))
    roundings = (terms if on_codes else 2 * terms) + 16
    transform = a.stored.transform if on_codes and a.stored is not None else None
    if transform is not None:
        roundings += 2 * (math.ceil(math.log2(len(left))) + 8)
        size = _spread(size, transform)
    if bias is not None:
        size = size + bias.view(1, -1, *[1] * (size.dim() - 2))
    return size * (roundings * unit * (1 + 2 * terms * unit))


def _magnitude(operand: Operand) -> torch.Tensor:
    """``|code - zero| step + |offset|``, float64."""
    assert operand.stored is not None
    codes = operand.stored.codes
    affine, dim = codes.affine, len(codes.shape)
    size = codes.centered().abs_() * affine.along(affine.step.double(), dim)
    return size if affine.offset is None else size + affine.along(affine.offset.double().abs(), dim)


def _spread(size: torch.Tensor, transform: Transform) -> torch.Tensor:
    """At least ``9 |T^-1| size`` on the rows."""
    rows = len(size)
    squared = transform.inverse_squared(size.square().reshape(rows, 1, -1))
    return 9 * (rows * squared).sqrt().view(size.shape)
