"""Oracle of the logarithmic quantizer: the two outcomes of one number and their probabilities, from its definition."""

from __future__ import annotations

import math


def outcomes(x: float, alpha: float, largest: float = math.inf, *, underflow=True, between=True):
    """``[(value, probability), ..]`` of a number; ``largest`` is where it is clipped.

    ``underflow`` and ``between``: whether it is rounded at random below alpha, and above.
    """
    size, sign = min(abs(x), largest), math.copysign(1.0, x)
    if size < alpha:
        up = size / alpha if underflow else 0.0
        return [(0.0, 1 - up), (sign * alpha, up)]
    low = alpha
    while 2 * low <= size:
        low *= 2
    up = size / low - 1
    if not between:
        up = float(up > 0.5)
    return [(sign * low, 1 - up), (sign * 2 * low, up)]


def mean(x: float, *args, **kinds) -> float:
    return math.fsum(value * p for value, p in outcomes(x, *args, **kinds))


def variance(x: float, *args, **kinds) -> float:
    centre = mean(x, *args, **kinds)
    return math.fsum((value - centre) ** 2 * p for value, p in outcomes(x, *args, **kinds))
