"""A chain of convolutions and what lies between them, as one autograd function.

What a chain is: :mod:`fqtstats.layers.fusion`. What it changes: batch normalization sums in float64 and multiplies by
one folded factor. ``t = a y + b`` (before ReLU and pooling, which are exact) is within ``4 * 2^-23 * (|a y| + |b| +
|beta|)`` of batch normalization in exact arithmetic; a code then differs from the unfused one only where a coordinate
lies within the sum of both paths' errors of a rounding boundary, and by one step. Every quantizer draws from the stream
it would draw from otherwise, in every call of a step. Without batch normalization finite numbers stay what they are bit
for bit, but for the sign of zero.

Kept for the backward pass, per stage: input and weight as the products take them (codes where they have some), and the
convolution's output in float32 where anything follows it. Surrogates of the quantizers in between keep nothing: what
they need is computed from that output again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fqtstats.errors import UnsupportedError
from fqtstats.layers import guards, passing
from fqtstats.layers.modules import QuantConv2d
from fqtstats.layers.multiply import Saved
from fqtstats.layers.operand import Operand
from fqtstats.layers.passing import Passed
from fqtstats.layers.state import Call, LayerState
from fqtstats.ops import fused
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers.forward import MinMax, Symmetric, ZeroOnGrid
from fqtstats.quantizers.passage import nbytes
from fqtstats.quantizers.ranged import Binary, binary
from fqtstats.quantizers.storage import Extremes, Stored

__all__ = ["Normalization", "Output", "Stage", "run"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A convolution and what follows it; the first one of a chain may be in full precision."""

    convolution: nn.Conv2d
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
    def binary(self) -> Binary | None:
        """The input's quantizer, if it gives one bit, whatever its input's range is."""
        return binary(self.activation)

    @property
    def state(self) -> LayerState | None:
        """What the layer knows of its quantization; None in full precision."""
        return self.convolution.fqt_state if isinstance(self.convolution, QuantConv2d) else None

    @property
    def activation(self) -> QuantizerLike | None:
        """The quantizer of the input."""
        return None if self.state is None else self.state.policy.activation

    @property
    def own(self) -> tuple[torch.Tensor, ...]:
        """Parameters of the input's quantizer that its surrogate has gradients for."""
        q = self.activation
        return tuple(q.parameters()) if isinstance(q, nn.Module) and hasattr(q, "surrogate") else ()

    @property
    def codes_of_input(self) -> MinMax | Symmetric | ZeroOnGrid | None:
        """The input's quantizer, if its codes can be made in the pass over the output before."""
        q = self.activation
        return q if isinstance(q, (MinMax, Symmetric, ZeroOnGrid)) and q.format.storage_bits == 8 else None


def _on_batch(module: nn.BatchNorm2d) -> bool:
    """Whether it normalizes with the statistics of the batch."""
    return module.training or (module.running_mean is None and module.running_var is None)


@dataclass(frozen=True, slots=True)
class Normalization:
    """The numbers of one call of batch normalization; ``[C]`` float64.

    Attributes:
        mean, scale: of what is normalized, ``output_scale y``; ``scale = 1 / sqrt(variance + eps)``.
        gamma, beta: the affine part.
        pixels: R if the statistics are those of the batch, 0 if they are constant.
        output_scale: what the channels of ``y`` are multiplied by before; 1 where there is no such scale.
        center: mean of ``y``; 0 if the statistics are constant.
        eps: of the module.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    pixels: int
    output_scale: torch.Tensor
    center: torch.Tensor
    eps: float

    @staticmethod
    def of(
        module: nn.BatchNorm2d,
        moments: fused.Moments | None,
        pixels: int,
        output_scale: torch.Tensor | None = None,
    ) -> Normalization:
        """With the statistics of the batch (``moments``) or the running ones, which are updated, as the module does."""
        like = module.running_mean if moments is None else moments.mean
        assert like is not None
        gamma = torch.ones_like(like).double() if module.weight is None else module.weight.detach().double()
        beta = torch.zeros_like(gamma) if module.bias is None else module.bias.detach().double()
        s = torch.ones_like(beta) if output_scale is None else output_scale.detach().double()
        running = module.running_mean, module.running_var
        if not _on_batch(module):
            zero = torch.zeros_like(beta)
            mean, variance = (statistic.double() for statistic in running if statistic is not None)
            return Normalization(mean, torch.rsqrt(variance + module.eps), gamma, beta, 0, s, zero, module.eps)
        assert moments is not None
        mean, square = moments.mean * s, moments.square * s.square()
        if pixels == 1:
            raise ValueError("expected more than 1 value per channel for batch normalization in training, got 1")
        if module.training and module.track_running_stats:
            factor = module.momentum
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
                factor = 1 / float(module.num_batches_tracked) if factor is None else factor
            for statistic, new in zip(running, (mean, square / (pixels - 1)), strict=True):
                if statistic is not None:
                    statistic.copy_((1 - (factor or 0)) * statistic.double() + (factor or 0) * new)
        return Normalization(
            mean, torch.rsqrt(square / pixels + module.eps), gamma, beta, pixels, s, moments.mean, module.eps
        )

    def map(self, stage: Stage) -> fused.Map:
        """With ``b`` for the rounded ``a``: what is normalized to 0 then cancels to the last digit."""
        a = (self.gamma * self.scale * self.output_scale).float()
        if self.pixels == 0:
            return fused.Map(a, (self.beta - self.gamma * self.scale * self.mean).float(), stage.relu, stage.pool)
        return fused.Map(a, (self.beta - self.center * a.double()).float(), stage.relu, stage.pool)

    def adjoint(self, total: torch.Tensor, dot: torch.Tensor) -> fused.Adjoint:
        """For ``sum h`` and ``sum h (y - center)``."""
        center, r = self.center.float(), (self.gamma * self.scale * self.output_scale).float()
        if self.pixels == 0:
            zero = torch.zeros_like(center)
            return fused.Adjoint(center, zero, zero, r)
        p, q = total / self.pixels, dot / self.pixels * (self.output_scale * self.scale).square()
        return fused.Adjoint(center, p.float(), q.float(), r)

    def gradients(self, total: torch.Tensor, dot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of ``gamma``, ``beta`` and the output scale, float32 ``[C]``.

        Statistics of the batch undo a scale but for ``eps``: what is left of its gradient is in proportion to that.
        """
        gamma = dot * self.output_scale
        scale = dot * self.gamma * self.scale
        if self.pixels == 0:
            gamma = gamma - self.mean * total
        else:
            scale = scale * (self.eps * self.scale.square())
        return (gamma * self.scale).float(), total.float(), scale.float()


@dataclass(frozen=True, slots=True)
class Output:
    """A convolution's output and what is to become of it.

    Attributes:
        y: the output.
        moments: of ``y``, where they are needed.
        normalization: of this call, or None.
        map: from ``y`` to what the next stage takes, before it is quantized.
    """

    y: torch.Tensor
    moments: fused.Moments | None
    normalization: Normalization | None
    map: fused.Map

    def read_backward(self, following: Stage | None) -> bool:
        """Whether the backward pass reads ``y``."""
        changed = self.normalization is not None or self.map.relu or self.map.pool
        q = None if following is None else following.activation
        return changed or hasattr(q, "surrogate")

    @staticmethod
    def of(stage: Stage, y: torch.Tensor, following: Stage | None, output_scale: torch.Tensor | None) -> Output:
        """Updates running statistics."""
        module, moments = stage.normalization, None
        bit = None if following is None else following.binary
        needs_range = bit is not None or (following is not None and following.codes_of_input is not None)
        if needs_range or (module is not None and _on_batch(module)):
            moments = fused.moments(y)
        normalization = None
        if module is None:
            ones = torch.ones(y.shape[1], dtype=torch.float32, device="cpu")
            f = fused.Map(ones, torch.zeros_like(ones), stage.relu, stage.pool)
        else:
            normalization = Normalization.of(module, moments, y.numel() // y.shape[1], output_scale)
            f = normalization.map(stage)
        if bit is not None:
            f = replace(f, passes=bit.passes)
        if f.pool and min(y.shape[2:]) < 2:
            F.max_pool2d(y, 2)  # refuses images without a window
        return Output(y, moments, normalization, f)

    def operand(self, stage: Stage, call: Call, pad: tuple[int, int]) -> Operand:
        """The input of the next stage through its quantizer."""
        bit = stage.binary
        if bit is not None and self.moments is not None:
            # The ends of all pixels, those outside of windows among them: they only have to be finite.
            low_high = fused.extremes(self.y, self.moments, replace(self.map, pool=False))
            if bool(torch.isfinite(torch.stack(low_high)).all()):
                return Operand(Stored(fused.bits(self.y, self.map, bit.threshold, bit.affine, pad)))
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


def run(x: torch.Tensor, stages: tuple[Stage, ...]) -> torch.Tensor:
    """What the modules of the stages give one after the other.

    Args:
        x: ``[N, C, H, W]`` float32 on the CPU.
        stages: at least one.
    """
    # Opened here: within an autograd function gradients are off, as in an evaluation, whose calls do not count.
    calls: list[Call | None] = []
    passed: list[Passed | None] = []
    parameters: list[torch.Tensor | None] = []
    for stage in stages:
        state = stage.state
        if state is None:
            calls.append(None)
            passed.append(None)
            parameters += [*stage.parameters, None]
            continue
        guards.check(stage.convolution)
        if state.shared.outputs is not None:
            raise UnsupportedError("a fused model has no outputs of single layers; leave out fuse_()")
        calls.append(state.call())
        weight = stage.convolution.weight
        w = passing.surrogate(state.policy.weight, weight)
        kept = 0
        if stage is stages[0]:
            entered = passing.surrogate(state.policy.activation, x)
            kept, x = 0 if entered is x else nbytes(entered), entered
        passed.append(Passed(state.policy.weight, weight, kept, 0 if w is weight else nbytes(w)))
        parameters += [w, *stage.parameters[1:], passing.output_scale(state.policy, weight)]
    own = [p for stage in stages[1:] for p in stage.own]
    out: torch.Tensor = _Run.apply(x, stages, calls, passed, *parameters, *own)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class _Plain:
    """The adjoint of a convolution in full precision."""

    layer: nn.Conv2d

    def gradients(
        self, g: torch.Tensor, data: Sequence[torch.Tensor], needs: Sequence[bool], extremes: Extremes | None
    ) -> Sequence[torch.Tensor | None]:
        """As :meth:`Saved.gradients`."""
        own, (x, w) = self.layer, data
        outputs = None if own.bias is None else [own.out_channels]
        found: Sequence[torch.Tensor | None] = torch.ops.aten.convolution_backward(
            g, x, w, outputs, own.stride, own.padding, own.dilation, False, [0, 0], own.groups, list(needs)
        )
        return found


@dataclass(frozen=True, slots=True)
class _Record:
    """What the backward pass of a stage needs, but for the large tensors."""

    stage: Stage
    saved: Saved | _Plain
    map: fused.Map
    normalization: Normalization | None


_OWN = 5
"""Parameters of a stage: those of :attr:`Stage.parameters` and the output scale, None where it has none."""


class _Run(torch.autograd.Function):
    """A chain: ``forward(x, stages, a call of each, what their weights passed, *parameters)``.

    The parameters are :data:`_OWN` of every stage, the weight behind its surrogate first and the scale of its output
    last, and then those of the quantizers between the stages.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stages: tuple[Stage, ...],
        calls: list[Call | None],
        passed: list[Passed | None],
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        records: list[_Record] = []
        large: list[torch.Tensor] = []
        output: Output | None = None
        scales = parameters[_OWN - 1 : _OWN * len(stages) : _OWN]
        for stage, call, way, scale, following in zip_longest(stages, calls, passed, scales, stages[1:]):
            layer = stage.convolution
            if call is None:
                x = x.contiguous(memory_format=torch.channels_last)
                y = layer._conv_forward(x, layer.weight, layer.bias).contiguous(memory_format=torch.channels_last)
                output = Output.of(stage, y, following, None)
                large += [x, layer.weight, y]
                records.append(_Record(stage, _Plain(layer), output.map, output.normalization))
                continue
            assert isinstance(layer, QuantConv2d)
            assert way is not None
            product = layer._product()
            pad = product.pad("activation", layer.kernel_size)
            a = call.operand("activation", x, pad) if output is None else output.operand(stage, call, pad)
            b = call.operand("weight", layer.weight)
            y = call.compute("forward", product, a, b, layer.bias).contiguous(memory_format=torch.channels_last)
            output = Output.of(stage, y, following, scale)
            large += [a.data, b.data, y if output.read_backward(following) else y.new_empty(0)]
            records.append(_Record(stage, Saved.of(call, product, a, b, way), output.map, output.normalization))
        assert output is not None
        ctx.save_for_backward(*large)
        ctx.records = records
        return output.numbers()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        gradients: list[torch.Tensor | None] = [None] * len(needs)
        large, records = ctx.saved_tensors, ctx.records
        grad: torch.Tensor | None = g
        end = len(needs)
        for i in reversed(range(len(records))):
            assert grad is not None
            mine = slice(_OWN * i, _OWN * (i + 1))
            own = slice(end - len(records[i].stage.own) if i else end, end)
            end = own.start
            further = needs_x or any(needs[: _OWN * i]) or any(needs[_OWN * len(records) : own.stop])
            grad, gradients[mine] = _adjoint(records[i], grad, large[3 * i : 3 * i + 3], needs[mine], further)
            if not further:
                break
            if i:
                assert grad is not None
                grad, gradients[own] = _through(records[i].stage, large[3 * i - 1], records[i - 1].map, grad)
        return (grad if needs_x else None), None, None, None, *gradients


def _through(
    stage: Stage, y: torch.Tensor, f: fused.Map, g: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The gradient before the quantizer of a stage's input ``f(y)``, and those of the quantizer's parameters."""
    q = stage.activation
    if not hasattr(q, "surrogate") or stage.binary is not None:  # the adjoint of a map knows where one bit passes
        return g, []
    with torch.enable_grad():
        x = fused.apply(y, f).requires_grad_()
        wanted = [p for p in stage.own if p.requires_grad]
        found = iter(torch.autograd.grad(passing.surrogate(q, x), [x, *wanted], g, allow_unused=True))
    grad = next(found)
    assert grad is not None
    return grad, [next(found) if p.requires_grad else None for p in stage.own]


def _adjoint(
    record: _Record, g: torch.Tensor, large: Sequence[torch.Tensor], needs: Sequence[bool], further: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of a stage's input (where the pass goes ``further``) and parameters for ``g``, that of its output."""
    needs_w, needs_bias, *needs_others = needs
    *operands, y = large
    adjoint = extremes = None
    others: list[torch.Tensor | None] = [None] * len(needs_others)
    g = g.contiguous(memory_format=torch.channels_last)
    normalization, f = record.normalization, record.map
    if normalization is not None:
        total, dot = fused.gradient_sums(g, y, f, normalization.center.float())
        found = normalization.gradients(total, dot)
        others = [one if needed else None for one, needed in zip(found, needs_others, strict=True)]
        adjoint = normalization.adjoint(total, dot)
    elif f.relu or f.pool:
        zero = torch.zeros_like(f.a)
        adjoint = fused.Adjoint(zero, zero, zero, f.a)
    if adjoint is not None:
        g, low, high = fused.gradient(g, y, f, adjoint)
        extremes = low, high
    grad_x, grad_w, grad_bias = record.saved.gradients(g, operands, (further, needs_w, needs_bias), extremes)
    return grad_x, [grad_w, grad_bias, *others]
