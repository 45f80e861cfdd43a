"""Who is told of requests for random numbers. Nobody, unless an audit is recording."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from fqtstats.layers.state import Call
    from fqtstats.random import Stream

__all__ = ["LISTENERS", "Listener", "asked", "quantizing"]


class Listener(Protocol):
    """Is told of requests for random numbers, and what they are for."""

    def asked(self, stream: Stream, start: int, numel: int | None, n: int) -> None:
        """``numel`` elements of ``n`` bits from ``start`` on; None is all that there are."""

    def quantizing(self, call: Call, place: str, x: torch.Tensor, draw: int) -> AbstractContextManager[None]:
        """What is asked for within is for the quantizer at ``place`` of the policy, which acts on ``x``."""


LISTENERS: list[Listener] = []
"""Whom to tell."""


def asked(stream: Stream, start: int, numel: int | None, n: int) -> None:
    """Tell every listener."""
    for listener in LISTENERS:
        listener.asked(stream, start, numel, n)


def quantizing(call: Call, place: str, x: torch.Tensor, draw: int) -> AbstractContextManager[object]:
    """The contexts of all listeners."""
    stack = ExitStack()
    for listener in LISTENERS:
        stack.enter_context(listener.quantizing(call, place, x, draw))
    return stack
