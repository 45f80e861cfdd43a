"""Exact expectations without sampling, by probing a quantizer with prescribed numbers.

If an element's output depends on its own random number alone, as a step function of it, then its law is known once the
numbers are at which it switches, and each of them is found by bisection: for all elements at once, one call of the
quantizer per bit of the number. ``E = sum_k value_k P(value_k)`` follows exactly.

Shape legend: P elements, n bits per number, L values that an element takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fqtstats.errors import NotExact
from fqtstats.quantizers.base import Quantized, UniformQuantizer
from fqtstats.random import Stream, stream
from fqtstats.verdicts.probe import Probe, StreamFunction, call, require_input

__all__ = ["Law", "coupled_codes", "exact_mean", "law"]

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
    """

    mean: torch.Tensor
    variance: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    up: torch.Tensor
    values: int
    n: int


def exact_mean(f: StreamFunction, x: torch.Tensor) -> torch.Tensor:
    """E[f(x, .)] over the stream's numbers, exactly.

    A callable that is elementwise and monotone (or any step function of few steps) in its one number per element is
    probed itself: the result is the expectation of its output as it comes, rounding of the arithmetic included. A
    quantizer whose codes are elementwise but whose decoder mixes rows (BHQ) is probed on its codes, whose mean is
    decoded linearly in float64.

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
    numpy = str(np.random.get_state(legacy=False))  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), device, numpy, random.getstate()


class _Bisection:
    def __init__(self, f: StreamFunction, x: torch.Tensor, key: Stream) -> None:
        self.f, self.x, self.key = f, x, key
        self.n = 0

    def run(self) -> Law:
        shape = self.x.shape
        zeros = torch.zeros(self.x.numel(), dtype=torch.int64)
        probe = Probe(zeros, self.key)
        first = call(self.f, self.x, probe).reshape(-1)
        outlet = probe.require_one_outlet()
        if outlet is None:
            self._require_deterministic(first)
            value = first.double().view(shape)
            nothing = torch.zeros_like(value)
            return Law(value, nothing, value, value, nothing, 1, 0)
        self.n = outlet.n
        top = (1 << self.n) - 1
        last = self._at(torch.full_like(zeros, top))
        values, starts = [first], [zeros]
        while not torch.equal(values[-1], last):
            if len(values) == _MOST_VALUES:
                raise NotExact(f"elements take more than {_MOST_VALUES} values")
            start, value = self._next_switch(values[-1], starts[-1], last, top)
            values.append(value)
            starts.append(start)
        self._check(values, starts)
        return self._law(values, starts, shape)

    def _at(self, numbers: torch.Tensor) -> torch.Tensor:
        probe = Probe(numbers << (_WIDEST - self.n), self.key)
        out = call(self.f, self.x, probe).reshape(-1)
        if {o.n for o in probe.outlets} != {self.n}:
            raise NotExact("what it asks of the stream depends on the numbers")
        return out

    def _next_switch(
        self, value: torch.Tensor, start: torch.Tensor, last: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest number above ``start`` with another value, and that value; unchanged where ``last`` is reached.

        Where it is reached already, the number is ``top + 1``: an interval of length 0.
        """
        moves = value != last
        low, high = start.clone(), torch.where(moves, top, start)  # f(low) == value, f(high) != value
        beyond = last.clone()
        while bool((high - low > 1).any()):
            middle = torch.where(moves, (low + high) // 2, low)
            out = self._at(middle)
            same = out == value
            low = torch.where(same, middle, low)
            beyond = torch.where(same, beyond, out)
            high = torch.where(same, high, middle)
        return torch.where(moves, high, top + 1), torch.where(moves, beyond, value)

    def _check(self, values: list[torch.Tensor], starts: list[torch.Tensor]) -> None:
        for draw in range(_CHECKS):
            numbers = stream(draw=draw, site="probe.check").bits(self.x.numel(), self.n)
            expected = values[0]
            for value, start in zip(values[1:], starts[1:], strict=True):
                expected = torch.where(numbers >= start, value, expected)
            out = self._at(numbers)
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

    def _law(self, values: list[torch.Tensor], starts: list[torch.Tensor], shape: torch.Size) -> Law:
        ends = [*starts[1:], torch.full_like(starts[0], 1 << self.n)]
        exact = [v.double() for v in values]
        # The first value as origin: where nothing moves, the mean is that value to the last bit.
        share = [(end - start).clamp(min=0).double() * 2.0**-self.n for start, end in zip(starts, ends, strict=True)]
        excess = [v - exact[0] for v in exact]
        mean = sum((e * s for e, s in zip(excess, share, strict=True)), torch.zeros_like(exact[0]))
        square = sum((e.square() * s for e, s in zip(excess, share, strict=True)), torch.zeros_like(mean))
        low, high = torch.minimum(exact[0], exact[-1]), torch.maximum(exact[0], exact[-1])
        is_up = torch.where(exact[-1] > exact[0], 1 - share[0], share[0])
        up = torch.where(high > low, is_up, 0.0)
        return Law(
            mean=(exact[0] + mean).view(shape),
            variance=(square - mean.square()).clamp(min=0).view(shape),
            low=low.view(shape),
            high=high.view(shape),
            up=up.view(shape),
            values=len(values),
            n=self.n,
        )


def coupled_codes(f: StreamFunction, x: torch.Tensor) -> tuple[Callable[..., torch.Tensor], Quantized] | None:
    """A quantizer's codes as a callable, with an example of its frame; None where its output is elementwise itself."""
    if not isinstance(f, UniformQuantizer):
        return None
    example = f.encode(x, stream(site="probe"))
    if example.frame.transform is None:
        return None

    def codes(_: torch.Tensor, s: Stream) -> torch.Tensor:
        return f.encode(x, s).codes().double()

    return codes, example
