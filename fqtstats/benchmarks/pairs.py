"""Timing two functions against each other on a shared, noisy machine."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from fqtstats.benchmarks import machine

__all__ = ["Case", "Pair", "Row", "compare", "run"]

MIN_SECONDS = 0.02
"""A sample repeats its function until it has taken at least this long."""

WARM_SECONDS = 0.2
"""Each function runs for at least this long before the first sample: fresh memory is slow to be touched."""

WAITED = 0.05
"""A sample is taken again if its threads waited for a processor for more than this share of it."""

RETRIES = 3

Pair = tuple[Callable[[], object], Callable[[], object]]
"""Ours, and the baseline."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a benchmark.

    Attributes:
        name: what is timed.
        shape: problem size.
        threads: intra-op threads of the baseline, and of ours unless the name says otherwise.
        allocator: ``"default"`` or ``"tuned"`` (:func:`fqtstats.benchmarks.machine.tune_allocator`).
        baseline: what it is compared with.
        ratio: baseline's time / ours, median over interleaved pairs.
        ratio_low: lower quartile.
        ratio_high: upper quartile.
        must: ratio to reach, or None where the row only informs.
        aim: ratio hoped for, or None.
        seconds: our median time, for orientation.
        baseline_seconds: the baseline's.
        rate: our operations or bytes per second, or None.
        peak: of which rate of the machine this is the bound: a kind of :func:`fqtstats.benchmarks.machine.peak`.
        of_peak: ``rate`` over that rate times ``threads``, both measured in this run, or None.
        shares: of our time, by kind of work, or None.
    """

    name: str
    shape: str
    threads: int
    allocator: str
    baseline: str
    ratio: float
    ratio_low: float
    ratio_high: float
    must: float | None
    aim: float | None
    seconds: float
    baseline_seconds: float
    rate: float | None
    peak: str | None
    of_peak: float | None
    shares: dict[str, float] | None = None

    @property
    def missed(self) -> bool:
        """Whether the row falls short of what it must reach."""
        return self.must is not None and self.ratio < self.must

    def as_dict(self) -> dict[str, object]:
        """The row as JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison, before it is run.

    Attributes:
        name, shape, threads, baseline, must, aim: as in :class:`Row`.
        pair: opens what the two functions need and gives them.
        work: operations or bytes of one call of ours, in the unit of ``peak``.
        peak: kind of :func:`fqtstats.benchmarks.machine.peak`.
        shares: what finds the share of time of every kind of work in our function.
    """

    name: str
    shape: str
    threads: int
    baseline: str
    pair: Callable[[], AbstractContextManager[Pair]]
    must: float | None = None
    aim: float | None = None
    work: float | None = None
    peak: str | None = None
    shares: Callable[[Callable[[], object]], dict[str, float]] | None = None


def run(case: Case, rounds: int, tell: Callable[[], None], allocator: str = "default") -> Row:
    """Time one case; torch's random numbers and number of threads are left as they were."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(case.threads)
        with torch.random.fork_rng(devices=[]), case.pair() as (ours, baseline):
            peaks: list[float | None] = []

            def after_round() -> None:
                peaks.append(None if case.peak is None else machine.peak(case.peak))
                tell()

            times = compare(ours, baseline, rounds, after_round)
            shares = None if case.shares is None else case.shares(ours)
    finally:
        torch.set_num_threads(before)
    mine, theirs = np.array(times[0]), np.array(times[1])
    low, middle, high = (float(q) for q in np.quantile(theirs / mine, [0.25, 0.5, 0.75]))
    seconds = float(np.median(mine))
    rate = None if case.work is None else case.work / seconds
    measured = [p for p in peaks if p is not None]
    of_peak = None if rate is None or not measured else rate / (float(np.median(measured)) * case.threads)
    return Row(
        name=case.name,
        shape=case.shape,
        threads=case.threads,
        allocator=allocator,
        baseline=case.baseline,
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        must=case.must,
        aim=case.aim,
        seconds=seconds,
        baseline_seconds=float(np.median(theirs)),
        rate=rate,
        peak=case.peak,
        of_peak=of_peak,
        shares=shares,
    )


def compare(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int, tell: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds per call of both, interleaved: ours, baseline, ours, ...; warmed up.

    Neighbouring samples see the same machine, so the ratio of each pair holds when its speed drifts.
    """
    functions = (ours, baseline)
    repeats = [_repeats(function) for function in functions]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, count, kept in zip(functions, repeats, times, strict=True):
            kept.append(_sample(function, count))
        tell()
    return times


def _repeats(function: Callable[[], object]) -> int:
    start = time.perf_counter()
    shortest = math.inf
    calls = 0
    while calls < 2 or time.perf_counter() - start < WARM_SECONDS:
        began = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - began)
        calls += 1
    return max(1, int(MIN_SECONDS / max(shortest, 1e-7)))


def _sample(function: Callable[[], object], count: int) -> float:
    best = float("inf")
    for _ in range(RETRIES):
        waited, start = _waited(), time.perf_counter()
        for _ in range(count):
            function()
        elapsed = time.perf_counter() - start
        best = min(best, elapsed)
        if _waited() - waited <= WAITED * elapsed:
            return elapsed / count
    return best / count


def _waited() -> float:
    """Seconds that this process's threads have spent ready to run, but without a processor; 0 where unknown."""
    total = 0
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/schedstat", encoding="ascii") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return total * 1e-9
