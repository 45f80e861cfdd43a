"""The state of a training run between two steps, and how it is kept.

A checkpoint is the position in the run, the tensors of all networks (with what quantizers have learned), those of the
optimizers, and the rows of the tables so far. No generator has a state: batches, dropout and rounding take their
numbers by seed, epoch and step. A :class:`fqtstats.measuring.Store` keeps a checkpoint as arrays, on disk in one file
with a digest, which replaces the previous one in one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fqtstats.errors import InputError, UnsupportedError
from fqtstats.measuring import Arrays

__all__ = [
    "Checkpoint",
    "Position",
    "identity_of",
    "load_tensors",
    "optimizer_state",
    "restore_optimizer",
    "tensors_of",
]


@dataclass(frozen=True)
class Position:
    """Where a run is: before ``step`` of ``epoch``, both from 0, in the configuration of ``stage``."""

    epoch: int = 0
    step: int = 0
    stage: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """All that a run continues from.

    Attributes:
        position: which step is next.
        tensors: by name.
        progress: what the unfinished epoch has summed up, and the finished rows, as JSON.
    """

    position: Position
    tensors: Mapping[str, Tensor]
    progress: Mapping[str, Any] = field(default_factory=dict)

    def arrays(self, identity: str) -> Arrays:
        """As arrays, for a store; ``identity`` tells which run it is of."""
        about = {
            "identity": identity,
            "position": vars(self.position),
            "progress": self.progress,
            "tensors": [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in self.tensors.items()],
        }
        stored: Arrays = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
        for index, tensor in enumerate(self.tensors.values()):
            # As bytes: NumPy lacks some of torch's types.
            stored[str(index)] = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return stored

    @staticmethod
    def of_arrays(arrays: Arrays, identity: str) -> Checkpoint:
        """The inverse of :meth:`arrays`.

        Raises:
            InputError: it is a checkpoint of another run.
        """
        about = json.loads(arrays["about"].tobytes())
        if about["identity"] != identity:
            raise InputError(
                "cannot resume: the saved checkpoint is of another run (recipe, model, first weights, data or seed "
                "differ); give what it was begun with, or start anew in another folder"
            )
        tensors = {
            name: torch.from_numpy(arrays[str(index)].copy()).view(getattr(torch, dtype)).reshape(shape)
            for index, (name, dtype, shape) in enumerate(about["tensors"])
        }
        return Checkpoint(Position(**about["position"]), tensors, about["progress"])


def identity_of(settings: Mapping[str, object]) -> str:
    """SHA-256 of what defines a run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's state, without parameters that no forward pass has initialized yet.

    Raises:
        UnsupportedError: a module keeps a state that is no tensor.
    """
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"the state of the model has {name!r}, a {type(value).__name__}, which a checkpoint does not keep; "
                "make it a buffer"
            )
        if not is_lazy(value):
            found[name] = value.detach().clone()
    return found


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`tensors_of` gave; parameters that were not initialized yet are.

    Raises:
        InputError: a name or a shape is not the model's.
    """
    own = model.state_dict(keep_vars=True)
    for name, value in tensors.items():
        target = own.get(name)
        if target is not None and is_lazy(target):
            target.materialize(tuple(value.shape), dtype=value.dtype)
        if target is None or target.shape != value.shape:
            raise InputError(f"the state has {name!r} {list(value.shape)}, which the model does not; give its model")
    # Modules may have states beside parameters and buffers, which they set themselves.
    model.load_state_dict(dict(tensors), strict=False)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, object]]]:
    """Copies of the tensors, by ``"parameter/name"``, and the other values by parameter and name."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, object]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value.detach().clone()
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, object]]
) -> None:
    """Put back what :func:`optimizer_state` gave, in an optimizer of the same parameters."""
    state: dict[int, dict[str, object]] = {int(index): dict(own) for index, own in values.items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
