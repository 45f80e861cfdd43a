"""Convolutions of an ``nn.Sequential`` and what lies between them, run as one.

A chain is a run of stages, each a quantized 2-D convolution, then batch normalization, ReLU and 2x2 max pooling, the
last three each where the model has it. Activations stay codes from one convolution to the next: where it takes
codes of 8 bits on one grid, normalization, ReLU, pooling and its quantizer are one pass over the output before
(:mod:`fqtstats.ops.fused`); backward, the adjoints of pooling, ReLU and normalization are two.

What changes: batch normalization sums in float64 and multiplies by one folded factor. ``t = a y + b`` (before ReLU and
pooling, which are exact) is within ``4 * 2^-23 * (|a y| + |b| + |beta|)`` of batch normalization in exact arithmetic;
a code then differs from the unfused one only where a coordinate lies within the sum of both paths' errors of a
rounding boundary, and by one step. Every quantizer draws from the stream it would draw from otherwise, in every call of
a step. Without batch normalization finite numbers stay what they are bit for bit, but for the sign of zero.

Kept for the backward pass, per stage: input and weight as the products take them (codes where they have some), and the
convolution's output in float32 where anything follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from fqtstats.errors import InputError
from fqtstats.layers import guards
from fqtstats.layers.modules import QuantConv2d
from fqtstats.layers.multiply import _bias_gradient
from fqtstats.layers.operand import Operand
from fqtstats.layers.product import ConvProduct
from fqtstats.layers.state import Call, Kept
from fqtstats.layers.swap import Handle
from fqtstats.ops import fused
from fqtstats.quantizers.base import UniformQuantizer
from fqtstats.quantizers.forward import MinMax, Symmetric, ZeroOnGrid
from fqtstats.quantizers.storage import Stored

__all__ = ["FusedSequential", "fuse_"]


def fuse_(model: nn.Module, handle: Handle) -> list[list[str]]:
    """Run the chains in the ``nn.Sequential`` modules of a prepared model as one operation each, in place.

    Every ``nn.Sequential`` with a chain changes its class and keeps everything else: modules, parameters, hooks,
    state_dict keys; ``handle.remove()`` changes it back. What a chain consists of is looked up at every call: a module
    with hooks, of another class or with a ``forward`` of its own ends it, and under autocast, for inputs that are not
    float32 images on the CPU, and while layers are inspected, the modules run one by one.

    Args:
        model: prepared with ``backend="native"``.
        handle: what :func:`fqtstats.prepare_` returned for it.

    Returns:
        The names of the modules of every chain, in the order of the model; a module that stands at several places goes
        by the name of the place.

    Raises:
        InputError: the model was prepared for another backend.
    """
    if handle.shared.backend != "native":
        raise InputError(
            f"only a model prepared with backend='native' can be fused, this one has {handle.shared.backend!r}"
        )
    names: list[list[str]] = []
    for prefix, module in list(model.named_modules()):
        if type(module) is not nn.Sequential or "forward" in vars(module):
            continue
        places = [f"{prefix}.{name}" if prefix else name for name in module._modules]
        chains = [places[piece.start : piece.stop] for piece in _pieces(list(module)) if isinstance(piece, Chain)]
        if chains:
            module.__class__ = FusedSequential
            handle.fused.append(module)
            names += chains
    return names


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs its chains as one operation each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the modules give one after the other."""
        modules = list(self)
        for piece in _pieces(modules):
            if isinstance(piece, Chain) and _fusible(x, piece):
                x = piece(x)
            else:
                for module in modules[piece.start : piece.stop]:
                    x = module(x)
        return x


@dataclass(frozen=True, slots=True)
class Stage:
    """A convolution and what follows it."""

    convolution: QuantConv2d
    normalization: nn.BatchNorm2d | None
    relu: bool
    pool: bool

    @property
    def parameters(self) -> tuple[torch.Tensor | None, ...]:
        """Weight and bias of the convolution, weight and bias of the normalization."""
        own, normalization = self.convolution, self.normalization
        others = (None, None) if normalization is None else (normalization.weight, normalization.bias)
        return own.weight, own.bias, *others

    @property
    def codes_of_input(self) -> MinMax | Symmetric | ZeroOnGrid | None:
        """The input's quantizer, if its codes can be made in the pass over the output before."""
        q = self.convolution.fqt_state.policy.activation
        return q if isinstance(q, (MinMax, Symmetric, ZeroOnGrid)) and q.format.storage_bits == 8 else None


@dataclass(frozen=True, slots=True)
class Single:
    """Modules ``start .. stop - 1``, to be run one by one."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Modules ``start .. stop - 1``, as stages."""

    start: int
    stop: int
    stages: tuple[Stage, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # Opened here: within an autograd function gradients are off, as in an evaluation, whose calls do not count.
        calls = []
        for stage in self.stages:
            guards.check(stage.convolution)
            calls.append(stage.convolution.fqt_state.call())
        parameters = [p for stage in self.stages for p in stage.parameters]
        out: torch.Tensor = _Run.apply(x, self.stages, calls, *parameters)  # type: ignore[no-untyped-call]
        return out


def _pieces(modules: Sequence[nn.Module]) -> Iterator[Chain | Single]:
    position = 0
    while position < len(modules):
        start, stages = position, []
        while (found := _stage(modules, position)) is not None:
            stage, position = found
            stages.append(stage)
        if len(stages) > 1 or (stages and position - start > 1):
            yield Chain(start, position, tuple(stages))
        else:
            position = max(position, start + 1)
            yield Single(start, position)


def _stage(modules: Sequence[nn.Module], start: int) -> tuple[Stage, int] | None:
    """The stage that begins at ``start``, and where it ends."""
    rest = iter(modules[start : start + 4])
    convolution = next(rest, None)
    if not isinstance(convolution, QuantConv2d) or not _plain(convolution, QuantConv2d) or not _on_codes(convolution):
        return None
    stop, following = start + 1, next(rest, None)
    normalization = None
    if isinstance(following, nn.BatchNorm2d) and _plain(following, nn.BatchNorm2d):
        normalization, stop, following = following, stop + 1, next(rest, None)
    relu = following is not None and _plain(following, nn.ReLU)
    if relu:
        stop, following = stop + 1, next(rest, None)
    pool = isinstance(following, nn.MaxPool2d) and _plain(following, nn.MaxPool2d) and _halves(following)
    return Stage(convolution, normalization, relu, pool), stop + pool


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of exactly that class, with the ``forward`` of the class, and nobody is to be told of its calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


def _on_codes(convolution: QuantConv2d) -> bool:
    state = convolution.fqt_state
    quantizers = (state.policy.activation, state.policy.weight)
    return state.shared.backend == "native" and all(isinstance(q, UniformQuantizer) for q in quantizers)


def _halves(pool: nn.MaxPool2d) -> bool:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    windows = pair(pool.kernel_size) == pair(pool.stride) == (2, 2) and pair(pool.dilation) == (1, 1)
    return windows and pair(pool.padding) == (0, 0) and not pool.ceil_mode and not pool.return_indices


def _on_batch(module: nn.BatchNorm2d) -> bool:
    """Whether it normalizes with the statistics of the batch."""
    return module.training or (module.running_mean is None and module.running_var is None)


def _fusible(x: torch.Tensor, chain: Chain) -> bool:
    tensors = [x, *(p for stage in chain.stages for p in stage.parameters if p is not None)]
    return (
        x.dim() == 4
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch_module._has_any_global_hook()
        and all(stage.convolution.fqt_state.shared.inspector is None for stage in chain.stages)
    )


@dataclass(frozen=True, slots=True)
class _Normalization:
    """The numbers of one call of batch normalization; ``[C]`` float64.

    Attributes:
        mean, scale: ``scale = 1 / sqrt(variance + eps)``.
        gamma, beta: the affine part.
        pixels: R if the statistics are those of the batch, 0 if they are constant.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    pixels: int

    @staticmethod
    def of(module: nn.BatchNorm2d, moments: fused.Moments | None, pixels: int) -> _Normalization:
        """With the statistics of the batch (``moments``) or the running ones, which are updated, as the module does."""
        like = module.running_mean if moments is None else moments.mean
        assert like is not None
        gamma = torch.ones_like(like).double() if module.weight is None else module.weight.detach().double()
        beta = torch.zeros_like(gamma) if module.bias is None else module.bias.detach().double()
        running = module.running_mean, module.running_var
        if not _on_batch(module):
            mean, variance = (statistic.double() for statistic in running if statistic is not None)
            return _Normalization(mean, torch.rsqrt(variance + module.eps), gamma, beta, 0)
        assert moments is not None
        if pixels == 1:
            raise ValueError("expected more than 1 value per channel for batch normalization in training, got 1")
        if module.training and module.track_running_stats:
            factor = module.momentum
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
                factor = 1 / float(module.num_batches_tracked) if factor is None else factor
            for statistic, new in zip(running, (moments.mean, moments.square / (pixels - 1)), strict=True):
                if statistic is not None:
                    statistic.copy_((1 - (factor or 0)) * statistic.double() + (factor or 0) * new)
        return _Normalization(moments.mean, torch.rsqrt(moments.square / pixels + module.eps), gamma, beta, pixels)

    def map(self, stage: Stage) -> fused.Map:
        """With ``b`` for the rounded ``a``: what is normalized to 0 then cancels to the last digit."""
        a = (self.gamma * self.scale).float()
        return fused.Map(a, (self.beta - self.mean * a.double()).float(), stage.relu, stage.pool)

    def adjoint(self, total: torch.Tensor, dot: torch.Tensor) -> fused.Adjoint:
        """For ``sum h`` and ``sum h (y - mean)``."""
        mean, r = self.mean.float(), (self.gamma * self.scale).float()
        if self.pixels == 0:
            zero = torch.zeros_like(mean)
            return fused.Adjoint(mean, zero, zero, r)
        p, q = total / self.pixels, dot / self.pixels * self.scale.square()
        return fused.Adjoint(mean, p.float(), q.float(), r)


@dataclass(frozen=True, slots=True)
class _Record:
    """What the backward pass of a stage needs, but for the large tensors."""

    call: Call
    product: ConvProduct
    x: Operand
    w: Operand
    map: fused.Map
    normalization: _Normalization | None
    kept: Kept


@dataclass(frozen=True, slots=True)
class _Output:
    """A convolution's output and what is to become of it."""

    y: torch.Tensor
    moments: fused.Moments | None
    normalization: _Normalization | None
    map: fused.Map

    @property
    def read_backward(self) -> bool:
        """Whether the backward pass reads ``y``."""
        return self.normalization is not None or self.map.relu or self.map.pool

    @staticmethod
    def of(stage: Stage, y: torch.Tensor, needs_range: bool) -> _Output:
        """Updates running statistics."""
        module, moments = stage.normalization, None
        if needs_range or (module is not None and _on_batch(module)):
            moments = fused.moments(y)
        normalization = None
        if module is None:
            ones = torch.ones(y.shape[1], dtype=torch.float32, device="cpu")
            f = fused.Map(ones, torch.zeros_like(ones), stage.relu, stage.pool)
        else:
            normalization = _Normalization.of(module, moments, y.numel() // y.shape[1])
            f = normalization.map(stage)
        if f.pool and min(y.shape[2:]) < 2:
            F.max_pool2d(y, 2)  # refuses images without a window
        return _Output(y, moments, normalization, f)

    def operand(self, stage: Stage, call: Call, pad: tuple[int, int]) -> Operand:
        """The input of the next stage through its quantizer."""
        q = stage.codes_of_input
        if q is not None and self.moments is not None:
            ends = torch.stack(fused.extremes(self.y, self.moments, self.map))
            # What is not finite goes the usual way, which says so.
            if bool(torch.isfinite(ends).all()):
                grid = q._grid(ends[0].amin().view(1, 1, 1), ends[1].amax().view(1, 1, 1))
                return Operand(Stored(fused.encode(self.y, self.map, grid, pad), None))
        return call.operand("activation", self.numbers(), pad)

    def numbers(self) -> torch.Tensor:
        """What the modules after the convolution give, in memory of its own."""
        return fused.apply(self.y, self.map)


class _Run(torch.autograd.Function):
    """A chain: ``forward(x, stages, a call of each, *parameters of the stages)``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, stages: tuple[Stage, ...], calls: list[Call], *parameters: torch.Tensor | None
    ) -> torch.Tensor:
        records: list[_Record] = []
        large: list[torch.Tensor] = []
        output: _Output | None = None
        for stage, call, following in zip_longest(stages, calls, stages[1:]):
            layer, product = stage.convolution, stage.convolution._product()
            pad = product.pad("activation", layer.kernel_size)
            a = call.operand("activation", x, pad) if output is None else output.operand(stage, call, pad)
            b = call.operand("weight", layer.weight)
            y = call.compute("forward", product, a, b, layer.bias).contiguous(memory_format=torch.channels_last)
            output = _Output.of(stage, y, following is not None and following.codes_of_input is not None)
            large += [a.data, b.data, y if output.read_backward else y.new_empty(0)]
            kept = Kept(call.layer.name, a.nbytes, b.nbytes, 4 * math.prod(a.shape))
            call.layer.shared.kept.add(kept)
            # Everything but the large tensors, which only autograd may hold (checkpoints drop them).
            a, b = (operand.with_data(operand.data.new_empty(0)) for operand in (a, b))
            records.append(_Record(call, product, a, b, output.map, output.normalization, kept))
        assert output is not None
        ctx.save_for_backward(*large)
        ctx.records = records
        return output.numbers()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, _, _, *needs = ctx.needs_input_grad
        gradients: list[torch.Tensor | None] = [None] * len(needs)
        large, grad = ctx.saved_tensors, g
        for i in reversed(range(len(ctx.records))):
            own = slice(4 * i, 4 * i + 4)
            further = needs_x or any(needs[: 4 * i])
            grad, gradients[own] = _adjoint(ctx.records[i], grad, large[3 * i : 3 * i + 3], needs[own], further)
            if not further:
                break
        return (grad if needs_x else None), None, None, *gradients


def _adjoint(
    record: _Record, g: torch.Tensor, large: Sequence[torch.Tensor], needs: Sequence[bool], further: bool
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Gradients of a stage's input (where the pass goes ``further``) and parameters for ``g``, that of its output."""
    needs_w, needs_bias, needs_gamma, needs_beta = needs
    (x_data, w_data, y), call, product = large, record.call, record.product
    x, w = record.x.with_data(x_data), record.w.with_data(w_data)
    grad_w = grad_bias = gamma = beta = None
    ends: list[torch.Tensor] = []
    g = g.contiguous(memory_format=torch.channels_last)
    normalization, f = record.normalization, record.map
    if normalization is not None:
        total, dot = fused.gradient_sums(g, y, f, normalization.mean.float())
        gamma = (dot * normalization.scale).float() if needs_gamma else None
        beta = total.float() if needs_beta else None
        g, *ends = fused.gradient(g, y, f, normalization.adjoint(total, dot))
    elif f.relu or f.pool:
        zero = torch.zeros_like(f.a)
        g, *ends = fused.gradient(g, y, f, fused.Adjoint(zero, zero, zero, f.a))
    extremes = (ends[0], ends[1]) if ends else None
    kernel = w.shape[2:]
    if needs_w or needs_bias:
        quantized = call.gradient("grad_weight", g, product.pad("grad_weight", kernel), extremes)
        grad_w = call.compute("grad_weight", product, quantized, x, w.shape) if needs_w else None
        grad_bias = _bias_gradient(quantized) if needs_bias else None
    if further:
        quantized = call.gradient("grad_input", g, product.pad("grad_input", kernel), extremes)
        g = call.compute("grad_input", product, quantized, w, x.shape)
    return g, [grad_w, grad_bias, gamma, beta]
