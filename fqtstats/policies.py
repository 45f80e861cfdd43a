"""Named policies: the recipes of the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fqtstats.errors import InputError
from fqtstats.policy import Policy, QuantizerLike
from fqtstats.quantizers import QUANTIZERS, quantizer

__all__ = ["POLICIES", "get", "with_gradients"]


def _forward() -> Policy:
    # arXiv 2010.14298, section 2.1: 8-bit activations on an affine grid, 8-bit weights with zero on the grid.
    return Policy(activation=quantizer("minmax", bits=8), weight=quantizer("zero_on_grid", bits=8))


_PER_TENSOR = ("ptq", "luq", "int4_sr", "flush")


def _statquant(grad_input: str) -> Callable[[int], Policy]:
    # Section 3.1 (bifurcation): only the input gradient's bits vary, the weight gradient stays at 8. There it has one
    # scale where the input gradient has one, too.
    grad_weight = "ptq" if grad_input in _PER_TENSOR else "pcq"

    def build(bits: int) -> Policy:
        return replace(
            _forward(), grad_input=quantizer(grad_input, bits=bits), grad_weight=quantizer(grad_weight, bits=8)
        )

    return build


POLICIES: dict[str, Callable[[int], Policy]] = {
    "exact": lambda bits: Policy(),
    "statquant-qat": lambda bits: _forward(),
    **{f"statquant-{name}": _statquant(name) for name, cls in QUANTIZERS.items() if cls.role == "gradient"},
}
"""Name to what makes the policy from the bits of the input gradient; every gradient quantizer has one."""


def get(name: str, bits: int = 5, grad_weight: QuantizerLike | None = None) -> Policy:
    """A named policy.

    Args:
        name: one of :data:`POLICIES`.
        bits: bits of the input-gradient quantizer.
        grad_weight: replaces the recipe's own weight-gradient quantizer.

    Raises:
        InputError: unknown name (lists the known ones), or bits that a quantizer does not have.
    """
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    policy = replace(POLICIES[name](bits), name=name)
    return policy if grad_weight is None else replace(policy, grad_weight=grad_weight)


def with_gradients(q: QuantizerLike) -> Policy:
    """The forward pass of the papers, and ``q`` on the incoming gradient in both backward products.

    Args:
        q: a quantizer of the library or your own, called as ``f(x, stream)``: returns a finite tensor of ``x``'s shape
            and dtype, leaves ``x`` as it is, and takes all its random numbers from the stream
            (``stream.uniform(x.shape)``; of ``stream.child("name")`` for a second set).

    Raises:
        InputError: ``q`` cannot be called.
    """
    return replace(_forward(), grad_input=q, grad_weight=q)
