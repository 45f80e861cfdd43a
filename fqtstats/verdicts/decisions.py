"""What a stochastic quantizer decides for each element, and what an unbiased one would: the input of the battery.

Shape legend: P elements, viewed as a matrix ``[R, C]`` of rows (samples) and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fqtstats.errors import InputError
from fqtstats.quantizers.base import UniformQuantizer
from fqtstats.random import Stream
from fqtstats.verdicts.expectation import Law, Shared
from fqtstats.verdicts.probe import StreamFunction, call, repeated, repeated_codes, replay

__all__ = ["Decisions", "of_grid", "of_groups", "of_law", "of_steps"]

_ROUNDED = 2.0**-24  # a probability in float32


@dataclass(frozen=True, slots=True)
class Decisions:
    """Elements that go up or stay down, by a random decision each.

    Attributes:
        x: the input in steps from its grid's origin, ``[R, C]`` float64; a direction in which errors may lie.
        p: P(up) of an unbiased quantizer, ``[R, C]`` float64 in [0, 1].
        tolerance: by how much P(up) may differ from ``p`` through the rounding of the arithmetic, ``[R, C]``.
        coordinates: of ``x`` on the grid, from its code 0 on, ``[R, C]``.
        ups: of a stream, which elements went up, ``[R, C]`` bool; and how many went neither up nor down.
    """

    x: torch.Tensor
    p: torch.Tensor
    tolerance: torch.Tensor
    coordinates: torch.Tensor
    ups: Callable[[Stream], tuple[torch.Tensor, int]]

    @property
    def variance(self) -> torch.Tensor:
        """``p (1 - p)``, steps squared."""
        return self.p * (1 - self.p)


def of_grid(q: UniformQuantizer, x: torch.Tensor, tolerance: float) -> Decisions:
    """The codes of a quantizer against the coordinates that its grid gives ``x`` (after its transform, if any).

    Args:
        q: the quantizer.
        x: ``[N, ...]``.
        tolerance: in steps.
    """
    coordinates, frame = q._frame(x)
    rows = frame.view[0]
    y = coordinates.double().view(rows, -1)
    low = y.floor()
    zero = 0.0 if frame.grid.zero is None else frame.grid.zero.double()
    lowest = (low.view(frame.view) + zero).view(rows, -1)
    p = y - low
    lower, upper = lowest.to(torch.int16), (lowest + 1).to(torch.int16)
    encoded = repeated_codes(q, x)

    def ups(s: Stream) -> tuple[torch.Tensor, int]:
        codes = encoded(s).codes().view(rows, -1)
        up = codes == upper
        return up, _count_others(up, codes == lower)

    return Decisions(y, p, torch.full_like(p, tolerance), lowest + p, ups)


def of_law(f: StreamFunction, x: torch.Tensor, law: Law) -> Decisions:
    """The two values of every element and their probabilities, as probing has found them.

    Whether their mean is ``x`` is not asked here: the law says it exactly, and the rounding of the arithmetic in it is
    no matter of chance. Elements with a single value have ``p = 0`` and never go up.

    Args:
        f: the callable.
        x: ``[N, ...]``.
        law: of ``f`` on ``x``.
    """
    rows = x.shape[0]
    low, high = law.low.to(x.dtype), law.high.to(x.dtype)  # exact: they are outputs
    gap = law.high - law.low
    moves = gap > 0
    upper = torch.where(moves, high, torch.nan)  # which nothing equals
    p = law.up.view(rows, -1)
    draw = repeated(f, x)

    def ups(s: Stream) -> tuple[torch.Tensor, int]:
        out = call(draw, x, s)
        up = out == upper
        return up.view(rows, -1), _count_others(up, out == low)

    along = torch.where(moves, x / torch.where(moves, gap, 1.0), 0.0)
    return Decisions(along.view(rows, -1), p, torch.full_like(p, _ROUNDED), p, ups)


def of_groups(f: StreamFunction, x: torch.Tensor, shared: Shared) -> Decisions:
    """The decisions that samples (or channels) make for all their elements, ``[K, 1]``.

    Up is out of the quietest state, the one in which elements take the fewest values: a group that was dropped. Groups
    with a single state have ``p = 0`` and never go up.

    Args:
        f: the callable.
        x: ``[N, ...]``.
        shared: what probing has found of the groups.
    """
    quiet = min(shared.states, key=lambda state: state.law.values)
    moves = (quiet.probability > 0) & (quiet.probability < 1)
    p = torch.where(moves, 1 - quiet.probability, 0.0).view(-1, 1)
    known = [state for state in shared.states if state.law.values <= 2]
    all_known = len(known) == len(shared.states)
    draw = repeated(f, x)

    def ups(s: Stream) -> tuple[torch.Tensor, int]:
        out = call(draw, x, s).double().movedim(shared.axis, 0).flatten(1)
        fits = {id(state): _within(state.law, out, shared.axis) for state in known}
        beyond = int((~torch.stack(list(fits.values())).any(0)).sum()) if all_known else 0
        quiets = fits.get(id(quiet), torch.zeros_like(moves))
        return (moves & ~quiets).view(-1, 1), beyond

    size = x.double().abs().movedim(shared.axis, 0).flatten(1).mean(1, keepdim=True)
    along = size / size.max().clamp(min=1e-300)
    return Decisions(along, p, torch.full_like(p, _ROUNDED), p, ups)


def _count_others(up: torch.Tensor, down: torch.Tensor) -> int:
    """How many are neither."""
    known = up | down
    return 0 if bool(known.all()) else int((~known).sum())


def _within(law: Law, out: torch.Tensor, axis: int) -> torch.Tensor:
    """Whether all elements of a group have one of their two values."""
    low, high = (t.movedim(axis, 0).flatten(1) for t in (law.low, law.high))
    return ((out == low) | (out == high)).all(1)


def of_steps(f: StreamFunction, x: torch.Tensor, step: float | torch.Tensor, offset: float | torch.Tensor) -> Decisions:
    """The results of a callable against the two points next to each element on a grid that its user names.

    P(up) may be off by what the arithmetic of ``x``'s dtype leaves: four units in the last place of the largest number
    that shares the step, and ``2^-24``.

    Args:
        f: the callable.
        x: ``[N, ...]``.
        step: of the grid, positive: a number, or a tensor that broadcasts against ``x``.
        offset: of any of its points, likewise.

    Raises:
        InputError: the grid has another shape or is no grid, or ``x``'s dtype cannot resolve it; while drawing: a
            result lies between its points.
    """
    rows = x.shape[0]
    steps, offsets = (_beside(x, name, value) for name, value in (("step", step), ("offset", offset)))
    if not bool((steps > 0).all()):
        raise InputError(f"grid: every step must be positive, got {float(steps.min())}")
    magnitude = torch.maximum(x.double().abs(), offsets.abs()) + steps
    shared = [axis for axis, extent in enumerate(steps.shape) if extent == 1]
    largest = magnitude.amax(shared, keepdim=True) if shared else magnitude
    tolerance = (4 * torch.finfo(x.dtype).eps * largest / steps + 2.0**-24).expand(x.shape)
    if float(tolerance.max()) >= 0.25:
        raise InputError(
            f"grid: {x.dtype} cannot resolve a step of {float(steps.min()):.3g} beside numbers of "
            f"{float(largest.max()):.3g}; give x in a wider dtype"
        )
    y = (x.double() - offsets) / steps
    low = y.floor()
    p = y - low
    may_be_lower, may_be_higher = p <= tolerance, p >= 1 - tolerance  # rounding says on which side of a point it lies

    def ups(s: Stream) -> tuple[torch.Tensor, int]:
        out = call(f, x, s)
        code = (out.double() - offsets) / steps - low
        whole = code.round()
        between = (code - whole).abs() > tolerance
        if bool(between.any()):
            i = int(between.view(-1).nonzero()[0])
            raise InputError(
                f"grid: {int(between.sum())} of {out.numel()} results are none of its points, such as element {i}: "
                f"{float(out.reshape(-1)[i]):.9g} is {float((code + low).reshape(-1)[i]):.6g} steps from the offset; "
                f"called with {replay(x, s)}"
            )
        beyond = (whole < torch.where(may_be_lower, -1, 0)) | (whole > torch.where(may_be_higher, 2, 1))
        return (whole >= 1).reshape(rows, -1), int(beyond.sum())

    y, p, off = (t.reshape(rows, -1).contiguous() for t in (y, p, tolerance))
    return Decisions(y, p, off, y, ups)


def _beside(x: torch.Tensor, name: str, value: float | torch.Tensor) -> torch.Tensor:
    """float64, with as many axes as ``x``."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"grid: its {name} must be a number or a tensor, got {value!r}") from error
    if found.dim() < x.dim():
        found = found.view(*[1] * (x.dim() - found.dim()), *found.shape)
    if found.dim() > x.dim() or any(n not in (1, m) for n, m in zip(found.shape, x.shape, strict=True)):
        raise InputError(f"grid: its {name} {list(found.shape)} does not broadcast against x {list(x.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"grid: its {name} must be finite")
    return found
