"""Swapping quantized layers into a model and out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.layers import guards
from fqtstats.layers.modules import QuantConv1d, QuantConv2d, QuantLinear
from fqtstats.layers.product import PRODUCTS, ProductName
from fqtstats.layers.state import BACKENDS, Kept, LayerState, Shared
from fqtstats.policy import PLACES, PREFIX, Policy
from fqtstats.quantizers.ranged import LearnedQuantizer
from fqtstats.random import stream

__all__ = ["BACKENDS", "Handle", "Skip", "Unquantized", "prepare_", "quantized", "require_matches"]

QUANTIZED_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""Layers to leave alone: a shell-style pattern of names, several, or a predicate ``(name, module) -> bool``."""


@dataclass(frozen=True, slots=True)
class Unquantized:
    """A module with parameters of its own that stays in full precision, and why."""

    name: str
    type: str
    reason: str


class Handle:
    """A prepared model's controls.

    Attributes:
        layers: the quantized layers by name.
        unquantized: modules with parameters that stay in full precision.
        policy: the policy they were prepared with.
        shared: state common to the layers.
        fused: the modules that :func:`fqtstats.fuse_` changed.
    """

    def __init__(
        self, layers: dict[str, nn.Module], unquantized: tuple[Unquantized, ...], policy: Policy, shared: Shared
    ) -> None:
        self.layers = layers
        self.unquantized = unquantized
        self.policy = policy
        self.shared = shared
        self.fused: list[nn.Sequential] = []

    @property
    def step(self) -> int:
        """Training step: set it every step, so that every step draws new numbers."""
        return self.shared.step

    @step.setter
    def step(self, value: int) -> None:
        self.shared.step = value

    @property
    def full_precision(self) -> frozenset[str]:
        """Layers that act as the plain ones, forward and backward, though they are prepared; none at first.

        Set it before a forward pass, to names of :attr:`layers`, and leave it until the backward pass is over: that of
        a plain layer's output is the plain one whatever is set by then, but a checkpoint computes its layers again.
        """
        return self.shared.full_precision

    @full_precision.setter
    def full_precision(self, names: Iterable[str]) -> None:
        chosen = frozenset([names] if isinstance(names, str) else names)
        unknown = sorted(chosen - set(self.layers))
        if unknown:
            raise InputError(
                f"expected names of quantized layers to run in full precision, got {unknown[0]!r}; "
                f"layers: {', '.join([*self.layers][:20])}"
            )
        self.shared.full_precision = chosen

    @property
    def backend(self) -> str:
        """How products are computed."""
        return self.shared.backend

    @property
    def arithmetic(self) -> dict[str, dict[ProductName, str]]:
        """How each product of each layer was computed so far on the native backend.

        ``"integer 8x4"`` (width of the two operands' codes), or the dtype and why it could not be integers. Passes in
        which a gradient quantizer sits out (QAT) do not count.
        """
        return {
            name: {
                product: "; ".join(sorted(self.shared.arithmetic[name, product]))
                for product in PRODUCTS
                if (name, product) in self.shared.arithmetic
            }
            for name in self.layers
        }

    @property
    def kept(self) -> dict[str, Kept]:
        """By layer, the bytes that the graphs that are now alive keep of the layers' operands, calls added up.

        What a checkpoint keeps only while it recomputes is counted as if it were kept.
        """
        found: dict[str, Kept] = {}
        for one in sorted(self.shared.kept, key=lambda kept: list(self.layers).index(kept.layer)):
            before = found.get(one.layer, Kept(one.layer))
            found[one.layer] = before + one
        return found

    def remove(self) -> None:
        """Give every layer its original class back; nothing of the quantization stays on the model."""
        for layer in self.layers.values():
            original = next(base for base, quantized in QUANTIZED_TYPES.items() if type(layer) is quantized)
            layer.__class__ = original
            del layer.fqt_state
            for name in [name for name in layer._modules if name.startswith(PREFIX)]:
                delattr(layer, name)
        for module in self.fused:
            module.__class__ = nn.Sequential
        self.layers, self.fused = {}, []


def prepare_(
    model: nn.Module, policy: Policy, skip: Skip | None = None, backend: str = "simulated", seed: int = 0
) -> Handle:
    """Quantize the linear and convolution layers of a model, in place.

    Modules of exactly the types ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` change their class and keep everything
    else: parameters, hooks, state_dict keys. Every other module with parameters is listed in ``Handle.unquantized``.
    (``nn.TransformerEncoderLayer`` in ``eval()`` under ``no_grad`` reads the weights of its layers without calling
    them: such a forward pass is not quantized. Measuring and training call them.)

    Args:
        model: the model; a single layer is fine.
        policy: quantizers per layer.
        skip: layers to leave in full precision.
        backend: how the products are computed: ``"simulated"`` multiplies dequantized numbers in float32; ``"native"``
            multiplies integer codes where their scales allow it (see :attr:`Handle.arithmetic`), keeps codes instead of
            numbers for the backward pass, and gives images in channels-last memory.
        seed: seed of the random streams.

    Returns:
        The handle; set ``handle.step`` in training, call ``handle.remove()`` to undo.

    Raises:
        InputError: unknown backend, nothing to quantize, a model that is prepared already, or a pattern without a
            match.
        UnsupportedError: a compiled, scripted or data-parallel model.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if not isinstance(policy, Policy):
        raise InputError(f"expected a fqtstats.Policy, got {policy!r}; see fqtstats.policies.get")
    guards.check_model(model)
    stream(seed=seed)  # raises InputError for what is no integer
    shared = Shared(seed=seed, replica=_rank(), backend=backend)
    skipped = _skipper(skip)
    chosen: dict[str, nn.Module] = {}
    unquantized: list[Unquantized] = []
    for name, module in model.named_modules():
        if hasattr(module, "fqt_state"):
            raise InputError(f"layer {name!r} is prepared already; call remove() of its handle first")
        reason = _reason(name, module, policy, skipped)
        if reason is None:
            chosen[name] = module
        elif any(p is not None for p in module._parameters.values()):
            unquantized.append(Unquantized(name, type(module).__name__, reason))
    if not chosen:
        raise InputError(
            "expected a model with nn.Linear, nn.Conv1d or nn.Conv2d layers to quantize, got "
            f"{type(model).__name__} with none (modules in full precision: {_listing(unquantized)}); "
            "let skip and policy leave a layer to quantize, or give another model"
        )
    names = [*chosen, *(u.name for u in unquantized)]
    require_matches("override", policy.overrides, names)
    require_matches("skip", [] if skip is None or callable(skip) else _patterns(skip), names)
    # Copies first: if one fails, the model has not been touched.
    own = {name: _own(policy.for_layer(name)) for name in chosen}
    for name, module in chosen.items():
        _attach(name, module, own[name])
    for name, module in chosen.items():
        module.__class__ = QUANTIZED_TYPES[type(module)]
        module.fqt_state = LayerState(name, own[name], shared)  # type: ignore[assignment]
        for place in PLACES:
            q = getattr(own[name], place)
            if isinstance(q, nn.Module):  # its state moves, saves and trains with the layer
                module.add_module(PREFIX + place, q)
    return Handle(chosen, tuple(unquantized), policy, shared)


def _own(policy: Policy) -> Policy:
    """A layer's own copy; a quantizer may say what layers get for it."""
    own = copy.deepcopy(replace(policy, overrides={}))
    learning = {place: q.for_layer() for place in PLACES if hasattr(q := getattr(own, place), "for_layer")}
    return replace(own, **learning)


@contextmanager
def quantized(
    model: nn.Module, policy: Policy, skip: Skip | None = None, backend: str = "simulated", seed: int = 0
) -> Iterator[Handle]:
    """:func:`prepare_` for the length of a ``with`` block; the model is restored on exit, also on error."""
    handle = prepare_(model, policy, skip, backend, seed)
    try:
        yield handle
    finally:
        handle.remove()


def _reason(name: str, module: nn.Module, policy: Policy, skipped: Callable[[str, nn.Module], bool]) -> str | None:
    """Why a module stays in full precision; None if it is to be quantized."""
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are used as plain functions, never called as modules"
    if type(module) not in QUANTIZED_TYPES:
        base = next((b for b in QUANTIZED_TYPES if isinstance(module, b)), None)
        return (
            "no quantized counterpart" if base is None else f"subclass of {base.__name__}; only exact types are swapped"
        )
    if skipped(name, module):
        return "skipped on request"
    return None if policy.for_layer(name).quantizes_anything else "its policy has no quantizer"


def _attach(name: str, layer: nn.Module, policy: Policy) -> None:
    """Tell quantizers with parameters of their own where they stand."""
    for place in PLACES:
        q = getattr(policy, place)
        if isinstance(q, LearnedQuantizer):
            try:
                q.attach(place, layer)
            except InputError as error:
                raise InputError(f"layer {name!r}: {error}") from None


def _patterns(skip: str | Iterable[str]) -> list[str]:
    return [skip] if isinstance(skip, str) else list(skip)


def _skipper(skip: Skip | None) -> Callable[[str, nn.Module], bool]:
    if skip is None:
        return lambda name, module: False
    if callable(skip):
        return skip
    patterns = _patterns(skip)
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(what: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise InputError for a pattern that is the name of none of the layers."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"{what} pattern {pattern!r} matches no layer; layers: {', '.join(names[:20])}")


def _listing(unquantized: list[Unquantized]) -> str:
    first = [f"{u.name or '(root)'}: {u.type}, {u.reason}" for u in unquantized[:5]]
    further = [f"and {len(unquantized) - len(first)} more"] if len(unquantized) > len(first) else []
    return ", ".join([*first, *further]) or "none with parameters"


def _rank() -> int:
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )
