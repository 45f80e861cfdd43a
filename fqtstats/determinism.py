"""Context managers for results that do not depend on thread count or on the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["isolated", "seeded", "single_thread", "threads"]

T = TypeVar("T")


@contextmanager
def single_thread() -> Iterator[None]:
    """Run the body with one intra-op thread; the former number is restored on exit, also on errors.

    oneDNN splits the reduction of a convolution's weight gradient over the threads, so one and two threads round
    differently.
    """
    with threads(1):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` intra-op threads; the former number is restored on exit, also on errors."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run the body with torch's global CPU generator seeded; its former state is restored on exit.

    Args:
        seed: any integer of at most 64 bits.
        device: a CUDA device whose generator is treated in the same way.
    """
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed would also reseed the accelerators that are not forked here.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def isolated(iterator: Iterator[T], seed: int) -> Iterator[T]:
    """Yield the iterator's items while it alone sees a generator seeded with ``seed``.

    Between items the caller's own random state is in place: what an iterator draws (shuffling, augmentation) neither
    depends on the caller's draws nor changes them.
    """
    with seeded(seed):
        state = torch.get_rng_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            try:
                item = next(iterator)
            except StopIteration:
                return
            state = torch.get_rng_state()
        yield item
