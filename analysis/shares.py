"""Shares of independent runs, with exact intervals, in numbers and in figures."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from statsmodels.stats.proportion import proportion_confint

from analysis.estimates import LEVEL
from analysis.study import with_interval

__all__ = ["at_least", "at_most", "bars", "share", "told"]


def share(count: int, runs: int, comparisons: int = 1) -> tuple[float, float, float]:
    """A share and the ends of its Clopper-Pearson interval.

    Args:
        count: of runs that count.
        runs: all of them.
        comparisons: number of intervals that hold together with 95 % (Bonferroni); 1: this one alone.
    """
    low, high = proportion_confint(count, runs, alpha=(1 - LEVEL) / comparisons, method="beta")
    return count / runs, float(low), float(high)


def told(count: int, runs: int, comparisons: int = 1) -> str:
    """The same as text: two digits, and three where it is nearer to 1, where they all would be 1."""
    found = share(count, runs, comparisons)
    return with_interval(*found, ".3f" if found[0] > 1 / 2 else ".2g")


def at_most(count: int, runs: int, limit: float, comparisons: int = 1) -> bool | None:
    """Whether the whole interval lies at or below ``limit``, or above it; None: it holds the limit, which is open."""
    _, low, high = share(count, runs, comparisons)
    return True if high <= limit else False if low > limit else None


def at_least(count: int, runs: int, limit: float, comparisons: int = 1) -> bool | None:
    """The same of the other side."""
    _, low, high = share(count, runs, comparisons)
    return True if low >= limit else False if high < limit else None


def bars(
    ax: Axes,
    places: Sequence[float],
    counts: Sequence[int],
    runs: Sequence[int],
    color: str,
    marker: str,
    label: str,
    unit: float = 1.0,
) -> None:
    """Shares in ``unit`` along x with their 95 % intervals, at heights ``places``."""
    exact = [share(count, of) for count, of in zip(counts, runs, strict=True)]
    found = [tuple(value / unit for value in each) for each in exact]
    error = [[rate - low for rate, low, _ in found], [high - rate for rate, _, high in found]]
    ax.errorbar(
        [rate for rate, _, _ in found], places, xerr=error, fmt=marker, color=color, elinewidth=0.8, label=label
    )
