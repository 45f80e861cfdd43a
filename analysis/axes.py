"""Axes of ratios: logarithmic, with numbers at a few factors that readers know."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

__all__ = ["ratio_axis"]

_TICKS = (
    (0.95, 0.98, 1, 1.02, 1.05),
    (0.9, 0.95, 1, 1.05, 1.1),
    (0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4),
    (0.5, 0.7, 1, 1.4, 2),
    (0.25, 0.5, 1, 2, 4, 8, 16, 32),
    (0.01, 0.1, 1, 10, 100),
    (1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6),
)
"""From fine to coarse."""


def ratio_axis(ax: Axes) -> None:
    """Make the x axis one of ratios, with the finest ticks of which two to seven spread over half of it at least."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in _TICKS]
    wide = math.log(high / low) / 2
    ticks = next((each for each in inside if 2 <= len(each) <= 7 and math.log(each[-1] / each[0]) >= wide), [1.0])
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    ax.grid(axis="x")
