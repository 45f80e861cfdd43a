"""What is kept of the gradients that arrive at the layers: the exact law of the quantizers on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fqtstats.estimators import exact
from fqtstats.layers.state import Call, Site, WeightGradient
from fqtstats.policy import QuantizerLike
from fqtstats.quantizers.base import Quantizer

__all__ = ["IncomingGradients", "LayerLaw", "add_own_variance"]


@dataclass
class LayerLaw:
    """Exact summed variance of one layer's quantizer at one site, and its bound; added up over the layer's calls.

    Attributes:
        variance: sum over elements of Var[Q(g)] on the incoming QAT gradient; NaN if the quantizer does not know it.
        bound: upper bound on ``variance``; NaN for a quantizer that has none.
        grad_norm_sq: squared norm of the incoming QAT gradient.
    """

    variance: float = 0.0
    bound: float = 0.0
    grad_norm_sq: float = 0.0


@dataclass
class IncomingGradients:
    """Observer of a QAT backward pass.

    Attributes:
        laws: by layer name and site.
        own: by layer name and ``"weight"`` or ``"bias"``: the exact variance of that gradient that comes from the
            layer's own Q1, summed over elements and calls; NaN if it is not known.
        few: by layer name, the largest :func:`fqtstats.estimators.exact.few_roundings` of its calls.
    """

    laws: dict[tuple[str, Site], LayerLaw] = field(default_factory=dict)
    own: dict[tuple[str, str], float] = field(default_factory=dict)
    few: dict[str, float] = field(default_factory=dict)
    _last: tuple[torch.Tensor, exact.Roundings] | None = field(default=None, init=False, repr=False)

    def __call__(self, call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
        """Add one incoming gradient ``g`` (the layer's output shape) that ``q`` is meant for."""
        law = self.laws.setdefault((call.layer.name, site), LayerLaw())
        variance, bound = getattr(q, "variance", None), getattr(q, "bound", None)
        if site == "grad_weight" and isinstance(q, Quantizer):
            # The weight gradient of the same tensor is told next: its roundings are looked at once.
            self._last = g, exact.Roundings.of(q, g)
            law.variance += self._last[1].total()
        else:
            law.variance += float(variance(g).sum()) if callable(variance) else math.nan
        limit = bound(g) if callable(bound) else None
        law.bound += math.nan if limit is None else limit
        law.grad_norm_sq += float(torch.linalg.vector_norm(g, dtype=torch.float64).square())

    def weight_gradient(self, call: Call, gradient: WeightGradient, parameters: Sequence[str]) -> None:
        """Add one weight gradient that a quantizer is meant for, for ``parameters`` of the layer."""
        known, self._last = self._last, None
        roundings = known[1] if known is not None and known[0] is gradient.g else None
        add_own_variance(self.own, call, gradient, parameters, roundings)
        if isinstance(gradient.q, Quantizer):
            layer = call.layer.name
            few = exact.few_roundings(gradient, roundings or exact.Roundings.of(gradient.q, gradient.g))
            self.few[layer] = max(self.few.get(layer, 0.0), few)


def add_own_variance(
    own: dict[tuple[str, str], float],
    call: Call,
    gradient: WeightGradient,
    parameters: Sequence[str],
    roundings: exact.Roundings | None = None,
) -> None:
    """Add the exact variance of one weight gradient from its own quantizer, as :attr:`IncomingGradients.own`."""
    for name, variance in exact.summed(gradient, parameters, roundings).items():
        key = call.layer.name, name
        own[key] = own.get(key, 0.0) + variance
