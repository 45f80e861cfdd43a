"""One step of a training: loss, gradients, their variance, and whether it has diverged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fqtstats import models
from fqtstats.data.base import Batch
from fqtstats.determinism import seeded
from fqtstats.errors import InputError, NonFiniteError
from fqtstats.measurement import measure_prepared
from fqtstats.random import stream
from fqtstats.training.divergence import Diverged
from fqtstats.training.evaluation import right
from fqtstats.training.networks import Networks
from fqtstats.training.state import State
from fqtstats.trainings import MODEL, VARIANCE

__all__ = ["AddRow", "Steps"]

FAR = 10.0
"""A loss this many times above its start, and above that of guessing, is far off."""

LONG = 200
"""So many steps in a row with a loss that is far off are a divergence."""


class AddRow(Protocol):
    """Adds a row to a table of the training."""

    def __call__(self, table: str, row: dict[str, Any]) -> None: ...


class Steps:
    """Makes the steps of a run.

    Args:
        networks, state: of the run; both change with every step.
        classes: of the data.
        variance_every: measure the gradient's variance at every so many steps; 0: never.
        variance_draws: gradients drawn each time.
        add: told the rows with the variances.
        found_finite: called where loss and gradients of a step are finite, before the weights change.
    """

    def __init__(
        self,
        networks: Networks,
        state: State,
        *,
        classes: int,
        variance_every: int,
        variance_draws: int,
        add: AddRow,
        found_finite: Callable[[], None],
    ) -> None:
        self.networks, self.state, self.classes = networks, state, classes
        self.variance_every, self.variance_draws = variance_every, variance_draws
        self.add, self.found_finite = add, found_finite

    def make(self, epoch: int, index: int, batch: Batch) -> float:
        """A step, the ``index``-th of its epoch, both from 0; the loss that it minimized.

        Raises:
            Diverged: loss or gradients are not finite, or the loss is far off for long.
            InputError: the loss has no gradient.
        """
        networks = self.networks
        step = epoch * networks.steps + index
        optimizer = networks.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * networks.factor(step)
        optimizer.zero_grad()
        logits: dict[str, Tensor] = {}

        def objective(found: dict[str, Tensor] | None = None) -> Tensor:
            if networks.handle is not None:
                networks.handle.step = step
            with seeded(self._forward_seed(step), networks.device):
                return networks.loss(networks.whole, batch, found)

        with networks.sampled(step):
            try:
                loss = objective(logits)
                if not loss.requires_grad:
                    raise InputError("the loss does not depend on any trainable parameter; let the model have some")
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise Diverged(f"the loss became {value}", objective)
                # With stochastic precision no step stands for the others.
                if networks.handle is not None and (index == 0 or networks.stage.stochastic is not None):
                    self.state.sums.kept = max(self.state.sums.kept or [0, 0], networks.kept())
                torch.autograd.backward(loss)
                del loss
                if not networks.gradients_finite():
                    raise Diverged("a gradient became NaN or Inf", objective)
                self.found_finite()
                if self.variance_every and step % self.variance_every == 0:
                    self._measure(epoch, step, batch)
            except NonFiniteError as error:
                raise Diverged(str(error), objective) from error
            networks.update()
            self._check_far(self._count(logits, batch[1]), objective)
        return value

    def _forward_seed(self, step: int) -> int:
        k0, k1, _, _ = stream(seed=self.networks.seed, step=step, site="training/forward").words()
        return k0 | (k1 & 0x7FFFFFFF) << 32

    def _count(self, logits: Mapping[str, Tensor], targets: Tensor) -> float:
        """Sum up losses and right predictions; the model's loss."""
        sums, losses = self.state.sums, {}
        for name, z in logits.items():
            losses[name] = float(models.cross_entropy(z, targets))
            sums.loss[name] = sums.loss.get(name, 0.0) + losses[name] * targets.numel()
            sums.right[name] = sums.right.get(name, 0) + right(z, targets)
        sums.targets += targets.numel()
        return losses[MODEL]

    def _check_far(self, loss: float, objective: Callable[[], Tensor]) -> None:
        state = self.state
        if state.start is None:
            state.start = loss
        limit = FAR * max(state.start, math.log(max(2, self.classes)))
        state.far = state.far + 1 if loss > limit else 0
        if state.far >= LONG:
            raise Diverged(f"the loss, {loss:.3g}, was above {limit:.3g} for {LONG} steps", objective)

    def _measure(self, epoch: int, step: int, batch: Batch) -> None:
        """The variance of this step's gradient, before the step is made."""
        networks, sums = self.networks, self.state.sums
        if networks.handle is None or not networks.handle.policy.quantizes_gradients:
            return  # there is none
        began = time.monotonic()
        result = measure_prepared(
            networks.whole, networks.handle, batch, networks.loss, self.variance_draws, self._forward_seed(step), []
        )
        total = result.total()
        sums.variances += float(total["variance"])
        sums.norms += float(total["grad_norm_sq"])
        sums.measured += 1
        names = [column.name for column in VARIANCE if column.name not in ("step", "epoch")]
        for row in result.table[names].to_dict("records"):
            self.add("variance", {"step": step, "epoch": epoch + 1, **{str(name): row[name] for name in names}})
        sums.variance_seconds += time.monotonic() - began
