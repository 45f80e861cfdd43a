"""A short linear sketch of a gradient error: what the bias tests look at.

Shape legend: a parameter's error is viewed as ``[O, I]`` (first axis, all others); W numbers are kept per draw.

Because the sketch is linear and fixed before any draw, the sketch of an unbiased error has mean zero, whatever its
width: the width costs power, never size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from fqtstats.random import stream

__all__ = ["WIDTH", "Sketch", "Slots"]

WIDTH = 4096
_DIRECTIONS = 3  # g, sign g, 1
_LEAST = 8  # slots that every parameter gets, however many there are


@dataclass(frozen=True, slots=True)
class Slots:
    """Where one parameter's numbers stand in the sketch.

    Attributes:
        directions: ``<e, g>``, ``<e, sign g>``, ``<e, 1>``.
        rows: sums over groups of rows; empty where the elements themselves are kept.
        columns: sums over groups of columns; empty where the elements themselves are kept.
        buckets: sums of the error times random signs over consecutive elements (or the elements themselves, where there
            are few): their inner products estimate those of the errors without bias. All buckets of a parameter share
            one pattern of signs, so a bias that repeats with the bucket's length may cancel in all of them.
    """

    directions: slice
    rows: slice
    columns: slice
    buckets: slice


class Sketch:
    """Maps the error, one tensor per parameter, to ``[W]`` float64.

    Args:
        reference: QAT gradient, one tensor per parameter; kept (not copied) for the directions.
        seed: seed of the random signs.
    """

    def __init__(self, reference: Sequence[torch.Tensor], seed: int) -> None:
        self._reference = reference
        self.slots: list[Slots] = []
        self._signs: list[torch.Tensor] = []
        self._groups: list[tuple[int, int]] = []
        at = 0
        for index, (g, width) in enumerate(zip(reference, _widths(reference), strict=True)):
            free = width - _DIRECTIONS
            rows, columns = _two_axes(g)
            small = g.numel() <= free
            # A third each to rows, columns and buckets; a vector has no rows and columns apart from its elements.
            third = 0 if small or rows == 1 or columns == 1 else free // 3
            groups = (min(rows, third), min(columns, third))
            buckets = g.numel() if small else free - sum(groups)
            length = 1 if small else -(-g.numel() // buckets)
            buckets = -(-g.numel() // length)
            ends = [at, *(at + np.cumsum([_DIRECTIONS, *groups, buckets])).tolist()]
            self.slots.append(Slots(*(slice(start, end) for start, end in pairwise(ends))))
            self._groups.append(groups)
            signs = stream(seed=seed, layer=str(index), site="sketch").bits(length, 1, device=g.device)
            self._signs.append(signs.mul_(2).sub_(1).to(g.dtype))
            at = ends[-1]
        self.width = at

    def __call__(self, errors: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
        """The sketch ``[W]`` of one draw's error."""
        out = np.zeros(self.width)
        for e, g, slots, groups, signs in zip(
            errors, self._reference, self.slots, self._groups, self._signs, strict=True
        ):
            flat = e.reshape(-1)
            directions = [torch.dot(flat, g.reshape(-1)), torch.dot(flat, g.reshape(-1).sign()), flat.sum()]
            out[slots.directions] = [float(d) for d in directions]
            if sum(groups):
                matrix = e.reshape(_two_axes(e))
                out[slots.rows] = _group_sums(matrix.sum(1), groups[0])
                out[slots.columns] = _group_sums(matrix.sum(0), groups[1])
            out[slots.buckets] = _buckets(flat, signs).double().cpu().numpy()
        return out

    def row_and_column_sums(self, index: int, sketches: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
        """Sums over (groups of) rows ``[n, .]`` and columns ``[n, .]`` of one parameter, from sketches ``[n, W]``.

        Both are empty for a vector: a single element is no sum.
        """
        slots, (rows, columns) = self.slots[index], _two_axes(self._reference[index])
        if self._signs[index].numel() > 1 or any(self._groups[index]) or rows == 1 or columns == 1:
            return sketches[:, slots.rows], sketches[:, slots.columns]
        elements = (sketches[:, slots.buckets] * float(self._signs[index])).reshape(-1, rows, columns)
        return elements.sum(2), elements.sum(1)


def _buckets(flat: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    length = signs.numel()
    if length == 1:
        return flat * signs
    whole = flat.numel() // length * length
    sums = flat[:whole].view(-1, length) @ signs
    if whole == flat.numel():
        return sums
    rest = flat[whole:]
    return torch.cat([sums, torch.dot(rest, signs[: rest.numel()]).view(1)])


def _group_sums(values: torch.Tensor, groups: int) -> npt.NDArray[np.float64]:
    ends = np.linspace(0, values.numel(), groups + 1).astype(int)
    return np.add.reduceat(values.double().cpu().numpy(), ends[:-1])


def _two_axes(x: torch.Tensor) -> tuple[int, int]:
    return (x.shape[0], x[0].numel()) if x.dim() > 1 else (1, x.numel())


def _widths(reference: Sequence[torch.Tensor]) -> list[int]:
    """Slots per parameter, together at most WIDTH (or _LEAST each): small ones whole, the rest in equal shares."""
    wanted = [g.numel() + _DIRECTIONS for g in reference]
    widths = [0] * len(wanted)
    left, open_ = WIDTH, sorted(range(len(wanted)), key=lambda i: wanted[i])
    while open_:
        share = max(left // len(open_), _LEAST)
        index = open_.pop(0)
        widths[index] = min(wanted[index], share)
        left -= widths[index]
    return widths
