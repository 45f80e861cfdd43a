"""What the quantized layers of one model share: seeds, counters, and which gradient draw is being made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakSet

import torch

from fqtstats.errors import InputError, NonFiniteError
from fqtstats.layers import recomputation
from fqtstats.layers.operand import Operand, images
from fqtstats.layers.passing import Passed
from fqtstats.layers.product import Product, ProductName, compute, how
from fqtstats.listening import LISTENERS, quantizing
from fqtstats.policy import Policy, QuantizerLike
from fqtstats.quantizers.base import Quantizer
from fqtstats.quantizers.passage import Passage
from fqtstats.quantizers.storage import Extremes, store
from fqtstats.random import Stream, stream

__all__ = [
    "BACKENDS",
    "SITES",
    "Call",
    "Draw",
    "Inspector",
    "Kept",
    "LayerState",
    "Observer",
    "Shared",
    "Site",
    "Source",
    "WeightGradient",
    "WeightObserver",
]

BACKENDS = ("simulated", "native")
"""How products are computed: on dequantized numbers in floating point, or on integer codes where that is possible."""

Site = Literal["grad_input", "grad_weight"]
SITES: tuple[Site, Site] = ("grad_input", "grad_weight")

Observer = Callable[["Call", Site, QuantizerLike, torch.Tensor], None]
WeightObserver = Callable[["Call", "WeightGradient", Sequence[str]], None]


class Source(NamedTuple):
    """A gradient quantizer in one call of a layer: where quantization noise enters the backward pass."""

    layer: str
    call: int
    site: Site


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """The weight gradient of one call of a layer, ``dW = Q1(g)^T x`` or that of a convolution; ``db`` sums ``Q1(g)``.

    Attributes:
        product: the layer's operation.
        q: Q1, the quantizer of ``g`` in this product.
        g: the incoming gradient before ``q``: ``[R, O]`` or ``[N, O, *space]``.
        x: the layer's input as the product takes it, quantized: ``[R, I]`` or ``[N, I, *space]``.
        shape: the weight's, ``[O, I]`` or ``[O, I / groups, *kernel]``.
        passage: how ``dW`` passes the weight's quantizer to the parameters; None if that is not known.
    """

    product: Product
    q: QuantizerLike
    g: torch.Tensor
    x: torch.Tensor
    shape: tuple[int, ...]
    passage: Passage | None = field(default_factory=Passage)


@dataclass(frozen=True, slots=True)
class Draw:
    """What a backward pass does with the incoming gradients.

    Attributes:
        index: index of the draw, part of the random streams' key.
        sites: the sites whose quantizers act; none gives the QAT gradient.
        only: of these, the quantizers that act; None: all of them.
        through: the one product by which what is put in at a call's output goes on; the call's other one is left out.
        wanted: the parameters (their ``id``) whose gradients will be looked at, so that others need not be computed;
            None: all.
        recorded: whether autograd records the pass, to differentiate what it gives by the incoming gradients. Operands
            of the forward products count as constants: second derivatives of the loss are something else.
        observe: is told every incoming gradient that a quantizer is meant for, before it acts.
        observe_weight: is told every weight gradient that a quantizer is meant for, and which of the layer's parameters
            (``"weight"``, ``"bias"``) take part.
    """

    index: int = 0
    sites: frozenset[Site] = frozenset(SITES)
    only: frozenset[Source] | None = None
    through: Source | None = None
    wanted: frozenset[int] | None = None
    recorded: bool = False
    observe: Observer | None = None
    observe_weight: WeightObserver | None = None

    def __post_init__(self) -> None:
        if self.recorded and self.sites:
            raise InputError("a pass with gradient quantizers is not linear: it cannot be recorded")

    def passes(self, source: Source) -> bool:
        """Whether a product is part of the pass."""
        return self.through is None or source[:2] != self.through[:2] or source == self.through

    def acts(self, source: Source) -> bool:
        """Whether a quantizer acts."""
        return source.site in self.sites and (self.only is None or source in self.only)


class Inspector(Protocol):
    """Is shown what layers compute, as they compute it."""

    def operand(self, call: Call, place: str, q: QuantizerLike, x: torch.Tensor, draw: int, operand: Operand) -> None:
        """``operand`` is what ``q`` made of ``x`` at ``place`` of the policy."""

    def product(
        self, call: Call, name: ProductName, product: Product, a: Operand, b: Operand, last: Any, result: torch.Tensor
    ) -> None:
        """``result`` is what :func:`fqtstats.layers.product.compute` gave."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What calls of a layer keep for their backward pass. Lives as long as the graph does.

    Attributes:
        layer: its name.
        activation, weight: bytes of the operands as they are kept.
        activation_float32: bytes of the activations in float32.
    """

    layer: str
    activation: int = 0
    weight: int = 0
    activation_float32: int = 0

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.layer,
            self.activation + other.activation,
            self.weight + other.weight,
            self.activation_float32 + other.activation_float32,
        )


@dataclass
class Shared:
    """State common to the layers of a prepared model.

    Attributes:
        seed, replica: parts of the random streams' key.
        backend: one of :data:`BACKENDS`.
        inspector: is shown every operand and product.
        arithmetic: by layer and product, how it was computed (all the ways, if there were several).
        kept: what the graphs that are alive keep.
        outputs: where the products of layers are noted by layer and call, as the graph has them; None: nowhere.
        dtypes: those of the layers' outputs so far, and with them of the gradients that arrive.
        full_precision: names of the layers that now act as the plain ones.
    """

    seed: int = 0
    replica: int = 0
    backend: str = "simulated"
    inspector: Inspector | None = None
    arithmetic: dict[tuple[str, ProductName], set[str]] = field(default_factory=dict)
    kept: WeakSet[Kept] = field(default_factory=WeakSet)
    outputs: dict[tuple[str, int], torch.Tensor] | None = None
    dtypes: set[torch.dtype] = field(default_factory=set)
    full_precision: frozenset[str] = frozenset()
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

    @contextmanager
    def noting(self, outputs: dict[tuple[str, int], torch.Tensor] | None) -> Iterator[None]:
        """Note the products of layers in ``outputs``."""
        before, self.outputs = self.outputs, outputs
        try:
            yield
        finally:
            self.outputs = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        # A copied layer stays with the handle that steers the original.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Graphs are not pickled.
        return {name: value for name, value in vars(self).items() if name not in ("kept", "outputs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, kept=WeakSet(), outputs=None)


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

    @property
    def plain(self) -> bool:
        """Whether the layer now acts as the plain one; its calls are not counted then."""
        return self.name in self.shared.full_precision

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

    @property
    def key(self) -> tuple[str, int]:
        """Layer and index."""
        return self.layer.name, self.index

    def stream(self, site: str, draw: int = 0) -> Stream:
        """The random stream of one use."""
        shared = self.layer.shared
        return Stream(shared.seed, self.step, self.layer.name, site, draw, self.index, shared.replica)

    def operand(
        self,
        place: str,
        x: torch.Tensor,
        pad: tuple[int, int] = (0, 0),
        draw: int = 0,
        extremes: Extremes | None = None,
    ) -> Operand:
        """``x`` as a product takes it, through the quantizer at ``place`` of the policy.

        Args:
            place: where in the policy.
            x: in the dtype that products are computed in.
            pad: pixels around images of codes.
            draw: index of the draw.
            extremes: of ``x``, where they are known already.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf; names layer and place.
            InputError: the quantizer returned another shape or dtype, or changed ``x``.
        """
        q: QuantizerLike | None = getattr(self.layer.policy, place)
        if q is None:
            return Operand.real(x, "no quantizer")
        shared = self.layer.shared
        operand = self._encoded(q, place, x, pad, draw, extremes) if shared.backend == "native" else None
        if operand is None:
            why = "float64" if x.dtype == torch.float64 else "a quantizer without codes for products"
            operand = Operand.real(self.quantize(q, place, x, draw), why)
        if shared.inspector is not None:
            shared.inspector.operand(self, place, q, x, draw, operand)
        return operand

    def _encoded(
        self, q: QuantizerLike, place: str, x: torch.Tensor, pad: tuple[int, int], draw: int, extremes: Extremes | None
    ) -> Operand | None:
        with torch.no_grad(), self._named(place), self._told(place, x, draw):
            stored = store(q, images(x), self.stream(place, draw), pad, extremes)
        return None if stored is None else Operand(stored)

    def gradient(
        self, site: Site, g: torch.Tensor, pad: tuple[int, int] = (0, 0), extremes: Extremes | None = None
    ) -> Operand:
        """The incoming gradient as the product at ``site`` takes it in the current draw.

        Raises:
            NonFiniteError: the gradient holds NaN or Inf; names the layer and the count.
        """
        q: QuantizerLike | None = getattr(self.layer.policy, site)
        draw = self.layer.shared.draw
        if q is not None and draw.observe is not None:
            with self._named(site):
                draw.observe(self, site, q, g)
        if q is not None and not draw.acts(Source(self.layer.name, self.index, site)):
            return Operand.real(g)
        return self.operand(site, g, pad, draw.index, extremes)

    def show_weight_gradient(
        self,
        product: Product,
        g: torch.Tensor,
        x: Operand,
        shape: tuple[int, ...],
        passed: Passed,
        parameters: Sequence[str],
    ) -> None:
        """Tell the current draw's observer, if there are one and a quantizer; as in :class:`WeightGradient`.

        ``parameters`` are those of the layer; its weight quantizer's own are added.
        """
        q, observe = self.layer.policy.grad_weight, self.layer.shared.draw.observe_weight
        if q is not None and observe is not None:
            passage: Passage | None = Passage()
            if "weight" in parameters:
                passage = passed.passage()
                parameters = [*passed.parameters(passage), *(name for name in parameters if name != "weight")]
            with self._named("grad_weight"):
                observe(self, WeightGradient(product, q, g, x.decode(), shape, passage), parameters)

    def compute(self, name: ProductName, product: Product, a: Operand, b: Operand, last: Any = None) -> torch.Tensor:
        """:func:`fqtstats.layers.product.compute`, noted and shown to the inspector."""
        shared = self.layer.shared
        result = compute(product, name, a, b, last)
        if shared.backend == "native" and not a.undrawn:
            known = shared.arithmetic.setdefault((self.layer.name, name), set())
            known.add(how(product, name, a, b, result.dtype))
        if shared.inspector is not None:
            shared.inspector.product(self, name, product, a, b, last, result)
        return result

    def quantize(self, q: QuantizerLike, site: str, x: torch.Tensor, draw: int = 0) -> torch.Tensor:
        """``q`` of ``x``, without autograd and in ``x``'s memory format.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf, or what a callable returned does; names layer and site.
            InputError: the quantizer returned another shape or dtype, or changed ``x``.
        """
        version = None if x.is_inference() else x._version
        with torch.no_grad(), self._named(site), self._told(site, x, draw):
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
        if not isinstance(q, Quantizer):
            # The library's quantizers refuse such input and give no such output.
            bad = int((~torch.isfinite(out)).sum())
            if bad and bool(torch.isfinite(x).all()):
                raise NonFiniteError(
                    f"layer {self.layer.name!r}, {site}: the quantizer returned {bad} NaN or Inf of {out.numel()} "
                    "elements for finite input; let it return finite numbers",
                    count=bad,
                    numel=out.numel(),
                )
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    def _told(self, place: str, x: torch.Tensor, draw: int) -> AbstractContextManager[object]:
        return quantizing(self, place, x, draw) if LISTENERS else nullcontext()

    @contextmanager
    def _named(self, site: str) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            message = f"layer {self.layer.name!r}, {site}: {error}"
            raise NonFiniteError(message, count=error.count, numel=error.numel) from None
