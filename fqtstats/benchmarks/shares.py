"""Where the time of a training step goes, by kind of work.

``torch.profiler`` records the operations of PyTorch, and while it does the library's own are wrapped in records of
their kind. An event's own time (without that of the events in it) counts for the kind of the event, or else of the
innermost one around it that has a kind. What lies outside of all events, Python between them, is the rest. Recording
slows small operations down, so that the rest is an upper bound of what it is without.

A pass that does several things counts once: that which normalizes, pools and makes codes is quantizing; the one that
takes gradients back through pooling, activation and normalization, with the extremes that quantizing needs, is
normalization.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from fqtstats.layers import state
from fqtstats.ops import fused

__all__ = ["KINDS", "shares"]

KINDS = (
    "forward products",
    "dX products",
    "dW products",
    "products in full precision",
    "quantizing",
    "normalization, activation, pooling",
    "optimizer",
    "the rest",
)

_PRODUCTS = {"forward": "forward products", "grad_input": "dX products", "grad_weight": "dW products"}
_OWN: tuple[tuple[ModuleType, str, str], ...] = (
    (state, "store", "quantizing"),
    *((fused, name, "quantizing") for name in ("bits", "encode", "extremes")),
    *(
        (fused, name, "normalization, activation, pooling")
        for name in ("moments", "apply", "gradient_sums", "gradient")
    ),
)
_MARK = "fqtstats: "
_NAMES = {
    "products in full precision": ("conv", "addmm", "aten::mm", "aten::linear"),
    "quantizing": ("_ClippedBackward", "_MaskedBackward", "hardtanh"),
    "normalization, activation, pooling": ("batch_norm", "relu", "threshold", "pool", "BatchNorm"),
    "optimizer": ("Optimizer.",),
}
"""Parts of the names of PyTorch's events."""

_STEPS = 3


def shares(step: Callable[[], object]) -> dict[str, float]:
    """The share of time of every kind of :data:`KINDS` in a training step; they add up to 1."""
    step()
    start = time.perf_counter()
    with _marked(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        for _ in range(_STEPS):
            step()
        elapsed = (time.perf_counter() - start) * 1e6
    found = dict.fromkeys(KINDS, 0.0)
    for event in recorded.events() or ():
        found[_kind(event)] += event.self_cpu_time_total / elapsed
    known = sum(share for kind, share in found.items() if kind != "the rest")
    scale = max(1.0, known)
    found = {kind: share / scale for kind, share in found.items()}
    found["the rest"] = max(0.0, 1 - known / scale)
    return found


def _kind(event: Any) -> str:
    while event is not None:
        if event.name.startswith(_MARK):
            return str(event.name.removeprefix(_MARK))
        for kind, parts in _NAMES.items():
            if any(part in event.name for part in parts):
                # What our own functions call in PyTorch is theirs.
                outer = _marked_around(event.cpu_parent)
                return kind if outer is None else outer
        event = event.cpu_parent
    return "the rest"


def _marked_around(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_MARK):
            return str(event.name.removeprefix(_MARK))
        event = event.cpu_parent
    return None


@contextmanager
def _marked() -> Iterator[None]:
    """The library's functions in records of their kind."""
    places = [(module, name) for module, name, _ in _OWN] + [(state, "compute")]
    before = [(module, name, getattr(module, name)) for module, name in places]
    compute = before[-1][2]

    def computed(product: Any, name: Any, *operands: Any) -> Any:
        with record_function(_MARK + _PRODUCTS[name]):
            return compute(product, name, *operands)

    try:
        for module, name, kind in _OWN:
            setattr(module, name, _recorded(getattr(module, name), _MARK + kind))
        setattr(*places[-1], computed)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _recorded(function: Callable[..., Any], mark: str) -> Callable[..., Any]:
    def recorded(*arguments: Any, **options: Any) -> Any:
        with record_function(mark):
            return function(*arguments, **options)

    return recorded
