"""Training by a recipe: stages, checkpoints, gradient variance on the way, and what to say where it diverges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from fqtstats import ops
from fqtstats.data.base import Batch, Data
from fqtstats.determinism import threads
from fqtstats.errors import InputError, NonFiniteError, TrainingDiverged
from fqtstats.hashing import tensor_digest
from fqtstats.layers.swap import Skip
from fqtstats.measuring import Store
from fqtstats.provenance import provenance
from fqtstats.random import stream
from fqtstats.training.checkpoints import Position, identity_of, tensors_of
from fqtstats.training.description import recipe_as_json, skip_as_json
from fqtstats.training.divergence import Diverged, diagnose, tell
from fqtstats.training.evaluation import evaluate, evaluation_split
from fqtstats.training.networks import Networks
from fqtstats.training.pretrain import Progress
from fqtstats.training.recipes import Recipe
from fqtstats.training.state import Checkpoints, State, Sums
from fqtstats.training.steps import Steps
from fqtstats.trainings import EPOCHS, MODEL, VARIANCE, Training

__all__ = ["Report", "train"]


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
    stream(seed=seed)  # raises InputError for what is no integer
    fitted = recipe.for_model(model, _samples(model, data, batch_size, seed, augment), pretrained=pretrained)
    if teacher is not None and recipe.distillation is None:
        raise InputError(f"recipe {recipe.name!r} has no teacher, but one is given; leave it out")
    skip = skip if skip is None or isinstance(skip, str) or callable(skip) else list(skip)
    networks = Networks(
        model, fitted, teacher, epochs=epochs, steps=data.steps(batch_size), skip=skip, backend=backend, seed=seed
    )
    if variance_every and not networks.quantizes_gradients:
        raise InputError(
            f"recipe {recipe.name!r} quantizes no gradient, so there is no variance to measure at every "
            f"{variance_every} steps; leave it out, or choose a recipe that does"
        )
    facts = {
        "recipe": recipe_as_json(recipe),
        "settings": {
            "epochs": epochs,
            "batch_size": batch_size,
            "backend": backend,
            "skip": skip_as_json(skip),
            "pretrained": pretrained,
            "teacher": teacher is not None,
            "augment": augment,
        },
        "seed": seed,
        "data": {"name": data.name, "sha256": data.fingerprint()},
        "initial_sha256": tensor_digest(tensors_of(networks.whole)),
    }
    batches = partial(data.batches, batch_size, seed=seed, augment=augment)
    run = _Run(
        networks,
        data,
        batches,
        facts,
        epochs,
        {"every": variance_every, "draws": variance_draws},
        progress,
        report,
        store,
    )
    was_training = model.training
    with threads(thread_count), torch.enable_grad(), _deterministic():
        try:
            return run.all()
        finally:
            networks.release()
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


def _samples(model: nn.Module, data: Data, batch_size: int, seed: int, augment: bool) -> Tensor:
    """Inputs to find the order of the layers with."""
    batch = next(data.batches(min(batch_size, 2), seed=seed, augment=augment), None)
    if batch is None:
        raise InputError(f"data {data.name!r} gave no batches; make it give some")
    return batch[0].to(next((p.device for p in model.parameters()), torch.device("cpu")))


class _Run:
    """The epochs of one call of :func:`train`, and what comes out of them.

    Args:
        networks: what is trained.
        data: to train and test on.
        batches: of an epoch, by its keyword ``epoch``.
        facts: what defines the run, as JSON.
        epochs: how many.
        variance: ``every`` how many steps it is measured, and by how many ``draws``.
        progress, report, store: as of :func:`train`.
    """

    def __init__(
        self,
        networks: Networks,
        data: Data,
        batches: Callable[..., Iterator[Batch]],
        facts: dict[str, Any],
        epochs: int,
        variance: dict[str, int],
        progress: Progress | None,
        report: Report | None,
        store: Store | None,
    ) -> None:
        self.networks, self.data, self.batches = networks, data, batches
        self.facts, self.epochs, self.variance = facts, epochs, variance
        self.progress, self.report = progress, report
        self.state = State()
        self.checkpoints = Checkpoints(self.state, networks, store, identity_of(facts))
        self.steps = Steps(
            networks,
            self.state,
            classes=data.num_classes,
            variance_every=variance["every"],
            variance_draws=variance["draws"],
            add=self._add,
            found_finite=self.checkpoints.step_was_good,
        )
        self.resumed_at: int | None = None

    def all(self) -> Training:
        """Every epoch that is not done yet."""
        networks, state, checkpoints = self.networks, self.state, self.checkpoints
        networks.try_stages()
        networks.whole.train()
        networks.enter(0)
        if checkpoints.resume():
            self.resumed_at = state.position.epoch * networks.steps + state.position.step
        else:
            try:
                networks.check_weights()
            except Diverged as reason:
                raise InputError(f"before the first step, {reason}; start from other weights") from None
            checkpoints.begin()
        try:
            for epoch in range(state.position.epoch, self.epochs):
                self._epoch(epoch)
        except Diverged as reason:
            raise self._diverged(reason) from None
        except BaseException:
            checkpoints.keep_latest()
            raise
        return self._result(None)

    def _epoch(self, epoch: int) -> None:
        networks, state, steps = self.networks, self.state, self.networks.steps
        index = networks.stage_of(epoch)
        if index != networks.index:
            networks.enter(index)
        began = time.monotonic() - state.sums.seconds
        first = number = state.position.step
        for number, batch in enumerate(islice(self.batches(epoch=epoch), first, None), first + 1):
            if number > steps:
                break
            loss = self.steps.make(epoch, number - 1, (batch[0].to(networks.device), batch[1].to(networks.device)))
            state.position = Position(epoch, number, index)
            state.sums.seconds = time.monotonic() - began
            self.checkpoints.keep()
            if self.progress is not None:
                self.progress(epoch + 1, self.epochs, number, steps, loss)
        if number < steps:
            raise InputError(
                f"data {self.data.name!r} gave {number} batches in epoch {epoch + 1}, expected {steps}; make it "
                "give as many every time"
            )
        self._finish(epoch, began)
        state.position, state.sums = Position(epoch + 1, 0, index), Sums()
        networks.check_weights()
        self.checkpoints.epoch_begins()
        self.checkpoints.keep()

    def _finish(self, epoch: int, began: float) -> None:
        """The epoch's rows."""
        networks, sums, split = self.networks, self.state.sums, evaluation_split(self.data)
        steps = (epoch + 1) * networks.steps
        common = {
            "epoch": epoch + 1,
            "stage": networks.stage.name,
            "steps": steps,
            "lr": networks.optimizer.param_groups[0]["initial_lr"] * networks.factor(steps - 1),
        }
        try:
            scores = {
                name: (math.nan, math.nan) if split is None else evaluate(network, self.data, split)
                for name, network in networks.by_name.items()
            }
        except NonFiniteError as error:
            raise Diverged(f"on the {split} data: {error}") from error
        for test_loss, _ in scores.values():
            if split is not None and not math.isfinite(test_loss):
                raise Diverged(f"on the {split} data: the loss became {test_loss}")
        seconds = time.monotonic() - began
        variance = sums.variances / sums.measured if sums.measured else math.nan
        rest = seconds - sums.variance_seconds
        for name in networks.by_name:
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
        self.state.rows[table].append(row)
        if self.report is not None:
            self.report(table, row)

    def _diverged(self, reason: Diverged) -> TrainingDiverged:
        """Where it shows, the last good checkpoint, and what was done until then."""
        networks, state = self.networks, self.state
        step = state.position.epoch * networks.steps + state.position.step - (reason.objective is None)
        epoch, index = divmod(step, networks.steps)
        with networks.sampled(step):
            found = diagnose({"": networks.whole} if networks.joint is None else networks.by_name, reason.objective)
        good = self.checkpoints.good
        rows = {table: list(each) for table, each in state.rows.items()}
        state.restore(networks, good)
        state.rows = rows
        where = f"epoch {epoch + 1}, step {index + 1} of {networks.steps}"
        diagnosis: dict[str, object] = {
            "epoch": epoch + 1,
            "step": step,
            "reason": str(reason),
            **found,
            "last_good_step": good.position.epoch * networks.steps + good.position.step,
        }
        message = (
            f"training diverged in {where}: {reason}; {tell(found)}; the weights are those of the last good "
            f"checkpoint, after {diagnosis['last_good_step']} steps; lower the learning rate, or give more bits"
        )
        return TrainingDiverged(message, diagnosis, self._result(diagnosis))

    def _result(self, diagnosis: dict[str, object] | None) -> Training:
        weights = {name: tensors_of(network) for name, network in self.networks.by_name.items()}
        handle = self.networks.handle
        metadata = {
            **self.facts,
            "steps_per_epoch": self.networks.steps,
            "variance": self.variance,
            "diverged": diagnosis,
            "resumed_at": self.resumed_at,
            "hashes": {name: tensor_digest(state) for name, state in weights.items()},
            "quantized": self.networks.quantized(),
            "unquantized": []
            if handle is None
            else [{"layer": u.name, "type": u.type, "reason": u.reason} for u in handle.unquantized],
            "arithmetic": {} if handle is None else handle.arithmetic,
            **provenance(ops.isa()),
        }
        tables = {
            name: pd.DataFrame(self.state.rows[name], columns=[column.name for column in columns])
            for name, columns in (("epochs", EPOCHS), ("variance", VARIANCE))
        }
        return Training(**tables, metadata=metadata, weights=weights)
