"""What the studies train on: embedded data in amounts that a run of a minute can learn from.

Digits are small enough as they are. Of the text the studies take a part, in small batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fqtstats.data import data
from fqtstats.data.base import InMemory

__all__ = ["TASKS", "Task", "guessing", "records"]


@dataclass(frozen=True)
class Task:
    """How much of some data a study takes, and what it calls trained.

    Attributes:
        trained: the share of the loss of guessing below which a training counts as one.
        sequences: the first of the training and of the test data; None: all.
        epochs, batch_size: instead of the run's own; None: these.
        longer: epochs of recipes that learn too slowly for these, by name.
    """

    trained: float
    sequences: tuple[int, int] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    longer: Mapping[str, int] = field(default_factory=dict)


_SLOW = ("1bit-qat-sgd", "1bit-psq-sgd", "1bit-agp-sgd", "progressive", "stochastic-precision", "joint-2-4", "dorefa")

TASKS = {
    "digits": Task(0.25),
    "text": Task(0.9, sequences=(2048, 512), epochs=5, batch_size=32, longer=dict.fromkeys(_SLOW, 10)),
}
"""By name of the data. 320 steps of a transformer on text learn little more than which characters follow which."""


def records(name: str) -> InMemory:
    """The data of a task."""
    found = data(name)
    assert isinstance(found, InMemory)
    if (sequences := TASKS[name].sequences) is None:
        return found
    lengths = dict(zip(("train", "test"), sequences, strict=True))
    return replace(
        found,
        inputs={split: found.inputs[split][:n] for split, n in lengths.items()},
        targets={split: found.targets[split][:n] for split, n in lengths.items()},
    )


def guessing(records: InMemory) -> float:
    """The loss [nats] of the best answer that does not look: the entropy of the classes' frequencies in training."""
    share = torch.bincount(records.targets["train"].reshape(-1).long()).double()
    share = share[share > 0] / share.sum()
    return -float((share * share.log()).sum())
