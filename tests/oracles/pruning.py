"""Oracle of pruning by groups: probabilities by bisection, variances from the definition, over Python numbers."""

from __future__ import annotations

import math

from oracles.quantizers import Matrix, affine, sr_variance


def water_filled(ranges: list[float], bits: int) -> list[float]:
    """``min(1, c R)`` with ``sum = G / b``, ``c`` found by bisection; 1 where few are not zero."""
    share = len(ranges) / bits
    if sum(r > 0 for r in ranges) <= share:
        return [float(r > 0) for r in ranges]
    low, high = 0.0, 1 / min(r for r in ranges if r > 0)
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(min(1.0, middle * r) for r in ranges) < share:
            low = middle
        else:
            high = middle
    return [min(1.0, high * r) for r in ranges]


def pruned_variance(x: Matrix, bits: int) -> Matrix:
    """``[step^2 f (1 - f) + x^2 (1 - p)] / p`` of every element, its row kept with probability ``p``."""
    ranges = [max(row) - min(row) for row in x]
    variance = []
    for row, p, r in zip(x, water_filled(ranges, bits), ranges, strict=True):
        low, step = affine(row, 2**bits - 1)
        exact = r == 0
        variance.append([0.0 if exact else (sr_variance(v, low, step) + v * v * (1 - p)) / p for v in row])
    return variance
