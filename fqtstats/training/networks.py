"""The networks that a recipe trains, and what the stage that they are in sets up: quantizers, optimizer, rates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fqtstats import models
from fqtstats.data.base import Batch
from fqtstats.layers.swap import Handle, Skip, prepare_, quantized
from fqtstats.policy import PLACES, PREFIX, Policy
from fqtstats.training.checkpoints import load_tensors, tensors_of
from fqtstats.training.distillation import Joint
from fqtstats.training.divergence import Diverged
from fqtstats.training.recipes import Recipe, Stage
from fqtstats.trainings import MODEL

__all__ = ["Networks"]


class Networks:
    """The networks of one run.

    Args:
        model: the network to train; not prepared.
        recipe: how, with its rules for layers already resolved.
        teacher: of a recipe with distillation; None: a copy of the model.
        epochs: of the run.
        steps: of an epoch.
        skip: layers to leave in full precision, by their names in the model.
        backend: how products are computed.
        seed: of the rounding.

    Attributes:
        by_name: the networks, by what the tables call them.
        whole: all of them as one module.
        device: where the model is.
        index: of the stage that they are in.
        handle: of the quantized layers; None in full precision.
        optimizer: of the stage.

    Raises:
        InputError: fewer epochs than stages, or networks that cannot be trained together.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        teacher: nn.Module | None,
        *,
        epochs: int,
        steps: int,
        skip: Skip | None,
        backend: str,
        seed: int,
    ) -> None:
        self.recipe, self.steps, self.backend, self.seed = recipe, steps, backend, seed
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.lengths = recipe.epochs(epochs)
        self.joint: Joint | None = None
        self.by_name: dict[str, nn.Module] = {MODEL: model}
        if recipe.distillation is not None:
            self.joint = Joint(model, 1 + len(recipe.distillation.others), teacher)
            for number, student in enumerate(self.joint.students[1:], start=2):
                self.by_name[f"student-{number}"] = student
            self.by_name["teacher"] = self.joint.teacher
        self.whole = model if self.joint is None else self.joint
        self.skip = skip if self.joint is None else self.joint.skip(skip)
        self.index = 0
        self.handle: Handle | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._units: dict[str, str] = {}
        self._updates: list[Callable[[], None]] = []

    @property
    def stage(self) -> Stage:
        """The one that they are in."""
        return self.recipe.stages[self.index]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None, "no stage has been entered"
        return self._optimizer

    @property
    def quantizes_gradients(self) -> bool:
        """Whether any stage does."""
        return any(self._policy(stage).quantizes_gradients for stage in self.recipe.stages)

    def _policy(self, stage: Stage) -> Policy:
        """Of all networks."""
        if self.joint is None:
            return stage.policy
        assert self.recipe.distillation is not None
        return self.joint.policy([stage.policy, *self.recipe.distillation.others])

    # --- stages ---

    def try_stages(self) -> None:
        """Raise InputError if the policy of a stage does not fit: before one is trained, all are known to."""
        for stage in self.recipe.stages:
            if stage.quantizes:
                with quantized(self.whole, self._policy(stage), self.skip, self.backend, self.seed):
                    pass

    def enter(self, index: int) -> None:
        """Prepare the networks for a stage; parameters and what equal quantizers have learned stay."""
        self.index = index
        learned = {} if self.handle is None else _learned(self.handle)
        self._unprepare()
        if self.stage.quantizes:
            self.handle = prepare_(self.whole, self._policy(self.stage), self.skip, self.backend, self.seed)
            for key, (told, state) in learned.items():
                layer, place = key
                own = self.handle.layers.get(layer)
                q = None if own is None else own._modules.get(PREFIX + place)
                if q is not None and told == repr(getattr(self.handle.policy.for_layer(layer), place)):
                    load_tensors(q, state)
            if self.stage.stochastic is not None:
                self._units = self.stage.stochastic.units(self.whole, self.handle.layers)
        # Quantizers that learn from a step what the next one needs.
        quantizers = [] if self.handle is None else [q for _, q in _learners(self.handle)]
        self._updates = [q.update for q in quantizers if callable(getattr(q, "update", None))]
        self._optimizer = self.recipe.build_optimizer(self.whole)

    def release(self) -> None:
        """Take the quantizers out of the model again."""
        self._unprepare()
        for p in self.whole.parameters():
            p.grad = None

    def _unprepare(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def stage_of(self, epoch: int) -> int:
        """Index of the stage that an epoch, from 0, is in."""
        ends = [sum(self.lengths[: index + 1]) for index in range(len(self.lengths))]
        return next(index for index, end in enumerate(ends) if epoch < end)

    def _within(self, step: int) -> tuple[int, int]:
        """Which step of the stage a step of the run is, and how many that has."""
        return step - self.steps * sum(self.lengths[: self.index]), self.steps * self.lengths[self.index]

    # --- a step ---

    def factor(self, step: int) -> float:
        """Of the learning rates, in a step of the run."""
        return self.recipe.factor(self.index, *self._within(step))

    def sampled(self, step: int) -> AbstractContextManager[None]:
        """The layers that a recipe with stochastic precision quantizes in this step."""
        rule = self.stage.stochastic
        if rule is None or self.handle is None:
            return nullcontext()
        return rule.sampled(self.handle, self._units, *self._within(step), self.seed)

    def loss(self, whole: nn.Module, batch: Batch, found: dict[str, Tensor] | None = None) -> Tensor:
        """What is minimized; the networks' logits are put into ``found``."""
        inputs, targets = batch
        smoothing = self.recipe.label_smoothing
        if self.joint is None:
            logits = whole(inputs)
            loss = models.cross_entropy(logits, targets, smoothing)
            each = [logits]
        else:
            assert self.recipe.distillation is not None
            teacher, students = whole(inputs)
            loss = self.recipe.distillation.losses(teacher, students, targets, smoothing).total
            each = [*students, teacher]
        if found is not None:
            found.update(zip(self.by_name, (z.detach() for z in each), strict=True))
        return loss

    def gradients_finite(self) -> bool:
        """Whether all of them are."""
        gradients = [p.grad for p in self.whole.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, ord=float("inf"))
        return bool(torch.isfinite(torch.stack([n.float().cpu() for n in norms])).all())

    def update(self) -> None:
        """Change the weights by their gradients, and what quantizers learn from the step."""
        self.optimizer.step()
        for update in self._updates:
            update()

    # --- what they have become ---

    def check_weights(self) -> None:
        """Raise Diverged if a weight is NaN or Inf."""
        for name, tensor in tensors_of(self.whole).items():
            own = any(part.startswith(PREFIX) for part in name.split("."))  # of a quantizer, which may not know it yet
            if not own and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Diverged(f"{name!r} has NaN or Inf")

    def kept(self) -> list[int]:
        """Bytes that quantized layers keep of their activations, and the same in float32."""
        layers = [] if self.handle is None else self.handle.kept.values()
        return [sum(one.activation for one in layers), sum(one.activation_float32 for one in layers)]

    def quantized(self) -> list[str]:
        """Names of those with quantized layers."""
        return [
            name
            for name, network in self.by_name.items()
            if any(hasattr(module, "fqt_state") for module in network.modules())
        ]


def _learners(handle: Handle) -> list[tuple[tuple[str, str], Any]]:
    """Quantizers that are modules, by layer and place."""
    return [
        ((name, place), q)
        for name, layer in handle.layers.items()
        for place in PLACES
        if (q := layer._modules.get(PREFIX + place)) is not None
    ]


def _learned(handle: Handle) -> dict[tuple[str, str], tuple[str, dict[str, Tensor]]]:
    """What quantizers have learned, by layer and place, with what they are."""
    return {
        (name, place): (repr(getattr(handle.policy.for_layer(name), place)), tensors_of(q))
        for (name, place), q in _learners(handle)
    }
