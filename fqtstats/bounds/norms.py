"""Operator norms of linear maps that are only known by what they and their adjoints do to a vector.

Source: G. Golub and C. Van Loan, "Matrix Computations" (4th ed.), section 10.1: the Lanczos process on ``J^T J``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Norm", "squared_norm"]

_MISFIT = 0.1
"""A map and its adjoint that differ by more than this are rounding errors: what they stand for is zero."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An estimate of ``||J||^2`` from below.

    Attributes:
        squared: the estimate.
        iterations: applications of ``J^T J``.
        change: of the last iteration, relative to the estimate.
        converged: whether the iteration ended by itself; not where it came to its limit, or found nothing but rounding
            errors.
    """

    squared: float
    iterations: int
    change: float
    converged: bool


def squared_norm(
    forward: Callable[[torch.Tensor], torch.Tensor],
    adjoint: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    tolerance: float,
    limit: int,
) -> Norm:
    """``||J||^2``, the largest eigenvalue of ``J^T J``.

    Each iteration costs what one of the power iteration does, and gives the largest Rayleigh quotient over the whole
    space of the vectors so far instead of that of the last one: never less, and usually much more. Like the power
    iteration's, the estimate approaches from below; it ends when two iterations together changed it by no more than
    ``tolerance``, which a spectrum with many values close to the largest can bring about too early.

    Args:
        forward: ``J``.
        adjoint: ``J^T``.
        start: a random vector.
        tolerance: relative change of ``||J||^2`` in two iterations at which it ends.
        limit: iterations at most.
    """
    v, before, beta = start / torch.linalg.vector_norm(start), torch.zeros_like(start), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    estimates: list[float] = []
    while True:
        y = forward(v)
        diagonal.append(float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2)
        estimates.append(float(np.linalg.eigvalsh(_tridiagonal(diagonal, beside))[-1]))
        change = _change(estimates)
        if estimates[-1] == 0 or change <= tolerance or len(estimates) == limit:
            return Norm(max(estimates[-1], 0.0), len(estimates), change, change <= tolerance)
        w = adjoint(y)
        product = float(torch.sum(v * w, dtype=torch.float64))
        if abs(product - diagonal[-1]) > _MISFIT * diagonal[-1]:
            return Norm(estimates[-1], len(estimates), 1.0, False)
        w = w.sub(v, alpha=diagonal[-1]).sub_(before, alpha=beta)
        beta = float(torch.linalg.vector_norm(w, dtype=torch.float64))
        if beta <= torch.finfo(w.dtype).eps * estimates[-1]:  # the vectors so far span an invariant space
            return Norm(estimates[-1], len(estimates), 0.0, True)
        beside.append(beta)
        before, v = v, w.div_(beta)


def _change(estimates: list[float]) -> float:
    """Of the last two iterations, relative."""
    if estimates[-1] == 0:
        return 0.0
    return 1.0 if len(estimates) < 3 else (estimates[-1] - estimates[-3]) / estimates[-1]


def _tridiagonal(diagonal: list[float], beside: list[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
