"""Tests of a callable of which nothing is known: neither its grid nor its law.

Shape legend: P elements in a matrix ``[R, C]``; n draws; ``e_i = f(x, s_i) - x``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fqtstats.estimators.bias import FLIPS, Directions, cross_fit_p, directed_p, sign_flip_p
from fqtstats.random import Stream
from fqtstats.verdicts.battery import LOOKS, Finding, Judged, autocorrelation, looks, strongest_lag
from fqtstats.verdicts.probe import StreamFunction, call

__all__ = ["DRAWS", "FAMILIES", "FEWEST", "BlackBox"]

DRAWS = 64
"""The most draws, where none are named."""

FEWEST = 64
"""Elements below which rare decisions, which may not show in all draws, pass for a certain bias."""

FAMILIES = 4
"""Each look spends its level on directions, cross-fit, independence and sign flips, in equal parts."""

_RANDOM_SIGNS = 8
_FIRST = 16  # draws whose independence is tested, once


class BlackBox:
    """Studentized directions, cross-fit and sign flips on the errors of a callable, fed draw by draw.

    Normal limits stand behind directions and cross-fit, so that an input all of whose errors are rare (next to points
    of the grid) is none to judge by draws alone: name the grid. Biases well below the noise of one draw are not found.
    ``analysis/results/blackbox`` has sizes and powers.

    Args:
        f: the callable.
        x: ``[N, ...]``.
        seed: of the random directions and flips.
    """

    def __init__(self, f: StreamFunction, x: torch.Tensor, seed: int = 0) -> None:
        self.f, self.x, self.seed = f, x, seed
        self._errors: list[torch.Tensor] = []
        rows = x.shape[0]
        matrix = x.double().view(rows, -1)
        generator = torch.Generator().manual_seed(seed)
        signs = [2.0 * torch.randint(0, 2, matrix.shape, generator=generator) - 1 for _ in range(_RANDOM_SIGNS)]
        self._fixed = torch.stack([torch.ones_like(matrix), matrix, matrix.sign(), *signs]).view(len(signs) + 3, -1)
        # One unit in the last place of each result, which nothing random has made.
        self._slack = torch.finfo(x.dtype).eps * matrix.abs()

    @property
    def draws(self) -> int:
        """How many were made."""
        return len(self._errors)

    def draw(self, s: Stream) -> None:
        """One more draw, from stream ``s``."""
        out = call(self.f, self.x, s)
        self._errors.append((out.double() - self.x.double()).view(self.x.shape[0], -1))

    def judge(self, streams: Iterator[Stream], most: int, false_alarm: float) -> Judged:
        """Draws and tests until a bias is found, or the draws are used up.

        A dependence is told and ends nothing: it is no bias, and the tests of one bear it.

        Args:
            streams: of the draws.
            most: draws.
            false_alarm: probability at most that what is unbiased shows a bias, and what is independent a dependence.
        """
        tests = sum(n <= most for n in LOOKS) * FAMILIES
        level = false_alarm / tests
        smallest: Finding | None = None
        dependence: Finding | None = None
        for _ in looks(self, streams, most):
            for finding in self.look(level):
                if finding.about_independence:
                    if finding.p_value < level:
                        dependence = finding
                elif smallest is None or finding.p_value < smallest.p_value:
                    smallest = finding
            assert smallest is not None
            if smallest.p_value < level:
                return Judged(smallest, dependence, smallest, tests)
        assert smallest is not None
        return Judged(None, dependence, smallest, tests)

    def look(self, level: float) -> Iterator[Finding]:
        """All tests on the draws so far.

        Args:
            level: of each family; sign flips are left out where there are too few of them to reach it.
        """
        e = torch.stack(self._errors)
        flat = e.view(len(e), -1)
        slack = self._slack.view(-1)
        kinds = [
            Directions((flat @ self._fixed.t()).numpy(), (self._fixed.abs() @ slack).numpy(), alike=False),
            Directions(e.sum(2).numpy(), self._slack.sum(1).numpy(), alike=True),
            Directions(e.sum(1).numpy(), self._slack.sum(0).numpy(), alike=True),
        ]
        gram = (flat @ flat.t()).numpy()
        gram = gram - float(slack.square().sum())
        p = directed_p(kinds)
        yield Finding("directions", p, "the mean error along fixed directions (x, its sign, rows, columns)", self.draws)
        p = cross_fit_p(gram)
        yield Finding("cross-fit", p, "errors of one half of the draws predict those of the other", self.draws)
        if self.draws == _FIRST:
            yield self._independence(e)
        if 10 / level <= FLIPS + 1:
            p = sign_flip_p(gram, self.seed)
            yield Finding("sign flips", p, "the squared mean error exceeds that of random sign flips", self.draws)

    def _independence(self, e: torch.Tensor) -> Finding:
        # As in the battery, but with what the draws show in place of the variances: products of errors that a shift
        # apart have the sum of their squares as the estimated variance of their sum.
        n = len(e)
        e = e - e.mean(0)
        deviation = e.square().mean((0, 2), keepdim=True).sqrt()
        e = e / torch.where(deviation > 0, deviation, 1.0)
        # The mean of the draws was taken out of each.
        found = autocorrelation(e) * (1 - 1 / n)
        best, text = strongest_lag(found, autocorrelation(e.square()), float(e.abs().amax().square()))
        return Finding("independence", best, text, self.draws)
