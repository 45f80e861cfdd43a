"""One forward pass, many backward passes: the QAT gradient and any number of FQT draws come from the same graph.

The forward pass of a quantized network is deterministic, so QAT and FQT share it, with its dropout masks and
batch-norm statistics; only the backward pass draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fqtstats.capture.propagation import Propagation
from fqtstats.determinism import seeded, single_thread
from fqtstats.errors import InputError, NonFiniteError, UnsupportedError
from fqtstats.layers.state import SITES, Draw, Observer, Site, Source, WeightObserver
from fqtstats.layers.swap import Handle

__all__ = ["LossFunction", "Session", "trainable_parameters"]

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""``loss_fn(model, batch) -> scalar``."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with elements that require gradients, by qualified name; tied ones once, under their first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel() > 0}


class Session:
    """The graph of one minibatch, held for repeated backward passes. A context manager.

    While it is open, the computation is deterministic (one intra-op thread: the order of summation in convolutions and
    matrix products depends on the thread count). On exit the model's buffers and gradients are what they were.

    Args:
        model: a prepared model; its training mode is left as it is.
        handle: its handle.
        batch: anything ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        seed: seed of what the forward pass draws from torch's generator (dropout).
        injectable: whether errors will be put in at layers' outputs, see :meth:`inject`.
        recordable: whether :meth:`propagation` will be asked for; implies ``injectable``. Attention is then computed
            step by step: the backward passes of fused kernels cannot be differentiated.

    Raises (on entering):
        InputError: an empty batch, or a loss that is not a finite scalar that depends on a trainable parameter.
        UnsupportedError: ``injectable`` or ``recordable`` and a model that is fused, or has a checkpoint with
            ``use_reentrant=True``.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: Handle,
        batch: object,
        loss_fn: LossFunction,
        seed: int = 0,
        *,
        injectable: bool = False,
        recordable: bool = False,
    ) -> None:
        self.model = model
        self.handle = handle
        self.parameters = trainable_parameters(model)
        self._batch = batch
        self._loss_fn = loss_fn
        self._seed = seed
        self._stack = ExitStack()
        self._leaves: list[torch.Tensor] = []
        self._through_grad_fields = False
        self._loss: torch.Tensor | None = None
        self._outputs: dict[tuple[str, int], torch.Tensor] | None = {} if injectable or recordable else None
        self._recordable = recordable

    def __enter__(self) -> Session:
        for tensor in self.tensors():
            if tensor.dim() > 0 and tensor.shape[0] == 0:
                raise InputError(f"expected a batch with samples, got a tensor of shape {list(tensor.shape)}")
        if not self.parameters:
            raise InputError("expected a model with trainable parameters, got none that requires a gradient")
        with self._stack:
            self._stack.enter_context(single_thread())
            self._stack.enter_context(torch.enable_grad())  # the caller may be in a no_grad block
            self._stack.enter_context(
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            )
            self._stack.callback(_restore_buffers, _buffers(self.model))
            if self._recordable:
                self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            inputs = [t for t in self.tensors() if t.is_leaf and t.requires_grad]
            self._leaves = [*self.parameters.values(), *inputs]
            self._stack.callback(_restore_grads, [(t, t.grad) for t in self._leaves])
            self._stack.enter_context(self.handle.shared.counting_anew())
            self._loss = self._forward()
            self._through_grad_fields = _has_reentrant_checkpoint(self._loss)
            if self._through_grad_fields and self._outputs is not None:
                raise UnsupportedError(
                    "a checkpoint with use_reentrant=True hides the layers in it; use use_reentrant=False"
                )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loss = None
        if self._outputs is not None:
            self._outputs.clear()
        self._stack.close()

    @property
    def loss(self) -> float:
        """The loss of the batch."""
        return float(self._require_loss().detach())

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors of the batch."""
        return _tensors(self._batch)

    def qat(self, observe: Observer | None = None, observe_weight: WeightObserver | None = None) -> list[torch.Tensor]:
        """The gradient with full-precision incoming gradients, one tensor per trainable parameter.

        Args:
            observe: is told every incoming gradient that a quantizer is meant for.
            observe_weight: is told every weight gradient that a quantizer is meant for.

        Raises:
            NonFiniteError: a gradient holds NaN or Inf; names the parameter (or layer) and the count.
        """
        gradients = self._backward(Draw(sites=frozenset(), observe=observe, observe_weight=observe_weight))
        for name, g in zip(self.parameters, gradients, strict=True):
            count = int((~torch.isfinite(g)).sum())
            if count:
                raise NonFiniteError(
                    f"expected a finite gradient, got {count} NaN or Inf among the {g.numel()} elements of {name!r}; "
                    "check the loss at this checkpoint, or rescale it",
                    count=count,
                    numel=g.numel(),
                )
        return gradients

    def draw(
        self,
        index: int,
        sites: Sequence[Site] = SITES,
        *,
        only: Iterable[Source] | None = None,
        observe: Observer | None = None,
        observe_weight: WeightObserver | None = None,
    ) -> list[torch.Tensor]:
        """One draw of the quantized gradient.

        Args:
            index: index of the draw; the same index gives the same numbers.
            sites: the sites that quantize; a draw with fewer sites shares the numbers of the others.
            only: of these, the quantizers that act; None: all of them. Likewise.
            observe, observe_weight: as in :meth:`qat`, told the gradients of this draw.
        """
        unknown = [] if isinstance(sites, str) else [site for site in sites if site not in SITES]
        if isinstance(sites, str) or unknown:
            raise InputError(f"expected a sequence of sites from {', '.join(SITES)}; got {sites!r}")
        chosen = None if only is None else frozenset(only)
        return self._backward(Draw(index, frozenset(sites), chosen, observe=observe, observe_weight=observe_weight))

    def calls(self) -> list[tuple[str, int]]:
        """Layer and index of every call, in forward order; of an injectable session."""
        return list(self._require_outputs())

    def inject(self, call: tuple[str, int], error: torch.Tensor) -> list[torch.Tensor | None]:
        """What an error of the gradient that arrives at a layer does to the parameters' gradients by way of its input.

        A backward pass without gradient quantizers from the call's output down: linear in ``error``, and without the
        layer's own weight and bias gradients.

        Args:
            call: layer and index, one of :meth:`calls`.
            error: as many elements as the layer's output, in the order in which quantizers see them.

        Returns:
            One tensor per trainable parameter; None where the error does not get to.
        """
        out, parameters = self._require_outputs()[call], list(self.parameters.values())
        if out.grad_fn is None:
            return [None] * len(parameters)
        error = error.reshape(out.shape).to(out.dtype)
        with self.handle.shared.drawing(Draw(sites=frozenset(), through=Source(*call, "grad_input"))):
            return list(torch.autograd.grad(out, parameters, error, retain_graph=True, allow_unused=True))

    def propagation(self, source: Source) -> Propagation:
        """How an error that ``source`` makes gets into the parameters' gradients, and the adjoint of that map.

        Raises:
            UnsupportedError: something on the way has a backward pass that autograd cannot differentiate.
        """
        if not self._recordable:
            raise RuntimeError("the session was not opened with recordable=True")
        return Propagation(self.handle, source, self._require_outputs()[source.layer, source.call], self.parameters)

    def _require_outputs(self) -> dict[tuple[str, int], torch.Tensor]:
        self._require_loss()
        if self._outputs is None:
            raise RuntimeError("the session was not opened with injectable=True")
        return self._outputs

    def _require_loss(self) -> torch.Tensor:
        if self._loss is None:
            raise RuntimeError("the session is not open: use it in a with block")
        return self._loss

    def _forward(self) -> torch.Tensor:
        device = next(iter(self.parameters.values())).device
        with seeded(self._seed, device), torch.enable_grad(), self.handle.shared.noting(self._outputs):
            loss = self._loss_fn(self.model, self._batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise InputError(
                f"expected loss_fn(model, batch) to return a scalar tensor, got {got}; reduce it with .mean()"
            )
        if not loss.requires_grad:
            raise InputError("the loss does not depend on any trainable parameter; was the model called under no_grad?")
        if not bool(torch.isfinite(loss)):
            raise InputError(f"expected a finite loss, got {loss.item()}; check the batch and the checkpoint")
        return loss.reshape(())

    def _backward(self, draw: Draw) -> list[torch.Tensor]:
        loss, parameters = self._require_loss(), list(self.parameters.values())
        with self.handle.shared.drawing(draw):
            gradients = self._gradients(loss, parameters)
        if all(g is None for g in gradients):
            raise InputError("the loss does not depend on any trainable parameter of the model")
        return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, gradients, strict=True)]

    def _gradients(self, loss: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        if not self._through_grad_fields:
            return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for leaf in self._leaves:
            leaf.grad = None
        loss.backward(retain_graph=True)
        gradients = [p.grad for p in parameters]
        for leaf in self._leaves:
            leaf.grad = None
        return gradients


def _has_reentrant_checkpoint(loss: torch.Tensor) -> bool:
    """Whether the graph holds a checkpoint with ``use_reentrant=True``.

    Such a node runs a backward pass of its own, which leaves its gradients in ``.grad``: ``torch.autograd.grad`` would
    not see the parameters behind it and silently take them for unused.
    """
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            if type(node).__name__ == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            stack.extend(function for function, _ in node.next_functions)
    return False


_Buffer = tuple[nn.Module, str, torch.Tensor | None, torch.Tensor | None]


def _buffers(model: nn.Module) -> list[_Buffer]:
    """Every buffer with a copy of its value."""
    return [
        (module, name, b, None if b is None else b.detach().clone())
        for module in model.modules()
        for name, b in module._buffers.items()
    ]


def _restore_buffers(saved: list[_Buffer]) -> None:
    with torch.no_grad():
        for module, name, tensor, value in saved:
            module._buffers[name] = tensor  # the forward pass may have put another one in its place
            if tensor is not None and value is not None:
                tensor.copy_(value)


def _restore_grads(saved: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    for tensor, grad in saved:
        tensor.grad = grad


def _tensors(batch: object, depth: int = 8) -> Iterator[torch.Tensor]:
    if depth == 0:  # an object that holds itself, or is no batch
        return
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value, depth - 1)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value, depth - 1)
    elif hasattr(batch, "__dict__") and not isinstance(batch, type):
        yield from _tensors(vars(batch), depth - 1)  # a dataclass, or a batch object of some library
