"""The networks that studies look at: trained on embedded data, one per seed, as they are or epoch by epoch.

They are those that ``fqtstats measure`` takes by default (:data:`fqtstats.training.pretrain`), with other seeds. A
trained network is kept in the cache of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from analysis.known import Known
from fqtstats import models
from fqtstats.data import data
from fqtstats.errors import InputError
from fqtstats.experiment import Experiment
from fqtstats.training import pretrain

__all__ = ["DATA", "snapshots", "trained"]

DATA = Known("network", {"mlp": "digits", "preact_resnet20": "digits", "transformer": "text"})
"""What each of the networks is trained on."""

BATCH = 128


def trained(model: str, seed: int, *, further: int = 0, batch_size: int = BATCH) -> Experiment:
    """A trained network with a minibatch of its training data.

    Args:
        model: one of :data:`DATA`.
        seed: of initialization, training and the choice of the minibatches.
        further: other minibatches, for the sampling variance.
        batch_size: samples, or sequences, per minibatch.
    """
    network, info = pretrain.checkpoint(model, data(DATA[model]), _config(model, seed))
    about = {"model": model, "seed": seed, "test_accuracy": info.history.test_accuracy}
    return _experiment(network, model, seed, further, batch_size, about)


def snapshots(
    model: str, seed: int, epochs: Sequence[int], *, further: int = 0, batch_size: int = BATCH
) -> Iterator[tuple[int, Experiment]]:
    """The network after some of its epochs; 0 is as it is initialized. The last of them ends the training.

    Args:
        model: as :func:`trained`, and the other arguments, too.
        epochs: ascending.
    """
    if list(epochs) != sorted(set(epochs)) or not epochs or epochs[-1] < 1:
        raise InputError(f"epochs must ascend to at least 1, got {list(epochs)}")
    source = data(DATA[model])
    network = models.build(model, source, seed)
    kept: dict[int, dict[str, Any]] = {0: copy.deepcopy(network.state_dict())}

    def progress(epoch: int, epochs_: int, step: int, steps: int, loss: float) -> None:
        if step == steps and epoch in epochs:
            kept[epoch] = copy.deepcopy(network.state_dict())

    pretrain.pretrain(network, source, replace(_config(model, seed), epochs=epochs[-1]), progress)
    for epoch in epochs:
        network.load_state_dict(kept[epoch])
        about = {"model": model, "seed": seed, "epoch": epoch}
        yield epoch, _experiment(network, model, seed, further, batch_size, about)


def _config(model: str, seed: int) -> pretrain.PretrainConfig:
    config = pretrain.default_config(model, DATA[model])
    assert config is not None
    return replace(config, seed=seed)


def _experiment(
    network: nn.Module, model: str, seed: int, further: int, batch_size: int, about: dict[str, object]
) -> Experiment:
    network.train()
    batches = data(DATA[model]).batches(batch_size, seed=seed)
    first, *others = [batch for batch, _ in zip(batches, range(1 + further), strict=False)]
    return Experiment(network, first, others, about, ())
