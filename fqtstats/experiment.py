"""What the command line measures: a named model, trained or loaded, on named data, with its batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, count, islice

import torch
from torch import nn

from fqtstats import models
from fqtstats.data import Batch, Data, data
from fqtstats.errors import InputError
from fqtstats.training import pretrain

__all__ = ["Experiment", "prepare"]


@dataclass(frozen=True)
class Experiment:
    """A model in training mode and the minibatches to measure it on.

    Attributes:
        model: on its device.
        batch: the measured minibatch.
        further: minibatches for the sampling variance.
        about: where the weights and the data come from, as JSON.
    """

    model: nn.Module
    batch: Batch
    further: list[Batch]
    about: dict[str, object]


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
    device: str = "cpu",
    progress: pretrain.Progress | None = None,
) -> Experiment:
    """Build, train or load everything.

    Without ``checkpoint`` a built-in model gets a short training, cached on disk, where one is defined for the data; any
    other model is measured as it is initialized (or as the user's function returns it).

    Raises:
        InputError: anything that cannot be used; see the registries of models and data.
    """
    place = _device(device)
    source = data(data_name, root, image_size=image_size)
    config = pretrain.default_config(model_name, data_name)
    about: dict[str, object] = {"model": model_name, "data": {"name": data_name, "sha256": source.fingerprint()}}
    if checkpoint is not None:
        model = models.build(model_name, source, seed)
        pretrain.load_checkpoint(model, checkpoint)
        about["weights"] = f"checkpoint {checkpoint}"
    elif config is not None:
        model, info = pretrain.checkpoint(model_name, source, config, progress=progress)
        about["weights"] = f"trained for {config.epochs} epochs"
        about["test_accuracy"] = info.history.test_accuracy
    else:
        model = models.build(model_name, source, seed)
        about["weights"] = "as initialized"
    first, *others = _batches(source, batch_size, 1 + further, seed)
    model.to(place).train()
    return Experiment(model, _on(first, place), [_on(batch, place) for batch in others], about)


def _batches(source: Data, batch_size: int, number: int, seed: int) -> list[Batch]:
    epochs = (source.batches(batch_size, seed=seed, epoch=epoch) for epoch in count())
    return list(islice(chain.from_iterable(epochs), number))


def _on(batch: Batch, device: torch.device) -> Batch:
    inputs, targets = batch
    return inputs.to(device), targets.to(device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"expected a device such as cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but no CUDA device is available; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"expected a cpu or cuda device, got {name!r}")
    return device
