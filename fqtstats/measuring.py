"""What the ways to measure share: progress, unfinished state, and the gradients of further minibatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fqtstats.capture import LossFunction, Session
from fqtstats.errors import InputError
from fqtstats.hashing import tensor_digest
from fqtstats.layers.state import SITES, Site, WeightObserver
from fqtstats.layers.swap import Handle
from fqtstats.policy import PLACES, Policy
from fqtstats.random import stream

__all__ = [
    "CALIBRATION_DRAW",
    "Accumulator",
    "Arrays",
    "Keeper",
    "Progress",
    "Store",
    "describe",
    "digest",
    "errors_of",
    "further_batches",
    "gradients",
    "metadata_of",
    "wide",
]

Arrays = dict[str, npt.NDArray[Any]]

CALIBRATION_DRAW = -1
"""Index of the extra draw whose errors tell quantizers and seed; never part of the sample."""


class Progress(Protocol):
    """Told after every backward pass or batch."""

    def __call__(self, done: int, total: int) -> None: ...


class Store(Protocol):
    """Where an unfinished measurement keeps what it has."""

    def load(self) -> Arrays | None:
        """The last saved state, or None."""

    def save(self, state: Callable[[], Arrays], *, force: bool = False) -> None:
        """Keep what ``state()`` gives; may skip it (and not even call it) unless ``force``."""


def wide(g: torch.Tensor) -> torch.Tensor:
    """Half-precision gradients as float32: differences and sums of them are not rounded again."""
    return g.float() if g.dtype in (torch.float16, torch.bfloat16) else g


def further_batches(batches: Sequence[object] | None) -> list[object]:
    """The further minibatches, as a list; InputError for what has none, such as their number."""
    if batches is not None and not isinstance(batches, Iterable):
        raise InputError(
            f"batches must be a sequence of minibatches like batch, got {batches!r}; give the minibatches themselves"
        )
    return [] if batches is None else list(batches)


def errors_of(
    session: Session,
    gradient: list[torch.Tensor],
    index: int,
    sites: Sequence[Site] = SITES,
    observe_weight: WeightObserver | None = None,
) -> list[torch.Tensor]:
    """FQT draw minus QAT gradient, fresh memory; the observer is as in :meth:`Session.draw`."""
    found = session.draw(index, sites, observe_weight=observe_weight)
    for place, g in enumerate(gradient):
        # Not in place: where parameters are added up, autograd gives them one tensor.
        found[place] = wide(found[place]) - g
    return found


def gradients(
    model: nn.Module,
    handle: Handle,
    batches: list[object],
    loss_fn: LossFunction,
    seed: int,
    tell: Callable[[int], None],
) -> Iterator[list[torch.Tensor]]:
    """The QAT gradients of further minibatches, one at a time; ``tell`` is told how many there were."""
    for index, batch in enumerate(batches, start=1):
        # Masks of dropout are part of what changes from batch to batch.
        own, *_ = stream(seed=seed, site="forward", draw=index).words()
        with Session(model, handle, batch, loss_fn, own) as session:
            yield [wide(g) for g in session.qat()]
        tell(index)


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256 of tensors in their order."""
    return tensor_digest({str(index): tensor for index, tensor in enumerate(tensors)})


class Accumulator(Protocol):
    """What the draws of a measurement are collected in."""

    def __len__(self) -> int:
        """Number of draws."""

    def state(self) -> Arrays:
        """Everything, as arrays."""

    def load(self, arrays: Arrays) -> None:
        """Continue from a saved :meth:`state`."""


class Keeper:
    """Loads and saves what was accumulated, with a digest of the gradient and the calibration errors it belongs to."""

    def __init__(self, store: Store | None, digest: str, accumulator: Accumulator) -> None:
        self._store, self._digest, self._accumulator = store, digest, accumulator
        arrays = None if store is None else store.load()
        if arrays is not None:
            if arrays.pop("gradient_digest").item() != digest:
                raise InputError(
                    "cannot resume: the gradient is not the one that the saved state belongs to (another machine, "
                    "library version, model, data, policy or seed); start anew in another folder"
                )
            accumulator.load(arrays)

    def save(self, *, force: bool = False) -> None:
        """Keep the state, if there is a draw in it; may skip it unless ``force``."""
        if self._store is not None and len(self._accumulator):
            arrays = self._accumulator.state
            self._store.save(lambda: {"gradient_digest": np.array(self._digest), **arrays()}, force=force)


def metadata_of(session: Session, gradient: Sequence[torch.Tensor]) -> dict[str, object]:
    """Metadata of what is measured: loss, backend, layers that stay in full precision, and hashes."""
    tensors = list(session.tensors())
    batch = {"batch": digest(tensors)} if tensors else {}
    return {
        "loss": session.loss,
        "backend": session.handle.backend,
        "unquantized": [{"layer": u.name, "type": u.type, "reason": u.reason} for u in session.handle.unquantized],
        "hashes": {"model": tensor_digest(session.model.state_dict()), **batch},
        "gradient_sha256": digest(gradient),
    }


def describe(policy: Policy) -> dict[str, object]:
    """The quantizers of a policy, as JSON."""
    return {
        "name": policy.name,
        **{place: repr(getattr(policy, place)) for place in PLACES},
        "overrides": {pattern: describe(own) for pattern, own in policy.overrides.items()},
    }
