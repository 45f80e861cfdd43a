"""Speed against named baselines: ratios measured side by side in one run, never a timed test."""

from __future__ import annotations

from collections.abc import Callable

from fqtstats.benchmarks.measure import benchmark_measure
from fqtstats.benchmarks.pairs import Row

__all__ = ["BENCHMARKS", "Row"]

BENCHMARKS: dict[str, Callable[[int, Callable[[int, int], None]], list[Row]]] = {
    "measure": benchmark_measure,
}
