"""Grids: how real numbers become grid coordinates and codes become real numbers again.

Shape legend: a tensor is viewed as ``[N, C, S]`` (sample, channel, space); a grid has one entry per group of elements
and broadcasts against that view.

The arithmetic is prescribed operation by operation, so that every implementation gives the same codes bit for bit:
per-group numbers are computed in float64 and rounded once to the compute dtype (float32, or float64 for float64
input); per element there is one subtraction and one multiplication on the way in (no fused multiply-add), and one
multiplication and one addition on the way out. Nothing adds an absolute epsilon. The coordinate of a logarithmic grid
is linear between its points, so that rounding it up or down at random is what rounding between them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fqtstats.ops.quantize import Rule, require_finite_ranges

__all__ = ["RULES", "Grid", "LogGrid", "affine", "logarithmic", "mirrored", "symmetric", "zero_on_grid"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Grid points ``(code - zero) * step + offset`` for ``code = 0 .. levels``.

    Attributes:
        levels: the largest code, ``B = 2^bits - 1`` (a symmetric grid leaves the last one unused).
        step: distance of neighbouring points, ``[., ., .]``; 0 in a degenerate group (all elements equal), where
            ``offset`` is the element itself.
        scale: ``1 / (step * prescale)``, correctly rounded; 0 in a degenerate group.
        offset: real number at ``code == zero``, or None where it is 0 everywhere.
        zero: integer-valued code of ``offset``, or None where it is 0 everywhere.
        prescale: exact power of two that lifts tiny groups into the normal range, where ``1 / step`` would overflow;
            None where it is 1 everywhere.
    """

    levels: int
    step: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    zero: torch.Tensor | None
    prescale: torch.Tensor | None

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Position of ``x`` on the grid in steps, relative to ``zero``: ``((x - offset) * prescale) * scale``.

        Fresh memory, ``x``'s shape.
        """
        # Distances are taken from `offset`, not from the lowest point, so that a grid with zero on it resolves numbers
        # near zero to 2^-24 of a step however large its range is.
        y = x if self.offset is None else x - self.offset
        if self.prescale is not None:
            y = y * self.prescale
        return torch.mul(y, self.scale, out=None if y is x else y)

    def codes(self, rounded: torch.Tensor) -> torch.Tensor:
        """Codes (integer-valued, ``0 .. levels``) of rounded coordinates; consumes its argument."""
        if self.zero is not None:
            rounded = rounded.add_(self.zero)
        return rounded.clamp_(0, self.levels)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Real numbers of integer-valued codes, in the grid's dtype; consumes its argument."""
        if self.zero is not None:
            codes = codes.sub_(self.zero)
        x = codes.mul_(self.step)
        return x if self.offset is None else x.add_(self.offset)

    @property
    def magnitudes(self) -> int:
        """Of a logarithmic grid, how many there are, unless it is one (evenly spaced points); else 0."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of what decoding needs: step, offset and zero."""
        return sum(t.numel() * t.element_size() for t in (self.step, self.offset, self.zero) if t is not None)


@dataclass(frozen=True, slots=True)
class LogGrid(Grid):
    """Grid points ``sign(k) 2^(|k| - 1) step + offset`` for ``k = code - zero``, and ``offset`` itself for ``k = 0``.

    ``step`` is the smallest magnitude, alpha. A number of magnitude ``z`` alpha has the coordinate ``z`` up to 1, and
    ``n + z / 2^n`` in the octave ``2^n <= z <= 2^(n + 1)``, with its sign.
    """

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Coordinate of ``x``, fresh memory: by one multiplication ``z = |x| scale``, and one addition ``n + z / 2^n``.

        ``z / 2^n`` is exact.
        """
        z = Grid.coordinates(self, x)
        sign = z.sign()
        z.abs_()
        octave = torch.frexp(z).exponent.sub_(1).clamp_(min=0)
        return torch.ldexp(z, -octave).add_(octave).mul_(sign)

    @property
    def magnitudes(self) -> int:
        return self.levels // 2 if self.levels > 2 else 0

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        assert self.zero is not None
        k = codes.sub_(self.zero)
        x = torch.ldexp(k.sign(), (k.abs() - 1).clamp_(min=0)).mul_(self.step)
        return x if self.offset is None else x.add_(self.offset)


def affine(low: torch.Tensor, high: torch.Tensor, levels: int) -> Grid:
    """The grid ``low + j (high - low) / B``: both ends are grid points, zero in general is not.

    Args:
        low, high: per-group minimum and maximum in the compute dtype, shape of the groups.
        levels: ``B``.

    Raises:
        NonFiniteError: a range is not finite.
    """
    return affine_of(require_finite_ranges(low, high), low, levels)


def affine_of(span: torch.Tensor, low: torch.Tensor, levels: int) -> Grid:
    """:func:`affine` of groups whose ranges are known, float64 and finite."""
    return _grid(span / levels, span == 0, levels, offset=low, zero=None, dtype=low.dtype)


def zero_on_grid(low: torch.Tensor, high: torch.Tensor, levels: int) -> Grid:
    """The finest grid of ``levels`` bins that covers ``[min(0, low), max(0, high)]`` and has zero as a point.

    Zero is grid point ``k``. The step ``max(-low / k, high / (B - k))`` is smallest at one of the two integers around
    ``k* = -low B / (high - low)``, with ``k >= 1`` if ``low < 0`` and ``k <= B - 1`` if ``high > 0``. With ``B = 1``
    and both signs present no such grid exists: those groups get the affine one.

    Raises:
        NonFiniteError: a range is not finite.
    """
    span = require_finite_ranges(low, high)
    minimum, maximum = low.double().clamp(max=0), high.double().clamp(min=0)
    lowest = (minimum < 0).double()
    highest = levels - (maximum > 0).double()
    ideal = torch.where(maximum > minimum, -minimum * levels / (maximum - minimum), 0.0)
    candidates = [torch.minimum(torch.maximum(ideal.floor() + i, lowest), highest.clamp(min=lowest)) for i in (0, 1)]
    first, second = (_covering_step(minimum, maximum, k, levels) for k in candidates)
    zero = torch.where(second < first, candidates[1], candidates[0])
    step = torch.minimum(first, second)
    infeasible = lowest > highest
    # A group of equal elements is represented exactly by its own value, whatever rounding `step` suffers.
    from_low = (span == 0) | infeasible
    step = torch.where(from_low, span / levels, step)
    zero = torch.where(from_low, 0.0, zero)
    offset = torch.where(from_low, low, torch.zeros_like(low)) if bool(from_low.any()) else None
    return _grid(step, span == 0, levels, offset=offset, zero=zero, dtype=low.dtype)


def symmetric(low: torch.Tensor, high: torch.Tensor, levels: int) -> Grid:
    """The grid of ``B - 1`` bins (``B`` points) that is symmetric about zero: ``step = max|x| / ((B - 1) / 2)``.

    Raises:
        NonFiniteError: a range is not finite.
    """
    span = require_finite_ranges(low, high)
    half = (levels - 1) // 2
    largest = torch.maximum(low.abs(), high.abs()).double()
    zero = torch.where(span == 0, 0.0, float(half))
    offset = torch.where(span == 0, low, torch.zeros_like(low)) if bool((span == 0).any()) else None
    return _grid(largest / half, span == 0, levels, offset=offset, zero=zero, dtype=low.dtype)


def mirrored(low: torch.Tensor, high: torch.Tensor, levels: int) -> Grid:
    """The affine grid from ``-m`` to ``m = max|x|``: zero lies in the middle of a bin.

    Raises:
        NonFiniteError: ``2 m`` is not finite.
    """
    require_finite_ranges(low, high)
    largest = torch.maximum(low.abs(), high.abs())
    constant = low == high
    return affine(torch.where(constant, low, -largest), torch.where(constant, high, largest), levels)


def logarithmic(low: torch.Tensor, high: torch.Tensor, levels: int) -> LogGrid:
    """The logarithmic grid of ``levels / 2`` magnitudes whose largest one is ``max|x|``."""
    magnitudes = levels // 2
    largest = torch.maximum(low.abs(), high.abs()).double()
    constant = low == high
    grid = _grid(
        largest / 2.0 ** (magnitudes - 1),
        constant,
        levels,
        offset=torch.where(constant, low, torch.zeros_like(low)) if bool(constant.any()) else None,
        zero=torch.full_like(largest, float(magnitudes)),
        dtype=low.dtype,
    )
    return LogGrid(grid.levels, grid.step, grid.scale, grid.offset, grid.zero, grid.prescale)


def _covering_step(minimum: torch.Tensor, maximum: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    below = torch.where(minimum < 0, -minimum / zero, 0.0)
    above = torch.where(maximum > 0, maximum / (levels - zero), 0.0)
    return torch.maximum(below, above)


def _grid(
    step: torch.Tensor,
    constant: torch.Tensor,
    levels: int,
    *,
    offset: torch.Tensor | None,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
) -> Grid:
    lift = 2.0**100 if dtype == torch.float32 else 2.0**1000
    if not bool((constant | (step < 1 / lift)).any()):
        step = step.to(dtype)
        return Grid(levels, step, (1 / step.double()).to(dtype), offset, None if zero is None else zero.to(dtype), None)
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal
    # A subnormal step is rounded up to a multiple of the smallest number: rounded down, the grid would no longer reach
    # the largest element and clipping would bias it. In float64 the quotient itself is already rounded: one more.
    multiple = torch.ceil(step / smallest) + (1 if dtype == torch.float64 else 0)
    step = torch.where(constant, 0.0, torch.where(step < info.smallest_normal, multiple * smallest, step))
    step = step.to(dtype).double()
    tiny = (step > 0) & (step < 1 / lift)
    prescale = torch.where(tiny, torch.full_like(step, lift), torch.ones_like(step))
    scale = torch.where(step > 0, 1 / (step * prescale), 0.0)
    return Grid(
        levels=levels,
        step=step.to(dtype),
        scale=scale.to(dtype),
        offset=offset,
        zero=None if zero is None else zero.to(dtype),
        prescale=prescale.to(dtype) if bool(tiny.any()) else None,
    )


RULES: Mapping[Rule, Callable[[torch.Tensor, torch.Tensor, int], Grid]] = {
    "affine": affine,
    "zero_on_grid": zero_on_grid,
    "symmetric": symmetric,
    "mirrored": mirrored,
    "logarithmic": logarithmic,
}
"""How a grid follows from the groups' minimum and maximum and the largest code."""
