"""Logarithmic unbiased quantizer (LUQ): a sign, an exponent, no mantissa.

Source: B. Chmiel et al., "Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats" (arXiv
2112.10769), section 4: stochastic underflow, logarithmic stochastic rounding, hindsight maximum (4.2) and averages of
several samples (SMP, section 4.1). With ``alpha = max|x| / M`` and ``z = |x| / alpha``:

* ``z < 1``: ``sign(x) alpha`` with probability ``z``, else 0 (stochastic underflow);
* ``2^n <= z <= 2^(n+1)``: the upper one of the two magnitudes with probability ``z / 2^n - 1``, else the lower one.

Both are stochastic rounding of one coordinate that is linear between neighbouring points
(:class:`fqtstats.quantizers.grid.LogGrid`). The paper's text has ``M = 16``, its code 128 (eight magnitudes, which do
not fit 4 bits); seven magnitudes and zero fill the format 1-3-0, and make ``M = 2^6 = 64``.

Shape legend: one alpha for the whole tensor ``[N, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from fqtstats.errors import InputError
from fqtstats.formats import LogFormat, log, pack, sign_magnitude, signed, unpack
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.base import Claim, Frame, Quantized, Quantizer, StochasticQuantizer, extremes
from fqtstats.quantizers.grid import Grid, logarithmic
from fqtstats.quantizers.noise import Noise
from fqtstats.random import Stream
from fqtstats.rounding import nearest, stochastic, up_probability

__all__ = ["LUQ", "Flush", "Hindsight", "LogQuantized"]

SMALLEST = torch.finfo(torch.float32).smallest_normal
"""The smallest hindsight maximum."""


@dataclass(frozen=True, slots=True)
class LogQuantized(Quantized):
    """Codes of a logarithmic format: the sign bit above the exponent field, 0 for zero.

    Attributes:
        format: the format of the codes.
        samples: how many independent quantizations there are, their codes one after the other; decoded, they are
            averaged.
    """

    format: LogFormat
    samples: int = 1

    def codes(self) -> torch.Tensor:
        """Which grid point, counted from the lowest, uint8: ``[N, C, S]``, or ``[samples, N, C, S]`` of several."""
        view = self.frame.view if self.samples == 1 else (self.samples, *self.frame.view)
        steps = signed(unpack(self.payload, self.format, math.prod(view)), self.format).view(view)
        zero = self.frame.grid.zero
        assert zero is not None
        return (steps + zero.to(torch.int16)).to(torch.uint8)

    def decode(self) -> torch.Tensor:
        codes = self.codes().to(self.frame.grid.step.dtype)
        return self.frame.decode(codes) if self.samples == 1 else _mean([self.frame.decode(one) for one in codes])


@dataclass(frozen=True)
class LUQ(StochasticQuantizer):
    """Logarithmic unbiased quantizer: one sign bit and an exponent.

    Args:
        bits: 2 to 5, with ``2^(bits - 1) - 1`` magnitudes; ``M = 64`` with 4 bits.
        random_bits: random bits per decision.
        dynamic_range: ``M``, a power of two, where it is not to be the one that fills the format; 128, eight
            magnitudes, takes 5 bits.
        underflow: below the smallest magnitude, ``"stochastic"`` or ``"flush"`` to zero, which is biased.
        rounding: between two magnitudes, ``"stochastic"`` or to the ``"nearest"`` one, which is biased.
        samples: the mean of so many independent quantizations (SMP), with that fraction of the variance; meant for the
            weight gradient, whose product is then made as many times.
        maximum: ``"exact"``, or ``"hindsight"``: ``largest`` stands in for ``max|x|``, and larger magnitudes are
            clipped to it, which is biased. Where it is not given, layers get a :class:`Hindsight` that learns it.
        eta: of the hindsight maximum, ``m' = (1 - eta) max|x| + eta m``; in [0, 1).
        largest: ``m``; None (before there is one): the exact maximum.

    ``encode`` stores sign and exponent; the codes that it gives back count the points of the grid from the lowest.

    Raises:
        InputError: an option is out of range.
    """

    bits: int = 4
    dynamic_range: int | None = None
    underflow: Literal["stochastic", "flush"] = "stochastic"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    samples: int = 1
    maximum: Literal["exact", "hindsight"] = "exact"
    eta: float = 0.1
    largest: float | None = None
    name: ClassVar[str] = "luq"
    widths: ClassVar[Sequence[int]] = range(2, 6)

    def __post_init__(self) -> None:
        super().__post_init__()
        fmt = log(self.bits)
        if self.dynamic_range is not None:
            _require(self.dynamic_range in (1 << n for n in range(15)), "dynamic_range", self.dynamic_range, "2^n")
            if self.magnitudes > fmt.magnitudes:
                raise InputError(
                    f"dynamic_range={self.dynamic_range} has {self.magnitudes} magnitudes, and {self.bits} bits have "
                    f"{fmt.magnitudes}; give bits={self.magnitudes.bit_length() + 1}"
                )
        _require(self.underflow in ("stochastic", "flush"), "underflow", self.underflow, "'stochastic' or 'flush'")
        _require(self.rounding in ("stochastic", "nearest"), "rounding", self.rounding, "'stochastic' or 'nearest'")
        _require(self.maximum in ("exact", "hindsight"), "maximum", self.maximum, "'exact' or 'hindsight'")
        whole = isinstance(self.samples, int) and not isinstance(self.samples, bool)
        _require(whole and self.samples >= 1, "samples", self.samples, "an integer of at least 1")
        _require(isinstance(self.eta, float | int) and 0 <= self.eta < 1, "eta", self.eta, "in [0, 1)")
        if self.largest is not None:
            _require(self.maximum == "hindsight", "largest", self.largest, "None where maximum is 'exact'")
            known = SMALLEST <= self.largest <= torch.finfo(torch.float32).max
            _require(known, "largest", self.largest, "a normal number of float32")

    @property
    def format(self) -> LogFormat:
        return log(self.bits)

    @property
    def magnitudes(self) -> int:
        """Number of nonzero magnitudes: ``log2(M) + 1``."""
        return self.format.magnitudes if self.dynamic_range is None else self.dynamic_range.bit_length()

    @property
    def recipe(self) -> Recipe:
        return Recipe(None, "logarithmic", self.bits, self.random_bits, self.magnitudes)

    @property
    def ladder_levels(self) -> int:
        return 2 * self.magnitudes

    @property
    def claim(self) -> Claim:
        fair = (self.underflow, self.rounding, self.maximum) == ("stochastic", "stochastic", "exact")
        return super().claim if fair else "biased"

    @property
    def by_coordinate(self) -> bool:
        """Whether all coordinates are rounded at random, as the native kernels do it."""
        return (self.underflow, self.rounding) == ("stochastic", "stochastic")

    def at_coordinates(self, places: torch.Tensor) -> torch.Tensor:
        """The numbers that lie at ``places`` of the grid with alpha = 1, counted from its lowest point."""
        y = places.double() - self.magnitudes
        octave = (y.abs().floor() - 1).clamp(min=0)
        return (y.sign() * (y.abs() - octave) * 2.0**octave).to(places.dtype)

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        if self.largest is not None:
            high = torch.full_like(high, self.largest)
            low = -high
        return logarithmic(low, high, 2 * self.magnitudes)

    def _certain(self, y: torch.Tensor) -> torch.Tensor:
        """Coordinates with those that are not rounded at random at the point that they go to."""
        if self.underflow == "flush":
            y = torch.where(y.abs() < 1, torch.zeros_like(y), y)
        if self.rounding == "nearest":
            y = torch.where(y.abs() < 1, y, nearest(y))
        # Beyond the hindsight maximum nothing is random.
        return y if self.largest is None else y.clamp(-self.magnitudes, self.magnitudes)

    def _round(self, y: torch.Tensor, stream: Stream) -> torch.Tensor:
        certain = self._certain(y)
        if self.underflow == "flush" and self.rounding == "nearest":
            return certain
        return stochastic(certain, stream, self.random_bits, out=certain)

    def _law(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return up_probability(self._certain(y), self.random_bits)

    def streams(self, stream: Stream) -> list[Stream]:
        """Those of the samples."""
        return [stream] if self.samples == 1 else [stream.child(f"sample {i}") for i in range(self.samples)]

    def _drawn(self, y: torch.Tensor, frame: Frame, stream: Stream) -> torch.Tensor:
        return _mean([frame.decode(self._codes(y, frame, s)) for s in self.streams(stream)])

    def encode(self, x: torch.Tensor, stream: Stream) -> LogQuantized:
        return self._encoded(*self._frame(x), stream)

    def _encoded(self, y: torch.Tensor, frame: Frame, stream: Stream) -> LogQuantized:
        steps = torch.stack([self._codes(y, frame, s) for s in self.streams(stream)]) - self.magnitudes
        return LogQuantized(pack(sign_magnitude(steps, self.format), self.format), self.format, frame, self.samples)

    def _codes(self, y: torch.Tensor, frame: Frame, stream: Stream) -> torch.Tensor:
        return frame.grid.codes(self._round(y.clone(), stream))

    def noise(self, x: torch.Tensor) -> Noise:
        _, frame, low, high, up = self._outcomes(x)
        gap = high.sub_(low)
        # The mean of n decisions has the variance of one over n, and moves by the n-th part of a gap at a time.
        return Noise(frame.shape, gap.square().mul_(up * (1 - up) / self.samples), gap / self.samples)

    def bound(self, x: torch.Tensor) -> float:
        """``alpha^2 / 4`` for every number below alpha but zero, ``x^2 / 8`` for the others; over ``samples``."""
        view = self._view(x)
        low, high = extremes(view, None)
        if bool(low == high) and self.largest is None:
            return 0.0
        alpha = float(self._grid(low, high).step.double())
        size = view.double().abs()
        # P(up) is known to that much: the coordinate's rounding, and that of P(up) to random bits.
        slack = 2.0**-20 + 2.0**-self.random_bits
        each = torch.where(size < alpha, size.sign() * (alpha**2 / 4), (0.125 + slack) * size.square())
        return float(each.sum()) / self.samples

    def published_bound(self, x: torch.Tensor) -> None:
        """None: the paper has no bound on the variance."""

    def for_layer(self) -> LUQ | Hindsight:
        """What a layer gets for it: one that learns its maximum, where it is a hindsight one that is not given."""
        return Hindsight(self) if self.maximum == "hindsight" and self.largest is None else self

    def after(self, x: torch.Tensor) -> LUQ:
        """The quantizer of the next step, its hindsight maximum updated with this step's ``x`` (equation 25)."""
        low, high = extremes(self._view(x), None)
        seen = float(torch.maximum(low.abs(), high.abs()))
        known = seen if self.largest is None else (1 - self.eta) * seen + self.eta * self.largest
        return replace(self, maximum="hindsight", largest=max(known, SMALLEST) if known > 0 else None)


@dataclass(frozen=True)
class Flush(LUQ):
    """Negative control: the logarithmic format with underflow flushed to zero and rounding to nearest.

    What is left of the gradient is smaller than the gradient (.69 of it on lognormal numbers).
    """

    underflow: Literal["stochastic", "flush"] = "flush"
    rounding: Literal["stochastic", "nearest"] = "nearest"
    name: ClassVar[str] = "flush"


class Hindsight(nn.Module, Quantizer):
    """LUQ with the hindsight maximum ``m_t = (1 - eta) max|x_(t-1)| + eta m_(t-1)``: it needs no pass over ``x`` first.

    Between two calls of :meth:`update`, which training makes after every step, it is a pure function of ``x`` and the
    stream. The maximum is a buffer: it is saved with the model, and a continued training goes on with it.

    Args:
        luq: a :class:`LUQ` with ``maximum="hindsight"``.

    Attributes:
        largest: ``m_t``, a number; NaN before the first update, when the exact maximum is taken.
        seen: the largest magnitude since the last update; 0 before the first call.

    Raises:
        InputError: ``luq`` is something else.
    """

    name: ClassVar[str] = "luq"
    role: ClassVar[Literal["gradient", "forward"]] = "gradient"
    largest: torch.Tensor
    seen: torch.Tensor

    def __init__(self, luq: LUQ) -> None:
        super().__init__()
        if not isinstance(luq, LUQ) or luq.maximum != "hindsight":
            raise InputError(f"expected a luq with maximum='hindsight', got {luq!r}")
        self.luq = luq
        start = math.nan if luq.largest is None else luq.largest
        self.register_buffer("largest", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    @property
    def current(self) -> LUQ:
        """The quantizer as it is until the next update."""
        largest = float(self.largest)
        return self.luq if math.isnan(largest) else replace(self.luq, largest=largest)

    @property
    def bits(self) -> int:
        """Width of the codes."""
        return self.luq.bits

    @property
    def claim(self) -> Claim:
        return "biased"

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """:class:`LUQ` with the current maximum; notes ``max|x|`` for the next one."""
        out = self.current(x, stream)  # refuses what is not finite, which is nothing to note
        self.note(x)
        return out

    def note(self, x: torch.Tensor) -> None:
        """Note ``max|x|`` for the next maximum."""
        self.seen = torch.maximum(self.seen, x.detach().abs().amax().double())

    def update(self) -> None:
        """End a step: the next one's maximum from what was seen in this one."""
        known = float(self.largest)
        seen = float(self.seen)
        if seen > 0:
            eta = self.luq.eta
            new = seen if math.isnan(known) else (1 - eta) * seen + eta * known
            self.largest = torch.full_like(self.largest, min(max(new, SMALLEST), torch.finfo(torch.float32).max))
        self.seen = torch.zeros_like(self.seen)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Hindsight:
        # A model that is cast leaves the maximum what it is.
        before = self.largest, self.seen
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.largest, self.seen = (
            old.to(new.device) for old, new in zip(before, (self.largest, self.seen), strict=True)
        )
        return self

    def encode(self, x: torch.Tensor, stream: Stream) -> LogQuantized:
        """As :meth:`LUQ.encode`."""
        return self.current.encode(x, stream)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.current.mean(x)

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        return self.current.variance(x)

    def noise(self, x: torch.Tensor) -> Noise:
        return self.current.noise(x)

    def bound(self, x: torch.Tensor) -> float:
        return self.current.bound(x)

    def published_bound(self, x: torch.Tensor) -> None:
        """None: the paper has no bound on the variance."""


def _mean(drawn: list[torch.Tensor]) -> torch.Tensor:
    total = drawn[0]
    for one in drawn[1:]:
        total = total + one
    return total if len(drawn) == 1 else total / len(drawn)


def _require(right: bool, option: str, value: object, expected: str) -> None:
    if not right:
        raise InputError(f"{option} must be {expected}, got {value!r}")
