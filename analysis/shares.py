"""Shares of independent runs, with exact intervals, in numbers and in figures."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from statsmodels.stats.proportion import proportion_confint

from analysis.estimates import LEVEL
from analysis.study import with_interval

__all__ = ["bars", "share", "told"]


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


def bars(
    ax: Axes, places: Sequence[float], counts: Sequence[int], runs: Sequence[int], color: str, marker: str, label: str
) -> None:
    """Shares along x with their 95 % intervals, at heights ``places``."""
    found = [share(count, of) for count, of in zip(counts, runs, strict=True)]
    error = [[rate - low for rate, low, _ in found], [high - rate for rate, _, high in found]]
    ax.errorbar(
        [rate for rate, _, _ in found], places, xerr=error, fmt=marker, color=color, elinewidth=0.8, label=label
    )
