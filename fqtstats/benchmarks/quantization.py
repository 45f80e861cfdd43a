"""Quantizing against what one would write in torch, and the whole chain from numbers to a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from fqtstats.benchmarks import machine
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.determinism import seeded
from fqtstats.ops import products
from fqtstats.ops.quantize import Recipe, encode, extremes
from fqtstats.quantizers import quantizer
from fqtstats.quantizers.bhq import BlockHouseholder, group_rows
from fqtstats.quantizers.storage import store
from fqtstats.quantizers.uniform import PTQ
from fqtstats.random import stream

__all__ = ["quantize_cases"]

LOGARITHMIC = "log2, floor, exp2 give the octave n; z / 2^n + n + rand, floor, sign: into buffers"
EXPRESSION = "rand(out=r); mul(x, s, out=y).add_(b).add_(r).floor_().clamp_(0, 255); codes.copy_(y)"
ROUNDING = ((4096, 4096), (128, 16384))
"""64 MB and 8 MB of float32."""
CHAINS = ((4096, 64, 1024), (4096, 128, 576), (4096, 256, 1024), (4096, 512, 576))
"""M, N, K."""
TRANSFORMS = ((128, 8.0), (1024, 50.0))
COLUMNS = 4096
ADAPTIVE = ((128, 1024), (128, 4096), (128, 16384))
"""Heavy-tailed rows, as for the transform."""


def quantize_cases() -> list[Case]:
    """Stochastic rounding with known extremes, row extremes, the block Householder transform, BHQ, and the chain."""
    cases = []
    for threads in machine.thread_counts():
        one = threads == 1
        for random_bits, must, aim in ((16, 10.0, 20.0), (24, 6.0, None), (8, None, None)):
            cases += [
                Case(
                    name=f"stochastic rounding, {random_bits} random bits",
                    shape=f"{n}x{d}",
                    threads=threads,
                    baseline=EXPRESSION,
                    pair=_rounding(random_bits, n, d),
                    must=must if one else None,
                    aim=aim if one else None,
                    work=5.0 * n * d,  # 4 bytes read, 1 written
                    peak="copy",
                )
                for n, d in ROUNDING
            ]
        cases += [
            Case(
                name="logarithmic codes (LUQ, 4 bits, 24 random bits)",
                shape=f"{n}x{d}",
                threads=threads,
                baseline=LOGARITHMIC,
                pair=_logarithmic(n, d),
                work=4.5 * n * d,
                peak="copy",
            )
            for n, d in ROUNDING
        ]
        cases += [
            Case(
                name="minimum and maximum of rows",
                shape=f"{n}x{d}",
                threads=threads,
                baseline="torch.aminmax(dim=1)",
                pair=_extremes(n, d),
                work=4.0 * n * d,
                peak="copy",
            )
            for n, d in ROUNDING
        ]
        cases += [
            Case(
                name="block Householder transform",
                shape=f"{n}x{COLUMNS}",
                threads=threads,
                baseline="T @ x, float32",
                pair=_householder(n),
                must=must if one else None,
                work=8.0 * n * COLUMNS,
                peak="copy",
            )
            for n, must in TRANSFORMS
        ]
        cases += [
            Case(
                name="BHQ codes, adaptive grouping",
                shape=f"{n}x{d}",
                threads=threads,
                baseline="the same with the published grouping",
                pair=_adaptive(n, d),
                must=1 / 1.5,
            )
            for n, d in ADAPTIVE
        ]
        cases += [
            Case(
                name=f"extremes, rounding ({random_bits} random bits), int8 product, scales",
                shape=f"{m}x{n}x{k}",
                threads=threads,
                baseline="the same in torch, with torch._int_mm",
                pair=_chain(random_bits, m, n, k),
                must=(4.0 if n <= 128 else 2.5) if one else None,
                aim=8.0 if one else None,
                work=2.0 * m * n * k,
                peak="int8",
            )
            for random_bits in (24, 16)
            for m, n, k in CHAINS
        ]
    return cases


def _input(n: int, d: int) -> Tensor:
    with seeded(0):
        return torch.randn(n, d)


def _heavy_tailed(n: int, d: int) -> Tensor:
    """Rows as in the gradients of trained networks."""
    return _input(n, d).mul_(torch.logspace(0, -3, n).view(-1, 1))


def _expression(x: Tensor) -> Callable[[float, float], Tensor]:
    """Stochastic rounding in torch, with every buffer made beforehand."""
    noise, y, codes = torch.empty_like(x), torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8)

    def run(scale: float, shift: float) -> Tensor:
        torch.rand(x.shape, out=noise)
        torch.mul(x, scale, out=y).add_(shift).add_(noise).floor_().clamp_(0, 255)
        return codes.copy_(y)

    return run


def _rounding(random_bits: int, n: int, d: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        x = _input(n, d)
        recipe, words = PTQ(8, random_bits, "affine").recipe, stream().words()
        low, high = torch.aminmax(x)
        known = low.view(1), high.view(1)
        scale = 255 / float(high - low)
        expression = _expression(x)
        yield (
            lambda: encode(x, recipe, words, extremes=known),
            lambda: expression(scale, -float(low) * scale),
        )

    return pair


def _logarithmic(n: int, d: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        x = _input(n, d)
        recipe, words = Recipe(None, "logarithmic", 4, 24, magnitudes=7), stream().words()
        low, high = torch.aminmax(x)
        known = low.view(1), high.view(1)
        scale = 64 / max(float(high), -float(low))
        noise, z, octave, power, sign = (torch.empty_like(x) for _ in range(5))
        codes = torch.empty(x.shape, dtype=torch.uint8)

        def expression() -> Tensor:
            torch.rand(x.shape, out=noise)
            torch.sign(x, out=sign)
            torch.mul(x, scale, out=z).abs_()
            torch.log2(z, out=octave).floor_().clamp_(min=0)
            torch.exp2(octave, out=power)
            z.div_(power).add_(octave).add_(noise).floor_().mul_(sign).add_(7).clamp_(0, 14)
            return codes.copy_(z)

        yield lambda: encode(x, recipe, words, extremes=known), expression

    return pair


def _extremes(n: int, d: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        x = _input(n, d)
        view = x.view(n, d, 1)
        yield lambda: extremes(view, 0), lambda: torch.aminmax(x, dim=1)

    return pair


def _householder(n: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        x = _heavy_tailed(n, COLUMNS)
        low, high = torch.aminmax(x, dim=1)
        transform = BlockHouseholder.of(group_rows((high - low).double()), torch.float32)
        dense = transform.forward(torch.eye(n).view(n, n, 1)).view(n, n)
        y = torch.empty_like(x)
        view = x.view(n, COLUMNS, 1)
        yield lambda: transform.forward(view), lambda: torch.mm(dense, x, out=y)

    return pair


def _adaptive(n: int, d: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        x, s = _heavy_tailed(n, d), stream()
        adaptive, published = quantizer("bhq-adaptive", bits=5), quantizer("bhq", bits=5)
        yield lambda: store(adaptive, x, s), lambda: store(published, x, s)

    return pair


def _chain(random_bits: int, m: int, n: int, k: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        x, w = _input(m, k), _input(n, k)
        gradient, words = PTQ(8, random_bits, "affine"), stream()
        stored = store(quantizer("symmetric", bits=8), w, words)
        assert stored is not None
        weights = stored.codes
        assert weights.affine.zero is not None
        step = float(weights.affine.step)
        signed = (weights.unpack().to(torch.int16) - int(weights.affine.zero)).to(torch.int8)
        sums = signed.sum(dim=1, dtype=torch.float32)
        transposed = signed.t()
        expression = _expression(x)

        def ours() -> Tensor:
            codes = store(gradient, x, words)
            assert codes is not None
            return products.linear(codes.codes, weights)

        def torch_chain() -> Tensor:
            low, high = (float(extreme) for extreme in torch.aminmax(x))
            scale = 255 / (high - low)
            codes = expression(scale, -low * scale).bitwise_xor_(128).view(torch.int8)  # codes - 128
            product = torch._int_mm(codes, transposed).float()
            return product.mul_(step / scale).add_(sums * (step * (128 / scale + low)))

        yield ours, torch_chain

    return pair
