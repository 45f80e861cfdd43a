"""What input and weight of a layer pass before its product: the surrogates of their quantizers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fqtstats.policy import PREFIX, Policy, QuantizerLike
from fqtstats.quantizers.passage import Passage, nbytes

__all__ = ["WEIGHT", "Passed", "enter", "output_scale", "surrogate"]

WEIGHT = f"{PREFIX}weight."
"""Before the names of the parameters that the weight's quantizer has."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What became of input and weight on their way to the product.

    Attributes:
        q: the weight's quantizer.
        weight: the weight as the layer has it.
        activation_nbytes, weight_nbytes: what the surrogates keep.
    """

    q: QuantizerLike | None
    weight: torch.Tensor
    activation_nbytes: int = 0
    weight_nbytes: int = 0

    def passage(self) -> Passage | None:
        """How the weight's gradient passes its quantizer; None if that is not known."""
        if not hasattr(self.q, "surrogate"):
            return Passage()
        known = getattr(self.q, "passage", None)
        if known is None:
            return None
        w = self.weight.detach()
        passage: Passage = known(w if w.dtype == torch.float64 else w.float())
        return passage

    def parameters(self, passage: Passage | None) -> list[str]:
        """The layer's parameters that the weight's gradient is passed on to, by their names in the layer."""
        own = () if passage is None else passage.own
        return [*(["weight"] if self.weight.requires_grad else []), *(f"{WEIGHT}{name}" for name in own)]


def surrogate(q: QuantizerLike | None, x: torch.Tensor) -> torch.Tensor:
    """``x`` as the product takes it: with the gradient of its quantizer, if that has one of its own."""
    own = getattr(q, "surrogate", None)
    passed: torch.Tensor = x if own is None else own(x)
    return passed


def enter(
    policy: Policy, x: torch.Tensor, weight: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Passed]:
    """Input and weight of a product behind their surrogates.

    Args:
        policy: the layer's.
        x: the input in the dtype that products are computed in.
        weight: as the layer has it.
        w: the same in that dtype.
    """
    passed_x, passed_w = surrogate(policy.activation, x), surrogate(policy.weight, w)
    kept = [0 if after is before else nbytes(after) for before, after in ((x, passed_x), (w, passed_w))]
    return passed_x, passed_w, Passed(policy.weight, weight, *kept)


def output_scale(policy: Policy, weight: torch.Tensor) -> torch.Tensor | None:
    """What the output channels are multiplied by, ``[O]``; None where the weight's quantizer asks for nothing."""
    scale = getattr(policy.weight, "output_scale", None)
    found: torch.Tensor | None = None if scale is None else scale(weight)
    return found
