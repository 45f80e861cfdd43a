"""Integer matrix products against torch's own: ``torch._int_mm`` (int8, oneDNN or MKL) and ``torch.mm`` (float32)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fqtstats.benchmarks import machine
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.determinism import seeded
from fqtstats.ops import product1, product8
from fqtstats.ops.codes import Affine, Codes

__all__ = ["gemm_cases"]

INT_MM, MM = "torch._int_mm", "torch.mm float32"

SHAPES = ((4096, 512, 576), (4096, 1024, 1024), (1024, 1024, 4608))
"""M, N, K."""

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
                        work=2.0 * m * n * k,
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
            else:
                signed = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n))]
                yield ours, lambda: torch._int_mm(*signed)

    return pair


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
