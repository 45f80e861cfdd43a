"""The battery: is each decision a fair one, and are they independent? Exact or bounded tails throughout.

Every test is valid for two-point outcomes of any probability: exact binomial tails and Bernstein bounds. Normal
approximations reject true null hypotheses here (rare outcomes), and none is used.

Shape legend: P elements in a matrix ``[R, C]``; n draws; ``e = up - p`` in steps, ``v = p (1 - p)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy import stats

from fqtstats.random import Stream
from fqtstats.verdicts.decisions import Decisions

__all__ = [
    "FAMILIES",
    "LOOKS",
    "TESTS",
    "Battery",
    "Finding",
    "Judged",
    "autocorrelation",
    "bernstein",
    "detectable",
    "looks",
    "spread_p",
    "strongest_lag",
]

LOOKS = (16, 32, 64, 128, 256)
"""Numbers of draws after which the tests are made."""

FAMILIES = 4
"""Each design and look spends its level on independence, elements, directions and the cross-fit, in equal parts."""

TESTS = len(LOOKS) * FAMILIES
"""A design's rate of false alarms is divided among these, in equal parts, however many of its looks are taken."""

_FIRST = 16  # draws whose correlations are tested
_EXACT_TAILS = 16
_TRUNCATIONS = 13
_RANDOM_SIGNS = 8
_STRATA = 18
_CUTS = (0.0, 2.5, 4.0)
_LARGEST_SPREAD = 9.0  # squares of sums count up to this multiple of their variance


@dataclass(frozen=True, slots=True)
class Finding:
    """One test's result.

    Attributes:
        family: ``"support"``, ``"independence"``, ``"elements"``, ``"directions"`` or ``"cross-fit"``.
        p_value: of this family at this look, corrected for the family's own multiplicity.
        evidence: what showed it, a sentence.
        draws: how many were used.
    """

    family: str
    p_value: float
    evidence: str
    draws: int

    @property
    def about_independence(self) -> bool:
        return self.family == "independence"


@dataclass(frozen=True, slots=True)
class Judged:
    """What the looks came to.

    Attributes:
        bias: the finding that shows one; None if none does.
        dependence: that elements or draws depend on each other; None if no finding does.
        smallest: the finding with the smallest p-value of those that decide.
        tests: among which the rate of false alarms was divided.
    """

    bias: Finding | None
    dependence: Finding | None
    smallest: Finding
    tests: int

    @property
    def failure(self) -> Finding | None:
        """The bias, or else the dependence."""
        return self.bias or self.dependence

    @property
    def p_value(self) -> float:
        """Adjusted for all tests: what passes gives a value below any rate with at most that probability."""
        return min(1.0, self.smallest.p_value * self.tests)


class _Drawn(Protocol):
    @property
    def draws(self) -> int: ...

    def draw(self, s: Stream) -> None: ...


def looks(tests: _Drawn, streams: Iterator[Stream], most: int) -> Iterator[int]:
    """Draws up to each of :data:`LOOKS` in turn, to ``most`` draws, and gives their number there."""
    for look in (n for n in LOOKS if n <= most):
        while tests.draws < look:
            tests.draw(next(streams))
        yield look


class Battery:
    """The tests of one design, fed draw by draw.

    Args:
        decisions: what is judged.
        seed: of the random directions.
    """

    def __init__(self, decisions: Decisions, seed: int = 0) -> None:
        self.decisions = decisions
        self.seed = seed
        self.draws = 0
        self._p = decisions.p.float()
        self._counts = [torch.zeros_like(self._p) for _ in range(2)]  # of ups in even and odd draws
        self._first: list[torch.Tensor] = []
        self._sums: list[list[torch.Tensor]] = [[], []]  # of ups over each row and each column, by draws
        self._outside = 0
        self._fixed: _Fixed | None = None

    def draw(self, s: Stream) -> None:
        """One more draw, from stream ``s``."""
        up, outside = self.decisions.ups(s)
        ups = up.float()
        self._counts[self.draws % 2] += ups
        self._outside += outside
        if self.draws < _FIRST:
            self._first.append(ups - self._p)
        for sums, axis in zip(self._sums, (1, 0), strict=True):
            sums.append(ups.sum(axis))
        self.draws += 1

    def judge(self, streams: Iterator[Stream], most: int, false_alarm: float, designs: int = 1) -> Judged:
        """Draws and tests until something is found, or the draws are used up.

        Args:
            streams: of the draws.
            most: draws.
            false_alarm: probability at most that fair, independent decisions do not pass.
            designs: among which that is divided first.
        """
        tests = designs * TESTS
        smallest: Finding | None = None
        dependence: Finding | None = None
        for _ in looks(self, streams, most):
            for finding in self.look():
                if dependence is not None and finding.family not in ("support", "elements"):
                    continue  # these would take shared noise for a bias
                if smallest is None or finding.p_value < smallest.p_value:
                    smallest = finding
                if finding.p_value < false_alarm / tests:
                    if not finding.about_independence:
                        return Judged(finding, dependence, smallest, tests)
                    dependence = finding
            if dependence is not None:
                break
        assert smallest is not None
        return Judged(None, dependence, smallest, tests)

    def look(self) -> Iterator[Finding]:
        """All tests on the draws so far; independence, which the others assume, comes first."""
        yield self._support()
        yield self._independence()
        yield self._elements()
        yield self._directions()
        yield self._cross_fit()

    # --- T0 ---------------------------------------------------------------------------------------------------------

    def _support(self) -> Finding:
        # Certain: an element that goes neither up nor down, or moves although it lies on a point.
        ups = self._counts[0] + self._counts[1]
        p, tolerance = self.decisions.p, self.decisions.tolerance
        moved = int(((p <= 0) & (ups > 0) & (tolerance < 2.0**-20)).sum())
        wrong = self._outside + moved
        text = f"{self._outside} results off the two neighbouring grid points, {moved} points of the grid that moved"
        return Finding("support", 0.0 if wrong else 1.0, text, self.draws)

    # --- T4 ---------------------------------------------------------------------------------------------------------

    def _independence(self) -> Finding:
        found = [self._spread(kind, axis) for kind, axis in (("rows", 1), ("columns", 0))]
        if self.draws == _FIRST:
            found += [self._lags(), self._following()]
        # The parts share the family's level.
        p, text = min(found)
        return Finding("independence", min(1.0, len(found) * p), text, self.draws)

    def _lags(self) -> tuple[float, str]:
        v = self.decisions.variance.float()
        return strongest_lag(autocorrelation(torch.stack(self._first)), self.draws * autocorrelation(v[None]), 1.0)

    def _following(self) -> tuple[float, str]:
        e = torch.stack(self._first)
        sums = (e[1:] * e[:-1]).sum((1, 2)).abs()
        variance = self.decisions.variance.float().square().sum()
        p = 2 * float(bernstein(sums, variance, torch.ones(())).min()) * len(sums)
        return p, "errors of consecutive draws are correlated"

    def _spread(self, kind: str, axis: int) -> tuple[float, str]:
        # Differences of two draws: a bias, which would widen the sums as well, cancels.
        sums = torch.stack(self._sums[1 - axis])
        differences = sums[1::2] - sums[: len(sums) // 2 * 2 : 2]
        p, ratio = spread_p(differences, self.decisions, axis)
        return p, f"sums of errors over {kind} have {ratio:.3g} times the variance of independent ones"

    # --- T1 ---------------------------------------------------------------------------------------------------------

    def _elements(self) -> Finding:
        k = (self._counts[0] + self._counts[1]).double().view(-1)
        n = self.draws
        p, tolerance = self.decisions.p.view(-1), self.decisions.tolerance.view(-1)
        low, high = (p - tolerance).clamp(min=0), (p + tolerance).clamp(max=1)
        rate = k / n
        nearest = torch.minimum(torch.maximum(rate, low), high)
        divergence = n * _kl(rate, nearest)
        top = torch.topk(divergence, min(_EXACT_TAILS, k.numel())).indices
        at, count = top.numpy(), k[top].numpy()
        upper = stats.binom.sf(count - 1, n, high[top].numpy())
        lower = stats.binom.cdf(count, n, low[top].numpy())
        tails = np.minimum(1.0, 2 * np.minimum(upper, lower) * p.numel())
        best = int(tails.argmin())
        i = int(at[best])
        row, column = divmod(i, self.decisions.p.shape[1])
        text = (
            f"element ({row}, {column}) went up in {int(count[best])} of {n} draws; with P(up) = {float(p[i]):.3g} it "
            f"should in {n * float(p[i]):.1f}"
        )
        return Finding("elements", float(tails[best]), text, n)

    # --- T2 ---------------------------------------------------------------------------------------------------------

    def _directions(self) -> Finding:
        n = self.draws
        mean = ((self._counts[0] + self._counts[1]) / n - self.decisions.p).float()
        if self._fixed is None:
            self._fixed = _Fixed(self.decisions, self.seed)
        fixed = self._fixed
        sums = fixed.sums(mean)
        p = 2 * bernstein((sums.abs() - fixed.slack).clamp(min=0), fixed.variance / n, fixed.largest / n)
        i = int(p.argmin())
        z = float(sums[i] / (fixed.variance[i] / n).sqrt().clamp(min=1e-300))
        text = f"the mean error along '{fixed.name(i)}' is {z:.3g} standard deviations from 0"
        return Finding("directions", min(1.0, float(p[i]) * len(p)), text, n)

    # --- T3 ---------------------------------------------------------------------------------------------------------

    def _cross_fit(self) -> Finding:
        d = self.decisions
        halves = (self.draws + 1) // 2, self.draws // 2
        e = [count.double() / max(n, 1) - d.p for count, n in zip(self._counts, halves, strict=True)]
        v = d.variance
        best, text = 1.0, "no direction"
        for fit, test in ((0, 1), (1, 0)):
            deviation, distance = (v / halves[fit]).sqrt(), e[fit].abs()
            for cut in _CUTS:
                w = torch.where(distance > cut * deviation, e[fit], 0.0)
                size = w.abs()
                total = ((w * e[test]).sum() - (size * d.tolerance).sum()).clamp(min=0)
                variance = (w.square() * v).sum() / halves[test]
                p = float(bernstein(total, variance, size.max() / halves[test])) * 2 * len(_CUTS)
                if p < best:
                    best = p
                    text = f"errors of one half of the draws (beyond {cut:g} deviations) predict those of the other"
        return Finding("cross-fit", best, text, self.draws)


class _Fixed:
    """Directions in which a bias is likely to lie, fixed before the draws, and what an unbiased mean does along them.

    Attributes:
        slack: ``sum |w| tolerance`` of each of the m directions.
        variance: ``sum w^2 v``.
        largest: ``max |w|``.
    """

    def __init__(self, d: Decisions, seed: int) -> None:
        p = d.p
        names, dense = ["constant", "towards the nearer point", "x", "sign of x"], []
        dense += [torch.ones_like(p), torch.sign(p - 0.5), d.x, torch.sign(d.x)]
        for r in range(_TRUNCATIONS):
            levels = 2.0**r
            names += [f"P(up) truncated to {r} bits", f"P(up) rounded to {r} bits"]
            dense += [at.div_(levels).sub_(p) for at in ((p * levels).floor_(), (p * levels).round_())]
        generator = torch.Generator().manual_seed(seed)
        for i in range(_RANDOM_SIGNS):
            names.append(f"random signs {i}")
            dense.append(2.0 * torch.randint(0, 2, p.shape, generator=generator) - 1)
        self._shape = p.shape
        self._dense = torch.stack([w.float() for w in dense]).view(len(dense), -1)
        self._x = d.x.float()
        # P(up) and P(down) by powers of two.
        self._strata = [
            (-torch.log2(q.clamp(min=2.0**-_STRATA))).long().clamp(max=_STRATA - 1).view(-1) for q in (p, 1 - p)
        ]
        names += [f"{of} around 2^-{i}" for of in ("P(up)", "P(down)") for i in range(_STRATA)]
        for kind, count in zip(("row", "column"), p.shape, strict=True):
            for what in ("sum", "correlation with x"):
                names += [f"{what} of {kind} {i}" for i in range(count)]
        self._names = names
        size, x = self._dense.abs(), self._x.abs()
        self.slack = self._along(size, x, d.tolerance.float())
        ones = [torch.ones(count) for count in p.shape]
        parts = [size.amax(1), torch.ones(2 * _STRATA), ones[0], x.amax(1), ones[1], x.amax(0)]
        self.largest = torch.cat([part.double() for part in parts])
        self.variance = self._along(size.square_(), x.square_(), d.variance.float())

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """``sum w values`` of each direction, float64."""
        return self._along(self._dense, self._x, values)

    def _along(self, dense: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # With other weights along the dense directions and those of x; the rest's are 0 and 1.
        flat = values.reshape(-1)
        weighted = x * values
        wide = flat.double()
        strata = [torch.bincount(s, wide, _STRATA) for s in self._strata]
        parts = [dense @ flat, *strata, values.sum(1), weighted.sum(1), values.sum(0), weighted.sum(0)]
        return torch.cat([part.double() for part in parts])

    def name(self, i: int) -> str:
        """What direction i is."""
        return self._names[i]


def autocorrelation(e: torch.Tensor) -> torch.Tensor:
    """Circular, over rows and columns, summed over draws: ``[R, C]`` of ``[n, R, C]``."""
    found: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(e).abs().square().sum(0), s=e.shape[1:])
    return found


def strongest_lag(found: torch.Tensor, variance: torch.Tensor, largest: float) -> tuple[float, str]:
    """Two-sided p-value of the lag at which errors are most correlated, corrected for all lags, and a sentence.

    A lag and its opposite are the same pairs of elements. Half a turn is its own opposite: each of its pairs is counted
    twice, which doubles both the terms and the variance of their sum.

    Args:
        found: autocorrelation of independent, centered errors, ``[R, C]``.
        variance: of each entry, were every pair counted once.
        largest: the largest product of two errors.
    """
    rows, columns = found.shape
    twice = torch.ones_like(found)
    twice[:: max(rows // 2, 1) if rows % 2 == 0 else rows, :: max(columns // 2, 1) if columns % 2 == 0 else columns] = 2
    total = found.abs()
    total[0, 0] = 0.0
    p = 2 * bernstein(total, variance.clamp(min=0) * twice, largest * twice) * max(found.numel() / 2, 1)
    lag = int(p.argmin())
    text = f"errors of elements {lag // columns} rows and {lag % columns} columns apart are correlated"
    return min(1.0, float(p.view(-1)[lag])), text


def spread_p(differences: torch.Tensor, d: Decisions, axis: int) -> tuple[float, float]:
    """Two-sided p-value that sums over one axis spread as those of independent decisions do, and the ratio to these.

    ``D``, the difference of two draws of a sum, has the mean square ``2 V`` (``V = sum v``), and ``D^2`` the variance
    ``8 V^2 + 2 V - 12 sum v^2``, however rare the decisions' outcomes are. ``D^2 / 2V`` is cut off at 9, which makes
    neither its mean nor its variance larger, and a sum with ``V < 1`` counts less: so Bernstein's bound applies.

    Args:
        differences: of the number of ups of two draws, ``[m, K]`` for m independent pairs of draws.
        d: the decisions; K sums over ``axis``.
        axis: which axis is summed over.
    """
    # What the tolerance leaves open of v: the smallest and the largest for each side of the test.
    off = (d.p - 0.5).abs()
    most = 0.25 - (off - d.tolerance).clamp(min=0).square()
    least = (0.25 - (off + d.tolerance).square()).clamp(min=0)
    high, low = most.sum(axis), least.sum(axis)
    scale = 2 * high.clamp(min=1)
    square = differences.double().square() / scale
    variance = (
        len(differences) * ((8 * high.square() + 2 * high - 12 * least.square().sum(axis)) / scale.square()).sum()
    )
    wider = (square.clamp(max=_LARGEST_SPREAD) - 2 * high / scale).sum()
    narrower = (2 * low / scale - square).sum()
    p = torch.stack(
        [
            bernstein(wider, variance, torch.tensor(_LARGEST_SPREAD)),
            bernstein(narrower, variance, torch.ones(())),
        ]
    )
    ratio = square.sum() / (len(differences) * (2 * high / scale).sum()).clamp(min=1e-300)
    return min(1.0, 2 * float(p.min())), float(ratio)


def bernstein(total: torch.Tensor, variance: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """``exp(-T^2 / (2 (V + M T / 3)))``: P(sum >= T) at most, for variance V and terms of at most M."""
    total, variance, largest = total.double(), variance.double(), largest.double()
    spread = 2 * (variance + largest * total / 3)
    exponent = torch.where(total > 0, total.square() / spread.clamp(min=1e-300), 0.0)
    return torch.exp(-exponent)


def _kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of two Bernoulli laws."""
    divergence: torch.Tensor = torch.special.xlogy(a, a / b.clamp(min=1e-300))
    divergence += torch.special.xlogy(1 - a, (1 - a) / (1 - b).clamp(min=1e-300))
    return divergence


def detectable(d: Decisions, draws: int, level: float) -> dict[str, float]:
    """The smallest bias, in steps, that is found with probability .99 after ``draws`` draws, by its shape.

    ``c sqrt(sum w^2 v / n) / sum |w|`` with ``c = sqrt(2 ln(2 m / level)) + 2.33``; one element: an exact binomial tail
    at ``p = 1/2``.
    """
    rows, columns = d.p.shape
    tests = 100 + 2 * (rows + columns)
    c = math.sqrt(2 * math.log(2 * tests / level)) + 2.33
    v = d.variance
    element = math.sqrt(2 * math.log(2 * d.p.numel() / level)) + 2.33
    per_row, per_column = v.sum(1).median(), v.sum(0).median()
    return {
        "constant": c * math.sqrt(float(v.sum()) / draws) / d.p.numel(),
        "one row": c * math.sqrt(float(per_row) / draws) / columns,
        "one column": c * math.sqrt(float(per_column) / draws) / rows,
        "one element": min(1.0, element * 0.5 / math.sqrt(draws)),
    }
