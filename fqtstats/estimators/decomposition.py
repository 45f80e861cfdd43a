"""The variance of a quantized gradient by source: Theorem 2 of StatQuant.

Source: J. Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks" (arXiv 2010.14298),
theorem 2. In backward order, what each quantizer adds to the gradient has mean zero given what was drawn before, so the
variances add up::

    Var[dW_k] = E Var[Q1(g_k)^T x_k | g_k] + sum over calls l of E[ Var[J_{l -> k} Q2(g_l) | g_l] ]

with ``g_l`` the gradient that arrives at call ``l`` in a draw (itself quantized on its way) and ``J`` the exact linear
map from there to the gradient of parameter ``k``. The outer expectation is taken over draws: the ranges of the
gradients, and with them the steps of the grids, are random, and a QAT gradient in place of ``g_l`` gives other numbers.

Shape legend: S sources (a layer's Q1 or Q2, its calls together), P parameters. A draw of either estimator is a matrix
``[S, P]`` of squared norms whose expectation is the variance that a source puts into a parameter's gradient:

* :func:`probe`: one backward pass for the ``g_l``, and one from each call down for an error that has the covariance of
  Q2's on ``g_l``, with random signs in place of its distribution. Q1's part is known in closed form. Sources whose
  norms vary much are given several errors in every probe, of which the mean counts: what has to be repeated for them
  is only what lies below.
* :func:`one_at_a_time`: switches the quantizers on one after the other, which takes one whole backward pass for each.
  Much noisier; for unbiased quantizers only. It uses nothing but draws, and so judges the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from fqtstats.capture import Session
from fqtstats.errors import NonFiniteError
from fqtstats.estimators import exact
from fqtstats.estimators.moments import squared_norm
from fqtstats.layers.operand import Operand
from fqtstats.layers.passing import WEIGHT
from fqtstats.layers.product import compute
from fqtstats.layers.state import Call, Site, Source, WeightGradient
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers.base import UniformQuantizer
from fqtstats.random import Stream

__all__ = ["FEWEST", "Decomposition", "Key", "Sources", "one_at_a_time", "precision_reached", "probe"]

FEWEST = 4
"""Draws below which the standard errors are not trusted to stop."""

MOST_REPEATS = 4
"""Errors of one source in one probe."""

NEGLIGIBLE = 0.01
"""Share of the grand total below which a source need not be known relative to itself."""

Key = tuple[str, Site]
"""Layer and site."""

Repeats = Mapping[Key, int]
"""Errors in one probe, by source."""

Matrix = npt.NDArray[np.float64]


@dataclass
class Sources:
    """The gradient quantizers that act in a session; observes a QAT backward pass.

    Attributes:
        session: the session.
        calls: every call of every quantizer, in backward order.
        quantizers: by layer and site.
        columns: by layer and name in the layer, which of the session's parameters it is.
        derived: layer and call of weight gradients that are none of a parameter's, but passed on to parameters
            (``torch.nn.utils.weight_norm``).
    """

    session: Session
    calls: list[Source] = field(default_factory=list)
    quantizers: dict[Key, QuantizerLike] = field(default_factory=dict)
    columns: dict[tuple[str, str], int] = field(default_factory=dict)
    derived: set[tuple[str, int]] = field(default_factory=set)

    def __call__(self, call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
        """Note a quantizer."""
        self.calls.append(Source(*call.key, site))
        self.quantizers[call.layer.name, site] = q

    def weight_gradient(self, call: Call, gradient: WeightGradient, parameters: Sequence[str]) -> None:
        """Note the parameters that a quantizer acts on."""
        places = {id(p): column for column, p in enumerate(self.session.parameters.values())}
        layer = call.layer.name
        for name in parameters:
            module, _, own = name.rpartition(".")
            holder = self.session.handle.layers[layer].get_submodule(module)
            column = places.get(id(holder._parameters.get(own)))
            if column is None:
                self.derived.add(call.key)
            else:
                self.columns[layer, name] = column

    @property
    def keys(self) -> list[Key]:
        """The sources: layers in forward order, each layer's ``grad_weight`` first."""
        layers = dict.fromkeys(source.layer for source in reversed(self.calls))
        sites: tuple[Site, Site] = ("grad_weight", "grad_input")
        return [(layer, site) for layer in layers for site in sites if (layer, site) in self.quantizers]

    @property
    def sampled(self) -> list[Key]:
        """The sources whose variance a probe samples, because it is not known in closed form."""
        derived = {(layer, "grad_weight") for layer, _ in self.derived}
        return [key for key in self.keys if key in derived or not isinstance(self.quantizers[key], UniformQuantizer)]

    def passes(self, estimator: Estimator, repeats: Repeats) -> int:
        """Backward passes of one draw."""
        if estimator is one_at_a_time:
            return len(self.calls)
        errors = [repeats.get((source.layer, source.site), 1) for source in self.calls if source.site == "grad_input"]
        return 1 + len(self.derived) + sum(errors)

    def repeats(self, totals: Matrix) -> Repeats:
        """How many errors each Q2 is given in a probe, from the totals ``[n, S]`` of some probes that gave one each.

        In proportion to the relative variance, with the median at one: that of most sources is similar, and the few
        others would set the number of probes for all.
        """
        keys = [key for key in self.keys if key[1] == "grad_input"]
        mean, error = mean_and_error(totals)
        ratios = _relative(mean, error, mean.sum())[[self.keys.index(key) for key in keys]] ** 2
        if not ratios.any():
            return {}
        multiples = np.rint(ratios / max(np.median(ratios), ratios.max() / MOST_REPEATS)).astype(int)
        return {key: max(1, int(multiple)) for key, multiple in zip(keys, multiples, strict=True)}


def probe(
    sources: Sources, gradient: Sequence[torch.Tensor], index: int, repeats: Repeats, tell: Callable[[], None]
) -> Matrix:
    """One draw of the matrix, ``[S, P]``; see the module.

    Args:
        sources: the quantizers, of an injectable session.
        gradient: QAT gradient (unused).
        index: index of the draw; the same index gives the same numbers.
        repeats: errors per call of a Q2, 1 where not given.
        tell: called after every backward pass.

    Raises:
        NonFiniteError: an error's norm overflows.
    """
    session, keys = sources.session, sources.keys
    matrix = np.zeros((len(keys), len(session.parameters)))
    errors: list[tuple[Call, list[torch.Tensor]]] = []

    def observe(call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
        if site == "grad_input":
            s, number = call.stream(site, index).child("profile"), repeats.get((call.layer.name, site), 1)
            errors.append((call, list(_errors(q, g, [s.child(str(i)) for i in range(number)]))))

    def observe_weight(call: Call, weight: WeightGradient, parameters: Sequence[str]) -> None:
        if call.key not in sources.derived:
            s = call.stream("grad_weight", index).child("profile")
            row = keys.index((call.layer.name, "grad_weight"))
            for name, variance in _own(weight, parameters, s).items():
                matrix[row, sources.columns[call.layer.name, name]] += variance

    # Q1 changes nothing of what arrives at the layers below.
    drawn = session.draw(index, ("grad_input",), observe=observe, observe_weight=observe_weight)
    tell()
    for key in sorted(sources.derived):
        own = Source(*key, "grad_weight")
        with_own = session.draw(index, only=[own, *(s for s in sources.calls if s.site == "grad_input")])
        matrix[keys.index((own.layer, own.site))] += _distances(with_own, drawn)
        tell()
    del drawn
    while errors:
        call, of_call = errors.pop()
        for error in of_call:
            norms = _norms(session.inject(call.key, error))
            matrix[keys.index((call.layer.name, "grad_input"))] += norms / len(of_call)
            tell()
    return _finite(matrix, keys)


def one_at_a_time(
    sources: Sources, gradient: Sequence[torch.Tensor], index: int, repeats: Repeats, tell: Callable[[], None]
) -> Matrix:
    """As :func:`probe`, on any session and without repeats: what each quantizer of a draw adds to those above it."""
    session, keys = sources.session, sources.keys
    matrix = np.zeros((len(keys), len(session.parameters)))
    before = gradient
    for number, source in enumerate(sources.calls, start=1):
        after = session.draw(index, only=sources.calls[:number])
        matrix[keys.index((source.layer, source.site))] += _distances(after, before)
        before = after
        tell()
    return _finite(matrix, keys)


def precision_reached(totals: Matrix) -> float:
    """The largest standard error of a source's total and of their sum, relative to it.

    A source with less than :data:`NEGLIGIBLE` of the sum counts relative to that much.

    Args:
        totals: ``[n, S]``, each draw's matrix summed over parameters.
    """
    values = np.column_stack([totals, totals.sum(axis=1)])
    mean, error = mean_and_error(values)
    return float(_relative(mean, error, mean[-1]).max())


def _relative(mean: Matrix, error: Matrix, total: float) -> Matrix:
    return np.divide(error, np.maximum(mean, NEGLIGIBLE * total), out=np.zeros_like(error), where=error > 0)


def mean_and_error(values: Matrix) -> tuple[Matrix, Matrix]:
    """Mean over draws (the first axis) and its standard error."""
    n = len(values)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(n)


Estimator = Callable[[Sources, Sequence[torch.Tensor], int, Repeats, Callable[[], None]], Matrix]
""":func:`probe` or :func:`one_at_a_time`."""


class Decomposition:
    """Makes and collects draws.

    Args:
        sources: the quantizers.
        estimator: makes the draws.
        gradient: QAT gradient.

    Attributes:
        matrices: by index of the draw, ``[S, P]``.
    """

    def __init__(self, sources: Sources, estimator: Estimator, gradient: Sequence[torch.Tensor]) -> None:
        self.matrices: dict[int, Matrix] = {}
        self._sources, self._estimator, self._gradient = sources, estimator, gradient

    def __len__(self) -> int:
        """Number of draws."""
        return len(self.matrices)

    def draw(self, index: int, tell: Callable[[], None]) -> None:
        """Make the draw with an index, if it is not there; those with lower ones are."""
        if index not in self.matrices:
            self.matrices[index] = self._estimator(self._sources, self._gradient, index, self._repeats(index), tell)

    def _repeats(self, index: int) -> Repeats:
        # The first draws decide, whatever was made after them: a draw is the same in a run that was continued.
        return {} if index < FEWEST else self._later

    @cached_property
    def _later(self) -> Repeats:
        return self._sources.repeats(self.totals(FEWEST))

    def passes(self, n: int) -> int:
        """Backward passes of the first ``n`` draws; an estimate while there are less than :data:`FEWEST`."""
        first = self._sources.passes(self._estimator, {})
        if n <= FEWEST or len(self.matrices) < FEWEST:
            return n * first
        return FEWEST * first + (n - FEWEST) * self._sources.passes(self._estimator, self._later)

    def first(self, n: int) -> Matrix:
        """The draws with the lowest ``n`` indices, ``[n, S, P]``."""
        return np.stack([self.matrices[index] for index in range(n)])

    def totals(self, n: int) -> Matrix:
        """The same, summed over parameters: ``[n, S]``."""
        return np.stack([self.matrices[index].sum(axis=1) for index in range(n)])

    def state(self) -> dict[str, npt.NDArray[np.float64]]:
        """Everything, as arrays; see :meth:`load`."""
        return {f"draw.{index}": matrix for index, matrix in self.matrices.items()}

    def load(self, arrays: dict[str, npt.NDArray[np.float64]]) -> None:
        """Continue from a saved :meth:`state`."""
        self.matrices = {int(name.removeprefix("draw.")): matrix for name, matrix in arrays.items()}


def _errors(q: QuantizerLike, g: torch.Tensor, streams: Sequence[Stream]) -> Iterator[torch.Tensor]:
    """Independent errors with mean zero and the covariance matrix of ``q(g)``, in ``g``'s shape and dtype."""
    with torch.no_grad():
        if not isinstance(q, UniformQuantizer):
            for s in streams:
                # The difference of two draws has twice the variance, and mean zero whatever the mean of q.
                yield (q(g, s.child("first")) - q(g, s.child("second"))).mul_(math.sqrt(0.5))
            return
        variance, frame = q.rounding_variance(g)
        deviation = variance.sqrt_().to(frame.grid.step.dtype)
        for s in streams:
            signs = s.bits(deviation.shape, 1, dtype=torch.int32, device=g.device).mul_(2).sub_(1)
            error = deviation * signs
            error = error if frame.transform is None else frame.transform.inverse(error)
            yield error.view(g.shape).to(g.dtype)


def _own(weight: WeightGradient, parameters: Sequence[str], s: Stream) -> dict[str, float]:
    """The variance that Q1 puts into its layer's own gradients in one call; a sample of it, where it is not known."""
    if isinstance(weight.q, UniformQuantizer):
        return exact.summed(weight, parameters)
    (error,), found = _errors(weight.q, weight.g, [s]), {}
    others = [name for name in parameters if name != "bias"]
    if others:
        a, b = Operand.real(error), Operand.real(weight.x)
        dw = compute(weight.product, "grad_weight", a, b, weight.shape).view(weight.shape)
        found.update(_passed_on(weight, dw, others))
    if "bias" in parameters:
        found["bias"] = squared_norm(error.sum([axis for axis in range(error.dim()) if axis != 1]))
    return found


def _passed_on(weight: WeightGradient, dw: torch.Tensor, parameters: Sequence[str]) -> dict[str, float]:
    """Squared norms of what an error of the weight's gradient becomes behind the weight's quantizer."""
    passage = weight.passage
    if passage is None:
        return dict.fromkeys(parameters, math.nan)
    gradients = {f"{WEIGHT}{name}": functional.of(dw) for name, functional in passage.own.items()}
    gradients["weight"] = passage(dw)
    return {name: squared_norm(gradients[name]) for name in parameters}


def _norms(errors: Sequence[torch.Tensor | None]) -> Matrix:
    return np.array([0.0 if e is None else squared_norm(e) for e in errors])


def _distances(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Matrix:
    return np.array([squared_norm(a.double() - b) for a, b in zip(one, other, strict=True)])


def _finite(matrix: Matrix, keys: Sequence[Key]) -> Matrix:
    for (layer, site), row in zip(keys, matrix, strict=True):
        count = int((~np.isfinite(row)).sum())
        if count:
            raise NonFiniteError(
                f"layer {layer!r}, {site}: the quantization noise of the gradient overflows in {count} parameters; "
                "check the loss at this checkpoint, or rescale it",
                count=count,
                numel=row.size,
            )
    return matrix
