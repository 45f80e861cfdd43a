"""Integer convolutions, the quantization of their input included, against PyTorch's in float32, channels-last.

The weights are quantized beforehand: a layer does that once per step, for any number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F

from fqtstats.benchmarks import machine
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.determinism import seeded
from fqtstats.layers.operand import Operand
from fqtstats.layers.product import ConvProduct, ProductName, compute
from fqtstats.ops import products
from fqtstats.ops.codes import Affine, Codes, Geometry, Kept
from fqtstats.quantizers import quantizer
from fqtstats.quantizers.storage import Stored, store
from fqtstats.random import stream

__all__ = ["convolution_cases"]

BASELINE = "F.conv2d float32, channels_last"
BACKWARD = "convolution_backward float32, channels_last"
WHOLE = "the same of all samples or channels"

SHAPES = ((64, 128, 128, 16), (64, 256, 256, 8), (64, 512, 512, 4))
"""N, I, O, H = W: the wide layers of VGG-16 at CIFAR size."""

KEPT = 4
"""Of so many samples or channels, activation gradient pruning at 4 bits keeps one."""


def convolution_cases() -> list[Case]:
    """3x3, stride 1, padding 1: forward, and both backward products of a pruned gradient."""
    return [*_forward_cases(), *_pruned_cases()]


def _forward_cases() -> list[Case]:
    targets = {8: (3.0, 4.0), 1: (8.0, 15.0)}
    peaks = {8: "int8", 1: "bit"}
    return [
        Case(
            name=f"{'int8' if bits == 8 else '1-bit'} 3x3 convolution, input quantized",
            shape=f"{n}x{i}x{size}x{size} -> {o}",
            threads=threads,
            baseline=BASELINE,
            pair=_pair(bits, n, i, o, size),
            must=must if threads == 1 else None,
            aim=aim if threads == 1 else None,
            work=2.0 * n * o * i * (3 * size - 2) ** 2,  # taps on padding are no work
            peak=peaks[bits],
        )
        for threads in machine.thread_counts()
        for bits, (must, aim) in targets.items()
        for n, i, o, size in SHAPES
    ]


def _pruned_cases() -> list[Case]:
    names: tuple[tuple[ProductName, str], ...] = (("grad_input", "input"), ("grad_weight", "weight"))
    return [
        Case(
            name=f"pruned 4 x 1 bit 3x3 {label} gradient",
            shape=f"{n}x{i}x{size}x{size} -> {o}",
            threads=threads,
            baseline=baseline,
            pair=_pruned(name, baseline, n, i, o, size),
            work=2.0 * n * o * i * (3 * size - 2) ** 2 / KEPT,
            peak="bit_table",
        )
        for threads in machine.thread_counts()
        for name, label in names
        for baseline in (BACKWARD, WHOLE)
        for n, i, o, size in SHAPES
    ]


def _pruned(
    name: ProductName, baseline: str, n: int, i: int, o: int, size: int
) -> Callable[[], AbstractContextManager[Pair]]:
    product = ConvProduct(Geometry(padding=(1, 1)))
    axis, shape = (0, (n, i, size, size)) if name == "grad_input" else (1, (o, i, 3, 3))

    def gradient(kept: Kept | None) -> Operand:
        sizes = [n, o, size, size]
        sizes[axis] = sizes[axis] if kept is None else len(kept.indices)
        scales = Affine(torch.rand(sizes[axis]), None, torch.randn(sizes[axis]), axis)
        codes = torch.randint(0, 16, sizes, dtype=torch.uint8)
        return Operand(Stored(Codes.pack(codes, 4, scales, product.pad(name, (3, 3))), kept=kept))

    @contextmanager
    def pair() -> Iterator[Pair]:
        with seeded(0):
            signs = Affine(torch.ones(1), None, -torch.ones(1) / 2)
            x, w = (torch.randint(0, 2, s, dtype=torch.uint8) for s in ((n, i, size, size), (o, i, 3, 3)))
            other = Codes.pack(w, 1, signs) if name == "grad_input" else Codes.pack(x, 1, signs, (1, 1))
            right, groups = Operand(Stored(other)), n if axis == 0 else o
            part, whole = gradient(Kept(axis, torch.arange(0, groups, KEPT), groups)), gradient(None)
            real = [
                torch.randn(s).contiguous(memory_format=torch.channels_last)
                for s in ((n, o, size, size), (n, i, size, size), (o, i, 3, 3))
            ]

        def backward() -> object:
            mask = [name == "grad_input", name == "grad_weight", False]
            return torch.ops.aten.convolution_backward(*real, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

        yield (
            lambda: compute(product, name, part, right, shape),
            backward if baseline == BACKWARD else lambda: compute(product, name, whole, right, shape),
        )

    return pair


def _pair(bits: int, n: int, i: int, o: int, size: int) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        with seeded(0):
            x = torch.randn(n, i, size, size).relu_().contiguous(memory_format=torch.channels_last)
            w = torch.randn(o, i, 3, 3).contiguous(memory_format=torch.channels_last)
        unused = stream()
        activation, weight = quantizer("minmax", bits=bits), quantizer("zero_on_grid", bits=bits)
        weights = store(weight, w, unused)
        assert weights is not None
        geometry = Geometry(padding=(1, 1))

        def ours() -> torch.Tensor:
            stored = store(activation, x, unused, (1, 1))
            assert stored is not None
            return products.convolution(stored.codes, weights.codes, geometry)

        yield ours, lambda: F.conv2d(x, w, padding=1)

    return pair
