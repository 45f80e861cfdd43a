"""Exact variance that a layer's own quantizers put into its weight, bias and input gradient.

Shape legend: linear: input ``x [R, I]``, incoming gradient ``g [R, O]``, weight ``[O, I]``. Convolution: ``x [N, I,
*space]``, ``g [N, O, *space]``, weight ``[O, I / groups, *kernel]``. Samples are the rows of a quantizer: R or N.

With ``x`` and ``g`` given, the only randomness in ``dW = Q1(g)^T x`` is that of the roundings in Q1, which are
independent with variances ``v``. ``dW`` is linear in them, so variances propagate through the squared coefficients::

    Var[dW_ok] = sum_r v_ro x_rk^2

which is the same product with ``v`` for ``Q1(g)`` and ``x^2`` for ``x``, in a convolution too: each of its terms is an
element of ``Q1(g)`` times one of ``x`` (or of its padding).

A quantizer with a transform, ``Q1(g) = T^-1 R(T g)``, has independent roundings in the rows of ``R(T g)`` only; ``v``
are their variances. ``T`` acts on samples and leaves the rest alone, so it can be taken to the other operand::

    dW = Q1(g)^T x = R(T g)^T (T^-T x),    Var[dW_ok] = sum_j v_jo (T^-T x)_jk^2

and in a convolution as well, where every position's patches are the same selection of elements of each sample. The bias
gradient sums ``Q1(g)`` over samples and space: ``x`` is a column of ones.

The input gradient ``dX = Q2(g) w`` never mixes samples, and ``T`` nothing else: the elements of one sample of ``Q2(g)``
have independent errors with or without a transform, and ``Var[dX_rk] = sum_o Var[Q2(g)_ro] w_ok^2``.

A weight's quantizer may pass ``dW`` on by a linear map of its own (:mod:`fqtstats.quantizers.passage`), to the weight
and to parameters of the quantizer. A linear functional of ``dW`` is one of the roundings as well: with coefficients
``c`` in the place of the weight, ``sum_ok c_ok dW_ok = sum_jo R(T g)_jo y_jo`` with ``y = (T^-T x) c^T`` (in a
convolution, that of ``T^-T x`` by ``c``), of variance ``sum_jo v_jo y_jo^2``; two have the covariance ``sum v y y'``.

The rounding of floating-point arithmetic is left out. Calls of a layer draw from streams of their own: their variances
add up. What the quantizers of later layers put into ``g`` is no part of this variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fqtstats.errors import InputError
from fqtstats.layers import real
from fqtstats.layers.operand import images
from fqtstats.layers.passing import WEIGHT
from fqtstats.layers.product import ConvProduct, Product
from fqtstats.layers.state import WeightGradient
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers.base import Frame, Transform, UniformQuantizer

__all__ = [
    "Roundings",
    "bias_variance",
    "few_roundings",
    "input_total",
    "summed",
    "weight_total",
    "weight_variance",
]


@dataclass(frozen=True, slots=True)
class Roundings:
    """The independent roundings of a quantizer on one gradient.

    Attributes:
        variance: ``v``, ``[R, O]`` or ``[N, O, H, W]`` float64; its rows are those of the transform.
        frame: the quantizer's grid and transform.
    """

    variance: torch.Tensor
    frame: Frame

    @staticmethod
    def of(q: UniformQuantizer, g: torch.Tensor) -> Roundings:
        """Those of ``q`` on ``g``, ``[R, O]`` or ``[N, O, *space]``."""
        with torch.no_grad():
            variance, frame = q.rounding_variance(g)
        return Roundings(variance.view(images(g).shape), frame)

    @property
    def transform(self) -> Transform | None:
        """``T``, or None for the identity."""
        return self.frame.transform

    def total(self) -> float:
        """The summed variance of ``Q1(g)`` itself, its transform undone."""
        if self.transform is None:
            return float(self.variance.sum())
        return float(self.transform.inverse_squared(self.variance.clone().view(self.frame.view)).sum())

    def partner(self, x: torch.Tensor) -> torch.Tensor:
        """``T^-T x``, float64, for ``x`` ``[R, I]`` or ``[N, I, H, W]``: what the roundings are multiplied by."""
        x = x.double()
        if self.transform is not None:
            x = self.transform.inverse_adjoint(x.reshape(x.shape[0], 1, -1)).view(x.shape)
        return x

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        """Its squares."""
        return self.partner(x).square()

    def of_bias(self) -> torch.Tensor:
        """``[O]``."""
        v = self.variance.flatten(2).sum(2) if self.variance.dim() > 2 else self.variance
        ones = v.new_ones(v.shape[0], 1)
        return (v * self.coefficients(ones)).sum(0)


def weight_variance(calls: Iterable[WeightGradient]) -> torch.Tensor:
    """Exact variance of every element of a weight's gradient, from the layer's own Q1; behind the weight's quantizer.

    Args:
        calls: the calls in which the weight takes part, at least one; those of several layers where it is shared.

    Returns:
        float64, the weight's shape ``[O, I]`` or ``[O, I / groups, *kernel]``.

    Raises:
        InputError: no calls, a quantizer of which it is not known which of its errors are independent, or one of the
            weight of which it is not known how gradients pass it.
        NonFiniteError: a gradient holds NaN or Inf.
    """
    return _added(_weight_variance(call) for call in calls)


def bias_variance(calls: Iterable[WeightGradient]) -> torch.Tensor:
    """Exact variance of every element of a bias's gradient, ``[O]`` float64; as :func:`weight_variance`."""
    with torch.no_grad():
        return _added(Roundings.of(_known(call.q), call.g).of_bias() for call in calls)


def summed(call: WeightGradient, parameters: Sequence[str], roundings: Roundings | None = None) -> dict[str, float]:
    """The sum over all elements of the variance of each of ``parameters`` in one call.

    These are ``"weight"``, ``"bias"``, and parameters of the weight's quantizer. NaN for a quantizer of which it is not
    known which of its errors are independent, or how gradients pass it.

    Args:
        call: the weight gradient.
        parameters: which take part in it.
        roundings: of ``call.q`` on ``call.g``, where they are known already.
    """
    if not isinstance(call.q, UniformQuantizer):
        return dict.fromkeys(parameters, math.nan)
    with torch.no_grad():
        roundings = roundings or Roundings.of(call.q, call.g)
        found = dict.fromkeys(parameters, math.nan)
        if "bias" in parameters:
            found["bias"] = float(roundings.of_bias().sum())
        if call.passage is None:
            return found
        if "weight" in parameters and call.passage.is_identity:
            shape = (*call.shape[:2], *_kernel(call.shape))
            coefficients = roundings.coefficients(images(call.x))
            found["weight"] = weight_total(call.product, roundings.variance, coefficients, shape)
        elif "weight" in parameters:
            found["weight"] = float(_weight_variance(call, roundings).sum())
        for name, functional in call.passage.own.items():
            if (own := f"{WEIGHT}{name}") in found:
                y = _paired(call, roundings, functional.coefficients)
                found[own] = float((roundings.variance * y.square()).sum())
        return found


def weight_total(product: Product, variance: torch.Tensor, coefficients: torch.Tensor, shape: tuple[int, ...]) -> float:
    """The sum over all elements of the variance of a weight's gradient.

    Args:
        product: the layer's operation.
        variance: of independent roundings of the incoming gradient, ``[R, O]`` or ``[N, O, H, W]`` float64.
        coefficients: the squares of what they are multiplied by, ``[R, I]`` or ``[N, I, H, W]`` float64.
        shape: the weight's, ``[O, I]`` or ``[O, I / groups, kh, kw]``.
    """
    # The channels are summed before the product, which leaves little of it.
    groups = _groups(product)
    v, c = (t.unflatten(1, (groups, -1)).sum(2) for t in (variance, coefficients))
    return float(product.grad_weight(real, v, c, (groups, 1, *shape[2:])).sum())


def input_total(product: Product, variance: torch.Tensor, w: torch.Tensor, shape: tuple[int, ...]) -> float:
    """The sum over all elements of the variance of an input's gradient.

    Args:
        product: the layer's operation.
        variance: of the elements of the quantized incoming gradient, which are independent within a sample: ``[R, O]``
            or ``[N, O, H, W]`` float64.
        w: the other operand, ``[O, I]`` or ``[O, I / groups, kh, kw]``.
        shape: the input's, ``[R, I]`` or ``[N, I, H, W]``.
    """
    if isinstance(product, ConvProduct) and product.border is not None:
        return _input_total_with_border(product, variance, w.double(), shape)
    summed_w = w.double().square().sum(1, keepdim=True)
    return float(product.grad_input(real, variance, summed_w, (shape[0], _groups(product), *shape[2:])).sum())


def _input_total_with_border(
    product: ConvProduct, variance: torch.Tensor, w: torch.Tensor, shape: tuple[int, ...]
) -> float:
    # A pixel and its copies add up, so an element of the gradient may reach a pixel by several taps, whose coefficients
    # add up before they are squared. Samples do not differ in that: one backward product for each position.
    channels, height, width = variance.shape[1:]
    per_position = variance.sum(0)
    each = torch.arange(channels)
    total = 0.0
    for row in range(height):
        for column in range(width):
            g = variance.new_zeros(channels, channels, height, width)
            g[each, each, row, column] = 1
            dx = product.grad_input(real, g, w, (channels, *shape[1:]))
            total += float((dx.square().flatten(1).sum(1) * per_position[:, row, column]).sum())
    return total


def _groups(product: Product) -> int:
    return product.geometry.groups if isinstance(product, ConvProduct) else 1


def few_roundings(call: WeightGradient, roundings: Roundings) -> float:
    """``1 / K`` for K roundings that the weight gradient's noise effectively consists of; 0 where it has none.

    Where few decisions are made, or all with probabilities near 0 or 1, draws show noise in rare outcomes only: of K
    decisions of variances ``v_j``, steps ``s_j`` and weights ``c_j``, the squared error has a relative variance of
    about ``1 / K = sum_j (c_j v_j)^2 (s_j^2 / v_j) / (sum_j c_j v_j)^2`` beyond that of Gaussian noise. The weights
    are those of the rows.
    """
    with torch.no_grad():
        v = roundings.variance.view(roundings.frame.view)
        weights = roundings.coefficients(images(call.x)).flatten(1).sum(1)
        noise = float((weights * v.sum((1, 2))).sum())
        rare = float((weights.square() * (v * roundings.frame.grid.step.double().square()).sum((1, 2))).sum())
    return rare / noise**2 if noise > 0 else 0.0


def _weight_variance(call: WeightGradient, roundings: Roundings | None = None) -> torch.Tensor:
    passage = call.passage
    if passage is None:
        raise InputError(
            "it is not known how gradients pass the weight's quantizer: it has a surrogate, but no passage"
        )
    with torch.no_grad():
        roundings = roundings or Roundings.of(_known(call.q), call.g)
        shape, partner = (*call.shape[:2], *_kernel(call.shape)), roundings.partner(images(call.x))
        found = call.product.grad_weight(real, roundings.variance, partner.square(), shape).view(call.shape)
        factor = 1.0 if passage.factor is None else passage.factor.double()
        found = found * factor**2
        if passage.rank_one is not None:
            direction, coefficients = (t.double() for t in passage.rank_one)
            y = _paired(call, roundings, coefficients)
            # Of every element with the functional, and of the functional.
            covariance = call.product.grad_weight(real, roundings.variance * y, partner, shape).view(call.shape)
            variance = (roundings.variance * y.square()).sum()
            found = found + 2 * factor * direction * covariance + direction.square() * variance
        return found


def _paired(call: WeightGradient, roundings: Roundings, coefficients: torch.Tensor) -> torch.Tensor:
    """What the roundings are multiplied by in the sum of ``coefficients`` times ``dW``; of their shape."""
    shape = (*call.shape[:2], *_kernel(call.shape))
    y = call.product.forward(real, roundings.partner(images(call.x)), coefficients.double().view(shape), None)
    return y.reshape(roundings.variance.shape)


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of a convolution's weight, height 1 in a 1-D one; nothing in a matrix."""
    return (1, shape[2]) if len(shape) == 3 else tuple(shape[2:])


def _known(q: QuantizerLike) -> UniformQuantizer:
    if not isinstance(q, UniformQuantizer):
        raise InputError(
            f"expected a quantizer of this package, got {q!r}: of others it is not known which errors are independent"
        )
    return q


def _added(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise InputError("expected at least one call, got none")
    return total
