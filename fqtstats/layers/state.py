"""What the quantized layers of one model share: seeds, counters, and which gradient draw is being made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fqtstats.errors import InputError, NonFiniteError
from fqtstats.layers import recomputation
from fqtstats.policy import Policy, QuantizerLike
from fqtstats.random import Stream, stream

__all__ = ["SITES", "Call", "Draw", "LayerState", "Shared", "Site"]

Site = Literal["grad_input", "grad_weight"]
SITES: tuple[Site, Site] = ("grad_input", "grad_weight")

Observer = Callable[["LayerState", Site, QuantizerLike, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Draw:
    """What a backward pass does with the incoming gradients.

    Attributes:
        index: index of the draw, part of the random streams' key.
        sites: the sites whose quantizers act; none gives the QAT gradient.
        observe: is told every incoming gradient that a quantizer is meant for, before it acts.
    """

    index: int = 0
    sites: frozenset[Site] = frozenset(SITES)
    observe: Observer | None = None


@dataclass
class Shared:
    """State common to the layers of a prepared model.

    Attributes:
        seed, replica: parts of the random streams' key.
    """

    seed: int = 0
    replica: int = 0
    _step: int = 0
    _calls: dict[str, int] = field(default_factory=dict)
    _draw: Draw = field(default_factory=Draw)

    @property
    def step(self) -> int:
        """Training step, part of the random streams' key. Setting it restarts the count of calls."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        stream(step=value)  # raises InputError for what is no integer
        self._step = value
        self._calls.clear()

    def next_call(self, layer: str) -> int:
        """Index of this call of ``layer`` within the step, in forward order; a recomputed call keeps its index."""
        return recomputation.call_index(layer, self._count)

    @contextmanager
    def counting_anew(self) -> Iterator[None]:
        """Count calls from 0; afterwards the count goes on where it was."""
        before, self._calls = self._calls, {}
        try:
            yield
        finally:
            self._calls = before

    def _count(self, layer: str) -> int:
        index = self._calls.get(layer, 0)
        self._calls[layer] = index + 1
        return index

    @property
    def draw(self) -> Draw:
        """The draw that backward passes make."""
        return self._draw

    @contextmanager
    def drawing(self, draw: Draw) -> Iterator[None]:
        """Make ``draw`` in backward passes."""
        before, self._draw = self._draw, draw
        try:
            yield
        finally:
            self._draw = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        # A copied layer stays with the handle that steers the original.
        return self


@dataclass(frozen=True)
class LayerState:
    """What one quantized layer knows.

    Attributes:
        name: qualified name in the model.
        policy: the layer's own quantizers.
        shared: state common to all layers of the model.
    """

    name: str
    policy: Policy
    shared: Shared

    def call(self) -> Call:
        """Open a call of the layer (in its forward pass)."""
        index = self.shared.next_call(self.name)
        return Call(self, self.shared.step, index)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer: fixes step and call index of its streams at forward time, however late backward runs."""

    layer: LayerState
    step: int
    index: int

    def stream(self, site: str, draw: int = 0) -> Stream:
        """The random stream of one use."""
        shared = self.layer.shared
        return Stream(shared.seed, self.step, self.layer.name, site, draw, self.index, shared.replica)

    def gradient(self, site: Site, g: torch.Tensor) -> torch.Tensor:
        """The incoming gradient as the product at ``site`` sees it in the current draw.

        Raises:
            NonFiniteError: the gradient holds NaN or Inf; names the layer and the count.
        """
        q: QuantizerLike | None = getattr(self.layer.policy, site)
        if q is None:
            return g
        draw = self.layer.shared.draw
        if draw.observe is not None:
            with self._named(site):
                draw.observe(self.layer, site, q, g)
        return self.quantize(q, site, g, draw.index) if site in draw.sites else g

    def quantize(self, q: QuantizerLike, site: str, x: torch.Tensor, draw: int = 0) -> torch.Tensor:
        """``q`` of ``x``, without autograd and in ``x``'s memory format.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf; names layer and site.
            InputError: the quantizer returned another shape or dtype, or changed ``x``.
        """
        version = None if x.is_inference() else x._version
        with torch.no_grad(), self._named(site):
            out = q(x, self.stream(site, draw))
        if version is not None and x._version != version:
            raise InputError(
                f"layer {self.layer.name!r}, {site}: the quantizer changed its argument in place, which others "
                "still use; let it work on a copy"
            )
        if not isinstance(out, torch.Tensor) or out.shape != x.shape or out.dtype != x.dtype:
            got = f"{list(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(
                f"layer {self.layer.name!r}, {site}: expected the quantizer to return {list(x.shape)} {x.dtype}, "
                f"got {got}"
            )
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    @contextmanager
    def _named(self, site: str) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            message = f"layer {self.layer.name!r}, {site}: {error}"
            raise NonFiniteError(message, count=error.count, numel=error.numel) from None
