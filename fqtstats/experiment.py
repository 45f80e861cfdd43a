"""What the command line measures: a named model, trained or loaded, on named data, with its batches."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fqtstats
from fqtstats import models
from fqtstats.data import Batch, Data, data
from fqtstats.errors import InputError, TrainingDiverged
from fqtstats.training import pretrain

__all__ = ["Experiment", "Trainable", "blaming", "device", "prepare", "trainable"]


@dataclass(frozen=True)
class Experiment:
    """A model in training mode and the minibatches to measure it on.

    Attributes:
        model: on its device.
        batch: the measured minibatch.
        further: minibatches for the sampling variance.
        about: where the weights and the data come from, as JSON.
        own: the functions of the user's that are in it, as they were named.
    """

    model: nn.Module
    batch: Batch
    further: list[Batch]
    about: dict[str, object]
    own: tuple[str, ...]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean cross entropy; :func:`fqtstats.models.loss`.

        Raises:
            InputError: the user's own model or data does not work.
        """
        with blaming(*self.own):
            return models.loss(model, batch)


def prepare(
    model_name: str,
    data_name: str,
    *,
    root: str | None = None,
    image_size: int | None = None,
    batch_size: int = 128,
    further: int = 8,
    seed: int = 0,
    checkpoint: str | None = None,
    device_name: str = "cpu",
    check: Callable[[nn.Module], None] = lambda model: None,
    progress: pretrain.Progress | None = None,
) -> Experiment:
    """Build, train or load everything.

    Without ``checkpoint`` a built-in model gets a short training, cached on disk, where one is defined for the data;
    any other model is measured as it is initialized (or as the user's function returns it).

    Args:
        model_name: a built-in model or ``package.module:function``.
        data_name: built-in data or ``package.module:function``.
        root: directory of data that are read from disk.
        image_size: pixels of images that are read from a folder.
        batch_size: samples per minibatch.
        further: number of minibatches beside the measured one.
        seed: of the initialization and of the choice of the minibatches.
        checkpoint: file with weights.
        device_name: where the measurement runs.
        check: raises InputError for a model that cannot be measured; told before the training, which takes a while.
        progress: told about every training step.

    Raises:
        InputError: anything that cannot be used; see the registries of models and data.
    """
    place = device(device_name)
    own = tuple(dict.fromkeys(name for name in (model_name, data_name) if ":" in name))
    with blaming(*(name for name in own if name == data_name)):
        source = data(data_name, root, image_size=image_size)
        first, *others = _batches(source, batch_size, 1 + further, seed)
        about: dict[str, object] = {
            "model": model_name,
            "data": {"name": data_name, "sha256": source.fingerprint(), "samples": len(first[0])},
        }
    with blaming(*(name for name in own if name == model_name)):
        model = models.build(model_name, source, seed)
    check(model)
    config = pretrain.default_config(model_name, data_name)
    if checkpoint is not None:
        pretrain.load_checkpoint(model, checkpoint)
        about["weights"] = f"checkpoint {checkpoint}"
    elif config is not None:
        model, info = pretrain.checkpoint(model_name, source, config, progress=progress)
        about["weights"] = f"trained for {config.epochs} epochs"
        about["test_accuracy"] = info.history.test_accuracy
    else:
        about["weights"] = "as initialized"
    if model_name in models.MODELS:
        model.train()  # the user's own model keeps the mode that its function gave it
    about["training_mode"] = model.training
    model.to(place)
    return Experiment(model, _on(first, place), [_on(batch, place) for batch in others], about, own)


@dataclass(frozen=True)
class Trainable:
    """A model and the data to train it on.

    Attributes:
        model: on its device, in training mode.
        data: the data.
        about: what they are, as JSON.
        own: the functions of the user's that are in it, as they were named.
    """

    model: nn.Module
    data: Data
    about: dict[str, object]
    own: tuple[str, ...]


def trainable(
    model_name: str,
    data_name: str,
    *,
    root: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
    checkpoint: str | None = None,
    device_name: str = "cpu",
) -> Trainable:
    """Build a model with its first weights, or those of a checkpoint.

    Args:
        model_name, data_name, root, image_size, device_name: as in :func:`prepare`.
        seed: of the initialization.
        checkpoint: file with weights.

    Raises:
        InputError: anything that cannot be used; see the registries of models and data.
    """
    place = device(device_name)
    own = tuple(dict.fromkeys(name for name in (model_name, data_name) if ":" in name))
    with blaming(*(name for name in own if name == data_name)):
        source = data(data_name, root, image_size=image_size)
    with blaming(*(name for name in own if name == model_name)):
        model = models.build(model_name, source, seed)
    if checkpoint is not None:
        pretrain.load_checkpoint(model, checkpoint)
    weights = "as initialized" if checkpoint is None else f"checkpoint {checkpoint}"
    return Trainable(model.train().to(place), source, {"model": model_name, "weights": weights}, own)


def _batches(source: Data, batch_size: int, number: int, seed: int) -> list[Batch]:
    """The first batches of as many epochs as it takes; the first batch alone, with a warning, if there is no other."""
    found: list[Batch] = []
    epoch = 0
    while len(found) < number:
        before = len(found)
        for batch in source.batches(batch_size, seed=seed, epoch=epoch):
            found.append(batch)
            if len(found) == number:
                break
        if len(found) == before:
            raise InputError(f"data {source.name!r} gave no batches in epoch {epoch}; make it give the same ones again")
        epoch += 1
        if len(found) == 1 < number:
            warnings.warn(
                f"data {source.name!r} has a single batch of {len(found[0][0])} samples: the sampling variance is left "
                "out; lower the batch size to have it",
                UserWarning,
                stacklevel=3,
            )
            break
    return found


def _on(batch: Batch, place: torch.device) -> Batch:
    inputs, targets = batch
    return inputs.to(place), targets.to(place)


@contextmanager
def blaming(*names: str) -> Iterator[None]:
    """Turn what the named functions of the user's raise into an InputError that says where; none named, none turned."""
    try:
        yield
    except (InputError, TrainingDiverged):
        raise
    except Exception as error:
        if not names or isinstance(error, Warning | torch.OutOfMemoryError):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        told = f"{' with '.join(map(repr, names))} failed{_line(error)}: {type(error).__name__}: {reason}"
        raise InputError(f"{told}; correct it, or choose a model and data that fit each other") from error


def _line(error: BaseException) -> str:
    """The innermost line of the user's code that an error passed through."""
    ours = tuple(str(Path(package.__file__ or "").parent) for package in (torch, fqtstats))
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" in {Path(lines[-1].filename).name}, line {lines[-1].lineno}" if lines else ""


def device(name: str) -> torch.device:
    """A device by name.

    Raises:
        InputError: it is unknown, not supported, or not there.
    """
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"expected a device such as cpu or cuda:0, got {name!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"expected a cpu or cuda device, got {name!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but no CUDA device is available; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return found
