"""Exact expectations without sampling, by probing a quantizer with prescribed numbers.

If an element's output depends on its own random number alone, as a step function of it, then its law is known once the
numbers are at which it switches, and each of them is found by bisection: for all elements at once, one call of the
quantizer per bit of the number. ``E = sum_k value_k P(value_k)`` follows exactly.

Where all elements of a sample or of a channel have one number in common beside their own (it prunes whole samples,
say), the switches of these numbers are found first, and then the law of the elements in each state of the groups.

Shape legend: P elements, n bits per number, L values that an element takes; K groups.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fqtstats.errors import NotExact
from fqtstats.quantizers.base import Quantized, UniformQuantizer
from fqtstats.random import Stream, stream
from fqtstats.verdicts.probe import Outlet, Probe, StreamFunction, call, repeated, repeated_codes, require_input

__all__ = ["Law", "Shared", "State", "coupled_codes", "exact_mean", "law"]

_WIDEST = 32
_MOST_VALUES = 8
_CHECKS = 3
_COMPARED = 256
"""Elements at least, over all repetitions, in which a deterministic callable must agree with itself."""


@dataclass(frozen=True, slots=True)
class Law:
    """The exact law of an elementwise callable on one input.

    Attributes:
        mean: E[f(x)], float64, ``x``'s shape.
        variance: Var[f(x)], float64, ``x``'s shape.
        low: the value at number 0 or at the largest one, whichever is smaller; ``x``'s shape, float64.
        high: the other one.
        up: P(high) where there are two values, float64; 0 where there is one.
        values: L, the most values that an element takes.
        n: bits per number, 0 for a deterministic callable.
        shared: the groups of elements that have a number in common, where there are such beside the elements' own.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    up: torch.Tensor
    values: int
    n: int
    shared: Shared | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What groups of elements do while their common numbers lie in one interval.

    Attributes:
        words: for each group a number that puts it into this state, ``[K]`` int64, as of 32 bits.
        probability: of the state, by group, ``[K]`` float64.
        law: of the elements while all groups are in it.
    """

    words: torch.Tensor
    probability: torch.Tensor
    law: Law


@dataclass(frozen=True, slots=True)
class Shared:
    """Numbers that whole samples or channels have in common.

    Attributes:
        axis: of ``x``, along which the groups lie: 0 or 1.
        outlet: where the numbers come from.
        states: from the least number to the largest; one for all groups where nothing depends on the numbers.
        gap: the mean distance of the two values of each element, ``x``'s shape, float64.
    """

    axis: int
    outlet: Outlet
    states: tuple[State, ...]
    gap: torch.Tensor


def exact_mean(f: StreamFunction, x: torch.Tensor) -> torch.Tensor:
    """E[f(x, .)] over the stream's numbers, exactly.

    A callable that is elementwise and monotone (or any step function of few steps) in its one number per element is
    probed itself, also where every sample or channel has one more number, which its elements share: the result is the
    expectation of its output as it comes, rounding of the arithmetic included. A quantizer whose codes are elementwise
    but whose decoder mixes rows (BHQ) is probed on its codes, whose mean is decoded linearly in float64.

    Args:
        f: called as ``f(x, stream)``.
        x: ``[N, ...]``.

    Returns:
        float64, ``x``'s shape.

    Raises:
        NotExact: ``f`` is neither; sample instead (:func:`fqtstats.check_unbiased` does).
        InputError: ``x`` is no finite floating-point tensor; ``f`` returns another shape or dtype, NaN or Inf, or
            raises.
    """
    require_input(x)
    codes = coupled_codes(f, x)
    if codes is None:
        return law(f, x).mean
    probed, frame = codes
    mean = law(probed, torch.zeros(frame.frame.view, dtype=torch.float64)).mean
    return frame.frame.decode(mean).double()


def law(f: StreamFunction, x: torch.Tensor, key: Stream | None = None) -> Law:
    """The exact law of every element of ``f(x, .)``; arguments and errors as for :func:`exact_mean`.

    The assumptions are checked against real streams: every element of several draws must have the value that the
    switches predict. A dependence on other elements' numbers, or an interval of numbers that bisection has missed, of
    probability ``q`` per element passes unseen with probability ``(1 - q)^(3 P)``.

    Args:
        key: of the stream that the probes stand for.
    """
    key = stream(site="probe") if key is None else key
    with torch.no_grad():
        before = _generators(x)
        found = _Bisection(f, x, key).run()
        # Few elements may come out alike by chance.
        if _generators(x) != before:
            raise NotExact("it takes random numbers from another place than its stream")
        return found


def _generators(x: torch.Tensor) -> tuple[object, ...]:
    """Where the generators of torch, NumPy and Python stand."""
    device = torch.cuda.get_rng_state(x.device).numpy().tobytes() if x.is_cuda else b""
    numpy = json.dumps(np.random.get_state(legacy=False), default=lambda part: part.tolist())  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), device, numpy, random.getstate()


class _Bisection:
    """Finds the numbers at which the elements, or groups of them, switch."""

    def __init__(self, f: StreamFunction, x: torch.Tensor, key: Stream) -> None:
        self.f, self.x, self.key = f, x, key
        self.repeated = repeated(f, x)
        self.own: Outlet | None = None  # with a number for every element
        self.shared: Outlet | None = None  # with a number for every group of elements
        self.group = torch.zeros(0, dtype=torch.int64)  # of every element
        self.held: dict[Outlet, torch.Tensor] = {}  # the words of `shared`

    def run(self) -> Law:
        numel = self.x.numel()
        probe = Probe(torch.zeros(numel, dtype=torch.int64), self.key)
        first = call(self.f, self.x, probe).reshape(-1)
        counts = probe.counts
        for axis in self._group_axes(counts):
            try:
                return self._grouped(counts, axis)
            except NotExact:
                self.shared, self.held = None, {}
        self.own = probe.require_one_outlet()
        if self.own is None:
            self._require_deterministic(first)
        values, starts = self._switches()
        self._check([(values, starts)], [])
        return self._law(values, starts)

    # --- one number per group beside one per element ----------------------------------------------------------------

    def _group_axes(self, counts: dict[Outlet, int]) -> list[int]:
        """Axes whose indices may each have a number, where there is another number for every element (or none is)."""
        numel = self.x.numel()
        few = [count for count in counts.values() if count < numel]
        if len(few) != 1 or len(counts) > 2 or (len(counts) == 2 and max(counts.values()) != numel):
            return []
        return [axis for axis in (0, 1) if axis < self.x.dim() and self.x.shape[axis] == few[0]]

    def _grouped(self, counts: dict[Outlet, int], axis: int) -> Law:
        outlet = self.shared = min(counts, key=lambda outlet: counts[outlet])
        self.own = next((one for one in counts if one != outlet), None)
        groups = self.x.shape[axis]
        view = [1] * self.x.dim()
        view[axis] = -1
        self.group = torch.arange(groups).view(view).expand(self.x.shape).reshape(-1)
        top = torch.full((groups,), (1 << outlet.n) - 1)
        ends = [torch.full((self.x.numel(),), n) for n in self._ends]

        def at(numbers: torch.Tensor) -> torch.Tensor:
            self._hold(numbers)
            return torch.cat([self._at(end) for end in ends])

        def differ(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            count = torch.zeros(groups, dtype=torch.int64)
            changed = (one != other).view(len(ends), -1).any(0)
            return count.index_add_(0, self.group, changed.long()) > 0

        def spread(mask: torch.Tensor) -> torch.Tensor:
            return mask[self.group].repeat(len(ends))

        _, starts = _switches(at, torch.zeros_like(top), top, differ, spread)
        bounds = [*starts, top + 1]
        lengths = [(end - start).clamp(min=0) for start, end in itertools.pairwise(bounds)]
        shares = [length.double() * 2.0**-outlet.n for length in lengths]
        states: list[State] = []
        found: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        for start, share in zip(starts, shares, strict=True):
            number = torch.minimum(start, top)  # of groups without this state, any
            self._hold(number)
            found.append(self._switches())
            states.append(State(number << (_WIDEST - outlet.n), share, self._law(*found[-1])))
        self._check(found, starts)
        return self._mixed(states, axis)

    def _hold(self, numbers: torch.Tensor) -> None:
        assert self.shared is not None
        self.held = {self.shared: numbers << (_WIDEST - self.shared.n)}

    def _mixed(self, states: list[State], axis: int) -> Law:
        """The law over all states of the groups."""
        assert self.shared is not None
        shares = [state.probability[self.group].view(self.x.shape) for state in states]
        laws = [state.law for state in states]
        nothing = torch.zeros_like(laws[0].mean)
        mean = sum((law.mean * p for law, p in zip(laws, shares, strict=True)), nothing)
        variance = sum(
            ((law.variance + (law.mean - mean).square()) * p for law, p in zip(laws, shares, strict=True)), nothing
        )
        gap = sum(((law.high - law.low) * p for law, p in zip(laws, shares, strict=True)), nothing)
        low, high = laws[0].low, laws[0].high
        for law, p in zip(laws, shares, strict=True):
            low = torch.where(p > 0, torch.minimum(low, law.low), low)
            high = torch.where(p > 0, torch.maximum(high, law.high), high)
        return Law(
            mean=mean,
            variance=variance,
            low=low,
            high=high,
            up=torch.zeros_like(mean),
            values=sum(law.values for law in laws),
            n=self.shared.n if self.own is None else self.own.n,
            shared=Shared(axis, self.shared, tuple(states), gap),
        )

    # --- one number per element -------------------------------------------------------------------------------------

    @property
    def _ends(self) -> tuple[int, ...]:
        """The least and the largest number of an element; 0 where it has none."""
        return (0,) if self.own is None else (0, (1 << self.own.n) - 1)

    def _at(self, numbers: torch.Tensor, f: StreamFunction | None = None) -> torch.Tensor:
        words = numbers if self.own is None else numbers << (_WIDEST - self.own.n)
        probe = Probe(words, self.key, others=self.held)
        out = call(self.repeated if f is None else f, self.x, probe).reshape(-1)
        if probe.outlets != {outlet for outlet in (self.own, self.shared) if outlet is not None}:
            raise NotExact("what it asks of the stream depends on the numbers")
        return out

    def _switches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The values that every element takes as its number grows, and the numbers from which on it takes them."""
        first = torch.zeros(self.x.numel(), dtype=torch.int64)
        return _switches(self._at, first, first + self._ends[-1], torch.ne, lambda mask: mask)

    def _check(self, found: list[tuple[list[torch.Tensor], list[torch.Tensor]]], states: list[torch.Tensor]) -> None:
        """Against real streams: ``found`` are the switches in each state, which begin at ``states``."""
        for draw in range(_CHECKS):
            real = stream(draw=draw, site="probe.check")
            numbers = torch.zeros(self.x.numel(), dtype=torch.int64)
            if self.own is not None:
                numbers = real.bits(self.x.numel(), self.own.n)
            of_group = torch.zeros(0, dtype=torch.int64)
            if self.shared is not None:
                drawn = real.child("groups").bits(states[0].numel(), self.shared.n)
                self._hold(drawn)
                of_group = drawn[self.group]
            expected = torch.zeros_like(found[0][0][0])
            for state, (values, starts) in enumerate(found):
                here = values[0]
                for value, start in zip(values[1:], starts[1:], strict=True):
                    here = torch.where(numbers >= start, value, here)
                expected = torch.where(of_group >= states[state][self.group], here, expected) if states else here
            out = self._at(numbers, self.f)  # called anew: what is kept for the repeated calls is checked, too
            wrong = (out != expected).nonzero().view(-1)
            if wrong.numel():
                i = int(wrong[0])
                raise NotExact(
                    f"it is not elementwise, or no step function of few steps: element {i} gave {float(out[i])} where "
                    f"its own number alone would give {float(expected[i])} ({wrong.numel()} of {out.numel()} elements)"
                )

    def _require_deterministic(self, first: torch.Tensor) -> None:
        for draw in range(max(2, _COMPARED // max(1, self.x.numel()))):
            again = call(self.f, self.x, stream(draw=draw, site="probe.check")).reshape(-1)
            if not torch.equal(again, first):
                raise NotExact("it asks nothing of its stream, and yet its result differs from call to call")

    def _law(self, values: list[torch.Tensor], starts: list[torch.Tensor]) -> Law:
        n = 0 if self.own is None else self.own.n
        ends = [*starts[1:], torch.full_like(starts[0], 1 << n)]
        exact = [v.double() for v in values]
        # The first value as origin: where nothing moves, the mean is that value to the last bit.
        share = [(end - start).clamp(min=0).double() * 2.0**-n for start, end in zip(starts, ends, strict=True)]
        excess = [v - exact[0] for v in exact]
        mean = sum((e * s for e, s in zip(excess, share, strict=True)), torch.zeros_like(exact[0]))
        square = sum((e.square() * s for e, s in zip(excess, share, strict=True)), torch.zeros_like(mean))
        low, high = torch.minimum(exact[0], exact[-1]), torch.maximum(exact[0], exact[-1])
        is_up = torch.where(exact[-1] > exact[0], 1 - share[0], share[0])
        up = torch.where(high > low, is_up, 0.0)
        shape = self.x.shape
        return Law(
            mean=(exact[0] + mean).view(shape),
            variance=(square - mean.square()).clamp(min=0).view(shape),
            low=low.view(shape),
            high=high.view(shape),
            up=up.view(shape),
            values=len(values),
            n=n,
        )


def _switches(
    at: Callable[[torch.Tensor], torch.Tensor],
    first: torch.Tensor,
    top: torch.Tensor,
    differ: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    spread: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All values of units that are step functions of a number each, and where they begin.

    A unit that takes fewer values than others begins the missing ones at ``top + 1``.

    Args:
        at: the outputs, from a number for every unit.
        first, top: the least and the largest number, ``[U]``.
        differ: which units' outputs are not the same, ``[U]``.
        spread: a mask of units as one of outputs.
    """
    value, last = at(first), at(top)
    values, starts = [value], [first]
    while bool(differ(value, last).any()):
        if len(values) == _MOST_VALUES:
            raise NotExact(f"elements take more than {_MOST_VALUES} values")
        # The smallest number above the last switch with another value, and that value.
        moves = differ(value, last)
        low = torch.minimum(starts[-1], top)
        high = torch.where(moves, top, low)  # at(low) is value, at(high) is not
        beyond = last.clone()
        while bool((high - low > 1).any()):
            middle = torch.where(moves, (low + high) // 2, low)
            out = at(middle)
            same = ~differ(out, value)
            low = torch.where(same, middle, low)
            beyond = torch.where(spread(same), beyond, out)
            high = torch.where(same, high, middle)
        starts.append(torch.where(moves, high, top + 1))
        value = torch.where(spread(moves), beyond, value)
        values.append(value)
    return values, starts


def coupled_codes(f: StreamFunction, x: torch.Tensor) -> tuple[Callable[..., torch.Tensor], Quantized] | None:
    """A quantizer's codes as a callable, with an example of its frame; None where its output is elementwise itself."""
    if not isinstance(f, UniformQuantizer):
        return None
    example = f.encode(x, stream(site="probe"))
    if example.frame.transform is None:
        return None
    encoded = repeated_codes(f, x)

    def codes(_: torch.Tensor, s: Stream) -> torch.Tensor:
        return encoded(s).codes().double()

    return codes, example
