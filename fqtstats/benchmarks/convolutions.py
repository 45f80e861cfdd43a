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
from fqtstats.ops import products
from fqtstats.ops.codes import Geometry
from fqtstats.quantizers import quantizer
from fqtstats.quantizers.storage import store
from fqtstats.random import stream

__all__ = ["convolution_cases"]

BASELINE = "F.conv2d float32, channels_last"

SHAPES = ((64, 128, 128, 16), (64, 256, 256, 8), (64, 512, 512, 4))
"""N, I, O, H = W: the wide layers of VGG-16 at CIFAR size."""


def convolution_cases() -> list[Case]:
    """3x3, stride 1, padding 1."""
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
