"""What a run knows between two steps, and the checkpoints that it falls back to or is continued from."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fqtstats.errors import RunDirectoryError
from fqtstats.measuring import Arrays, Store
from fqtstats.training.checkpoints import (
    Checkpoint,
    Position,
    load_tensors,
    optimizer_state,
    restore_optimizer,
    tensors_of,
)
from fqtstats.training.networks import Networks

__all__ = ["Checkpoints", "State", "Sums"]

GOOD = "good/"
"""Before the names of the arrays that a stored state has of the good checkpoint."""


@dataclass
class Sums:
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


@dataclass
class State:
    """All that a run has beside its networks.

    Attributes:
        position: which step is next.
        sums: of the unfinished epoch.
        rows: of the tables, by name.
        start: loss of the model in the first step.
        far: so many steps in a row had a loss that is far off.
    """

    position: Position = field(default_factory=Position)
    sums: Sums = field(default_factory=Sums)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"epochs": [], "variance": []})
    start: float | None = None
    far: int = 0

    def checkpoint(self, networks: Networks) -> Checkpoint:
        """The run between two steps."""
        tensors = tensors_of(networks.whole)
        moments, values = optimizer_state(networks.optimizer)
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

    def restore(self, networks: Networks, checkpoint: Checkpoint) -> None:
        """The inverse of :meth:`checkpoint`, in place."""
        if checkpoint.position.stage != networks.index:
            networks.enter(checkpoint.position.stage)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        load_tensors(networks.whole, parts["model"])
        progress = copy.deepcopy(dict(checkpoint.progress))
        restore_optimizer(networks.optimizer, parts["optimizer"], progress["optimizer"])
        self.position = checkpoint.position
        self.sums = Sums(**progress["sums"])
        self.rows = progress["rows"]
        self.start, self.far = progress["start"], progress["far"]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        state, networks: of the run.
        store: keeps them; None: only in memory.
        identity: tells which run they are of.

    Attributes:
        good: what a divergence falls back to, of a point that does not depend on time.
        pending: what is to be that once a step from it had a finite loss and finite gradients.
        latest: what the run is continued from.
    """

    def __init__(self, state: State, networks: Networks, store: Store | None, identity: str) -> None:
        self.state, self.networks, self.store, self.identity = state, networks, store, identity
        self.good = self.latest = Checkpoint(state.position, {})
        self.pending: Checkpoint | None = None

    def begin(self) -> None:
        """The run begins here."""
        self.good = self.latest = self.state.checkpoint(self.networks)

    def resume(self) -> bool:
        """Whether the store had a checkpoint, from which the run goes on.

        Raises:
            InputError: it is of another run.
        """
        arrays = None if self.store is None else self.store.load()
        if arrays is None:
            return False
        self.latest = Checkpoint.of_arrays(arrays, self.identity)
        good = {name.removeprefix(GOOD): array for name, array in arrays.items() if name.startswith(GOOD)}
        self.good = Checkpoint.of_arrays(good, self.identity) if good else self.latest
        self.state.restore(self.networks, self.latest)
        # The start of an epoch: its first step has not shown yet whether it is good.
        self.pending = self.latest if self.state.position.step == 0 else None
        return True

    def epoch_begins(self) -> None:
        """The run is at the start of an epoch."""
        self.pending = self.latest = self.state.checkpoint(self.networks)

    def step_was_good(self) -> None:
        """A step had a finite loss and finite gradients."""
        if self.pending is not None:
            self.good, self.pending = self.pending, None

    def keep(self) -> None:
        """Offer the store a checkpoint of the run as it is."""
        if self.store is not None:
            self.store.save(self._now)

    def keep_latest(self) -> None:
        """Give the store the latest checkpoint: the run ends within a step."""
        if self.store is not None and self.latest.position != Position():
            with suppress(RunDirectoryError):  # what ends the run is told; an earlier checkpoint stays
                self.store.save(self._arrays, force=True)

    def _now(self) -> Arrays:
        if self.latest.position != self.state.position:
            self.latest = self.state.checkpoint(self.networks)
        return self._arrays()

    def _arrays(self) -> Arrays:
        """The latest checkpoint, and the good one where it is another."""
        arrays = self.latest.arrays(self.identity)
        if self.good is not self.latest:
            arrays |= {GOOD + name: array for name, array in self.good.arrays(self.identity).items()}
        return arrays
