"""The end-to-end bound on the variance of a quantized gradient.

Source: J. Chen et al. (arXiv 2010.14298), Theorem 2. For a trainable parameter k::

    Var[dW_k | batch] <= sum over s of E[bound(Q_s(g_s))] ||J_sk||^2

over the gradient quantizers s: for the weight-gradient quantizer (Q1) of a call of k's own layer, ``J_sk`` maps an
error of ``Q1(g)`` to ``dW_k`` (the layer's input in a linear layer, the weight-gradient map in a convolution); for the
input-gradient quantizer (Q2) of any call above it, an error of ``Q2(g)`` by way of the network below. Both are linear,
because the backward pass is; ``||.||`` is the operator norm, and ``bound`` a quantizer's bound on its summed variance.
Errors of different quantizers are uncorrelated where the quantizers are unbiased: their variances add up, and
``Var[J e] = tr(J Cov[e] J^T) <= ||J||^2 tr Cov[e]``.

The expectation is over the gradients ``g_s`` as the quantizers above have made them. It is the mean over some draws
here; the value at the QAT gradient is given beside it. Operator norms are estimated from below
(:mod:`fqtstats.bounds.norms`): the bound holds up to their tolerance, as far as the iterations have converged.

A norm takes about ten iterations of two passes over the part of the network between quantizer and parameter. With L
layers and P parameters there are about P L / 2 of them: in a residual network of 22 layers and 61 parameters 670 norms
and 12800 passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from fqtstats.bounds.norms import Norm, squared_norm
from fqtstats.capture import Session
from fqtstats.errors import InputError
from fqtstats.layers.state import Call, Site, Source
from fqtstats.policy import QuantizerLike
from fqtstats.random import stream
from fqtstats.results import NORM_TOLERANCE

__all__ = ["Bounds", "Noise", "ParameterBound", "Term", "end_to_end_bounds"]

_NEGLIGIBLE = 1e-9
"""Share of a term in a bound below which it does not matter whether its norm has converged."""


@dataclass
class Noise:
    """What one quantizer may put into the backward pass; in units of the gradient that it quantizes, squared.

    Attributes:
        quantizer: how it is called.
        unbiased: whether it claims to be.
        qat: its bound on the QAT gradient; NaN if it has none.
        variance: its exact variance on the QAT gradient; NaN if it is not known.
        drawn: its bound on the gradient of each draw.
    """

    quantizer: str
    unbiased: bool
    qat: float = math.nan
    variance: float = math.nan
    drawn: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The expected bound: the mean over the draws, or without draws the value on the QAT gradient."""
        return math.fsum(self.drawn) / len(self.drawn) if self.drawn else self.qat


@dataclass(frozen=True, slots=True)
class Term:
    """One quantizer's part in the bound of one parameter.

    Attributes:
        source: the quantizer.
        noise: its own bound.
        norm: of the map from its error to the parameter's gradient.
    """

    source: Source
    noise: Noise
    norm: Norm

    @property
    def bound(self) -> float:
        """The product."""
        return self.noise.mean * self.norm.squared


@dataclass(frozen=True, slots=True)
class ParameterBound:
    """The bound of one parameter's gradient; in units of the gradient, squared, summed over the elements.

    NaN where a quantizer that has a part in it does not know a bound of its own.

    Attributes:
        terms: by quantizer, in the order of the forward pass.
    """

    terms: tuple[Term, ...]

    @property
    def bound(self) -> float:
        """The sum of all terms."""
        return math.fsum(term.bound for term in self.terms)

    def part(self, site: Site) -> float:
        """The sum over the quantizers at one site: Q1's or Q2's."""
        return math.fsum(term.bound for term in self.terms if term.source.site == site)

    @property
    def qat(self) -> float:
        """The bound with every quantizer's own bound taken on the QAT gradient, not expected over draws."""
        return math.fsum(term.noise.qat * term.norm.squared for term in self.terms)

    @property
    def error(self) -> float:
        """Standard error of :attr:`bound` from the number of draws; NaN for fewer than two."""
        n = min((len(term.noise.drawn) for term in self.terms), default=0)
        if n < 2:
            return math.nan
        drawn = [math.fsum(t.noise.drawn[i] * t.norm.squared for t in self.terms) for i in range(n)]
        mean = math.fsum(drawn) / n
        return math.sqrt(math.fsum((value - mean) ** 2 for value in drawn) / (n * (n - 1)))

    @property
    def unconverged(self) -> list[Term]:
        """Terms whose norm has not converged; those that are nothing but rounding errors are left out."""
        negligible = _NEGLIGIBLE * self.bound
        return [term for term in self.terms if not (term.norm.converged or term.bound <= negligible)]

    @property
    def largest(self) -> Term | None:
        """The term that is largest, of those that are known."""
        return max((term for term in self.terms if not math.isnan(term.bound)), key=lambda t: t.bound, default=None)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a model's parameters.

    Attributes:
        parameters: by qualified name.
        noise: by quantizer.
        tolerance: of the operator norms, relative to their squares.
        draws: over which expectations were taken.
        passes: backward passes (and passes of their adjoints) that the operator norms took.
    """

    parameters: Mapping[str, ParameterBound]
    noise: Mapping[Source, Noise]
    tolerance: float
    draws: int
    passes: int


def end_to_end_bounds(
    session: Session,
    *,
    draws: int = 4,
    tolerance: float = NORM_TOLERANCE,
    iterations: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Bounds:
    """The bound of Theorem 2 for every trainable parameter.

    Args:
        session: open, with ``recordable=True``. Integer products of the native backend are multiplications by what the
            codes stand for; the norms are those of the same maps.
        draws: draws of the quantized gradient, over which the expectation is taken; 0 for the QAT gradient's values.
        tolerance: relative change of ``||J||^2`` at which a norm's iteration ends.
        iterations: at which it ends in any case; then the norm is marked as not converged.
        seed: of the start vectors.
        progress: called with (done, total) quantizers.

    Raises:
        InputError: bad arguments.
        UnsupportedError: a backward pass in the model cannot be differentiated.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
        raise InputError(f"draws must be an integer of at least 0, got {draws!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise InputError(f"iterations must be an integer of at least 1, got {iterations!r}")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance must lie between 0 and 1, got {tolerance!r}")
    noise: dict[Source, Noise] = {}
    session.qat(observe=partial(_observe_qat, noise))
    for index in range(draws):
        # All input-gradient quantizers act, and those of the weight gradient see what they leave.
        session.draw(index, ("grad_input",), observe=partial(_observe_draw, noise))
    order = {call: position for position, call in enumerate(session.calls())}
    sources = sorted(noise, key=lambda s: (order[s.layer, s.call], s.site))
    terms: dict[str, list[Term]] = {name: [] for name in session.parameters}
    passes = 0
    for done, source in enumerate(sources):
        way = session.propagation(source)
        for name in way.parameters:
            start = way.error(stream(seed, 0, source.layer, "operator_norm", 0, source.call).child(name))
            norm = squared_norm(partial(way, name), partial(way.adjoint, name), start, tolerance, iterations)
            passes += 2 * norm.iterations - 1
            if norm.squared > 0:
                terms[name].append(Term(source, noise[source], norm))
        if progress is not None:
            progress(done + 1, len(sources))
    parameters = {name: ParameterBound(tuple(own)) for name, own in terms.items()}
    return Bounds(parameters, noise, tolerance, draws, passes)


def _observe_qat(noise: dict[Source, Noise], call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
    name = str(getattr(q, "name", type(q).__name__))
    variance = getattr(q, "variance", None)
    noise[Source(*call.key, site)] = Noise(
        name if getattr(q, "bits", None) is None else f"{name}@{q.bits}",  # type: ignore[attr-defined]
        getattr(q, "claim", None) == "unbiased",
        _bound(q, g),
        float(variance(g).sum()) if callable(variance) else math.nan,
    )


def _observe_draw(noise: dict[Source, Noise], call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
    noise[Source(*call.key, site)].drawn.append(_bound(q, g))


def _bound(q: QuantizerLike, g: torch.Tensor) -> float:
    bound = getattr(q, "bound", None)
    limit = bound(g) if callable(bound) else None
    return math.nan if limit is None else float(limit)
