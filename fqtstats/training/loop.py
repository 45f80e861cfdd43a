"""Training by a recipe: stages, checkpoints, gradient variance on the way, and what to say where it diverges."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from fqtstats import models, ops
from fqtstats.data.base import Batch, Data
from fqtstats.determinism import seeded, threads
from fqtstats.errors import InputError, NonFiniteError, RunDirectoryError, TrainingDiverged
from fqtstats.hashing import tensor_digest
from fqtstats.layers.swap import Handle, Skip, prepare_, quantized
from fqtstats.measurement import measure_prepared
from fqtstats.measuring import Arrays, Store, describe
from fqtstats.policy import PLACES, PREFIX, Policy
from fqtstats.provenance import provenance
from fqtstats.random import stream
from fqtstats.training.checkpoints import (
    Checkpoint,
    Position,
    identity_of,
    load_tensors,
    optimizer_state,
    restore_optimizer,
    tensors_of,
)
from fqtstats.training.distillation import Joint
from fqtstats.training.divergence import diagnose, tell
from fqtstats.training.evaluation import evaluate, evaluation_split, right
from fqtstats.training.pretrain import Progress
from fqtstats.training.recipes import Recipe, Stage
from fqtstats.trainings import EPOCHS, MODEL, VARIANCE, Training

__all__ = ["Report", "train"]

FAR = 10.0
"""A loss this many times above its start, and above that of guessing, is far off."""

GOOD = "good/"
"""Before the names of the arrays that a state has of the good checkpoint."""

LONG = 200
"""So many steps in a row with a loss that is far off are a divergence."""


class Report(Protocol):
    """Told every row of a training's tables, as it is made: ``"epochs"`` or ``"variance"``, and the row."""

    def __call__(self, table: str, row: Mapping[str, Any]) -> None: ...


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
    backend: str = "simulated",
    skip: Skip | None = None,
    pretrained: bool = False,
    teacher: nn.Module | None = None,
    augment: bool = False,
    variance_every: int = 0,
    variance_draws: int = 8,
    thread_count: int = 1,
    progress: Progress | None = None,
    report: Report | None = None,
    store: Store | None = None,
) -> Training:
    """Train a model in place.

    Every random number is keyed by the seed and the epoch or step that it is for: the order of the samples, dropout,
    and the rounding of quantizers. So a run that continues from a checkpoint ends with the bits of one that was never
    interrupted, and measuring the variance on the way does not change it. The global random state and the number of
    threads are left as they were.

    Args:
        model: from the data's inputs to logits; not prepared. Afterwards it has the trained weights and no quantizers;
            what these have learned is in the result's ``weights``, under keys that a prepared model has.
        data: classes or next tokens as targets.
        recipe: one of :mod:`fqtstats.training.recipes`.
        epochs: passes over the training data.
        batch_size: samples per step.
        seed: of everything but the model's first weights.
        backend: how products are computed, see :func:`fqtstats.prepare_`.
        skip: layers to leave in full precision, by their names in the model; in a joint distillation of every student.
        pretrained: whether the model has the weights of a training in full precision, which some recipes start from.
        teacher: of a recipe with distillation; None: a copy of the model.
        augment: change the training images at random, see :meth:`fqtstats.data.Data.batches`.
        variance_every: measure the variance of the quantized gradient at every so many steps; 0: never.
        variance_draws: gradients drawn each time, at least 2.
        thread_count: intra-op threads of torch; with more than one, bits depend on their number.
        progress: told about every step.
        report: told every row of the tables.
        store: keeps checkpoints; one that is there is continued from.

    Raises:
        InputError: something does not fit; of a checkpoint, another run's.
        TrainingDiverged: the loss or a tensor became NaN or Inf, or the loss stayed far above its start for long. The
            model has the weights of the last good checkpoint, from the start of an epoch whose first step had a finite
            loss and finite gradients, or of the run; ``partial_result`` is the training so far.
    """
    if not isinstance(recipe, Recipe):
        raise InputError(f"expected a recipe, got {recipe!r}; fqtstats.training.recipes.get(name) gives one")
    if not isinstance(data, Data):
        raise InputError(
            f"expected a fqtstats.data.Data, got a {type(data).__name__}; fqtstats.data.wrap(function, name) makes one "
            "of the tensors, dataset or loader that a function returns"
        )
    _check(data, epochs, batch_size, variance_every, variance_draws, thread_count)
    run = _Run(
        model,
        data,
        recipe,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        backend=backend,
        skip=skip,
        pretrained=pretrained,
        teacher=teacher,
        augment=augment,
        variance_every=variance_every,
        variance_draws=variance_draws,
        progress=progress,
        report=report,
        store=store,
    )
    was_training = model.training
    with threads(thread_count), torch.enable_grad(), _deterministic():
        try:
            return run.all()
        finally:
            run.release()
            model.train(was_training)


def _check(
    data: Data, epochs: int, batch_size: int, variance_every: int, variance_draws: int, thread_count: int
) -> None:
    limits = {
        "epochs": (epochs, 1),
        "batch_size": (batch_size, 1),
        "variance_every": (variance_every, 0),
        "variance_draws": (variance_draws, 2),
        "thread_count": (thread_count, 1),
    }
    for name, (value, least) in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    if data.num_classes < 1:
        raise InputError(f"training needs classes as targets, data {data.name!r} has none; give integer targets")


def _deterministic() -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@dataclass
class _Sums:
    """What an unfinished epoch has summed up.

    Attributes:
        loss: cross entropy times targets, by network.
        right: right predictions, by network.
        targets: predictions made.
        variances, norms: of the measured gradients, in total.
        measured: how many.
        kept: bytes as the epochs' table has them, of the step with most; None where no layer is quantized.
        seconds, variance_seconds: wall times, up to the checkpoint.
    """

    loss: dict[str, float] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    targets: int = 0
    variances: float = 0.0
    norms: float = 0.0
    measured: int = 0
    kept: list[int] | None = None
    seconds: float = 0.0
    variance_seconds: float = 0.0


class _Diverged(Exception):  # noqa: N818  (it ends the steps)
    """The run cannot go on.

    Attributes:
        objective: computes the step's loss again; None if it shows after the step that was made last.
    """

    def __init__(self, reason: str, objective: Callable[[], Tensor] | None = None) -> None:
        super().__init__(reason)
        self.objective = objective


class _Run:
    """One call of :func:`train`, whose arguments it has."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        backend: str,
        skip: Skip | None,
        pretrained: bool,
        teacher: nn.Module | None,
        augment: bool,
        variance_every: int,
        variance_draws: int,
        progress: Progress | None,
        report: Report | None,
        store: Store | None,
    ) -> None:
        self.data, self.epochs, self.batch_size, self.seed = data, epochs, batch_size, seed
        self.backend, self.skip, self.augment = backend, skip, augment
        self.variance_every, self.variance_draws = variance_every, variance_draws
        self.progress, self.report, self.store = progress, report, store
        stream(seed=seed)  # raises InputError for what is no integer
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.recipe = recipe.for_model(model, self._samples(), pretrained=pretrained)
        if teacher is not None and recipe.distillation is None:
            raise InputError(f"recipe {recipe.name!r} has no teacher, but one is given; leave it out")
        self.lengths = self.recipe.epochs(epochs)
        self.steps = data.steps(batch_size)
        self.joint: Joint | None = None
        self.networks: dict[str, nn.Module] = {MODEL: model}
        if self.recipe.distillation is not None:
            self.joint = Joint(model, 1 + len(self.recipe.distillation.others), teacher)
            for number, student in enumerate(self.joint.students[1:], start=2):
                self.networks[f"student-{number}"] = student
            self.networks["teacher"] = self.joint.teacher
        self.whole = model if self.joint is None else self.joint
        self.skipped = self.skip if self.joint is None else self.joint.skip(self.skip)
        if variance_every and not any(self._policy(stage).quantizes_gradients for stage in self.recipe.stages):
            raise InputError(
                f"recipe {recipe.name!r} quantizes no gradient, so there is no variance to measure at every "
                f"{variance_every} steps; leave it out, or choose a recipe that does"
            )
        self.handle: Handle | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.units: dict[str, str] = {}
        self.updates: list[Callable[[], None]] = []
        self.position = Position()
        self.sums = _Sums()
        self.rows: dict[str, list[dict[str, Any]]] = {"epochs": [], "variance": []}
        self.start: float | None = None
        self.far = 0
        self.facts = self._facts(recipe, teacher is not None, pretrained)
        self.identity = identity_of(self.facts)
        self.resumed_at: int | None = None
        # What a divergence falls back to, of a point that does not depend on time; and what is to be that once a step
        # from it had a finite loss and finite gradients.
        self.good = Checkpoint(self.position, {})
        self.pending: Checkpoint | None = None
        self.latest = self.good  # what the run is continued from

    def _samples(self) -> Tensor:
        """Inputs to find the order of the layers with."""
        batch = next(self.data.batches(min(self.batch_size, 2), seed=self.seed, augment=self.augment), None)
        if batch is None:
            raise InputError(f"data {self.data.name!r} gave no batches; make it give some")
        return batch[0].to(self.device)

    def _facts(self, recipe: Recipe, has_teacher: bool, pretrained: bool) -> dict[str, Any]:
        """What defines the run, as JSON."""
        return {
            "recipe": _plain(recipe),
            "settings": {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "backend": self.backend,
                "skip": _named(self.skip),
                "pretrained": pretrained,
                "teacher": has_teacher,
                "augment": self.augment,
            },
            "seed": self.seed,
            "data": {"name": self.data.name, "sha256": self.data.fingerprint()},
            "initial_sha256": tensor_digest(tensors_of(self.whole)),
        }

    # --- the whole run ---

    def all(self) -> Training:
        """Every epoch that is not done yet."""
        for stage in self.recipe.stages:
            if stage.quantizes:  # before one is trained, all are known to fit
                with quantized(self.whole, self._policy(stage), self.skipped, self.backend, self.seed):
                    pass
        self.whole.train()
        self._enter(0)
        arrays = None if self.store is None else self.store.load()
        if arrays is None:
            try:
                self._check_weights()
            except _Diverged as reason:
                raise InputError(f"before the first step, {reason}; start from other weights") from None
            self.good = self.latest = self._checkpoint()
        else:
            self._continue(arrays)
        try:
            for epoch in range(self.position.epoch, self.epochs):
                self._epoch(epoch)
        except _Diverged as reason:
            raise self._diverged(reason) from None
        except BaseException:
            self._keep(force=True)
            raise
        return self._result(None)

    def release(self) -> None:
        """Take the quantizers out of the model again."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        for p in self.whole.parameters():
            p.grad = None

    def _epoch(self, epoch: int) -> None:
        index = self._stage_of(epoch)
        if index != self.position.stage:
            self._enter(index)
        began = time.monotonic() - self.sums.seconds
        first = self.position.step
        batches = self.data.batches(self.batch_size, seed=self.seed, epoch=epoch, augment=self.augment)
        number = first
        for number, batch in enumerate(islice(batches, first, None), first + 1):
            if number > self.steps:
                break
            loss = self._step(epoch, number - 1, (batch[0].to(self.device), batch[1].to(self.device)))
            self.position = Position(epoch, number, index)
            self.sums.seconds = time.monotonic() - began
            self._keep()
            if self.progress is not None:
                self.progress(epoch + 1, self.epochs, number, self.steps, loss)
        if number < self.steps:
            raise InputError(
                f"data {self.data.name!r} gave {number} batches in epoch {epoch + 1}, expected {self.steps}; make it "
                "give as many every time"
            )
        self._finish(epoch, began)
        self.position, self.sums = Position(epoch + 1, 0, index), _Sums()
        self._check_weights()
        self.pending = self.latest = self._checkpoint()
        self._keep()

    def _finish(self, epoch: int, began: float) -> None:
        """The epoch's rows."""
        sums, split = self.sums, evaluation_split(self.data)
        assert self.optimizer is not None
        common = {
            "epoch": epoch + 1,
            "stage": self._stage.name,
            "steps": (epoch + 1) * self.steps,
            "lr": self.optimizer.param_groups[0]["initial_lr"] * self._factor((epoch + 1) * self.steps - 1),
        }
        try:
            scores = {
                name: (math.nan, math.nan) if split is None else evaluate(network, self.data, split)
                for name, network in self.networks.items()
            }
        except NonFiniteError as error:
            raise _Diverged(f"on the {split} data: {error}") from error
        for test_loss, _ in scores.values():
            if split is not None and not math.isfinite(test_loss):
                raise _Diverged(f"on the {split} data: the loss became {test_loss}")
        seconds = time.monotonic() - began
        variance = sums.variances / sums.measured if sums.measured else math.nan
        rest = seconds - sums.variance_seconds
        for name in self.networks:
            first = name == MODEL  # what is of all networks together stands in its row
            kept = sums.kept if first else None
            row = {
                **common,
                "network": name,
                "loss": sums.loss[name] / sums.targets,
                "accuracy": sums.right[name] / sums.targets,
                "test_loss": scores[name][0],
                "test_accuracy": scores[name][1],
                "variance": variance if first else math.nan,
                "snr": sums.norms / sums.variances if first and sums.variances > 0 else math.nan,
                "kept_bytes": None if kept is None else kept[0],
                "kept_float32_bytes": None if kept is None else kept[1],
                "seconds": seconds if first else math.nan,
                "variance_seconds": sums.variance_seconds if first else math.nan,
                "overhead": sums.variance_seconds / rest if first and rest > 0 else math.nan,
            }
            self._add("epochs", row)

    def _add(self, table: str, row: dict[str, Any]) -> None:
        self.rows[table].append(row)
        if self.report is not None:
            self.report(table, row)

    # --- one step ---

    def _step(self, epoch: int, index: int, batch: Batch) -> float:
        """A training step; the loss that it minimized."""
        step = epoch * self.steps + index
        assert self.optimizer is not None
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(step)
        optimizer.zero_grad()
        logits: dict[str, Tensor] = {}

        def objective(found: dict[str, Tensor] | None = None) -> Tensor:
            if self.handle is not None:
                self.handle.step = step
            with seeded(self._forward_seed(step), self.device):
                return self._loss(self.whole, batch, found)

        with self._sampled(step):
            try:
                loss = objective(logits)
                if not loss.requires_grad:
                    raise InputError("the loss does not depend on any trainable parameter; let the model have some")
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise _Diverged(f"the loss became {value}", objective)
                # With stochastic precision no step stands for the others.
                if self.handle is not None and (index == 0 or self._stage.stochastic is not None):
                    self.sums.kept = max(self.sums.kept or [0, 0], _kept(self.handle))
                torch.autograd.backward(loss)
                del loss
                if not self._gradients_finite():
                    raise _Diverged("a gradient became NaN or Inf", objective)
                if self.pending is not None:
                    self.good, self.pending = self.pending, None
                if self.variance_every and step % self.variance_every == 0:
                    self._measure(epoch, step, batch)
            except NonFiniteError as error:
                raise _Diverged(str(error), objective) from error
            optimizer.step()
            for update in self.updates:
                update()
            self._check_far(self._count(logits, batch[1]), objective)
        return value

    def _loss(self, whole: nn.Module, batch: Batch, found: dict[str, Tensor] | None = None) -> Tensor:
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
            found.update(zip(self.networks, (z.detach() for z in each), strict=True))
        return loss

    def _forward_seed(self, step: int) -> int:
        k0, k1, _, _ = stream(seed=self.seed, step=step, site="training/forward").words()
        return k0 | (k1 & 0x7FFFFFFF) << 32

    def _sampled(self, step: int) -> AbstractContextManager[None]:
        """The layers that a recipe with stochastic precision quantizes in this step."""
        rule = self._stage.stochastic
        if rule is None or self.handle is None:
            return nullcontext()
        return rule.sampled(self.handle, self.units, *self._within(step), self.seed)

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for p in self.whole.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, ord=float("inf"))
        return bool(torch.isfinite(torch.stack([n.float().cpu() for n in norms])).all())

    def _count(self, logits: Mapping[str, Tensor], targets: Tensor) -> float:
        """Sum up losses and right predictions; the model's loss."""
        sums, losses = self.sums, {}
        for name, z in logits.items():
            losses[name] = float(models.cross_entropy(z, targets))
            sums.loss[name] = sums.loss.get(name, 0.0) + losses[name] * targets.numel()
            sums.right[name] = sums.right.get(name, 0) + right(z, targets)
        sums.targets += targets.numel()
        return losses[MODEL]

    def _check_far(self, loss: float, objective: Callable[[], Tensor]) -> None:
        if self.start is None:
            self.start = loss
        limit = FAR * max(self.start, math.log(max(2, self.data.num_classes)))
        self.far = self.far + 1 if loss > limit else 0
        if self.far >= LONG:
            raise _Diverged(f"the loss, {loss:.3g}, was above {limit:.3g} for {LONG} steps", objective)

    def _measure(self, epoch: int, step: int, batch: Batch) -> None:
        """The variance of this step's gradient, before the step is made."""
        if self.handle is None or not self.handle.policy.quantizes_gradients:
            return  # there is none
        began = time.monotonic()
        result = measure_prepared(
            self.whole, self.handle, batch, self._loss, self.variance_draws, self._forward_seed(step), []
        )
        total = result.total()
        self.sums.variances += float(total["variance"])
        self.sums.norms += float(total["grad_norm_sq"])
        self.sums.measured += 1
        names = [column.name for column in VARIANCE if column.name not in ("step", "epoch")]
        for row in result.table[names].to_dict("records"):
            self._add("variance", {"step": step, "epoch": epoch + 1, **{str(name): row[name] for name in names}})
        self.sums.variance_seconds += time.monotonic() - began

    # --- stages ---

    @property
    def _stage(self) -> Stage:
        return self.recipe.stages[self.position.stage]

    def _within(self, step: int) -> tuple[int, int]:
        """Which step of the stage it is, and how many that has."""
        index = self.position.stage
        return step - self.steps * sum(self.lengths[:index]), self.steps * self.lengths[index]

    def _factor(self, step: int) -> float:
        """Of the learning rates."""
        return self.recipe.factor(self.position.stage, *self._within(step))

    def _stage_of(self, epoch: int) -> int:
        ends = [sum(self.lengths[: index + 1]) for index in range(len(self.lengths))]
        return next(index for index, end in enumerate(ends) if epoch < end)

    def _policy(self, stage: Stage) -> Policy:
        """Of all networks."""
        if self.joint is None:
            return stage.policy
        assert self.recipe.distillation is not None
        return self.joint.policy([stage.policy, *self.recipe.distillation.others])

    def _enter(self, index: int) -> None:
        """Prepare the networks for a stage; parameters and what equal quantizers have learned stay."""
        stage = self.recipe.stages[index]
        learned = {} if self.handle is None else _learned(self.handle)
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if stage.quantizes:
            self.handle = prepare_(self.whole, self._policy(stage), self.skipped, self.backend, self.seed)
            for key, (told, state) in learned.items():
                layer, place = key
                own = self.handle.layers.get(layer)
                q = None if own is None else own._modules.get(PREFIX + place)
                if q is not None and told == repr(getattr(self.handle.policy.for_layer(layer), place)):
                    load_tensors(q, state)
            if stage.stochastic is not None:
                self.units = stage.stochastic.units(self.whole, self.handle.layers)
        # Quantizers that learn from a step what the next one needs.
        quantizers = [] if self.handle is None else [q for _, q in _learners(self.handle)]
        self.updates = [q.update for q in quantizers if callable(getattr(q, "update", None))]
        self.optimizer = self.recipe.build_optimizer(self.whole)
        self.position = Position(self.position.epoch, self.position.step, index)

    # --- checkpoints ---

    def _check_weights(self) -> None:
        """Raise _Diverged if a weight is NaN or Inf."""
        for name, tensor in tensors_of(self.whole).items():
            own = any(part.startswith(PREFIX) for part in name.split("."))  # of a quantizer, which may not know it yet
            if not own and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _Diverged(f"{name!r} has NaN or Inf")

    def _checkpoint(self) -> Checkpoint:
        """The run between two steps."""
        assert self.optimizer is not None
        tensors = tensors_of(self.whole)
        moments, values = optimizer_state(self.optimizer)
        return Checkpoint(
            self.position,
            {
                **{f"model/{name}": tensor for name, tensor in tensors.items()},
                **{f"optimizer/{name}": tensor for name, tensor in moments.items()},
            },
            {
                "optimizer": values,
                "sums": asdict(self.sums),
                "rows": {table: list(rows) for table, rows in self.rows.items()},
                "start": self.start,
                "far": self.far,
            },
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.position.stage != self.position.stage:
            self._enter(checkpoint.position.stage)
        assert self.optimizer is not None
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        load_tensors(self.whole, parts["model"])
        progress = copy.deepcopy(dict(checkpoint.progress))
        restore_optimizer(self.optimizer, parts["optimizer"], progress["optimizer"])
        self.position = checkpoint.position
        self.sums = _Sums(**progress["sums"])
        self.rows = progress["rows"]
        self.start, self.far = progress["start"], progress["far"]

    def _state(self) -> Arrays:
        """The latest checkpoint, and the good one where it is another, for the store."""
        state = self.latest.arrays(self.identity)
        if self.good is not self.latest:
            state |= {GOOD + name: array for name, array in self.good.arrays(self.identity).items()}
        return state

    def _continue(self, state: Arrays) -> None:
        """The inverse of :meth:`_state`; InputError if it is of another run."""
        self.latest = Checkpoint.of_arrays(state, self.identity)
        good = {name.removeprefix(GOOD): array for name, array in state.items() if name.startswith(GOOD)}
        self.good = Checkpoint.of_arrays(good, self.identity) if good else self.latest
        self._restore(self.latest)
        self.resumed_at = self.position.epoch * self.steps + self.position.step
        # The start of an epoch: its first step has not shown yet whether it is good.
        self.pending = self.latest if self.position.step == 0 else None

    def _keep(self, *, force: bool = False) -> None:
        """Give the store a checkpoint; ``force``: the latest one, from between two steps."""
        if self.store is None:
            return
        if not force:

            def state() -> Arrays:
                if self.latest.position != self.position:
                    self.latest = self._checkpoint()
                return self._state()

            self.store.save(state)
        elif self.latest.position != Position():
            with suppress(RunDirectoryError):  # what ends the run is told; an earlier checkpoint stays
                self.store.save(self._state, force=True)

    # --- results ---

    def _diverged(self, reason: _Diverged) -> TrainingDiverged:
        """Where it shows, the last good checkpoint, and what was done until then."""
        networks = {"": self.whole} if self.joint is None else dict(self.networks)
        step = self.position.epoch * self.steps + self.position.step - (reason.objective is None)
        epoch, index = divmod(step, self.steps)
        with self._sampled(step):
            found = diagnose(networks, reason.objective)
        good = self.good.position
        rows = {table: list(each) for table, each in self.rows.items()}
        self._restore(self.good)
        self.rows = rows
        where = f"epoch {epoch + 1}, step {index + 1} of {self.steps}"
        diagnosis: dict[str, object] = {
            "epoch": epoch + 1,
            "step": step,
            "reason": str(reason),
            **found,
            "last_good_step": good.epoch * self.steps + good.step,
        }
        message = (
            f"training diverged in {where}: {reason}; {tell(found)}; the weights are those of the last good "
            f"checkpoint, after {diagnosis['last_good_step']} steps; lower the learning rate, or give more bits"
        )
        return TrainingDiverged(message, diagnosis, self._result(diagnosis))

    def _result(self, diagnosis: dict[str, object] | None) -> Training:
        weights = {name: tensors_of(network) for name, network in self.networks.items()}
        handle = self.handle
        metadata = {
            **self.facts,
            "steps_per_epoch": self.steps,
            "variance": {"every": self.variance_every, "draws": self.variance_draws},
            "diverged": diagnosis,
            "resumed_at": self.resumed_at,
            "hashes": {name: tensor_digest(state) for name, state in weights.items()},
            "quantized": [
                name
                for name, network in self.networks.items()
                if any(hasattr(module, "fqt_state") for module in network.modules())
            ],
            "unquantized": []
            if handle is None
            else [{"layer": u.name, "type": u.type, "reason": u.reason} for u in handle.unquantized],
            "arithmetic": {} if handle is None else handle.arithmetic,
            **provenance(ops.isa()),
        }
        tables = {
            name: pd.DataFrame(self.rows[name], columns=[column.name for column in columns])
            for name, columns in (("epochs", EPOCHS), ("variance", VARIANCE))
        }
        return Training(**tables, metadata=metadata, weights=weights)


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


def _kept(handle: Handle) -> list[int]:
    layers = handle.kept.values()
    return [sum(one.activation for one in layers), sum(one.activation_float32 for one in layers)]


def _named(skip: Skip | None) -> list[str] | None:
    if skip is None or isinstance(skip, str):
        return None if skip is None else [skip]
    return [_without_address(skip)] if callable(skip) else list(skip)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON."""
    distillation = recipe.distillation
    return {
        "name": recipe.name,
        "source": recipe.source,
        "bits": recipe.bits,
        "optimizer": repr(recipe.optimizer),
        "label_smoothing": recipe.label_smoothing,
        "warmup": recipe.warmup,
        "decay_norms": recipe.decay_norms,
        "starts_from": recipe.starts_from,
        "rules": _without_address(recipe.rules),
        "distillation": None if distillation is None else _without_address(distillation),
        "stages": [
            {
                "name": stage.name,
                "policy": _without_address(describe(stage.policy)),
                "share": stage.share,
                "lr_scale": stage.lr_scale,
                "schedule": stage.schedule,
                "stochastic": None if stage.stochastic is None else repr(stage.stochastic),
            }
            for stage in recipe.stages
        ],
    }


def _without_address(value: object) -> str:
    """The representation, without where in memory a function is: it is the same in the next process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
