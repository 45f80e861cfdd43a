"""Axes and marks that the figures of several studies have: axes of ratios, and intervals side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

__all__ = ["beside", "intervals", "ratio_axis"]

_MOST = 7
"""Ticks of an axis."""

_FACTORS = (
    (0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4),
    (0.5, 0.7, 1, 1.4, 2),
    (0.25, 0.5, 1, 2, 4, 8, 16, 32),
    tuple(digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)),
    tuple(10.0**power for power in range(-6, 7)),
    tuple(100.0**power for power in range(-6, 7)),
)
"""Ticks of longer axes, from fine to coarse."""


def ratio_axis(ax: Axes, most: int = _MOST) -> None:
    """Make the x axis one of ratios: logarithmic, with the finest two to ``most`` ticks that spread over half of it.

    Where no ticks do, it has those that spread most.
    """
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    listed = [ticks for ticks in _candidates(low, high) if 2 <= len(ticks) <= most]
    spread = np.array([math.log(ticks[-1] / ticks[0]) for ticks in listed])
    enough = spread >= math.log(high / low) / 2
    ticks = listed[int(np.argmax(enough if enough.any() else spread))]  # the first of them
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    ax.grid(axis="x")


def _candidates(low: float, high: float) -> Iterator[list[float]]:
    """Ticks between two ratios, from fine to coarse: multiples of a step on a short axis, and factors."""
    if high < 1.5 * low:
        yield from _multiples(low, high)
    for ticks in _FACTORS:
        yield [float(tick) for tick in ticks if low <= tick <= high]
    yield from _multiples(low, high)


def _multiples(low: float, high: float) -> Iterator[list[float]]:
    power = 10.0 ** math.floor(math.log10((high - low) / _MOST))
    for step in (power * times for times in (1, 2, 2.5, 5, 10)):
        yield [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1) if index]


def beside(index: int, count: int, pitch: float) -> float:
    """Where the ``index``-th of ``count`` series stands beside the place of them all: ``pitch`` apart, centred."""
    return pitch * (index - (count - 1) / 2)


def intervals(
    ax: Axes, places: npt.ArrayLike, found: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], **drawn: Any
) -> None:
    """Points at ``places`` along x with intervals along y.

    Args:
        ax: where.
        places: of the points.
        found: values, and the lower and upper ends of their intervals.
        drawn: arguments of :meth:`matplotlib.axes.Axes.errorbar`.
    """
    middle, low, high = (np.asarray(each, dtype=np.float64) for each in found)
    ax.errorbar(np.asarray(places), middle, (middle - low, high - middle), **{"elinewidth": 0.8, **drawn})
