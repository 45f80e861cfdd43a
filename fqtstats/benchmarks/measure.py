"""One draw of the quantized gradient against the naive replicate.

The baseline is what one writes without this package, and what public code of the method does: layers whose forward
pass computes each convolution twice, once per backward product, because autograd then keeps the two incoming
gradients apart; stochastic rounding by adding ``torch.rand`` and flooring; and a full forward and backward pass per
repetition. It is deliberately independent of the package's layers and quantizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqtstats import policies
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.capture import Session
from fqtstats.determinism import seeded
from fqtstats.layers import quantized
from fqtstats.models.preact_resnet import PreActResNet

__all__ = ["make_naive", "measure_cases"]

BITS = 5
BATCH = 128


def measure_cases() -> list[Case]:
    """ResNet-20, batch 128, 3 x 32 x 32, PSQ and PTQ, on both backends.

    A draw always takes one thread, which makes it the same on every machine; the baseline takes one, and for
    information all that torch would use. The last rows, for information too, time what ``fqtstats.measure`` does per
    draw: a second backward pass tells the two quantizers' parts apart.
    """
    settings = [("simulated", 1, False), ("native", 1, False)]
    settings += [("native", threads, False) for threads in {torch.get_num_threads()} - {1}]
    settings += [("native", 1, True)]
    return [_against_naive(name, *setting) for setting in settings for name in ("psq", "ptq")]


_MUST = {"simulated": (1.5, None), "native": (3.0, 10.0)}


def _against_naive(name: str, backend: str, threads: int, split: bool) -> Case:
    must, aim = _MUST[backend] if threads == 1 and not split else (None, None)
    return Case(
        name=f"one {name} draw, {backend}" + (", split" if split else ""),
        shape=f"resnet20 {BATCH}x3x32x32",
        threads=threads,
        baseline="naive replicate (forward and backward)",
        pair=lambda: _pair(name, backend, threads, split),
        must=must,
        aim=aim,
    )


@contextmanager
def _pair(name: str, backend: str, threads: int, split: bool) -> Iterator[Pair]:
    with seeded(0):
        model = PreActResNet(3, 10, 3)
        batch = (torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,)))
    naive = copy.deepcopy(model)
    make_naive(naive, per_sample=name == "psq")

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def replicate() -> None:
        torch.set_num_threads(threads)
        naive.zero_grad()
        torch.autograd.backward(loss_fn(naive, batch))

    with (
        quantized(model, policies.get(f"statquant-{name}", bits=BITS), backend=backend) as handle,
        Session(model, handle, batch, loss_fn) as session,
    ):
        index = count()

        def draw() -> None:
            torch.set_num_threads(1)
            session.draw(at := next(index))
            if split:
                session.draw(at, ("grad_input",))

        yield draw, replicate


def _fake_quantize(x: Tensor, bits: int, dims: tuple[int, ...], noise: bool) -> Tensor:
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    scale = (2**bits - 1) / (high - low).clamp(min=1e-30)
    y = (x - low) * scale
    y = torch.floor(y + torch.rand_like(y)) if noise else torch.round(y)
    result: Tensor = y.clamp(0, 2**bits - 1) / scale + low
    return result


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _fake_quantize(x, 8, tuple(range(x.dim())), noise=False)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
        ctx.bits, ctx.dims = bits, dims
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _fake_quantize(g, ctx.bits, ctx.dims, noise=True), None, None


_forward: Callable[[Tensor], Tensor] = _Forward.apply
_gradient: Callable[[Tensor, int, tuple[int, ...]], Tensor] = _Gradient.apply


def _bifurcated(layer: nn.Module, per_sample: bool, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        xq, wq = _forward(x), _forward(weight)
        every = tuple(range(x.dim()))
        channels = (0, *every[2:])
        for_weight = _gradient(product(xq.detach(), wq, bias), 8, channels if per_sample else every)
        for_input = _gradient(product(xq, wq.detach(), None), BITS, every[1:] if per_sample else every)
        total: Tensor = for_weight + for_input - for_input.detach()
        return total

    return forward


def make_naive(model: nn.Module, per_sample: bool) -> None:
    """Turn convolutions and linear layers into ones that quantize as one writes it without this package.

    Args:
        model: changed in place.
        per_sample: one scale per sample, and per channel for the weight gradient; else one per tensor.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            conv = layer

            def convolve(x: Tensor, w: Tensor, b: Tensor | None, conv: nn.Conv2d = conv) -> Tensor:
                return F.conv2d(x, w, b, conv.stride, conv.padding, conv.dilation, conv.groups)

            layer.forward = _bifurcated(layer, per_sample, convolve)  # type: ignore[method-assign]
        elif isinstance(layer, nn.Linear):
            layer.forward = _bifurcated(layer, per_sample, F.linear)  # type: ignore[method-assign]
