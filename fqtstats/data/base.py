"""What every data source offers, and the common in-memory implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fqtstats.data.augmentation import CropAndFlip, numbers
from fqtstats.determinism import isolated
from fqtstats.errors import InputError
from fqtstats.hashing import tensor_digest
from fqtstats.random import stream

__all__ = ["Batch", "Data", "InMemory", "Kind", "order", "root_directory"]

Batch = tuple[Tensor, Tensor]
Kind = Literal["image", "tokens", "features"]


class Data(ABC):
    """A source of minibatches.

    Index legend: N samples, C channels, H x W pixels, T tokens per sequence.

    Attributes:
        name: the registry's name, or ``package.module:function``.
        kind: ``"image"``: inputs float32 [N, C, H, W], targets int64 [N]; ``"tokens"``: inputs and targets int64
            [N, T], a target being the next token; ``"features"``: a user's inputs of any other shape.
        input_shape: shape of one sample, (C, H, W) or (T,).
        num_classes: classes, or for tokens the size of the vocabulary; 0 if the targets are not class indices.
        splits: the names accepted as ``split``.
        fingerprint_complete: whether :meth:`fingerprint` covers every record.
        augments: whether there is an :meth:`augmented` version of the training records.
    """

    name: str
    kind: Kind
    input_shape: tuple[int, ...]
    num_classes: int
    splits: tuple[str, ...]
    fingerprint_complete: bool = True
    augments: bool = False

    @abstractmethod
    def len(self, split: str = "train") -> int:
        """Number of samples in the split."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of what the source holds."""

    @abstractmethod
    def records(self, split: str, indices: Tensor) -> Batch:
        """The samples at ``indices`` (int64 [N]) of the split as one batch."""

    def augmented(self, indices: Tensor, *, seed: int, epoch: int) -> Batch:
        """Training samples at ``indices``, changed at random: each depends on (seed, epoch, its index) alone.

        Raises:
            InputError: there is no augmentation for this source.
        """
        raise InputError(f"data {self.name!r} has no augmentation")

    def steps(self, batch_size: int, split: str = "train") -> int:
        """Number of batches that :meth:`batches` gives."""
        n = self.len(split)
        return max(1, n // batch_size) if split == "train" else -(-n // batch_size)

    def batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, split: str = "train", augment: bool = False
    ) -> Iterator[Batch]:
        """One epoch of batches, in an order that depends on (seed, epoch, split) alone.

        Training batches are all full (the rest of the epoch is left out) unless the whole split is smaller than one
        batch, which then is the only one; other splits end with a smaller batch. The global random state is neither
        used nor changed.

        Args:
            batch_size: samples per batch, >= 1.
            seed: the experiment's seed.
            epoch: which pass over the data.
            split: one of :attr:`splits`.
            augment: take the :meth:`augmented` version of the training records.

        Raises:
            InputError: ``batch_size`` or ``split`` is out of range, or augmented batches are asked for that there are
                not; while iterating, a record cannot be read.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}; ask for a non-empty batch")
        self.check_split(split)
        if augment and split != "train":
            raise InputError(f"only training batches are augmented, not those of split {split!r}; leave it out")
        if augment and not self.augments:
            raise InputError(f"data {self.name!r} has no augmentation; leave it out")
        k0, k1, _, _ = stream(seed=seed, step=epoch, layer="data", site=f"records/{split}").words()
        return isolated(self.iterate(batch_size, seed, epoch, split, augment), k0 | k1 << 32)

    def iterate(self, batch_size: int, seed: int, epoch: int, split: str, augment: bool) -> Iterator[Batch]:
        """The batches of one epoch; called by :meth:`batches`, which has checked the arguments."""
        permutation = order(self.len(split), seed=seed, epoch=epoch, split=split)
        for k in range(self.steps(batch_size, split)):
            chosen = permutation[k * batch_size : (k + 1) * batch_size]
            yield self.augmented(chosen, seed=seed, epoch=epoch) if augment else self.records(split, chosen)

    def check_split(self, split: str) -> None:
        """Raise InputError unless ``split`` is one of :attr:`splits`."""
        if split not in self.splits:
            raise InputError(f"data {self.name!r} has no split {split!r}; use one of {', '.join(self.splits)}")


def order(n: int, *, seed: int, epoch: int, split: str) -> Tensor:
    """The keyed permutation of 0..n-1 (int64 [n]): indices sorted by the stream's bits, ties broken by index."""
    return torch.argsort(stream(seed=seed, step=epoch, layer="data", site=f"order/{split}").bits(n, 32), stable=True)


def root_directory(name: str, root: str | Path | None, holds: str) -> Path:
    """The user's ``root`` as an existing directory.

    Args:
        name: the source that asks.
        root: what the user gave.
        holds: what the directory is expected to hold, for the message.

    Raises:
        InputError: no root, or not a directory.
    """
    if root is None:
        raise InputError(f"data {name!r} needs a root directory, got none; pass the directory that holds {holds}")
    path = Path(root)
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        raise InputError(f"data {name!r} expected a directory at {str(path)!r}, found {what}; it has to hold {holds}")
    return path


def _identity(inputs: Tensor) -> Tensor:
    return inputs


@dataclass(frozen=True, eq=False)
class InMemory(Data):
    """A source whose records are all in memory.

    Attributes:
        inputs: per split, [N, *input_shape] in storage format.
        targets: per split, [N, ...].
        transform: from a batch in storage format to the model's input.
        augmentation: of the training inputs, after ``transform``.
    """

    name: str
    kind: Kind
    num_classes: int
    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    transform: Callable[[Tensor], Tensor] = _identity
    augmentation: CropAndFlip | None = None

    @property
    def augments(self) -> bool:  # type: ignore[override]
        return self.augmentation is not None

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.inputs["train"].shape[1:])

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.inputs)

    def len(self, split: str = "train") -> int:
        self.check_split(split)
        return self.inputs[split].shape[0]

    def fingerprint(self) -> str:
        tensors = {f"{split}/inputs": t for split, t in self.inputs.items()}
        return tensor_digest(tensors | {f"{split}/targets": t for split, t in self.targets.items()})

    def records(self, split: str, indices: Tensor) -> Batch:
        targets = self.targets[split][indices]
        # Class indices may be stored in a narrower type; cross entropy takes int64.
        return self.transform(self.inputs[split][indices]), targets if targets.is_floating_point() else targets.long()

    def augmented(self, indices: Tensor, *, seed: int, epoch: int) -> Batch:
        if self.augmentation is None:
            return super().augmented(indices, seed=seed, epoch=epoch)
        inputs, targets = self.records("train", indices)
        drawn = numbers(indices, self.augmentation.count, seed=seed, epoch=epoch)
        return self.augmentation(inputs, drawn), targets
