"""Stochastic precision: at each iteration a random part of the layers is quantized; the sampling rule is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fqtstats.random import stream

__all__ = ["StochasticPrecision"]


@dataclass(frozen=True)
class StochasticPrecision:
    """Each layer is quantized with probability ``min(1, t / (rho T))``, independently.

    Attributes:
        rho: share of the stage after which all layers are quantized.
    """

    rho: float = 0.5

    def quantized_layers(self, step: int, steps: int, layers: Sequence[str], seed: int) -> set[str]:
        """The layers that are quantized in this step of a stage."""
        probability = min(1.0, step / (self.rho * steps))
        s = stream(seed=seed, step=step, site="stochastic precision")
        return {name for name, u in zip(layers, s.uniform(len(layers)).tolist(), strict=True) if u < probability}
