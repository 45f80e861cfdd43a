"""The linear map by which an error of one quantized gradient gets into the parameters' gradients, and its adjoint.

The map is a backward pass without gradient quantizers, from the call's output down. Its adjoint is the derivative of
that pass by what was put in: autograd records the pass once, and differentiates it as often as it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fqtstats.errors import UnsupportedError
from fqtstats.layers.state import Draw, Source
from fqtstats.layers.swap import Handle
from fqtstats.random import Stream

__all__ = ["Propagation"]

_UNSUPPORTED = (
    "operator norms need derivatives of the backward pass, which a custom autograd function or fused kernel in the "
    "model does not have; leave the bounds out, or replace it"
)


class Propagation:
    """How the error of one quantizer spreads; linear.

    Made by :meth:`fqtstats.capture.Session.propagation`; holds a graph, and lives no longer than its session.

    Errors have the shape of the layer's product, whose order of elements is the one in which quantizers see it.

    Attributes:
        source: the quantizer that makes the error. From one of ``"grad_input"`` it goes through the layer's input, from
            one of ``"grad_weight"`` into the layer's own weight and bias.
        parameters: names of the parameters that it reaches, perhaps with nothing but zeros.
    """

    def __init__(
        self, handle: Handle, source: Source, out: torch.Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.source = source
        self._handle, self._out, self._parameters = handle, out, parameters
        self._error = torch.zeros_like(out, requires_grad=True)
        gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
        if out.grad_fn is not None:
            with self._pass(Draw(sites=frozenset(), through=source, recorded=True)):
                gradients = torch.autograd.grad(
                    out, list(parameters.values()), self._error, create_graph=True, allow_unused=True
                )
        self._recorded = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        self.parameters = tuple(self._recorded)
        if (obstacle := _obstacle(self._recorded.values())) is not None:
            raise UnsupportedError(f"{_UNSUPPORTED}: {obstacle}")

    def error(self, numbers: Stream) -> torch.Tensor:
        """A random error."""
        shape, device = self._out.shape, self._out.device
        return numbers.uniform(shape, device=device).sub_(0.5).to(self._out.dtype)

    def __call__(self, parameter: str, error: torch.Tensor) -> torch.Tensor:
        """The error of the gradient of ``parameter``, one of :attr:`parameters`."""
        p = self._parameters[parameter]
        draw = Draw(sites=frozenset(), through=self.source, wanted=frozenset([id(p)]))
        with self._pass(draw):
            return torch.autograd.grad(self._out, p, error, retain_graph=True)[0]

    def adjoint(self, parameter: str, gradient: torch.Tensor) -> torch.Tensor:
        """The adjoint's value at ``gradient``, of the shape of ``parameter``; has the shape of an error.

        Only for a parameter that the source reaches: where autograd finds no way, there is one that it cannot follow.

        Raises:
            UnsupportedError: it cannot be differentiated.
        """
        with self._pass(Draw(sites=frozenset(), through=self.source, recorded=True)):
            return torch.autograd.grad(self._recorded[parameter], self._error, gradient, retain_graph=True)[0]

    @contextmanager
    def _pass(self, draw: Draw) -> Iterator[None]:
        with self._handle.shared.drawing(draw):
            try:
                yield
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UnsupportedError(f"{_UNSUPPORTED}: {str(error).split('. ')[0]}") from error


def _obstacle(gradients: Iterable[torch.Tensor]) -> str | None:
    """What in the graph of some gradients stands for a backward pass that cannot be differentiated."""
    seen: set[Any] = set()
    stack: list[Any] = [g.grad_fn for g in gradients]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            # These have no edges to what they were computed from: autograd would take such a way for absent.
            if (name := node.name().rpartition("::")[2]) in ("Error", "NotImplemented", "DelayedError"):
                return f"a node {name}"
            seen.add(node)
            stack.extend(function for function, _ in node.next_functions)
    return None
