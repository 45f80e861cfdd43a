"""Integer matrix products against torch's own: ``torch._int_mm`` (int8, oneDNN or MKL) and ``torch.mm`` (float32)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fqtstats.benchmarks import machine
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.determinism import seeded
from fqtstats.layers.operand import Operand
from fqtstats.layers.product import LinearProduct, compute
from fqtstats.ops import product1, product8, products
from fqtstats.ops.codes import Affine, Codes, Kept
from fqtstats.quantizers.storage import Stored

__all__ = ["gemm_cases"]

INT_MM, MM, WHOLE = "torch._int_mm", "torch.mm float32", "the same of all rows"

SHAPES = ((4096, 512, 576), (4096, 1024, 1024), (1024, 1024, 4608))
"""M, N, K."""

KEPT = 4
"""Of so many rows, activation gradient pruning at 4 bits keeps one."""

Operands = Callable[[int, int, int], Callable[[], Tensor]]


def gemm_cases() -> list[Case]:
    """Packing of both operands into the kernels' panels is part of every call of ours."""
    kinds: list[tuple[str, Operands, str, str, float | None, float | None]] = [
        ("u8 x s8", _bytes, "int8", INT_MM, 0.95, 1.1),
        ("u8 x s8", _bytes, "int8", MM, 7.0, None),
        ("int4 x int8", lambda m, n, k: _codes(m, n, k, 8, 4), "int8", INT_MM, 0.95, 1.1),
        ("int4 x int4", lambda m, n, k: _codes(m, n, k, 4, 4), "int8", INT_MM, None, None),
        ("1 x 1 bit", lambda m, n, k: _codes(m, n, k, 1, 1), "bit", MM, 35.0, 50.0),
        ("1 x 1 bit", lambda m, n, k: _codes(m, n, k, 1, 1), "bit", INT_MM, 4.5, 6.0),
        ("4 x 1 bit", lambda m, n, k: _codes(m, n, k, 4, 1), "bit_table", INT_MM, 1.3, 3.5),
        ("2 x 1 bit", lambda m, n, k: _codes(m, n, k, 2, 1), "bit", INT_MM, None, None),
        ("log4 x int4", _logarithmic, "int8", INT_MM, None, None),
        ("log4 x int4", _logarithmic, "int8", MM, None, None),
        ("pruned 4 x 1 bit", _pruned, "bit_table", MM, None, None),
        ("pruned 4 x 1 bit", _pruned, "bit_table", WHOLE, None, None),
    ]
    cases = []
    for threads in machine.thread_counts():
        for name, operands, peak, baseline, must, aim in kinds:
            for m, n, k in SHAPES:
                cases.append(
                    Case(
                        name=f"{name} product",
                        shape=f"{m}x{n}x{k}",
                        threads=threads,
                        baseline=baseline,
                        pair=_pair(operands, baseline, m, n, k),
                        must=must if threads == 1 else None,
                        aim=aim if threads == 1 else None,
                        work=2.0 * (len(range(0, m, KEPT)) if operands is _pruned else m) * n * k,
                        peak=peak,
                    )
                )
    return cases


def _pair(operands: Operands, baseline: str, m: int, n: int, k: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        with seeded(0):
            ours = operands(m, n, k)
            if baseline == MM:
                a, b, product = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
                yield ours, lambda: torch.mm(a, b, out=product)
            elif baseline == WHOLE:
                yield ours, _input_gradient(m, n, k, None)
            else:
                signed = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n))]
                yield ours, lambda: torch._int_mm(*signed)

    return pair


def _logarithmic(m: int, n: int, k: int) -> Callable[[], Tensor]:
    zero = torch.tensor([7], dtype=torch.int32)
    g = Codes.pack(torch.randint(0, 15, (m, k), dtype=torch.uint8), 4, Affine(torch.ones(1), zero, magnitudes=7))
    w = Codes.pack(torch.randint(0, 16, (k, n), dtype=torch.uint8), 4, Affine(torch.ones(1), zero))
    return lambda: products.linear_grad_input(g, w)


def _pruned(m: int, n: int, k: int) -> Callable[[], Tensor]:
    return _input_gradient(m, n, k, Kept(0, torch.arange(0, m, KEPT), m))


def _input_gradient(m: int, n: int, k: int, kept: Kept | None) -> Callable[[], Tensor]:
    """Of the rows that are kept (None: all); the others of the result are zeros."""
    rows = m if kept is None else len(kept.indices)
    scales = Affine(torch.rand(rows), None, torch.randn(rows), 0)
    g = Codes.pack(torch.randint(0, 16, (rows, k), dtype=torch.uint8), 4, scales)
    w = Codes.pack(torch.randint(0, 2, (k, n), dtype=torch.uint8), 1, Affine(torch.ones(1), None, -torch.ones(1) / 2))
    left, right = Operand(Stored(g, kept=kept)), Operand(Stored(w))
    return lambda: compute(LinearProduct(), "grad_input", left, right, (m, n))


def _bytes(m: int, n: int, k: int) -> Callable[[], Tensor]:
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return lambda: product8.integer_product(a, b)


def _codes(m: int, n: int, k: int, a_bits: int, b_bits: int) -> Callable[[], Tensor]:
    affine = Affine(torch.ones(1))
    a = Codes.pack(torch.randint(0, 2**a_bits, (m, k), dtype=torch.uint8), a_bits, affine)
    b = Codes.pack(torch.randint(0, 2**b_bits, (n, k), dtype=torch.uint8), b_bits, affine)
    module = product1 if b_bits == 1 else product8
    return lambda: module.integer_product(a, b)
