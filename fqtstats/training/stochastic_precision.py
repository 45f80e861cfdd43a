"""Stochastic precision: at every iteration only some parts of the network are quantized, more and more of them.

Source of the idea: B. Zhuang et al. (arXiv 1908.04680), who do not state how the parts are sampled. **The rule here is
ours**: at iteration t of T every part is quantized, weights and activations together and independently of the others,
with probability ``r_t = min(1, t / (rho T))``. At test time, and from ``t = rho T`` on, everything is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fqtstats.errors import InputError
from fqtstats.layers import Handle
from fqtstats.random import stream

__all__ = ["StochasticPrecision"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LEVELS = 4
"""Of the schedule "step": r_t is rounded down to a multiple of 1 / LEVELS."""


@dataclass(frozen=True)
class StochasticPrecision:
    """The rule by which parts of a network are quantized.

    Attributes:
        unit: what is sampled as one: a ``"layer"``, or a ``"block"``, see :meth:`units`.
        schedule: how r_t rises: ``"linear"`` as above, or in equal steps, ``"step"``.
        rho: share of the iterations after which everything is quantized, in (0, 1].

    Raises:
        InputError: an attribute is out of range.
    """

    unit: Literal["layer", "block"] = "block"
    schedule: Literal["linear", "step"] = "linear"
    rho: float = 0.5

    def __post_init__(self) -> None:
        if self.unit not in ("layer", "block"):
            raise InputError(f"expected the unit of stochastic precision to be layer or block, got {self.unit!r}")
        if self.schedule not in ("linear", "step"):
            raise InputError(f"expected the schedule of stochastic precision as linear or step, got {self.schedule!r}")
        if not 0 < self.rho <= 1:
            raise InputError(f"expected rho of stochastic precision above 0 and at most 1, got {self.rho}")

    def probability(self, step: int, steps: int) -> float:
        """r_t for iteration ``step`` (from 0) of ``steps``."""
        r = min(1.0, step / (self.rho * steps))
        return r if self.schedule == "linear" else math.floor(LEVELS * r) / LEVELS

    def units(self, model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
        """By layer, the name of the part that it is sampled with.

        A layer's block is the innermost module around it that is neither a container (``nn.Sequential`` and lists of
        modules) nor the model itself nor a module with other blocks in it; a layer without one is its own.

        Args:
            model: has the layers.
            layers: their names.
        """
        own = {layer: layer for layer in layers}
        if self.unit == "layer":
            return own
        modules = dict(model.named_modules())
        around = {layer: _around(modules, layer) for layer in own}
        names = set(around.values())
        blocks = {name for name in names if name and not any(other.startswith(f"{name}.") for other in names)}
        return {layer: around[layer] if around[layer] in blocks else layer for layer in own}

    def quantized_layers(self, step: int, steps: int, units: Mapping[str, str], seed: int) -> set[str]:
        """The layers that are quantized at an iteration: depends on (seed, step, name of the part) alone.

        Args:
            step, steps: of the stage, from 0.
            units: as :meth:`units` gives them.
            seed: the experiment's.
        """
        threshold = self.probability(step, steps) * 2**24
        chosen = {
            unit
            for unit in set(units.values())
            if int(stream(seed=seed, step=step, layer=unit, site="stochastic_precision").bits(1)) < threshold
        }
        return {layer for layer, unit in units.items() if unit in chosen}

    @contextmanager
    def sampled(self, handle: Handle, units: Mapping[str, str], step: int, steps: int, seed: int) -> Iterator[None]:
        """Run the body, a forward and backward pass, with the iteration's layers quantized and the others plain."""
        before = handle.full_precision
        handle.full_precision = set(handle.layers) - self.quantized_layers(step, steps, units, seed)
        try:
            yield
        finally:
            handle.full_precision = before


def _around(modules: Mapping[str, nn.Module], layer: str) -> str:
    """Name of the innermost module around a layer that is no container; that of the model is empty."""
    name = layer.rpartition(".")[0]
    while name and isinstance(modules[name], CONTAINERS):
        name = name.rpartition(".")[0]
    return name
