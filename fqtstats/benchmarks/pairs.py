"""Timing two functions against each other on a shared, noisy machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Row", "compare", "row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a benchmark.

    Attributes:
        name: what is timed.
        shape: problem size.
        threads: intra-op threads of the baseline.
        baseline: what it is compared with.
        ratio: baseline's time / ours, median over interleaved pairs.
        ratio_low: lower quartile.
        ratio_high: upper quartile.
        must: ratio to reach, or None where the row only informs.
        aim: ratio hoped for, or None.
        seconds: our median time, for orientation.
        baseline_seconds: the baseline's.
    """

    name: str
    shape: str
    threads: int
    baseline: str
    ratio: float
    ratio_low: float
    ratio_high: float
    must: float | None
    aim: float | None
    seconds: float
    baseline_seconds: float

    def as_dict(self) -> dict[str, object]:
        """The row as JSON."""
        return dataclasses.asdict(self)


def compare(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int, tell: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Times in seconds of both, interleaved: ours, baseline, ours, ...; one warm-up each.

    Neighbouring runs see the same machine, so the ratio of each pair holds when its speed drifts.
    """
    ours()
    baseline()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, kept in zip((ours, baseline), times, strict=True):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
        tell()
    return times


def row(
    name: str,
    shape: str,
    threads: int,
    baseline: str,
    times: tuple[list[float], list[float]],
    must: float | None = None,
    aim: float | None = None,
) -> Row:
    """A row from the times of :func:`compare`."""
    ours, theirs = np.array(times[0]), np.array(times[1])
    low, middle, high = (float(q) for q in np.quantile(theirs / ours, [0.25, 0.5, 0.75]))
    return Row(
        name, shape, threads, baseline, middle, low, high, must, aim, float(np.median(ours)), float(np.median(theirs))
    )
