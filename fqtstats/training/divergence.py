"""Why a training run came to NaN or Inf: one step again, with a look at every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fqtstats.errors import NonFiniteError

__all__ = ["Diverged", "Seen", "diagnose", "tell"]

_LISTED = 5
"""Tensors that are named for their size."""


class Diverged(Exception):  # noqa: N818  (it ends the steps)
    """A run cannot go on.

    Attributes:
        objective: computes the step's loss again; None if it shows after the step that was made last.
    """

    def __init__(self, reason: str, objective: Callable[[], torch.Tensor] | None = None) -> None:
        super().__init__(reason)
        self.objective = objective


@dataclass(frozen=True)
class Seen:
    """A tensor of the step.

    Attributes:
        layer: name of the module.
        tensor: ``"activation"`` (its output), ``"gradient"`` (of its output), or a parameter's name, with
            ``" gradient"`` after it for that parameter's gradient.
        largest: magnitude of its largest finite element.
        nonfinite: number of NaN and Inf.
        numel: number of elements.
    """

    layer: str
    tensor: str
    largest: float
    nonfinite: int
    numel: int


def diagnose(networks: Mapping[str, nn.Module], objective: Callable[[], torch.Tensor] | None) -> dict[str, object]:
    """Make a step's forward and backward pass again and look at the tensors in the order in which they are computed.

    Parameters come first, then the layers' outputs, then the gradients of these from the last layer to the first, then
    the gradients of the parameters.

    Args:
        networks: by the name that their layers' names are preceded by; "" for none.
        objective: the loss of the step; the same every time. None: look at the parameters alone.

    Returns:
        JSON: ``"first"``, the first tensor with NaN or Inf (None if there is none), and ``"largest"``, the tensors with
        the largest finite elements, each with what :class:`Seen` has.
    """
    seen: list[Seen] = []

    def look(layer: str, tensor: str, values: torch.Tensor | None) -> None:
        if values is not None and not is_lazy(values) and values.is_floating_point() and values.numel():
            finite = torch.isfinite(values)
            largest = float(torch.where(finite, values, 0).abs().max())
            seen.append(Seen(layer, tensor, largest, int((~finite).sum()), values.numel()))

    def parameters() -> Iterator[tuple[str, str, nn.Parameter]]:
        for prefix, network in networks.items():
            for name, p in network.named_parameters():
                layer, _, own = name.rpartition(".")
                yield _joined(prefix, layer), own, p

    for layer, own, p in parameters():
        look(layer, own, p.detach())
        p.grad = None
    # A quantizer refuses what is looked for, which has been seen on its way there.
    if objective is not None:
        with _watched(networks, look), suppress(NonFiniteError):
            torch.autograd.backward(objective())
    for layer, own, p in parameters():
        look(layer, f"{own} gradient", p.grad)
    first = next((one for one in seen if one.nonfinite), None)
    largest = sorted(seen, key=lambda one: -one.largest)[:_LISTED]
    return {"first": None if first is None else asdict(first), "largest": [asdict(one) for one in largest]}


def tell(diagnosis: Mapping[str, object]) -> str:
    """What :func:`diagnose` found, as a clause."""
    first = diagnosis["first"]
    if isinstance(first, Mapping):
        where = f"{first['tensor']} of layer {first['layer']!r}"
        return f"first in the {where}: {first['nonfinite']} NaN or Inf among {first['numel']} elements"
    largest = diagnosis["largest"]
    assert isinstance(largest, list)
    top = max(largest, key=lambda one: one["largest"])
    return f"the largest number is {top['largest']:.3g}, in the {top['tensor']} of layer {top['layer']!r}"


def _joined(prefix: str, layer: str) -> str:
    return f"{prefix}.{layer}".strip(".")


@contextmanager
def _watched(
    networks: Mapping[str, nn.Module], look: Callable[[str, str, torch.Tensor | None], None]
) -> Iterator[None]:
    """Look at the outputs of all modules that compute something themselves, and at the gradients of these."""

    def watch(layer: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                look(layer, "activation", output.detach())
                if output.requires_grad:
                    output.register_hook(lambda g: look(layer, "gradient", g))

        return hook

    handles = [
        module.register_forward_hook(watch(_joined(prefix, name)))
        for prefix, network in networks.items()
        for name, module in network.named_modules()
        if not any(True for _ in module.children()) or any(p is not None for p in module._parameters.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
