"""What a user's own function returns, as a :class:`~fqtstats.data.base.Data`."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from fqtstats.data.base import Batch, Data, InMemory, Kind
from fqtstats.determinism import seeded
from fqtstats.errors import InputError
from fqtstats.hashing import tensor_digest

__all__ = ["wrap"]

EXPECTED = "a pair of tensors (inputs, targets), a Dataset, a DataLoader, or an iterable of (inputs, targets) batches"

# An endless iterable is fine for drawing batches, but it cannot be counted.
MAX_BATCHES = 1_000_000

# Samples or batches that the fingerprint of a lazily read source covers.
HEAD = 64


def wrap(make: Callable[[], object], name: str) -> Data:
    """Wrap what ``make()`` returns.

    Args:
        make: the user's function; called again for every epoch if it returns a one-shot iterator (a generator).
        name: how the user named it.

    Returns:
        Data with the single split ``"train"``. Ready-made batches (a DataLoader, any iterable of batches) keep the
        user's batch size and order; tensors and datasets are batched and shuffled like the built-in sources.
        A ``Data`` is passed through.

    Raises:
        InputError: something else came back, it is empty, or inputs and targets do not match.
    """
    made = make()
    if isinstance(made, Data):
        return made
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor) for part in made):
        inputs, targets = _pair(made, f"what {name!r} returned")
        return InMemory(name, _kind(inputs), _classes([(inputs, targets)]), {"train": inputs}, {"train": targets})
    if isinstance(made, IterableDataset):
        raise InputError(
            f"{name!r} returned an IterableDataset of single samples; return DataLoader(dataset, batch_size=...)"
        )
    if isinstance(made, Dataset):
        return _Indexed(name, made)
    if isinstance(made, Iterable) and not isinstance(made, Tensor | str | bytes | Mapping):
        again = iter(made) is made
        return _Ready(name, cast("Callable[[], Iterable[object]]", make) if again else lambda: made)
    raise InputError(f"{name!r} returned {_describe(made)}, expected {EXPECTED}")


class _Lazy(Data):
    """Common part of the sources that are read when asked for."""

    splits = ("train",)
    fingerprint_complete = False

    def __init__(self, name: str) -> None:
        self.name = name
        first = next(self.batches(1, seed=0), None)
        if first is None:
            raise InputError(f"{name!r} gave no batches; expected {EXPECTED}")
        self.kind = _kind(first[0])
        self.input_shape = tuple(first[0].shape[1:])

    @abstractmethod
    def in_order(self) -> Iterator[Batch]:
        """The batches in the source's own order."""

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """Found by one pass over the data."""
        with seeded(0):
            return _classes(self.in_order())

    def fingerprint(self) -> str:
        """sha256 of the first batches (at most 64), not of everything: a full pass may take hours."""
        h = hashlib.sha256()
        with seeded(0):
            for inputs, targets in islice(self.in_order(), HEAD):
                h.update(tensor_digest({"inputs": inputs, "targets": targets}).encode())
        return h.hexdigest()


class _Indexed(_Lazy):
    """A map-style dataset of (input, target) samples."""

    def __init__(self, name: str, dataset: Dataset[Any]) -> None:
        if not isinstance(dataset, Sized) or len(dataset) == 0:
            raise InputError(
                f"{name!r} returned a Dataset without a length, or an empty one; give it __len__ and samples"
            )
        self.dataset = dataset
        super().__init__(name)

    def len(self, split: str = "train") -> int:
        self.check_split(split)
        return len(cast("Sized", self.dataset))

    def records(self, split: str, indices: Tensor) -> Batch:
        samples = [self.dataset[i] for i in indices.tolist()]
        return _pair(default_collate(samples), f"a sample of {self.name!r}")

    def in_order(self) -> Iterator[Batch]:
        for start in range(0, self.len(), 64):
            yield self.records("train", torch.arange(start, min(start + 64, self.len())))


class _Ready(_Lazy):
    """Batches that the user has made."""

    def __init__(self, name: str, make: Callable[[], Iterable[object]]) -> None:
        self.make = make
        super().__init__(name)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples in each batch."""
        with seeded(0):
            return tuple(len(inputs) for inputs, _ in _bounded(self.in_order(), self.name))

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        with seeded(0):
            return _classes(_bounded(self.in_order(), self.name))

    def len(self, split: str = "train") -> int:
        self.check_split(split)
        return sum(self.sizes)

    def steps(self, batch_size: int, split: str = "train") -> int:
        self.check_split(split)
        return len(self.sizes)

    def iterate(self, batch_size: int, seed: int, epoch: int, split: str, augment: bool) -> Iterator[Batch]:
        return self.in_order()

    def in_order(self) -> Iterator[Batch]:
        for k, batch in enumerate(self.make()):
            yield _pair(batch, f"batch {k} of {self.name!r}")

    def records(self, split: str, indices: Tensor) -> Batch:
        raise InputError(f"{self.name!r} gives ready batches, not single samples; return a Dataset to pick samples")


def _bounded(batches: Iterator[Batch], name: str) -> Iterator[Batch]:
    for k, batch in enumerate(batches):
        if k == MAX_BATCHES:
            raise InputError(
                f"{name!r} has not ended after {MAX_BATCHES} batches; return a finite iterable to train on it"
            )
        yield batch


def _pair(batch: object, what: str) -> Batch:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise InputError(f"{what} is {_describe(batch)}, expected {EXPECTED}")
    inputs, targets = batch
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
        raise InputError(
            f"{what} has inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}; "
            "expected the same positive number of samples in the leading axis"
        )
    return inputs, targets


def _describe(found: object) -> str:
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {', '.join(type(part).__name__ for part in found[:4]) or 'nothing'}"
    return f"a {type(found).__name__}"


def _kind(inputs: Tensor) -> Kind:
    if inputs.is_floating_point():
        return "image" if inputs.ndim == 4 else "features"
    return "tokens" if inputs.ndim == 2 else "features"


def _classes(batches: Iterable[Batch]) -> int:
    """One more than the largest class index (for tokens also of the inputs); 0 if the targets are not integers."""
    largest = -1
    for inputs, targets in batches:
        if targets.is_floating_point():
            return 0
        largest = max(largest, int(targets.max()))
        if _kind(inputs) == "tokens":
            largest = max(largest, int(inputs.max()))
    return largest + 1
