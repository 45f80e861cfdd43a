"""Recipes: how networks of low precision are trained, as the papers say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fqtstats import policies
from fqtstats.errors import InputError
from fqtstats.policy import Policy
from fqtstats.training.distillation import Distillation
from fqtstats.training.stochastic_precision import StochasticPrecision

__all__ = ["RECIPES", "Optimizer", "Recipe", "Stage", "get"]


@dataclass(frozen=True)
class Optimizer:
    """A torch optimizer and its options.

    Attributes:
        name: ``"sgd"`` or ``"adam"``.
        lr: first learning rate.
        momentum: of SGD.
        weight_decay: L2 coefficient.
    """

    name: str
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def build(self, model: nn.Module, *, decay_norms: bool = True) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters; without ``decay_norms`` vectors (norms, biases) do not decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trained, "weight_decay": self.weight_decay}]
        if not decay_norms:
            kept = {id(p) for p in trained if p.dim() < 2}
            groups = [
                {"params": [p for p in trained if id(p) not in kept], "weight_decay": self.weight_decay},
                {"params": [p for p in trained if id(p) in kept], "weight_decay": 0.0},
            ]
        if self.name == "adam":
            return torch.optim.Adam(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Stage:
    """One phase of a recipe: which policy, for how long, how fast.

    Attributes:
        name: what it is called.
        policy: the quantizers; one without any is full precision.
        share: of the run's epochs; a recipe's shares add up to 1.
        lr_scale: factor of the learning rate.
        schedule: key of :data:`fqtstats.training.schedules.SCHEDULES`, over the stage.
        stochastic: which layers are quantized at each iteration; None: all.
    """

    name: str
    policy: Policy
    share: float = 1.0
    lr_scale: float = 1.0
    schedule: str = "cosine"
    stochastic: StochasticPrecision | None = None


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        name: its name in :data:`RECIPES`.
        source: where it is from.
        bits: its free number of bits; None if it has none.
        stages: one after the other.
        optimizer: of every stage, begun anew in each.
        label_smoothing: of the cross entropy.
        warmup: share of the epochs in which the learning rate grows linearly.
        decay_norms: whether weight decay acts on norms and biases, too.
        distillation: the teacher's part; None: no teacher.
        starts_from: whether a trained full-precision checkpoint is needed.
    """

    name: str
    source: str
    bits: int | None
    stages: tuple[Stage, ...]
    optimizer: Optimizer = Optimizer("sgd")
    label_smoothing: float = 0.0
    warmup: float = 0.0
    decay_norms: bool = True
    distillation: Distillation | None = None
    starts_from: Literal["scratch", "full-precision"] = "scratch"

    def for_model(self, model: nn.Module) -> Recipe:
        """The recipe with its rules for first and last layers resolved; InputError if it does not fit the model."""
        return self


def _statquant(name: str, policy: str) -> Callable[[int | None], Recipe]:
    def build(bits: int | None) -> Recipe:
        free = policy in ("statquant-ptq", "statquant-psq", "statquant-bhq")
        if bits is not None and not free:
            raise InputError(f"recipe {name!r} has no number of bits to choose, got {bits}; leave --bits out")
        chosen = (5 if bits is None else bits) if free else None
        made = policies.get(policy, 5 if chosen is None else chosen)
        return Recipe(name, "arXiv 2010.14298", chosen, (Stage("training", made),))

    return build


RECIPES: dict[str, Callable[[int | None], Recipe]] = {
    "exact": _statquant("exact", "exact"),
    **{
        f"statquant-{name}": _statquant(f"statquant-{name}", f"statquant-{name}")
        for name in ("qat", "ptq", "psq", "bhq")
    },
}
"""Name to what makes the recipe from its bits."""


def get(name: str, bits: int | None = None) -> Recipe:
    """A recipe by name.

    Raises:
        InputError: unknown name (lists the known ones), or bits that it does not define.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name](bits)
