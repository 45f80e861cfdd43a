"""LSQ: a learned step.

Source: S. Esser et al., "Learned Step Size Quantization" (arXiv 1902.08153), equations 1 to 3 and 5 (the gradients),
section 2.2 (their scale) and 2.1 (the first step).

Shape legend: ``v`` what is quantized, ``s`` its step, ``Qn`` and ``Qp`` the largest negative and positive code; ``n``
the numbers that share a step: a layer's weights, or the features of one sample (of one channel, with a step for each).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.formats import uint
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.base import rows
from fqtstats.quantizers.passage import Functional, PackedMask, Passage, keeps
from fqtstats.quantizers.ranged import (
    LearnedQuantizer,
    RangedQuantizer,
    absolute_mean,
    require_choice,
    require_finite,
)

__all__ = ["LSQ", "Steps"]


@dataclass(frozen=True, eq=False)
class Steps(RangedQuantizer):
    """``s round(clip(v / s, -Qn, Qp))`` with given steps: what :class:`LSQ` is at one time.

    Args:
        bits: 1 to 8.
        step: ``s > 0``, ``[G]``; 0 where it is not known yet, and everything is quantized to zero.
        signed: whether ``Qn = 2^(bits - 1)``, ``Qp = Qn - 1``; else ``Qn = 0``, ``Qp = 2^bits - 1``.
        axis: of ``v`` that has a step for every index (0 or 1), or None.
    """

    step: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    signed: bool = True
    axis: int | None = None
    name: ClassVar[str] = "lsq"

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.axis, "zero_on_grid", self.bits, None)

    @property
    def negative(self) -> int:
        """``Qn``."""
        return 2 ** (self.bits - 1) if self.signed else 0

    @property
    def positive(self) -> int:
        """``Qp``."""
        return self.format.levels - self.negative

    def ranged(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        require_finite(x)
        low, high = self._ends(x.dtype)
        return x.clamp(low.view(self._across(x)), high.view(self._across(x))), low, high

    def _ends(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.step.to(dtype)
        high = step * self.positive
        # Never above Qp s: the grid's step is the larger of those that its two ends ask for, and Qn s is exact.
        high = torch.where(high.double() > step.double() * self.positive, torch.nextafter(high, high * 0), high)
        return -step * self.negative, high

    def slopes(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The derivatives of the quantized numbers by ``v`` (0 or 1) and by ``s``, both of ``v``'s shape.

        Equations 3 and 5: 1 and ``round(v / s) - v / s`` strictly inside, 0 and ``-Qn`` or ``Qp`` outside.
        """
        low, high = (end.view(self._across(v)) for end in self._ends(v.dtype))
        y = self._grid(low, high).coordinates(v)
        inside = (y > -self.negative) & (y < self.positive)
        return inside, torch.where(inside, torch.round(y).sub_(y), y.clamp(-self.negative, self.positive))

    def _across(self, v: torch.Tensor) -> list[int]:
        """The shape in which the steps broadcast against ``v``."""
        return [-1 if axis == self.axis else 1 for axis in range(v.dim())]

    def sums(self, t: torch.Tensor) -> torch.Tensor:
        """Sum of ``t`` over what shares a step, ``[G]``."""
        if self.axis is None:
            return t.sum().view(1)
        return t.sum([axis for axis in range(t.dim()) if axis != self.axis])


@dataclass(eq=False)
class LSQ(LearnedQuantizer):
    """Learned step, ``s round(clip(v / s, -Qn, Qp))``, trained with the network.

    The gradient of ``s`` is the paper's, times ``1 / sqrt(n Qp)``. The step is ``|p|`` of the parameter ``p``: always
    positive, and for ``p > 0``, where it starts, with the paper's gradient. Training that takes ``p`` below zero is
    reflected there; a clamp would need a smallest step, which no scale of the data gives. ``p = 0`` is a step that is
    not known yet: the first input that is not all zeros sets ``2 mean|v| / sqrt(Qp)``, and until then zeros are
    quantized to zeros. Set it before replicas of the model start, as it is not averaged over processes, and before a
    step that recomputes a layer whose first input in it is all zeros.

    Args:
        bits: 1 to 8; 2 to 8 where signed.
        on: ``"weight"`` or ``"activation"``: what ``n`` counts.
        signed: whether negative numbers have codes. None: those of weights do; those of activations if the input that
            sets the step has any (after a ReLU there are none).
        per: one step for all (``"tensor"``), or one per ``"channel"``: of the output for weights, of the input for
            activations (which takes the forward product from the integers).

    Raises:
        InputError: an option is out of range.
    """

    bits: int = 8
    on: Literal["weight", "activation"] = "weight"
    signed: bool | None = None
    per: Literal["tensor", "channel"] = "tensor"
    name: ClassVar[str] = "lsq"
    widths: ClassVar[Sequence[int]] = range(2, 9)

    def __post_init__(self) -> None:
        super().__init__()
        uint(self.bits)
        require_choice("on", self.on, ("weight", "activation"))
        require_choice("signed", self.signed, (None, True, False))
        require_choice("per", self.per, ("tensor", "channel"))
        if self.bits == 1 and (self.signed or (self.signed is None and self.on == "weight")):
            raise InputError(
                "lsq needs at least 2 bits for signed numbers (with 1 there is no positive code), got bits=1"
            )
        self.step = nn.Parameter(torch.zeros(1))
        self._found_signed: bool | None = self.signed if self.signed is not None or self.on == "activation" else True

    def attach(self, place: str, layer: nn.Module) -> None:
        if place != self.on:
            raise InputError(f"expected lsq with on={place!r} as the quantizer of the {place}, got on={self.on!r}")
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        groups = 1 if self.per == "tensor" else weight.shape[0] if self.on == "weight" else channels
        self.step.data = torch.zeros(groups, dtype=dtype, device=weight.device)  # type: ignore[arg-type]

    @property
    def axis(self) -> int | None:
        """That has a step for every index, or None."""
        return None if self.per == "tensor" else 0 if self.on == "weight" else 1

    @property
    def known(self) -> bool:
        """Whether the step is set."""
        return bool(self.step.any())

    def fixed(self, x: torch.Tensor) -> Steps:
        if not self.known:
            self._set(x)
        signed = True if self._found_signed is None else self._found_signed
        return Steps(self.bits, self.step.detach().abs(), signed, self.axis)

    def _set(self, x: torch.Tensor) -> None:
        view = rows(x)
        if not bool(require_finite(view) > 0):
            return
        signed = self._found_signed
        if signed is None:
            signed = bool((view < 0).any())
            if signed and self.bits == 1:
                raise InputError(
                    "lsq needs at least 2 bits for signed numbers, got an input with negative ones at bits=1"
                )
        positive = Steps(self.bits, self.step, signed).positive
        mean = absolute_mean(x, self.axis)
        # A channel of zeros starts where the others do on average.
        mean = torch.where(mean > 0, mean, mean[mean > 0].mean())
        with torch.no_grad():
            self.step.data = (2 * mean / math.sqrt(positive)).to(self.step.dtype)
        self._found_signed = signed

    def scale(self, v: torch.Tensor, fixed: Steps) -> float:
        """``1 / sqrt(n Qp)``, section 2.2."""
        numbers = v.numel() if self.on == "weight" else v.numel() // v.shape[0]
        return 1 / math.sqrt(numbers // fixed.step.numel() * fixed.positive)

    def surrogate(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, with the gradients of equations 3 and 5; keeps ``x``, or one bit per element if the step is frozen."""
        fixed = self.fixed(x)
        wanted = torch.is_grad_enabled() and (x.requires_grad or self.step.requires_grad)
        if not (wanted and self.known):
            return x
        out: torch.Tensor = _LearnedStep.apply(x, self.step, fixed, self.scale(x, fixed))  # type: ignore[no-untyped-call]
        return out

    def passage(self, w: torch.Tensor) -> Passage:
        """What the surrogate does to the gradient of the weight ``w``."""
        fixed = self.fixed(w)
        if not self.known:
            return Passage()
        inside, by_step = fixed.slopes(w)
        shape = (-1, *[1] * (w.dim() - 1))
        by_parameter = by_step * self.scale(w, fixed) * self.step.detach().sign().view(shape)
        own = {"step": Functional(by_parameter, self.per == "channel")} if self.step.requires_grad else {}
        return Passage(inside.to(w.dtype), None, own)

    def get_extra_state(self) -> torch.Tensor:
        """Whether negative numbers have codes: 0, 1, or 2 while that is not known."""
        return torch.tensor(2 if self._found_signed is None else int(self._found_signed))

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Of :meth:`get_extra_state`."""
        self._found_signed = None if int(state) == 2 else bool(state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        saved = state_dict.get(f"{prefix}step")
        if isinstance(saved, torch.Tensor) and not self.known:
            self.step.data = torch.zeros_like(saved, dtype=self.step.dtype, device=self.step.device)
        super()._load_from_state_dict(state_dict, prefix, *others)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, step: torch.Tensor, fixed: Steps, scale: float) -> torch.Tensor:
        ctx.fixed, ctx.scale, ctx.sign, ctx.dtype = fixed, scale, step.detach().sign(), step.dtype
        ctx.mask = None
        if ctx.needs_input_grad[1]:
            keeps(ctx, v)
        else:
            ctx.mask, bits = PackedMask.pack(fixed.slopes(v)[0])
            keeps(ctx, bits)
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (kept,) = ctx.saved_tensors
        if g is None:
            return None, None, None, None
        if ctx.mask is not None:
            return g * ctx.mask.unpack(kept), None, None, None
        inside, by_step = ctx.fixed.slopes(kept.detach())
        by_v = g * inside if ctx.needs_input_grad[0] else None
        return by_v, (ctx.fixed.sums(g * by_step) * ctx.scale).to(ctx.dtype) * ctx.sign, None, None
