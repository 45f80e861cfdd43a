"""Is a quantizer unbiased, and are its decisions independent? A verdict with a stated false-alarm rate.

What can be computed is computed: a callable whose expectation can be probed (:mod:`.expectation`) is compared with its
input, element by element, without sampling and without error. What is left to chance, the coupling of its decisions to
each other and to the stream, is then tested on draws (:mod:`.battery`). Only a callable that cannot be probed is judged
by its draws alone: by the battery if its grid is named, else without knowing what it rounds to (:mod:`.blackbox`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fqtstats.determinism import single_thread
from fqtstats.errors import BiasDetected, InputError, NotExact
from fqtstats.quantizers import registered
from fqtstats.quantizers.agp import AGP
from fqtstats.quantizers.base import Quantized, Quantizer, UniformQuantizer
from fqtstats.random import Stream, stream
from fqtstats.verdicts import blackbox, designs
from fqtstats.verdicts.battery import LOOKS, TESTS, Battery, Finding, Judged, detectable
from fqtstats.verdicts.blackbox import BlackBox
from fqtstats.verdicts.decisions import Decisions, of_grid, of_groups, of_law, of_steps
from fqtstats.verdicts.expectation import Law, Shared, coupled, law, law_of_codes
from fqtstats.verdicts.probe import Held, StreamFunction, contradiction, repeated, repeated_codes, require_input

__all__ = ["Verdict", "assert_unbiased", "check_unbiased"]

_LADDER_TOLERANCE = 2.0**-20
_TOO_LARGE = 0.5  # steps


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a quantizer is what "unbiased" promises.

    Attributes:
        unbiased: no bias was found, whatever the tests of independence say.
        independent: no dependence between elements or draws was found; ``"between groups"`` where the elements of a
            sample (or channel) share a number, as the quantizer declares (``factor_groups``), and nothing else depends
            on anything; None where a bias was found first, or where nothing could be tested.
        p_value: the smallest, adjusted for everything that was tested: an unbiased quantizer gives a value below
            ``false_alarm`` with at most that probability. 0 where the failure is certain.
        evidence: what showed it, a sentence; or what was looked at.
        draws: how many were made, in all designs.
        seed: gives the same verdict again.
        false_alarm: the level.
        method: how the expectation was judged: ``"exact"``, ``"exact over samples and elements"`` (which have a random
            number each; or channels), ``"exact on the codes"`` (which are decoded linearly), ``"deterministic"``,
            ``"sampled on its grid"`` or ``"sampled"``, and why nothing better would do; ``"compared"`` where it is not
            ``consistent``.
        minimum_detectable_bias: smallest bias, in steps, that the draws on the first design find with probability .99,
            by its shape; empty for a black box.
        worst_bias: largest ``|E - x|`` found without sampling, in steps; None where it was not computed.
        consistent: the codes of a quantizer decode to what it gives when it is called. Where they do not, neither is
            judged, and it is not ``unbiased``.
    """

    unbiased: bool
    independent: bool | Literal["between groups"] | None
    p_value: float
    evidence: str
    draws: int
    seed: int
    false_alarm: float
    method: str
    minimum_detectable_bias: dict[str, float] = field(default_factory=dict)
    worst_bias: float | None = None
    consistent: bool = True

    @property
    def ok(self) -> bool:
        """Unbiased, and not found dependent."""
        return self.unbiased and self.independent is not False

    def __str__(self) -> str:
        state = "unbiased" if self.unbiased else "BIASED" if self.consistent else "INCONSISTENT"
        if self.independent is False:
            state += ", NOT INDEPENDENT"
        return f"{state} (p = {self.p_value:.3g}, {self.draws} draws, {self.method}): {self.evidence}"


NamedGrid = tuple[float | torch.Tensor, float | torch.Tensor]
"""Step, and offset of any point, of a uniform grid: numbers, or tensors that broadcast against the input."""


def check_unbiased(
    f: StreamFunction,
    x: torch.Tensor,
    false_alarm: float = 1e-6,
    *,
    seed: int = 0,
    draws: int | None = None,
    grid: NamedGrid | None = None,
) -> Verdict:
    """Judge ``f``, called as ``f(x, stream)``.

    Args:
        f: a quantizer, or any callable that draws from the stream it is given.
        x: ``[N, ...]``; the input to judge it on. A quantizer of the registry is also judged on the two ladders of
            :mod:`fqtstats.verdicts.designs`.
        false_alarm: probability at most that an unbiased, independent quantizer is not ``ok``, in (0, 1).
        seed: of the streams and of the random directions; the verdict is a function of it.
        draws: the most draws on ``x``; by default 64.
        grid: step and offset of the uniform grid onto which ``f`` rounds ``x``, numbers or tensors that broadcast
            against ``x``. It is made use of where the expectation of ``f`` cannot be probed: its draws then show far
            smaller biases. Elements whose random numbers are shared are judged without it.

    Returns:
        The verdict. A failure ends the sampling.

    Raises:
        InputError: ``f``, ``x``, ``false_alarm`` or ``grid`` cannot be used; ``f`` returns another shape or dtype,
            NaN or Inf, points that the grid does not have, or raises (the message says with what it was called); or
            ``x`` has too few elements for a callable that only its draws can judge.
    """
    if not callable(f):
        raise InputError(f"expected something called as f(x, stream), got {f!r}; fqtstats.quantizer(name) makes one")
    _require_usable(x, false_alarm, draws, grid)
    with torch.no_grad(), single_thread():
        return _Judge(f, x.detach(), false_alarm, seed, draws, grid).verdict()


def assert_unbiased(
    f: StreamFunction,
    x: torch.Tensor,
    false_alarm: float = 1e-6,
    *,
    seed: int = 0,
    draws: int | None = None,
    grid: NamedGrid | None = None,
) -> Verdict:
    """:func:`check_unbiased`, raising unless the verdict is ``ok``.

    Raises:
        BiasDetected: (an AssertionError) with the verdict.
    """
    verdict = check_unbiased(f, x, false_alarm, seed=seed, draws=draws, grid=grid)
    if not verdict.ok:
        raise BiasDetected(str(verdict), verdict)
    return verdict


def _require_usable(x: torch.Tensor, false_alarm: float, draws: int | None, grid: NamedGrid | None) -> None:
    require_input(x)
    if not isinstance(false_alarm, float) or not 0 < false_alarm < 1:
        raise InputError(f"false_alarm must be a probability between 0 and 1, got {false_alarm!r}")
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < LOOKS[0]):
        raise InputError(f"draws must be an integer of at least {LOOKS[0]}, got {draws!r}")
    if grid is not None and not (isinstance(grid, tuple | list) and len(grid) == 2):
        raise InputError(f"grid must be a pair (step, offset), got {grid!r}; give grid=(step, 0.0) if 0 is a point")


class _Judge:
    def __init__(
        self,
        f: StreamFunction,
        x: torch.Tensor,
        false_alarm: float,
        seed: int,
        draws: int | None,
        grid: NamedGrid | None,
    ) -> None:
        self.f, self.x, self.false_alarm, self.seed = f, x, false_alarm, seed
        self.most = draws
        self.named = None if grid is None else of_steps(f, x, *grid)
        self.deterministic = False
        self.drawn = f  # for many calls on one design
        self.draws = 0
        self.worst = 0.0
        self.p_value = 1.0  # the smallest adjusted one of any test
        self.detectable: dict[str, float] = {}
        self.encoded: Callable[[Stream], Quantized] | None = None  # of a coupled quantizer
        self.coupled = coupled(f, x)
        self.sharing: str | None = None  # what shares a number: "sample" or "channel"

    def verdict(self) -> Verdict:
        # Of other classes the codes may be what is inherited, and are not what is judged.
        if self.coupled or registered(self.f):
            told = contradiction(self.f, self.x)
            if told is not None:
                return replace(self._result(False, None, 0.0, told, "compared"), worst_bias=None, consistent=False)
        planned = list(self._designs())
        for design in planned:
            if not self.coupled:
                self.drawn = repeated(self.f, design.x)
            try:
                exact = self._expectation(design)
            except NotExact as reason:
                if self.named is not None and not reason.shared:
                    return self._on_grid(design, self.named, str(reason))
                return self._sampled(str(reason), shared=reason.shared)
            if isinstance(exact, str):
                return self._result(False, None, 0.0, exact)
            if exact.n == 0:
                # What does not look at its stream has no decisions to test.
                return self._result(True, True, 1.0, "a deterministic map that gives back its input")
            if exact.shared is not None:
                found = self._groups(design, exact.shared, len(planned))
                if found is not None:
                    return found
                continue
            if exact.values > 2:
                # There is no "up" and "down" to test; the mean is known all the same.
                if self.x.numel() < blackbox.FEWEST:
                    few = f"E = x within {self.worst:.1g} steps, by probing; too few elements to test on draws"
                    return self._result(True, None, 1.0, few)
                return self._sampled("", shared=False, method="exact")
            decisions = self._decisions(design, exact)
            self._know_detectable(design, decisions, len(planned))
            judged = self._battery(design, decisions, len(planned))
            if judged.failure is not None:
                return self._failed(judged.failure, design, judged.tests)
        adjusted = self.p_value
        evidence = f"E = x within {self.worst:.1g} steps, by probing; the draws show nothing"
        if self.sharing is None:
            return self._result(True, True, adjusted, evidence)
        if self.sharing == getattr(self.f, "factor_groups", None):
            return self._result(True, "between groups", adjusted, evidence)
        evidence += f"; but the elements of a {self.sharing} share a number, and it has no factor_groups that says so"
        return self._result(True, False, adjusted, evidence)

    def _groups(self, design: designs.Design, shared: Shared, planned: int) -> Verdict | None:
        """What the draws show of a callable whose samples or channels have a number each: what is wrong, if anything.

        The common numbers' decisions are tested on the first design; and on all of them those of the elements, with the
        common numbers held where most elements are random.
        """
        self.sharing = ("sample", "channel")[shared.axis]
        parts = [of_groups(self.drawn, design.x, shared)] if design.name == "natural" else []
        loudest = max(shared.states, key=lambda state: int((state.law.high > state.law.low).sum()))
        if loudest.law.values == 2:
            draw = self.drawn

            def held(x: torch.Tensor, s: Stream) -> torch.Tensor:
                return draw(x, Held(s, shared.outlet, loudest.words))

            parts.append(of_law(held, design.x, loudest.law))
            self._know_detectable(design, parts[-1], 2 * planned)
        for decisions in parts:
            judged = self._battery(design, decisions, 2 * planned)
            if judged.failure is not None:
                return self._failed(judged.failure, design, judged.tests)
        return None

    def _on_grid(self, design: designs.Design, decisions: Decisions, reason: str) -> Verdict:
        """By the battery alone; a dependence, which its tests of a bias cannot bear, leaves the black box's."""
        self.detectable = {}
        self._know_detectable(design, decisions, 1)
        method = f"sampled on its grid, since {reason}"
        judged = self._battery(design, decisions, 1)
        if judged.failure is None:
            evidence = "the draws show nothing"
            if min(self.detectable.values()) >= _TOO_LARGE:
                evidence += f"; {self.x.numel()} elements are too few for them to show a bias of {_TOO_LARGE} steps"
            return self._result(True, True, judged.p_value, evidence, method)
        if judged.failure.about_independence:
            return self._sampled(judged.failure.evidence, shared=True)
        return self._failed(judged.failure, design, judged.tests, method)

    def _failed(self, failure: Finding, design: designs.Design, tests: int, method: str | None = None) -> Verdict:
        certain = failure.family == "support"
        adjusted = min(1.0, failure.p_value * tests)
        where = f"{failure.evidence} ({design.name} design, {failure.draws} draws)"
        if failure.about_independence:
            return self._result(True, False, adjusted, where, method)
        return self._result(False, True, 0.0 if certain else adjusted, where, method)

    # --- designs ----------------------------------------------------------------------------------------------------

    def _designs(self) -> Iterator[designs.Design]:
        x = self.x
        yield designs.Design("natural", x, 0.0)
        q = self.f
        levels = q.ladder_levels if isinstance(q, Quantizer) else None
        if isinstance(q, Quantizer) and levels and not self.coupled and x.dtype in (torch.float32, torch.float64):
            for high in (False, True):
                ladder = q.at_coordinates(designs.ladder(designs.LADDER_SHAPE, levels, high, x.dtype))
                if not coupled(q, ladder):  # a quantizer may mix these rows, and not those of x
                    yield designs.Design("high ladder" if high else "low ladder", ladder, _LADDER_TOLERANCE)

    def _steps(self, design: designs.Design, exact: Law) -> torch.Tensor:
        """Distance of the two values of each element; of a quantizer without chance, its grid's step."""
        if exact.shared is not None:
            return exact.shared.gap
        if exact.n > 0 or not isinstance(self.f, UniformQuantizer):
            return exact.high - exact.low
        _, frame = self.f._frame(design.x)
        return frame.grid.step.double().expand(frame.view).reshape(design.x.shape)

    def _tolerance(self, design: designs.Design, step: torch.Tensor) -> torch.Tensor:
        """By how much the arithmetic may move each element, in units of ``x``.

        On the ladders, which are exact, a fixed part of a step; else four units in the last place of the largest number
        that shares the element's grid (subtraction, scale, product and the decoder's two operations, each rounded once,
        of numbers up to twice as large), and what 24 random bits leave. A grid that ends beyond the numbers, or is
        divided by a probability, doubles them.
        """
        if design.tolerance:
            return design.tolerance * torch.where(step > 0, step, 1.0)
        magnitude = design.x.double().abs()
        q = self.f.rounding if isinstance(self.f, AGP) else self.f
        if isinstance(q, UniformQuantizer):
            view = magnitude.view(q.view_shape(design.x.shape))
            largest = view.amax(q.recipe.shared, keepdim=True).expand_as(view).reshape(magnitude.shape)
        else:
            largest = magnitude.amax().expand_as(magnitude)  # who shares a grid is not known
        # float32 is what narrower types are quantized in, and their own rounding is part of the output.
        doubled = isinstance(self.f, AGP) or (isinstance(q, UniformQuantizer) and q.recipe.rule == "mirrored")
        return (8 if doubled else 4) * torch.finfo(design.x.dtype).eps * largest + 2.0**-24 * step

    # --- exact ------------------------------------------------------------------------------------------------------

    def _expectation(self, design: designs.Design) -> Law | str:
        """The law on a design, or what is wrong with its mean."""
        x = design.x.double()
        if not self.coupled:
            exact = law(self.f, design.x, stream(seed=self.seed, site=f"probe {design.name}"), self.drawn)
            self.deterministic = exact.n == 0
            step = self._steps(design, exact)
            return self._off(design, "E", "x", exact.mean, x, step, self._tolerance(design, step)) or exact
        assert isinstance(self.f, UniformQuantizer)
        self.encoded = repeated_codes(self.f, design.x)
        exact, frame = law_of_codes(self.encoded)
        # First the codes against the coordinates that they round, then transform and decoder, which are linear, and
        # whose rounding is relative to the largest number they meet.
        decisions = self._decisions(design, exact)
        mean = exact.mean.view_as(decisions.p)
        one = torch.ones_like(mean)
        wrong = self._off(
            design, "the mean code", "the coordinate", mean, decisions.coordinates, one, decisions.tolerance
        )
        decoded = frame.decode(exact.mean.clone()).double()
        tolerance = torch.full_like(x, 16 * torch.finfo(torch.float32).eps * float(x.abs().amax()))
        return wrong or self._off(design, "E", "x", decoded, x, torch.zeros_like(x), tolerance) or exact

    def _off(
        self,
        design: designs.Design,
        what: str,
        aim: str,
        mean: torch.Tensor,
        expected: torch.Tensor,
        step: torch.Tensor,
        tolerance: torch.Tensor,
    ) -> str | None:
        """What is wrong with a mean, at the element that is furthest off; None if nothing is."""
        error = (mean - expected).abs().view(-1)
        step, tolerance = step.reshape(-1), tolerance.reshape(-1)
        in_steps = torch.where(step > 0, error / torch.where(step > 0, step, 1.0), 0.0)
        self.worst = max(self.worst, float(in_steps.max()))
        beyond = error > tolerance
        if not bool(beyond.any()):
            return None
        i = int((error - tolerance).argmax())
        size = f"{float(in_steps[i]):.3g} steps" if float(step[i]) > 0 else f"{float(error[i]):.3g}"
        return (
            f"{what} is {float(mean.reshape(-1)[i]):.6g} where {aim} is {float(expected.reshape(-1)[i]):.6g}: off by "
            f"{size}; {int(beyond.sum())} of {len(error)} elements are off ({design.name} design, by probing)"
        )

    def _decisions(self, design: designs.Design, exact: Law) -> Decisions:
        if self.coupled:
            assert isinstance(self.f, UniformQuantizer)
            return of_grid(self.f, design.x, 4 * self.f.format.levels * 2.0**-24, self.encoded)
        return of_law(self.drawn, design.x, exact)

    # --- draws ------------------------------------------------------------------------------------------------------

    def _streams(self, design: str) -> Iterator[Stream]:
        draw = 0
        while True:
            yield stream(seed=self.seed, site=f"check {design}", draw=draw)
            draw += 1

    def _know_detectable(self, design: designs.Design, decisions: Decisions, shares: int) -> None:
        if not self.detectable:
            level = self.false_alarm / (shares * TESTS)
            self.detectable = detectable(decisions, self.most or design.draws, level)

    def _battery(self, design: designs.Design, decisions: Decisions, shares: int) -> Judged:
        """One of ``shares`` among which the rate of false alarms is divided."""
        battery = Battery(decisions, self.seed)
        judged = battery.judge(self._streams(design.name), self.most or design.draws, self.false_alarm, shares)
        self.draws += battery.draws
        self.p_value = min(self.p_value, judged.p_value)
        return judged

    def _sampled(self, reason: str, shared: bool, method: str | None = None) -> Verdict:
        if self.x.numel() < blackbox.FEWEST:
            raise InputError(
                f"x {list(self.x.shape)}: {self.x.numel()} elements are too few to be judged by draws alone, since "
                f"{reason}; give at least {blackbox.FEWEST}"
            )
        self.detectable = {}  # the battery's, had it been enough
        box = BlackBox(self.f, self.x, self.seed)
        judged = box.judge(self._streams("black box"), self.most or blackbox.DRAWS, self.false_alarm)
        self.draws += box.draws
        method = method or f"sampled, since {reason}"
        independent = not shared and judged.dependence is None
        if judged.dependence is not None:
            reason = judged.dependence.evidence
        if judged.bias is None:
            known = f"E = x within {self.worst:.1g} steps, by probing; " if method == "exact" else ""
            evidence = f"{known}the draws show nothing{'' if known else ', and only they were looked at'}"
        else:
            evidence = f"{judged.bias.evidence} (p = {judged.p_value:.3g} in {judged.bias.draws} draws)"
        if not independent:
            evidence += f"; {reason}"
        return self._result(judged.bias is None, independent, judged.p_value, evidence, method)

    def _result(
        self,
        unbiased: bool,
        independent: bool | Literal["between groups"] | None,
        p_value: float,
        evidence: str,
        method: str | None = None,
    ) -> Verdict:
        if method is None:
            method = "deterministic" if self.deterministic else "exact on the codes" if self.coupled else "exact"
            if self.sharing is not None:
                method = f"exact over {self.sharing}s and elements"
        return Verdict(
            unbiased=unbiased,
            independent=independent,
            p_value=p_value,
            evidence=evidence,
            draws=self.draws,
            seed=self.seed,
            false_alarm=self.false_alarm,
            method=method,
            minimum_detectable_bias=self.detectable,
            worst_bias=None if method.startswith("sampled") else self.worst,
        )
