"""What a quantizer is, and the parts that all uniform quantizers share.

Shape legend: ``x`` is ``[N, ...]`` with the sample axis first; inside, it is viewed as ``[N, C, S]`` (sample, channel,
space), contiguous in row-major order of the logical shape whatever the memory format.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from fqtstats.errors import InputError
from fqtstats.formats import IntFormat, LogFormat, pack, uint, unpack
from fqtstats.ops import quantize as native
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers.grid import RULES, Grid
from fqtstats.quantizers.noise import Groups, Noise
from fqtstats.random import Stream
from fqtstats.rounding import nearest, stochastic, up_probability

__all__ = ["Claim", "Frame", "Quantized", "Quantizer", "Role", "Transform", "UniformQuantizer", "extremes", "rows"]

Claim = Literal["unbiased", "asymptotic", "biased"]
Role = Literal["gradient", "forward"]
Transformed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Transformed rows ``[N, C, S]``, and the minimum and maximum of each of them, ``[N, 1, 1]``."""


class Quantizer(ABC):
    """A map from a tensor and a stream to a tensor on a low-precision grid.

    Attributes:
        name: registry name.
        role: ``"gradient"`` (stochastic) or ``"forward"`` (deterministic).
        widths: the bits that it comes in, its other options being the defaults.
    """

    name: ClassVar[str]
    role: ClassVar[Role]
    widths: ClassVar[Sequence[int]] = range(1, 9)

    @property
    @abstractmethod
    def claim(self) -> Claim:
        """What is promised of E[Q(x)]: ``"unbiased"`` is |E - x| <= 2^-24 step plus the rounding of the arithmetic."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Quantize and dequantize: ``x``'s shape and dtype, cast once at the end.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf, or a range that overflows.
            InputError: ``x`` is not a floating-point tensor with a sample axis, or is empty.
        """

    def for_input(self, x: torch.Tensor) -> Callable[[Stream], torch.Tensor]:
        """``q.for_input(x)(stream)`` is ``q(x, stream)``: for many draws on one ``x``, which must not change meanwhile.

        What does not depend on the random numbers may be computed once. Errors are those of a call, here or there.
        """
        return partial(self, x)

    @abstractmethod
    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Exact E[Q(x)] before the cast to ``x``'s dtype: float64, ``x``'s shape."""

    @abstractmethod
    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """Exact elementwise Var[Q(x)]: float64, ``x``'s shape, units of ``x`` squared."""

    def noise(self, x: torch.Tensor) -> Noise:
        """What is independent in the error: exact, float64; variances of products follow from it.

        Raises:
            NotImplementedError: there is noise, and the class does not say what of it is independent.
        """
        variance = self.variance(x)
        if bool(variance.any()):
            raise NotImplementedError(f"{type(self).__name__} is random: it must define noise()")
        n, c, s = rows(x).shape
        return Noise(x.shape, variance.reshape(n, c, s), variance.new_zeros(1, 1, 1))

    @property
    def factor_groups(self) -> Groups | None:
        """Whose elements share a random factor by design; None: nobody's."""
        return None

    @property
    def ladder_levels(self) -> int | None:
        """The largest code of the grid, for inputs that try all fractions of a step; None where there is no grid."""
        return None

    def at_coordinates(self, places: torch.Tensor) -> torch.Tensor:
        """The numbers at ``places`` of a grid, counted in codes, on which ``ladder_levels`` is the largest number."""
        return places

    def bound(self, x: torch.Tensor) -> float | None:
        """A valid upper bound on the summed variance, or None."""
        return None

    def published_bound(self, x: torch.Tensor) -> float | None:
        """The paper's bound on the summed variance; :meth:`bound` unless it differs."""
        return self.bound(x)


class Transform(ABC):
    """A linear, invertible map applied to the rows before rounding and undone after it."""

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``T x`` for ``x`` ``[N, C, S]``, in ``x``'s dtype, fresh memory."""

    @abstractmethod
    def forward_extremes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``T x``, and the minimum and maximum of each of its rows, ``[N, 1, 1]``: found on the way."""

    @abstractmethod
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """``T^-1 y`` for ``y`` ``[N, C, S]``, in ``y``'s dtype; consumes its argument."""

    @abstractmethod
    def inverse_adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """``T^-T x`` for ``x`` ``[N, C, S]``, in ``x``'s dtype, fresh memory: ``x^T T^-1 = (T^-T x)^T``."""

    @abstractmethod
    def inverse_squared(self, variance: torch.Tensor) -> torch.Tensor:
        """``(T^-1)^2 v`` with the entries of ``T^-1`` squared: how independent variances propagate.

        float64; consumes its argument.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what :meth:`inverse` needs."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything about one input that does not depend on the random numbers.

    Attributes:
        shape: logical shape of the input.
        view: the shape ``[N, C, S]`` in which it is quantized.
        grid: the grid of the (transformed) rows.
        transform: what was applied before rounding, or None.
    """

    shape: torch.Size
    view: tuple[int, int, int]
    grid: Grid
    transform: Transform | None

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Real numbers, ``shape``, in the grid's dtype; consumes ``codes`` (integer-valued, view shape)."""
        y = self.grid.decode(codes)
        return (y if self.transform is None else self.transform.inverse(y)).view(self.shape)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized tensor in its storage format.

    Attributes:
        payload: packed codes, uint8.
        format: format of the codes.
        frame: grid and transform.
    """

    payload: torch.Tensor
    format: IntFormat | LogFormat
    frame: Frame

    def codes(self) -> torch.Tensor:
        """The codes, uint8, ``[N, C, S]`` (of the transformed rows, where there is a transform)."""
        return unpack(self.payload, self.format, math.prod(self.frame.view)).view(self.frame.view)

    def decode(self) -> torch.Tensor:
        """Real numbers of the original shape: float32, or float64 for float64 input."""
        return self.frame.decode(self.codes().to(self.frame.grid.step.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, grid and transform together."""
        transform = self.frame.transform
        return self.payload.numel() + self.frame.grid.nbytes + (0 if transform is None else transform.nbytes)


@dataclass(frozen=True)
class UniformQuantizer(Quantizer):
    """Rounding on a grid that is computed from the input: uniform, or uniform in a coordinate of its own.

    Args:
        bits: width of the codes, 1 to 8.

    Raises:
        InputError: ``bits`` is out of range.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        uint(self.bits)

    @property
    def format(self) -> IntFormat | LogFormat:
        """Storage format of the codes."""
        return uint(self.bits)

    @property
    def ladder_levels(self) -> int | None:
        return self.format.levels - (self.recipe.rule == "symmetric")

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """Which elements share a grid, which grid that is, and how coordinates are rounded."""

    def view_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape ``[N, C, S]`` in which a tensor of ``shape`` ``[N, ...]`` is quantized."""
        return shape[0], shape[1] if len(shape) > 1 else 1, math.prod(shape[2:])

    def transform(self, x: torch.Tensor) -> Transform | None:
        """What is applied to the view ``[N, C, S]`` of ``x`` before rounding."""
        return None

    def _transformed(self, x: torch.Tensor) -> tuple[Transform | None, Transformed | None]:
        """:meth:`transform`, and its ``forward_extremes`` of the view of ``x`` where that is known already."""
        return self.transform(x), None

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        return rows(x).view(self.view_shape(x.shape))

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        return RULES[self.recipe.rule](low, high, self.format.levels)

    def _frame(self, x: torch.Tensor) -> tuple[torch.Tensor, Frame]:
        """Grid coordinates ``[N, C, S]`` of ``x``, fresh memory, and the frame that undoes them."""
        view = self._view(x)
        transform, known = self._transformed(x)
        if transform is None:
            y, (low, high) = view, extremes(view, self.recipe.axis)
        else:
            y, low, high = known or transform.forward_extremes(view)
            native.require_finite(low, high, y)
        grid = self._grid(low, high)
        n, c, s = view.shape
        return grid.coordinates(y), Frame(x.shape, (n, c, s), grid, transform)

    @abstractmethod
    def _round(self, y: torch.Tensor, stream: Stream) -> torch.Tensor:
        """Integer-valued coordinates; consumes ``y``."""

    @abstractmethod
    def _law(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower neighbour ``k`` and P(k + 1) (float64) of :meth:`_round`."""

    def __call__(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        return self._drawn(*self._frame(x), stream).to(x.dtype)

    def for_input(self, x: torch.Tensor) -> Callable[[Stream], torch.Tensor]:
        y, frame = self._frame(x)
        return lambda stream: self._drawn(y.clone(), frame, stream).to(x.dtype)

    def _drawn(self, y: torch.Tensor, frame: Frame, stream: Stream) -> torch.Tensor:
        """The numbers that coordinates ``y`` are rounded to, in the compute dtype; consumes ``y``."""
        return frame.decode(frame.grid.codes(self._round(y, stream)))

    def encode(self, x: torch.Tensor, stream: Stream) -> Quantized:
        """The same numbers as calling, as codes in their storage format."""
        return self._encoded(*self._frame(x), stream)

    def encode_input(self, x: torch.Tensor) -> Callable[[Stream], Quantized]:
        """``q.encode_input(x)(stream)`` is ``q.encode(x, stream)``, with what :meth:`for_input` saves."""
        y, frame = self._frame(x)
        return lambda stream: self._encoded(y.clone(), frame, stream)

    def _encoded(self, y: torch.Tensor, frame: Frame, stream: Stream) -> Quantized:
        """The codes that coordinates ``y`` are rounded to; consumes ``y``."""
        codes = frame.grid.codes(self._round(y, stream)).to(torch.uint8)
        return Quantized(pack(codes, self.format), self.format, frame)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        _, frame, low, high, up = self._outcomes(x)
        mean = low.add_(up.mul_(high.sub_(low)))
        return (mean if frame.transform is None else frame.transform.inverse(mean)).view(frame.shape)

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(x).elementwise.view(x.shape)

    def noise(self, x: torch.Tensor) -> Noise:
        _, frame, low, high, up = self._outcomes(x)
        variance = high.sub_(low).square_().mul_(up * (1 - up))
        return Noise(frame.shape, variance, frame.grid.step.double(), frame.transform)

    def _outcomes(self, x: torch.Tensor) -> tuple[torch.Tensor, Frame, torch.Tensor, torch.Tensor, torch.Tensor]:
        # The two decoded outcomes are those of the real decoder, rounded in its dtype, so mean and variance are the
        # law of decode() itself and not of an idealization.
        y, frame = self._frame(x)
        k, up = self._law(y)
        grid = frame.grid
        high = grid.decode(grid.codes(k + 1)).double()
        low = grid.decode(grid.codes(k)).double()
        return y, frame, low, high, up


@dataclass(frozen=True)
class StochasticQuantizer(UniformQuantizer):
    """A uniform quantizer with stochastic rounding: the gradient quantizers.

    Args:
        random_bits: random bits per rounding decision, 1 to 32. With fewer than 24 the truncation of the probability
            biases towards the lower neighbour by up to ``2^-random_bits`` steps, and the claim says so.

    Raises:
        InputError: an option is out of range.
    """

    random_bits: int = 24
    role: ClassVar[Role] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.random_bits, bool)
            or not isinstance(self.random_bits, int)
            or not 1 <= self.random_bits <= 32
        ):
            raise InputError(f"random_bits must be an integer from 1 to 32, got {self.random_bits!r}")

    @property
    def claim(self) -> Claim:
        return "unbiased" if self.random_bits >= 24 else "biased"

    def _round(self, y: torch.Tensor, stream: Stream) -> torch.Tensor:
        return stochastic(y, stream, self.random_bits, out=y)

    def _law(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return up_probability(y, self.random_bits)


@dataclass(frozen=True)
class NearestQuantizer(UniformQuantizer):
    """A uniform quantizer that rounds to nearest: deterministic, hence biased; the forward quantizers."""

    role: ClassVar[Role] = "forward"

    @property
    def claim(self) -> Claim:
        return "biased"

    def _round(self, y: torch.Tensor, stream: Stream) -> torch.Tensor:
        return nearest(y)

    def _law(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nearest(y), torch.zeros_like(y, dtype=torch.float64)

    def bound(self, x: torch.Tensor) -> float:
        """Zero: there is nothing random."""
        return 0.0


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``[N, C, S]`` in the compute dtype (float64 for float64, float32 otherwise), contiguous.

    Raises:
        InputError: not a floating-point tensor, no sample axis, or no elements.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise InputError(f"expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or x.numel() == 0:
        raise InputError(f"expected a non-empty tensor [N, ...] with the samples first, got shape {list(x.shape)}")
    channels = x.shape[1] if x.dim() > 1 else 1
    compute = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    # Without contiguous(), a channels-last tensor would come out as a strided view.
    return compute.reshape(x.shape[0], channels, -1).contiguous()


def extremes(x: torch.Tensor, axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of each group of the view ``[N, C, S]``, with the axes that a group spans kept as size 1.

    Args:
        x: the view.
        axis: one group per index of this axis, or None for one group.

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
    """
    shape = [n if i == axis else 1 for i, n in enumerate(x.shape)]
    found = native.extremes(x, axis)
    if found is None:
        shared = [i for i in range(x.dim()) if i != axis]
        found = x.amin(shared), x.amax(shared)
    low, high = found
    native.require_finite(low, high, x)
    return low.view(shape), high.view(shape)


def step_bound(grid: Grid, low: torch.Tensor, high: torch.Tensor, per_group: float) -> float:
    """``sum over groups of per_group * (step + ulp)^2 / 4``.

    Two decoded neighbours differ by ``step`` up to the rounding of the decoder, one unit in the last place of the
    group's largest magnitude; with it the bound holds to the last bit.
    """
    largest = torch.maximum(low.abs(), high.abs()).double()
    gap = torch.where(grid.step > 0, grid.step.double() + torch.finfo(low.dtype).eps * largest, 0.0)
    return float(gap.square().sum() * (per_group / 4))
