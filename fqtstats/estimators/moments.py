"""Streaming moments of the gradient error, exactly associative.

Shape legend: P parameters with M_p elements each; n draws. ``e_i`` is draw i's error, FQT gradient minus QAT gradient
(never the raw gradient: the difference of two large sums would cancel).

The sum of the errors is kept in int64 fixed point, whose addition is associative; everything else is a small record per
draw. However the draws are split over calls or processes and in whatever order they are merged, the result is the same
bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fqtstats.errors import InputError
from fqtstats.estimators.sketch import Sketch

__all__ = ["ErrorMoments", "squared_norm"]

# Resolution and headroom of the fixed point, relative to the largest element of gradient and calibration error: steps
# of 2^-32, single errors up to 2^20, and room for 2^10 of those.
_RESOLUTION = 32
_LARGEST = 2.0**52
_RECORDS = ("norms", "parts", "own", "sketches")
_CHUNK = 1 << 20  # elements converted at a time, so that temporaries stay small beside the gradient


def squared_norm(x: torch.Tensor) -> float:
    """``||x||^2`` accumulated in float64."""
    # In pieces: a norm in another dtype converts the whole tensor first.
    pieces = x.reshape(-1).split(_CHUNK)
    return math.fsum(float(torch.linalg.vector_norm(piece, dtype=torch.float64).square()) for piece in pieces)


class ErrorMoments:
    """Accumulates the errors of gradient draws.

    Args:
        names: names of the parameters.
        reference: QAT gradient, one tensor per parameter.
        calibration: error of one extra draw; with ``reference`` it fixes the fixed-point scale of each parameter.
        sketch: linear functionals of the error that are kept per draw, or None.

    Attributes:
        norms: per draw, ``[P]``: ``||e_i||^2``.
        parts: per draw, ``[2, P]``: squared norms of the parts of ``e_i`` from the weight-gradient and the
            input-gradient quantizers.
        own: per draw, ``[P]``: exact variance of the first of these parts, given the incoming gradients of the draw.
        sketches: per draw, ``[W]``.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference: Sequence[torch.Tensor],
        calibration: Sequence[torch.Tensor],
        sketch: Sketch | None,
    ) -> None:
        self.names = list(names)
        self.sketch = sketch
        largest = [max(float(g.abs().max()), float(e.abs().max())) for g, e in zip(reference, calibration, strict=True)]
        floor = max(largest) * 2.0**-40 or 1.0
        self.exponents = [math.frexp(max(value, floor))[1] - _RESOLUTION for value in largest]
        self.sums = [torch.zeros(g.numel(), dtype=torch.int64, device=g.device) for g in reference]
        self.norms: dict[int, npt.NDArray[np.float64]] = {}
        self.parts: dict[int, npt.NDArray[np.float64]] = {}
        self.own: dict[int, npt.NDArray[np.float64]] = {}
        self.sketches: dict[int, npt.NDArray[np.float64]] = {}

    def __len__(self) -> int:
        """Number of draws."""
        return len(self.norms)

    @property
    def largest(self) -> npt.NDArray[np.float64]:
        """Largest element of gradient and calibration error, rounded up to a power of two, ``[P]``."""
        return np.array([2.0 ** (exponent + _RESOLUTION) for exponent in self.exponents])

    @property
    def draws(self) -> list[int]:
        """Indices of the draws seen, ascending."""
        return sorted(self.norms)

    def add(
        self,
        draw: int,
        errors: Sequence[torch.Tensor],
        parts: npt.NDArray[np.float64] | None = None,
        own: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Add one draw.

        Args:
            draw: its index; each may be added once.
            errors: ``e_i``, one tensor per parameter.
            parts, own: see the class.

        Raises:
            InputError: the draw was added before, or an error is too large for the fixed point (or not finite).
        """
        if draw in self.norms:
            raise InputError(f"draw {draw} was added before; every draw counts once")
        for name, exponent, e in zip(self.names, self.exponents, errors, strict=True):
            if not float(e.abs().max()) * 2.0**-exponent < _LARGEST:
                raise InputError(
                    f"draw {draw}: the error of {name!r} is not finite or over {_LARGEST * 2.0**exponent:.2g}, which "
                    "is 2^20 times what the gradient and a first draw have; use more bits"
                )
        norms = np.array([squared_norm(e) for e in errors])
        sketch = None if self.sketch is None else self.sketch(errors)
        added = 0
        try:
            for part, increment in self._increments(errors):
                part.add_(increment)
                added += 1
            if parts is not None:
                self.parts[draw] = parts
            if own is not None:
                self.own[draw] = own
            if sketch is not None:
                self.sketches[draw] = sketch
            self.norms[draw] = norms
        except BaseException:
            # Interrupted half-way: take back what was added (exact), so that the state stays one of whole draws.
            for record in _RECORDS:
                getattr(self, record).pop(draw, None)
            for part, increment in itertools.islice(self._increments(errors), added):
                part.sub_(increment)
            raise

    def _increments(self, errors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of the sums and what an error adds to each."""
        for total, exponent, e in zip(self.sums, self.exponents, errors, strict=True):
            for part, chunk in _chunks(total, e.reshape(-1)):
                yield part, chunk.double().mul_(2.0**-exponent).round_().long()

    def merge(self, other: ErrorMoments) -> None:
        """Add the draws of another accumulator of the same gradient.

        Raises:
            InputError: the two do not belong together, or share a draw.
        """
        if self.names != other.names or self.exponents != other.exponents:
            raise InputError("expected accumulators of the same gradient and seed; these differ in parameters or scale")
        shared = self.norms.keys() & other.norms.keys()
        if shared:
            raise InputError(f"draws {sorted(shared)[:5]} are in both accumulators; every draw counts once")
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine.add_(theirs)
        self.norms |= other.norms
        self.parts |= other.parts
        self.own |= other.own
        self.sketches |= other.sketches

    def mean_norm_sq(self) -> npt.NDArray[np.float64]:
        """``||sum_i e_i||^2 / n^2``, ``[P]``: the squared norm of the mean error (biased upwards by variance / n)."""
        n = len(self.norms)
        result = []
        for total, exponent in zip(self.sums, self.exponents, strict=True):
            value = math.fsum(float(part.double().square().sum()) for part, _ in _chunks(total, total))
            result.append(value * 2.0 ** (2 * exponent) / n**2)
        return np.array(result)

    def mean_error(self, index: int) -> torch.Tensor:
        """``sum_i e_i / n`` of one parameter, flat, float64."""
        return self.sums[index].double().mul_(2.0 ** self.exponents[index] / len(self.norms))

    def stacked(self, record: str) -> npt.NDArray[np.float64]:
        """``norms`` or ``own`` ``[n, P]``, ``parts`` ``[n, 2, P]`` or ``sketches`` ``[n, W]``, by draw index."""
        rows: dict[int, npt.NDArray[np.float64]] = getattr(self, record)
        return np.stack([rows[draw] for draw in self.draws])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays; see :meth:`load`."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "exponents": np.array(self.exponents),
            "draws": np.array(self.draws, dtype=np.int64),
            **{f"sum.{i}": total.cpu().numpy() for i, total in enumerate(self.sums)},
        }
        for record in _RECORDS:
            if getattr(self, record):
                arrays[record] = self.stacked(record)
        return arrays

    def load(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from a saved :meth:`state`.

        Raises:
            InputError: the state belongs to another gradient.
        """
        if arrays["exponents"].tolist() != self.exponents:
            raise InputError(
                "the saved state belongs to another gradient (model, data, seed or library versions differ)"
            )
        draws = arrays["draws"].tolist()
        for i, total in enumerate(self.sums):
            total.copy_(torch.from_numpy(arrays[f"sum.{i}"]))
        for record in _RECORDS:
            if record in arrays:
                setattr(self, record, dict(zip(draws, arrays[record], strict=True)))


def _chunks(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(first.split(_CHUNK), second.split(_CHUNK), strict=True)
