"""Which quantizer acts where in a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from fqtstats.errors import InputError
from fqtstats.random import Stream

__all__ = ["PLACES", "PREFIX", "Policy", "QuantizerLike"]

PLACES = ("activation", "weight", "grad_input", "grad_weight")
"""Where a policy's quantizers act."""

PREFIX = "fqt_"
"""Of the names under which quantizers that are modules stand on their layer, and in its state_dict."""

QuantizerLike = Callable[[torch.Tensor, Stream], torch.Tensor]
"""Anything called as ``f(x, stream)`` that returns a tensor of ``x``'s shape and dtype."""


@dataclass(frozen=True)
class Policy:
    """Quantizers of one layer: of its input, its weight, and its incoming gradient once for each backward product.

    Attributes:
        activation: acts on the layer's input in the forward pass. Gradients pass it straight through, or by its own
            straight-through estimator, where it has one (:mod:`fqtstats.quantizers.passage`).
        weight: acts on the weight in the forward pass. Likewise.
        grad_input: acts on dL/dY in the product that gives the input gradient, ``dX = Q2(dL/dY) W^T``.
        grad_weight: acts on dL/dY in the product that gives the weight gradient, ``dW = X^T Q1(dL/dY)``, and the bias
            gradient.
        overrides: policies of single layers by shell-style pattern of the layer's name; the first match wins and
            replaces this policy whole.
        name: how results call this policy.

    A quantizer here is a prototype: every layer gets its own copy. One that is an ``nn.Module`` becomes a submodule of
    the layer (``fqt_activation``, ...), which adds keys to the state_dict. None leaves that place in full precision.

    Raises:
        InputError: a quantizer cannot be called, or an override has overrides of its own.
    """

    activation: QuantizerLike | None = None
    weight: QuantizerLike | None = None
    grad_input: QuantizerLike | None = None
    grad_weight: QuantizerLike | None = None
    overrides: Mapping[str, Policy] = field(default_factory=dict)
    name: str = "custom"

    def __post_init__(self) -> None:
        for place in PLACES:
            q = getattr(self, place)
            if q is not None and not callable(q):
                raise InputError(
                    f"expected {place} to be a quantizer called as f(x, stream), or None; got {q!r}: "
                    "make one with fqtstats.quantizer(name, bits=...)"
                )
        for pattern, policy in self.overrides.items():
            if not isinstance(policy, Policy):
                raise InputError(f"expected a Policy as override of {pattern!r}, got {policy!r}")
            if policy.overrides:
                raise InputError(f"the override of {pattern!r} has overrides of its own; list them all in one policy")

    def qat(self) -> Policy:
        """The same forward pass with full-precision gradients."""
        return replace(
            self,
            name=f"{self.name}-qat",
            grad_input=None,
            grad_weight=None,
            overrides={pattern: policy.qat() for pattern, policy in self.overrides.items()},
        )

    def for_layer(self, layer: str) -> Policy:
        """The policy of one layer, overrides applied."""
        for pattern, policy in self.overrides.items():
            if fnmatchcase(layer, pattern):
                return policy
        return self

    @property
    def quantizes_gradients(self) -> bool:
        """Whether any gradient quantizer is set, here or in an override."""
        own = self.grad_input is not None or self.grad_weight is not None
        return own or any(policy.quantizes_gradients for policy in self.overrides.values())

    @property
    def quantizes_anything(self) -> bool:
        """Whether any of the four places has a quantizer (overrides not counted)."""
        return any(q is not None for q in (self.activation, self.weight, self.grad_input, self.grad_weight))
