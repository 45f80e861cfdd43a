"""Call indices under activation checkpointing: a recomputed call must draw the numbers of the original one.

With ``use_reentrant=False`` the graph of the first forward pass stays, and with it the call indices that its nodes
hold; the recomputation only refills saved tensors, so it must merely not advance the count. With
``use_reentrant=True`` the first pass runs without a graph and the recomputation inside backward builds the one that is
used: its calls get the indices that the first pass noted on the checkpoint's own autograd node.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["call_index"]

_FORWARD = CheckpointFunction.forward.__code__
_BACKWARD = CheckpointFunction.backward.__code__


def call_index(layer: str, count: Callable[[str], int]) -> int:
    """Index of this call of ``layer``: the next of ``count``, or the original's if this is a recomputation.

    A forward pass without gradients and outside a checkpoint (evaluation) neither needs an index nor advances it: 0.
    """
    recomputing = torch._C._current_graph_task_id() != -1
    if torch.is_grad_enabled() and not recomputing:
        return count(layer)
    nodes = list(_checkpoints(sys._getframe(1)))
    original = next((node for is_forward, node in nodes if not is_forward and hasattr(node, "fqt_calls")), None)
    if original is not None:
        indices, position = original.fqt_calls[layer]
        # Every backward pass repeats the segment's calls in the same order, so the position wraps around.
        original.fqt_calls[layer] = (indices, (position + 1) % len(indices))
        index = indices[position]
    elif recomputing or not nodes:
        return 0
    else:
        index = count(layer)
    for is_forward, node in nodes:
        if is_forward:
            if not hasattr(node, "fqt_calls"):
                node.fqt_calls = {}
            indices, _ = node.fqt_calls.setdefault(layer, ([], 0))
            indices.append(index)
    return index


def _checkpoints(frame: FrameType | None) -> Iterator[tuple[bool, Any]]:
    """The autograd nodes of the reentrant checkpoints that this call runs in, innermost first; True for a first pass."""
    while frame is not None:
        if frame.f_code in (_FORWARD, _BACKWARD):
            yield frame.f_code is _FORWARD, frame.f_locals["ctx"]
        frame = frame.f_back
