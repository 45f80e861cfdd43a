"""Call indices under activation checkpointing: a recomputed call must draw the numbers of the original one.

With ``use_reentrant=False`` the graph of the first forward pass stays, and with it the call indices that its nodes
hold; the recomputation refills saved tensors, so forward quantizers must see the original's stream. With
``use_reentrant=True`` the first pass runs without a graph and the recomputation inside backward builds the one that is
used. In both cases a first pass notes its indices on torch's own record of the checkpoint, and the recomputation reads
them in the same order.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from fqtstats.errors import UnsupportedError

__all__ = ["call_index"]

_UNKNOWN = (
    f"activation checkpointing cannot be followed in torch {torch.__version__}, so a recomputation might draw other "
    "numbers; measure without it, or use the torch version in constraints.txt"
)


def _inner_code(function: Callable[..., Any], name: str) -> CodeType:
    """Code of the function ``name`` that is defined inside ``function``."""
    constants = function.__code__.co_consts
    return next(c for c in constants if isinstance(c, CodeType) and c.co_name == name)


_REENTRANT_FIRST = CheckpointFunction.forward.__code__
_REENTRANT_AGAIN = CheckpointFunction.backward.__code__
_FIRST = inspect.unwrap(checkpoint.checkpoint).__code__
_AGAIN: CodeType | None
try:
    _AGAIN = _inner_code(checkpoint._checkpoint_hook.__init__, "unpack_hook")
except (AttributeError, StopIteration):  # a torch that is built otherwise: only checkpoints cannot be used then
    _AGAIN = None


@dataclass
class _Noted:
    """Indices of a checkpoint's calls by layer, and how many of them the backward pass ``task`` has repeated."""

    indices: dict[str, list[int]] = field(default_factory=dict)
    task: int = -1
    repeated: dict[str, int] = field(default_factory=dict)

    def again(self, layer: str, task: int) -> int:
        """Index of the next repeated call of ``layer``; every backward pass starts over."""
        if task != self.task:
            self.task, self.repeated = task, {}
        position = self.repeated.get(layer, 0)
        self.repeated[layer] = position + 1
        return self.indices[layer][position]


def call_index(layer: str, count: Callable[[str], int]) -> int:
    """Index of this call of ``layer``: the next of ``count``, or the original's if this is a recomputation.

    A forward pass without gradients and outside a checkpoint (evaluation) neither needs an index nor advances it: 0.

    Raises:
        UnsupportedError: a checkpoint is in use, and this version of torch keeps its records in a way not known here.
    """
    task = torch._C._current_graph_task_id()
    try:
        records = list(_checkpoints(sys._getframe(1)))
    except (AttributeError, KeyError) as error:
        raise UnsupportedError(_UNKNOWN) from error
    if task != -1 and _AGAIN is None:
        raise UnsupportedError(_UNKNOWN)
    repeated = (record.fqt_calls for first, record in records if not first and hasattr(record, "fqt_calls"))
    original: _Noted | None = next(repeated, None)
    if original is not None:
        index = original.again(layer, task)
    elif task != -1 or not (torch.is_grad_enabled() or records):
        return 0
    else:
        index = count(layer)
    for first, record in records:
        if first:
            if not hasattr(record, "fqt_calls"):
                record.fqt_calls = _Noted()
            record.fqt_calls.indices.setdefault(layer, []).append(index)
    return index


def _checkpoints(frame: FrameType | None) -> Iterator[tuple[bool, Any]]:
    """The records torch keeps of the checkpoints that this call runs in, innermost first; True for a first pass."""
    while frame is not None:
        code = frame.f_code
        if code is _REENTRANT_FIRST or code is _REENTRANT_AGAIN:
            yield code is _REENTRANT_FIRST, frame.f_locals["ctx"]
        elif code is _AGAIN:
            yield False, frame.f_locals["frame"]
        elif code is _FIRST and "gen" in frame.f_locals:  # not for a reentrant one
            yield True, frame.f_locals["gen"].gi_frame.f_locals["new_frame"]
        frame = frame.f_back
