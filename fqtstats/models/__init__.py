"""Small reference models: one row of :data:`MODELS` each.

Every product with weights is an ``nn.Conv2d`` or an ``nn.Linear``, the layers that get quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from fqtstats import imports
from fqtstats.determinism import seeded
from fqtstats.errors import InputError
from fqtstats.models.mlp import mlp
from fqtstats.models.preact_resnet import PreActResNet
from fqtstats.models.resnet import BasicBlock, Bottleneck, ResNet
from fqtstats.models.transformer import Transformer
from fqtstats.models.vgg import vgg16

__all__ = ["MODELS", "Model", "Shaped", "build", "cross_entropy", "loss"]


class Shaped(Protocol):
    """What a model has to know of the data; see :class:`fqtstats.data.Data`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def num_classes(self) -> int: ...


@dataclass(frozen=True)
class Model:
    """One registered model.

    Attributes:
        summary: one line for listings.
        kinds: kinds of data that fit.
        make: from data to a model that fits; draws its initialization from the global generator.
    """

    summary: str
    kinds: tuple[str, ...]
    make: Callable[[Shaped], nn.Module]


def _small(d: Shaped) -> bool:
    return max(d.input_shape[1:]) <= 64


def _resnet(d: Shaped, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...]) -> nn.Module:
    return ResNet(block, depths, d.input_shape[0], d.num_classes, _small(d))


def _vgg16(d: Shaped) -> nn.Module:
    channels, height, width = d.input_shape
    return vgg16(channels, d.num_classes, (height, width), _small(d))


MODELS: dict[str, Model] = {
    "mlp": Model("2 hidden layers of 128", ("image", "features"), lambda d: mlp(d.input_shape, d.num_classes)),
    "preact_resnet20": Model(
        "pre-activation, 16-32-64 wide", ("image",), lambda d: PreActResNet(d.input_shape[0], d.num_classes, 3)
    ),
    "preact_resnet56": Model(
        "pre-activation, 16-32-64 wide", ("image",), lambda d: PreActResNet(d.input_shape[0], d.num_classes, 9)
    ),
    "resnet18": Model("basic blocks", ("image",), lambda d: _resnet(d, BasicBlock, (2, 2, 2, 2))),
    "resnet50": Model("bottleneck blocks", ("image",), lambda d: _resnet(d, Bottleneck, (3, 4, 6, 3))),
    "vgg16": Model("with batch normalization", ("image",), _vgg16),
    "transformer": Model(
        "causal, 2 layers, 64 wide, 4 heads", ("tokens",), lambda d: Transformer(d.num_classes, d.input_shape[0])
    ),
}


def build(name: str, data: Shaped, seed: int) -> nn.Module:
    """A model that fits the data, in training mode, on the CPU.

    Args:
        name: a name in :data:`MODELS`, or ``package.module:function`` for the user's own, called without arguments.
        data: gives kind, input shape and number of classes.
        seed: decides the initialization; the global generator is left as it was.

    Raises:
        InputError: unknown name, a model that does not fit the data, or a user's function that returns no module.
    """
    if ":" in name:
        with seeded(seed):
            made = imports.call(name)
        if not isinstance(made, nn.Module):
            raise InputError(f"{name!r} returned a {type(made).__name__}, expected a torch.nn.Module; return the model")
        return made
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; known: {', '.join(MODELS)}, or package.module:function for your own")
    if data.kind not in MODELS[name].kinds:
        fits = [other for other, model in MODELS.items() if data.kind in model.kinds]
        raise InputError(
            f"model {name!r} takes {' or '.join(MODELS[name].kinds)}, but data {data.name!r} is {data.kind}; "
            f"use {', '.join(fits) or 'your own model'}"
        )
    if data.num_classes < 1:
        raise InputError(f"model {name!r} needs integer class targets, data {data.name!r} has none; use your own model")
    with seeded(seed):
        return MODELS[name].make(data)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy in nats (scalar); the default ``loss_fn``.

    Args:
        model: from inputs to logits [N, classes] or [B, T, vocabulary].
        batch: inputs, and targets int64 [N] or [B, T].

    Raises:
        InputError: logits and targets do not match.
    """
    inputs, targets = batch
    return cross_entropy(model(inputs), targets)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy in nats (scalar).

    Args:
        logits: [N, classes] or [B, T, vocabulary].
        targets: int64 [N] or [B, T].
        label_smoothing: share of the target's probability that is spread over all classes.

    Raises:
        InputError: logits and targets do not match.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape or targets.is_floating_point():
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"cross entropy expected logits of shape {(*targets.shape, 'classes')} for integer targets, got {got} and "
            f"{targets.dtype} targets; use fqtstats.measure with your own loss_fn"
        )
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)
