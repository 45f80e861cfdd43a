"""Which of torch's optimizers a recipe uses, and how it treats the parameters of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.policy import PREFIX

__all__ = ["Optimizer"]


@dataclass(frozen=True)
class Optimizer:
    """Numbers of ``torch.optim.SGD`` or ``torch.optim.Adam``.

    Attributes:
        name: which of them.
        lr: the learning rate, before the schedule.
        momentum: of SGD; Adam has its own, ``betas``.
        weight_decay: coefficient of the L2 penalty, whose gradient is added to the loss's.
        linear_lr: learning rate of the parameters of ``nn.Linear`` layers; None: as the others.
        betas: of Adam.

    Raises:
        InputError: a number is out of range.
    """

    name: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    linear_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam"):
            raise InputError(f"unknown optimizer {self.name!r}; known: sgd, adam")
        for name, value, ok, want in (
            ("lr", self.lr, self.lr > 0, "positive"),
            ("linear_lr", self.linear_lr, self.linear_lr is None or self.linear_lr > 0, "positive"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "not negative"),
            ("betas", min(self.betas), 0 <= min(self.betas) <= max(self.betas) < 1, "in [0, 1)"),
        ):
            if not ok or not math.isfinite(value or 0):
                raise InputError(f"expected {name} of the optimizer to be finite and {want}, got {value}")

    def with_lr(self, lr: float) -> Optimizer:
        """Another learning rate; that of linear layers keeps its ratio to it."""
        linear = None if self.linear_lr is None else self.linear_lr * (lr / self.lr)
        return replace(self, lr=lr, linear_lr=linear)

    def groups(self, model: nn.Module, *, decay_norms: bool = True) -> list[dict[str, Any]]:
        """The parameters of a model that are trained, by learning rate and weight decay.

        A parameter that a quantizer learns (a step, an output scale) is never decayed: that would pull it to zero
        whatever the loss says.

        Args:
            model: prepared, so that what its quantizers learn is there.
            decay_norms: whether norms and biases are decayed, too: the parameters with at most one axis.

        Returns:
            Groups as torch's optimizers take them, none of them empty; ``initial_lr`` is what a schedule's factor
            multiplies.

        Raises:
            InputError: the model has nothing to train.
        """
        linear = {
            f"{name}.{own}" if name else own
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            for own, _ in module.named_parameters(recurse=False)
        }
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            learned = any(part.startswith(PREFIX) for part in name.split("."))
            # One that is made at the first forward pass has no axes to count; only quantizers have such here.
            decayed = not learned and (decay_norms or parameter.dim() > 1)
            lr = self.linear_lr if self.linear_lr is not None and name in linear else self.lr
            found.setdefault((lr, self.weight_decay if decayed else 0.0), []).append(parameter)
        if not found:
            raise InputError(
                f"expected a model with parameters to train, got {type(model).__name__} with none; "
                "let some of them have requires_grad=True"
            )
        return [
            {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in found.items()
        ]

    def build(self, model: nn.Module, *, decay_norms: bool = True) -> torch.optim.Optimizer:
        """The optimizer of a model; arguments and errors as of :meth:`groups`."""
        groups = self.groups(model, decay_norms=decay_norms)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas)
