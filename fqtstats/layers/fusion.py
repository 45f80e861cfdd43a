"""Convolutions of an ``nn.Sequential`` and what lies between them, run as one.

A chain is a run of stages, each a quantized 2-D convolution, then batch normalization, ReLU and 2x2 max pooling, the
last three each where the model has it. Before them there may be one whose convolution is in full precision.

Activations stay codes from one convolution to the next: where it takes codes of 8 bits on one grid, or of one bit,
normalization, ReLU, pooling and its quantizer are one pass over the output before (:mod:`fqtstats.ops.fused`);
backward, the adjoints of one bit, pooling, ReLU and normalization are two. A scale of a
weight's output channels is part of the normalization behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fqtstats.errors import InputError
from fqtstats.layers.chain import Stage, run
from fqtstats.layers.modules import QuantConv2d
from fqtstats.layers.swap import Handle
from fqtstats.quantizers.storage import has_codes

__all__ = ["FusedSequential", "fuse_"]


def fuse_(model: nn.Module, handle: Handle) -> list[list[str]]:
    """Run the chains in the ``nn.Sequential`` modules of a prepared model as one operation each, in place.

    Every ``nn.Sequential`` with a chain changes its class and keeps everything else: modules, parameters, hooks,
    state_dict keys; ``handle.remove()`` changes it back. What a chain consists of is looked up at every call: a module
    with hooks, of another class or with a ``forward`` of its own ends it, and under autocast, for inputs that are not
    float32 images on the CPU, and while layers are inspected, the modules run one by one.

    Args:
        model: prepared with ``backend="native"``.
        handle: what :func:`fqtstats.prepare_` returned for it.

    Returns:
        The names of the modules of every chain, in the order of the model; a module that stands at several places goes
        by the name of the place.

    Raises:
        InputError: the model was prepared for another backend.
    """
    if handle.shared.backend != "native":
        raise InputError(
            f"only a model prepared with backend='native' can be fused, this one has {handle.shared.backend!r}"
        )
    names: list[list[str]] = []
    for prefix, module in list(model.named_modules()):
        if type(module) is not nn.Sequential or "forward" in vars(module):
            continue
        places = [f"{prefix}.{name}" if prefix else name for name in module._modules]
        chains = [places[piece.start : piece.stop] for piece in _pieces(list(module)) if piece.stages]
        if chains:
            module.__class__ = FusedSequential
            handle.fused.append(module)
            names += chains
    return names


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs its chains as one operation each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the modules give one after the other."""
        modules = list(self)
        for piece in _pieces(modules):
            if piece.stages and _fusible(x, piece.stages):
                x = run(x, piece.stages)
            else:
                for module in modules[piece.start : piece.stop]:
                    x = module(x)
        return x


@dataclass(frozen=True, slots=True)
class _Piece:
    """Modules ``start .. stop - 1``: a chain of stages, or without stages, to be run one by one."""

    start: int
    stop: int
    stages: tuple[Stage, ...] = ()


def _pieces(modules: Sequence[nn.Module]) -> Iterator[_Piece]:
    position = 0
    while position < len(modules):
        start = position
        stages: list[Stage] = []
        while (found := _stage(modules, position, not stages)) is not None:
            stage, position = found
            stages.append(stage)
        if stages and stages[-1].state is not None and position - start > 1:
            yield _Piece(start, position, tuple(stages))
        else:
            position = max(position, start + 1)
            yield _Piece(start, position)


def _stage(modules: Sequence[nn.Module], start: int, first: bool) -> tuple[Stage, int] | None:
    """The stage that begins at ``start``, and where it ends; the ``first`` one may be in full precision."""
    rest = iter(modules[start : start + 4])
    convolution = next(rest, None)
    if isinstance(convolution, QuantConv2d):
        state = convolution.fqt_state
        if not _plain(convolution, QuantConv2d) or not _on_codes(convolution):
            return None
    elif first and isinstance(convolution, nn.Conv2d) and _in_full_precision(convolution):
        state = None
    else:
        return None
    stop, following = start + 1, next(rest, None)
    normalization = None
    if isinstance(following, nn.BatchNorm2d) and _plain(following, nn.BatchNorm2d):
        normalization, stop, following = following, stop + 1, next(rest, None)
    relu = following is not None and _plain(following, nn.ReLU)
    if relu:
        stop, following = stop + 1, next(rest, None)
    if (
        state is not None
        and hasattr(state.policy.weight, "output_scale")
        and (normalization is None or convolution.bias is not None)
    ):
        return None  # the scale of the output is part of the normalization
    pool = isinstance(following, nn.MaxPool2d) and _plain(following, nn.MaxPool2d) and _halves(following)
    return Stage(convolution, normalization, relu, pool), stop + pool


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of exactly that class, with the ``forward`` of the class, and nobody is to be told of its calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


def _in_full_precision(convolution: nn.Conv2d) -> bool:
    """Whether it is a plain one with zeros around the image, as many on both sides."""
    return (
        _plain(convolution, nn.Conv2d)
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def _on_codes(convolution: QuantConv2d) -> bool:
    state = convolution.fqt_state
    if state.plain:
        return False
    activation, weight = state.policy.activation, state.policy.weight
    return state.shared.backend == "native" and has_codes(activation) and has_codes(weight)


def _halves(pool: nn.MaxPool2d) -> bool:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    windows = pair(pool.kernel_size) == pair(pool.stride) == (2, 2) and pair(pool.dilation) == (1, 1)
    return windows and pair(pool.padding) == (0, 0) and not pool.ceil_mode and not pool.return_indices


def _fusible(x: torch.Tensor, stages: Sequence[Stage]) -> bool:
    tensors = [x, *(p for stage in stages for p in stage.parameters if p is not None)]
    return (
        x.dim() == 4
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch_module._has_any_global_hook()
        and all(stage.state is None or stage.state.shared.inspector is None for stage in stages)
    )
