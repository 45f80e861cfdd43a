"""Are the backward products of a quantized layer what independent rounding of the gradient's elements makes of them?

Noise that elements share (along rows, columns or tiles) leaves the mean and the variance of every element right, and
only a product shows it: errors that should average out in its sums do not, or cancel where they should not. The
products here are those of a model's own layers, ``dW = Q1(g)^T x`` and ``dX = Q2(g) w`` or those of a convolution, on
their incoming QAT gradients.

Shape legend: n draws in m = n / 2 pairs; ``L`` is the product, linear in the gradient; ``e_i = Q(g)_i - g`` are the
errors of draw i, ``E_i = L e_i`` those of the product.

*Variance.* The difference ``f = e_1 - e_2`` of two draws is free of bias. Its elements are symmetric; if they are also
independent, any of their signs may be changed without changing the law, so that ``X = ||L f||^2 / 2``, the product's
variance, and ``Y = ||L (s f)||^2 / 2`` with random signs ``s``, what independent errors of the same sizes give, are
exchangeable, and ``Z = X - Y`` is symmetric around 0. (A quantizer with a transform has its signs changed where it
rounds. One whose samples or channels share a random factor has those of each group changed together, which leaves the
law of every group as it is: what is tested then is that groups are independent.) For independent symmetric ``Z_1 ..
Z_m``, whatever their laws and whatever m,

    P(|sum Z_i| >= c sqrt(sum Z_i^2)) <= 2 K P(N(0, 1) >= c),    K = 1 / (4 P(N(0, 1) >= sqrt 2)) = 3.18

(V. Bentkus and D. Dzindzalieta, "A tight Gaussian bound for weighted sums of Rademacher random variables", Bernoulli
21(2), 2015). The interval of the ratio is this test inverted: ``1 + (mean Z +- c sd / sqrt(m - c^2)) / prediction``,
with ``sd^2 = mean (Z - mean Z)^2``. A t interval of ``mean ||E_i||^2`` has no such guarantee.

*Bias.* The means of ``E_i`` along directions ``w`` that were fixed beforehand (the product itself, its sign, ones,
random signs), and those of the second half of the draws along the mean of the first half. Each is studentized, which
noise that elements share does not deceive; but outcomes that are rare may all be missing, and then leave a mean without
a variance. Where the quantizer's law is known, the mean has to be beyond Bernstein's bound as well, with ``<w, L e> =
<L^T w, e>`` a sum of independent variances and ranges: a false alarm takes that, too, and the bound holds exactly. Of
other callables it is not known what the draws did not show: their false-alarm rate is that of the t test.

In 2000 simulated null runs of 128 draws, of layers from a single element to 32 x 32, the interval missed 1 at level
.01 with rates of 0 to .0035 and at .001 of 0 to .0005, and the tests of bias failed with 0 to .001 and 0. With few and
rare outcomes (1 in 100 or less, 1 to 16 elements) the rates were .13 to .29 and .09 to .29 for the t interval, and .10
to .29 and .07 to .29 for studentized means alone. ``tests/test_products_check.py`` repeats what is about intervals.

What is compared is the variance summed over the product's elements. Noise that the elements of a row of ``g`` share
changes that of ``dX``, whose sums run along rows, and not that of ``dW``, whose sums run along columns; and vice versa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import stats
from torch import nn

from fqtstats.capture import LossFunction, Session
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.estimators.exact import (
    Roundings,
    factors_input_total,
    factors_weight_total,
    input_total,
    weight_total,
)
from fqtstats.estimators.moments import squared_norm
from fqtstats.layers import real
from fqtstats.layers.operand import Operand, images
from fqtstats.layers.product import Product, ProductName
from fqtstats.layers.state import Call, Site
from fqtstats.layers.swap import Skip, quantized
from fqtstats.measurement import Progress
from fqtstats.policy import Policy, QuantizerLike
from fqtstats.quantizers.base import Quantizer
from fqtstats.quantizers.noise import Noise
from fqtstats.random import stream
from fqtstats.verdicts.battery import bernstein
from fqtstats.verdicts.junit import Case, junit

__all__ = ["ProductVerdict", "ProductsReport", "as_junit", "check_products", "symmetric_interval"]

Array = npt.NDArray[np.float64]
State = Literal["ok", "dependent rounding", "biased"]

_RADEMACHER = 1 / (4 * stats.norm.sf(math.sqrt(2)))
_ROUNDING = 2.0**-14  # relative differences of squared norms up to this are the arithmetic's
_FAMILIES = 2  # variance and bias
_RANDOM_SIGNS = 8


@dataclass(frozen=True, slots=True)
class ProductVerdict:
    """One backward product of one call of a layer.

    Attributes:
        layer: its name.
        call: index of the call.
        product: ``"grad_weight"`` or ``"grad_input"``.
        ratio: the variance of the product, summed over its elements, over what independent errors of the gradient's
            elements give; NaN where nothing is random.
        low, high: interval of the ratio, which misses 1 by chance with at most half of what this product gets of the
            false-alarm rate.
        bias_p: p-value of "the product is unbiased", of this product alone; it fails below the other half.
        draws: how many were made.
        prediction: of the variance that independent errors give: ``"exact"`` from the quantizer's law, or from the
            ``"sampled"`` variances of the elements, half the mean square of the pairs' differences, which is unbiased.
        verdict: ``"biased"`` where both fail.
    """

    layer: str
    call: int
    product: Site
    ratio: float
    low: float
    high: float
    bias_p: float
    draws: int
    prediction: Literal["exact", "sampled"]
    verdict: State

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    @property
    def evidence(self) -> str:
        """What was found, a sentence."""
        where = f"layer {self.layer or '(root)'}, call {self.call}, {self.product}"
        if math.isnan(self.ratio):
            variance = "no draw differs from another"
        else:
            variance = (
                f"the variance is {self.ratio:.3g} ({self.low:.3g} to {self.high:.3g}) times what independent "
                "rounding gives"
            )
        return f"{where}: {self.verdict}; {variance}, bias p = {self.bias_p:.2g} ({self.draws} draws)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class ProductsReport:
    """The verdicts on all products of a model.

    Attributes:
        rows: one per layer, call and product, in the order of the model's layers.
        false_alarm: probability at most that one of them is not ``"ok"`` where all are right, and the laws are known.
        seed: gives the same verdicts again.
    """

    rows: tuple[ProductVerdict, ...]
    false_alarm: float
    seed: int

    @property
    def ok(self) -> bool:
        """Whether every product is."""
        return all(row.ok for row in self.rows)

    @property
    def table(self) -> pd.DataFrame:
        """One row per product, with the fields of :class:`ProductVerdict`."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    @property
    def evidence(self) -> list[str]:
        """A sentence on every product that failed; if none did, on the one that is closest to it."""
        failed = [row.evidence for row in self.rows if not row.ok]
        return failed or [min(self.rows, key=lambda row: row.bias_p).evidence]

    def __str__(self) -> str:
        good = sum(row.ok for row in self.rows)
        return f"{good} of {len(self.rows)} products ok: {' | '.join(self.evidence)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [row.as_dict() for row in self.rows]
        return {"ok": self.ok, "false_alarm": self.false_alarm, "seed": self.seed, "products": rows}


def check_products(
    model: nn.Module,
    batch: object,
    loss_fn: LossFunction,
    policy: Policy,
    *,
    draws: int = 128,
    false_alarm: float = 1e-6,
    seed: int = 0,
    backend: str = "simulated",
    skip: Skip | None = None,
    progress: Progress | None = None,
) -> ProductsReport:
    """Compare bias and variance of every layer's backward products with those of independent rounding.

    One forward and one backward pass give every layer's operands and incoming QAT gradient; every gradient is then
    quantized ``draws`` times, with the layer's own random streams, and multiplied in floating point.

    Args:
        model: any module; it is not changed.
        batch: anything ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        policy: the quantizers.
        draws: even; about 80 is the least that can show anything at a false-alarm rate of 1e-6.
        false_alarm: probability at most that a product is not ``"ok"`` where all are right, in (0, 1); split evenly
            over the products.
        seed: of all random numbers.
        backend: of the forward pass, see :func:`fqtstats.prepare_`.
        skip: layers to leave in full precision.
        progress: called with (done, total) products.

    Raises:
        InputError: bad input, no quantized backward product, or fewer draws than it takes to find anything.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2 or draws % 2:
        raise InputError(f"draws must be an even integer of at least 2, got {draws!r}")
    if not isinstance(false_alarm, float) or not 0 < false_alarm < 1:
        raise InputError(f"false_alarm must be a probability between 0 and 1, got {false_alarm!r}")
    recorder = _Recorder()
    with single_thread(), quantized(model, policy, skip, backend, seed) as handle:
        handle.shared.inspector = recorder
        with Session(model, handle, batch, loss_fn, seed) as session:
            session.qat(recorder.observe)
        if not recorder.products:
            raise InputError("expected a policy that quantizes the incoming gradient of a layer, got none that does")
        order = list(handle.layers)
        found = sorted(recorder.products, key=lambda p: (order.index(p.call.layer.name), p.call.index, p.site))
        level = false_alarm / (len(found) * _FAMILIES)
        least = 2 * (math.floor(_critical(level) ** 2) + 1)
        if draws < least:
            raise InputError(
                f"draws must be at least {least} to find anything in {len(found)} products at a false-alarm rate of "
                f"{false_alarm:g}, got {draws}"
            )
        rows = []
        for i, one in enumerate(found):
            with torch.no_grad():
                rows.append(_judge(one, draws, level, seed))
            if progress is not None:
                progress(i + 1, len(found))
    return ProductsReport(tuple(rows), false_alarm, seed)


def as_junit(reports: Mapping[str, ProductsReport]) -> str:
    """JUnit XML: one test case for each product under each quantizer."""
    return junit(
        [
            Case(f"products.{name}", f"{row.layer} call {row.call} {row.product}", failure, row.evidence)
            for name, report in reports.items()
            for row in report.rows
            for failure in [None if row.ok else row.verdict]
        ]
    )


def symmetric_interval(z: Array, level: float) -> tuple[float, float]:
    """Interval of the centre of independent variables that are symmetric around it, exact at every sample size.

    Args:
        z: ``[m]``.
        level: it misses the centre with at most this probability.

    Returns:
        Its ends; infinite where m is too small for the level.
    """
    c, m, mean = _critical(level), len(z), float(z.mean())
    if m <= c * c:
        return -math.inf, math.inf
    half = c * float(z.std()) / math.sqrt(m - c * c)
    return mean - half, mean + half


def _critical(level: float) -> float:
    """``c``, beyond which a self-normalized sum of symmetric variables lies with at most this probability."""
    return float(stats.norm.isf(level / (2 * _RADEMACHER)))


@dataclass(frozen=True, slots=True)
class _BackwardProduct:
    """``L`` and what it is applied to.

    Attributes:
        call, site, q, g: the incoming gradient as the quantizer gets it.
        product: the layer's operation.
        other: the other operand.
        shape: the result's.
        reference: the product of ``g`` itself.
        noise: of ``q`` on ``g``; None where it is not known.
    """

    call: Call
    site: Site
    q: QuantizerLike
    g: torch.Tensor
    product: Product
    other: Operand
    shape: tuple[int, ...]
    reference: torch.Tensor
    noise: Noise | None

    def apply(self, e: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``L e``, with the other operand decoded."""
        result: torch.Tensor = getattr(self.product, self.site)(real, images(e), other, self.shape)
        return result

    def adjoint(self, w: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``L^T w``: the product being one of three of a bilinear operation, its adjoint is the forward one."""
        x, weight = (w, other) if self.site == "grad_input" else (other, w)
        return self.product.forward(real, x, weight, None)

    def predicted(self, other: torch.Tensor, sampled: torch.Tensor) -> float:
        """The product's variance where the roundings are independent; ``sampled`` are the variances of ``e``."""
        shape = images(self.g).shape
        on_input = self.site == "grad_input"
        if self.noise is None:
            v, coefficients, factors = images(sampled), None if on_input else other.double().square(), None
        else:
            roundings = Roundings(self.noise.variance.view(shape), self.noise)
            factors = roundings.factors
            v = self.noise.roundings.view(shape) if on_input else roundings.variance
            coefficients = None if on_input else roundings.coefficients(other)
        if coefficients is None:
            total = input_total(self.product, v, other, self.shape)
        else:
            total = weight_total(self.product, v, coefficients, self.shape)
        if factors is None:
            return total
        of_factors = factors_input_total if on_input else factors_weight_total
        return total + of_factors(self.product, factors, other, self.shape)


@dataclass
class _Recorder:
    """Inspector and observer of a QAT pass."""

    products: list[_BackwardProduct] = field(default_factory=list)
    _arrived: dict[tuple[tuple[str, int], str], tuple[Site, QuantizerLike, torch.Tensor]] = field(default_factory=dict)

    def observe(self, call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
        self._arrived[call.key, site] = site, q, g

    def operand(self, call: Call, place: str, q: QuantizerLike, x: torch.Tensor, draw: int, operand: Operand) -> None:
        pass

    def product(
        self, call: Call, name: ProductName, product: Product, a: Operand, b: Operand, last: Any, result: torch.Tensor
    ) -> None:
        arrived = self._arrived.pop((call.key, name), None)
        if arrived is not None:
            site, q, g = arrived
            noise = q.noise(g) if isinstance(q, Quantizer) else None
            self.products.append(_BackwardProduct(call, site, q, g, product, b, last, result, noise))


def _judge(one: _BackwardProduct, draws: int, level: float, seed: int) -> ProductVerdict:
    call, site, g = one.call, one.site, one.g
    other = one.other.decode()
    signs = _Signs(one, seed)
    bias = _Bias(one, other, draws, seed)
    z = np.empty(draws // 2)
    sampled = torch.zeros_like(g, dtype=torch.float64)
    for pair in range(draws // 2):
        e = [call.quantize(one.q, site, g, draw).sub(g) for draw in (2 * pair, 2 * pair + 1)]
        errors = [one.apply(x, other) for x in e]
        for error in errors:
            bias.add(error)
        f = e[0].sub_(e[1])
        sampled += f.double().square()
        x = squared_norm(errors[0].sub_(errors[1])) / 2
        y = squared_norm(one.apply(signs.change(f, pair), other)) / 2
        # Cutting off is symmetric, too.
        z[pair] = x - y if abs(x - y) > _ROUNDING * (x + y) else 0.0
    predicted = one.predicted(other, sampled / draws)
    low, high = symmetric_interval(z, level)
    dependent = not low <= 0 <= high
    ratio, low, high = (
        max(0.0, 1 + value / predicted) if predicted > 0 else math.nan for value in (float(z.mean()), low, high)
    )
    p = bias.p_value()
    verdict: State = "biased" if p < level else "dependent rounding" if dependent else "ok"
    exact: Literal["exact", "sampled"] = "sampled" if one.noise is None else "exact"
    return ProductVerdict(call.layer.name, call.index, site, ratio, low, high, p, draws, exact, verdict)


class _Signs:
    """Changes signs at random: one where a quantizer rounds, or one for all that share a factor."""

    def __init__(self, one: _BackwardProduct, seed: int) -> None:
        self._stream = stream(seed=seed, layer=one.call.layer.name, site=f"{one.site} signs", call=one.call.index)
        self._noise = one.noise

    def change(self, f: torch.Tensor, pair: int) -> torch.Tensor:
        """``s f``; shape and dtype stay."""
        noise = self._noise
        y = f if noise is None else f.reshape(noise.variance.shape)
        if noise is not None and noise.transform is not None:
            y = noise.transform.forward(y.contiguous())
        shape = y.shape if noise is None or noise.factors is None else noise.factors.variance.shape
        bits = replace(self._stream, draw=pair).bits(shape, 1, dtype=torch.int32, device=y.device)
        y = y * bits.mul_(2).sub_(1)
        if noise is not None and noise.transform is not None:
            y = noise.transform.inverse(y)
        return y.view(f.shape)


class _Bias:
    """Tests that the errors of a product have mean zero, fed draw by draw."""

    def __init__(self, one: _BackwardProduct, other: torch.Tensor, draws: int, seed: int) -> None:
        self._one, self._other, self._draws = one, other, draws
        reference = one.reference
        own = stream(seed=seed, layer=one.call.layer.name, site=f"{one.site} directions", call=one.call.index)
        random = own.bits((_RANDOM_SIGNS, *reference.shape), 1, dtype=torch.int32, device=reference.device)
        signs = random.mul_(2).sub_(1).to(reference.dtype)
        self._fixed = torch.cat([torch.stack([reference, reference.sign(), torch.ones_like(reference)]), signs])
        self._first_half = torch.zeros_like(reference)
        self._along: list[torch.Tensor] = []  # the fixed directions, by draw
        self._along_first: list[torch.Tensor] = []  # the mean of the first half, by draw of the second
        # A mean error of an element up to this is the rounding of grid and arithmetic.
        self._floor = 8 * torch.finfo(one.g.dtype).eps * float(one.apply(one.g.abs(), other.abs()).max())

    def add(self, error: torch.Tensor) -> None:
        """One more draw."""
        half = self._draws // 2
        self._along.append(self._fixed.flatten(1) @ error.reshape(-1))
        if len(self._along) <= half:
            self._first_half += error / half
        else:
            self._along_first.append(self._first_half.reshape(-1) @ error.reshape(-1))

    def p_value(self) -> float:
        """Of both families, corrected for all that was tested."""
        values = torch.stack(self._along).double().cpu().numpy()
        fixed = [2 * self._p(values[:, k] * np.sign(values[:, k].mean()), w) for k, w in enumerate(self._fixed)]
        cross = self._p(torch.stack(self._along_first).double().cpu().numpy(), self._first_half)
        return min(1.0, 2 * min(len(fixed) * min(fixed), cross))

    def _p(self, values: Array, w: torch.Tensor) -> float:
        """One-sided, of the values along a direction; the larger of Student's t and Bernstein's bound."""
        n = len(values)
        excess = float(values.mean()) - self._floor * math.sqrt(squared_norm(w))
        if not excess > 0:
            return 1.0
        deviation = float(values.std(ddof=1)) / math.sqrt(n)
        studentized = float(stats.t.sf(excess / deviation, n - 1)) if deviation > 0 else 0.0
        noise = self._one.noise
        if noise is None:
            return studentized
        coefficients = self._one.adjoint(w, self._other).double().reshape(noise.variance.shape)
        if noise.transform is not None:
            coefficients = noise.transform.inverse_adjoint(coefficients)
        variance = (coefficients.square() * noise.variance).sum()
        ranges = coefficients.abs() * torch.where(noise.variance > 0, noise.gap, 0.0)
        if noise.factors is not None:
            # The groups are independent, and what one adds is at most its factor's part and all of its roundings.
            axes = [axis for axis in range(3) if axis != noise.factors.axis]
            along = (coefficients * noise.factors.signal).sum(axes, keepdim=True)
            variance = variance + (along.square() * noise.factors.variance).sum()
            ranges = along.abs() * noise.factors.gap + ranges.sum(axes, keepdim=True)
        total = torch.tensor(n * excess, dtype=torch.float64, device=noise.variance.device)
        return max(studentized, float(bernstein(total, n * variance, ranges.max())))
