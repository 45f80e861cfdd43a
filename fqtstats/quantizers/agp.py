"""Activation gradient pruning (AGP): few samples or channels, kept at random, stand for all; one bit per element.

Source: C. Gao et al., "1-Bit FQT: Pushing the Limit of Fully Quantized Training to 1-bit" (arXiv 2408.14267), section
4.2. With R_i the range of group i (a sample; a channel in the weight-gradient product, sample-channel joint
quantization, section 4.3), b bits and G groups, group i is kept with probability ``p_i = G R_i / (b sum R)``,
independently of the others, and ``Q(X) = PSQ_b(diag(m_i / p_i) X)``: about ``G / b`` groups of b bits. Where a ``p_i``
would exceed 1, which the paper leaves open, it is 1 and the others take what is left ("water-filling").

Shape legend: ``x`` is viewed as ``[N, C, S]``; G groups along axis 0 (samples) or 1 (channels), D elements in each;
B = 2^b - 1 bins; K groups that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from fqtstats.errors import InputError, NonFiniteError
from fqtstats.formats import IntFormat, pack, uint
from fqtstats.ops.quantize import require_finite_ranges
from fqtstats.quantizers.base import Claim, Frame, Quantized, Quantizer, Role, extremes, rows
from fqtstats.quantizers.grid import Grid
from fqtstats.quantizers.noise import Factors, Groups, Noise
from fqtstats.quantizers.uniform import PCQ, PSQ
from fqtstats.random import Stream

__all__ = ["AGP", "Keep", "Pruned", "TopK", "keep_probabilities"]

_BITS = 24
"""Random bits of the decision to keep a group: its probability is a multiple of 2^-24."""


def keep_probabilities(ranges: torch.Tensor, bits: int) -> torch.Tensor:
    """``p_i = min(1, c R_i)`` with ``sum p = G / b``; 1 for every positive range where there are at most ``G / b``.

    Args:
        ranges: R, ``[G]`` float64, not negative.
        bits: b.

    Returns:
        ``[G]`` float64, multiples of 2^-24, at least that for a positive range, and 0 for a range of 0.
    """
    # A few numbers: NumPy takes a fifth of torch's time for each operation, and is the same for every device.
    p = _water_filling(ranges.cpu().numpy(), bits)
    return torch.from_numpy(p).to(ranges.device)


def _water_filling(ranges: np.ndarray, bits: int) -> np.ndarray:
    groups = ranges.size
    share = groups / bits
    positive = ranges > 0
    if np.count_nonzero(positive) <= share:
        return positive.astype(np.float64)
    # So that sums of float64 ranges are finite, and none is lost beside the largest.
    scaled = np.where(positive, np.maximum(ranges / ranges.max(), np.finfo(np.float64).tiny), 0.0)
    ordered = np.sort(scaled)[::-1]
    tail = np.cumsum(ordered[::-1])[::-1]  # of the ranges from each one on
    # The k largest have probability 1, for the smallest k with which nothing else exceeds it.
    certain = np.arange(groups)
    k = int(np.argmax(((share - certain) * ordered <= tail) & (certain <= share)))
    p = np.minimum(scaled * ((share - k) / tail[k]), 1.0)
    p = np.maximum(np.round(p * 2.0**_BITS), 1.0) * 2.0**-_BITS
    return np.where(positive, p, 0.0)


@dataclass(frozen=True, slots=True)
class Keep:
    """What becomes of the groups of one input.

    Attributes:
        probability: that a group is kept, ``[G]`` float64, multiples of 2^-24; 0 for groups of zeros.
        weight: what a group is multiplied by where it is kept, ``[G]`` float64.
    """

    probability: torch.Tensor
    weight: torch.Tensor

    @property
    def random(self) -> bool:
        """Whether anything is left to chance."""
        return bool(((self.probability > 0) & (self.probability < 1)).any())


@dataclass(frozen=True, slots=True)
class Pruned(Quantized):
    """The groups that were kept, quantized; ``frame`` is theirs, with ``1 / p`` in its grid.

    Attributes:
        index: which groups they are, ``[K]`` int64, ascending.
        probability: with which each was kept, ``[K]`` in the compute dtype.
        shape: logical shape of the whole tensor.
        axis: the axis of ``[N, C, S]`` along which the groups lie.
    """

    index: torch.Tensor
    probability: torch.Tensor
    shape: torch.Size
    axis: int

    def decode(self) -> torch.Tensor:
        kept = Quantized.decode(self)
        n, c = self.shape[0], self.shape[1] if len(self.shape) > 1 else 1
        whole = kept.new_zeros(n, c, math.prod(self.shape[2:]))
        return whole.index_copy_(self.axis, self.index, kept).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept groups' codes, grids, indices and probabilities."""
        own = sum(t.numel() * t.element_size() for t in (self.index, self.probability))
        return self.payload.numel() + self.frame.grid.nbytes + own


@dataclass(frozen=True)
class AGP(Quantizer):
    """Activation gradient pruning: keeps about one group in ``bits``, at that many bits, and divides it by ``p``.

    Args:
        bits: b, 1 to 8; the paper has 2, 4 and 8, and 4 is best of them. With 1 nothing is dropped.
        random_bits: random bits per rounding decision; a group's fate is decided by 24.
        groups: whether samples are kept or dropped, or channels (for the weight gradient, whose product then stays
            integer).

    The elements of a group share its factor ``m / p``, whose variance is ``(1 - p) / p``. A group without a range that
    is not zero is kept for certain, exactly.

    Raises:
        InputError: an option is out of range.
    """

    bits: int = 4
    random_bits: int = 24
    groups: Groups = "sample"
    name: ClassVar[str] = "agp"
    role: ClassVar[Role] = "gradient"

    def __post_init__(self) -> None:
        if self.groups not in ("sample", "channel"):
            raise InputError(f"groups must be 'sample' or 'channel', got {self.groups!r}")
        PSQ(self.bits, self.random_bits)  # raises InputError for what is out of range

    @property
    def rounding(self) -> PSQ | PCQ:
        """What rounds the groups that are kept."""
        return (PSQ if self.groups == "sample" else PCQ)(self.bits, self.random_bits)

    @property
    def format(self) -> IntFormat:
        """Storage format of the codes."""
        return uint(self.bits)

    @property
    def axis(self) -> int:
        """The axis of ``[N, C, S]`` that has a group per index."""
        return 0 if self.groups == "sample" else 1

    @property
    def claim(self) -> Claim:
        return self.rounding.claim

    @property
    def factor_groups(self) -> Groups:
        return self.groups

    @property
    def ladder_levels(self) -> int:
        return self.format.levels

    def keep(self, x: torch.Tensor) -> Keep:
        """Which groups of ``x`` are kept, and with what weight.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf, or a range that overflows.
        """
        return self.keep_of(*extremes(rows(x), self.axis))

    def keep_of(self, low: torch.Tensor, high: torch.Tensor) -> Keep:
        """:meth:`keep` from the groups' minimum and maximum.

        Raises:
            NonFiniteError: a range overflows.
        """
        ranges = require_finite_ranges(low, high).view(-1)
        constant = (ranges == 0) & (low.view(-1) != 0)
        return self._keep(torch.where(constant, 1.0, self._probabilities(ranges)))

    def _probabilities(self, ranges: torch.Tensor) -> torch.Tensor:
        return keep_probabilities(ranges, self.bits)

    def _keep(self, probability: torch.Tensor) -> Keep:
        return Keep(probability, 1 / torch.where(probability > 0, probability, 1.0))

    def _prepared(self, x: torch.Tensor) -> tuple[torch.Tensor, Frame, Keep]:
        """Coordinates of all groups on grids of their own; the frame that decodes them if they are kept."""
        y, frame = self.rounding._frame(x)
        keep = self.keep(x)
        return y, replace(frame, grid=self.weighted(frame.grid, keep, x.dtype)), keep

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """The grids of all groups, from their minimum and maximum."""
        return self.rounding._grid(low, high)

    def weighted(self, grid: Grid, keep: Keep, dtype: torch.dtype) -> Grid:
        """The grids that decode groups of a tensor of ``dtype`` if they are kept.

        Raises:
            NonFiniteError: numbers exceed ``dtype`` after the division by p.
        """
        view = [1, 1, 1]
        view[self.axis] = -1
        weight = keep.weight.view(view)
        assert grid.offset is not None
        # All of a group's numbers lie between its ends, which are its first and last point.
        ends = [grid.offset.double(), grid.offset.double() + grid.levels * grid.step.double()]
        largest = torch.stack([end.abs() * weight for end in ends]).amax(0)
        beyond = int(((largest > torch.finfo(dtype).max) & (weight > 1)).sum())
        if beyond:
            raise NonFiniteError(
                f"expected numbers that {dtype} holds after division by p, got {beyond} of {largest.numel()} "
                f"{self.groups}s that exceed it; rescale the loss",
                count=beyond,
                numel=largest.numel(),
            )
        return replace(
            grid,
            step=(grid.step.double() * weight).to(grid.step.dtype),
            offset=(grid.offset.double() * weight).to(grid.step.dtype),
        )

    def _kept(self, keep: Keep, stream: Stream) -> torch.Tensor:
        """Which groups are kept in this draw, ``[G]`` bool."""
        p = keep.probability
        if not keep.random:
            return p > 0
        bits = stream.child("mask").bits(p.shape, _BITS, dtype=torch.int32, device=p.device)
        return bits < (p * 2.0**_BITS).to(torch.int32)

    def drawn(self, keep: Keep, stream: Stream) -> torch.Tensor:
        """Which groups are kept in this draw, ``[K]`` int64, ascending."""
        return torch.nonzero(self._kept(keep, stream)).view(-1)

    def _codes(
        self, y: torch.Tensor, frame: Frame, keep: Keep, stream: Stream
    ) -> tuple[torch.Tensor, Frame, torch.Tensor]:
        # Consumes y.
        index = self.drawn(keep, stream)
        # Element i takes number i, whichever groups are kept.
        rounded = self.rounding._round(y, stream).index_select(self.axis, index)
        grid = _of_groups(frame.grid, self.axis, index)
        view = (rounded.shape[0], rounded.shape[1], rounded.shape[2])
        return grid.codes(rounded), Frame(rounded.shape, view, grid, None), index

    def __call__(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        return self._whole(*self._prepared(x), stream).to(x.dtype)

    def for_input(self, x: torch.Tensor) -> Callable[[Stream], torch.Tensor]:
        y, frame, keep = self._prepared(x)
        return lambda stream: self._whole(y.clone(), frame, keep, stream).to(x.dtype)

    def _whole(self, y: torch.Tensor, frame: Frame, keep: Keep, stream: Stream) -> torch.Tensor:
        # Kept groups between zeros, in the compute dtype; consumes y.
        codes, kept, index = self._codes(y, frame, keep, stream)
        return codes.new_zeros(frame.view).index_copy_(self.axis, index, kept.decode(codes)).view(frame.shape)

    def encode(self, x: torch.Tensor, stream: Stream) -> Pruned:
        """The same numbers as calling, as codes of the groups that are kept."""
        y, prepared, keep = self._prepared(x)
        codes, frame, index = self._codes(y, prepared, keep, stream)
        probability = keep.probability[index].to(codes.dtype)
        payload = pack(codes.to(torch.uint8), self.format)
        return Pruned(payload, self.format, frame, index, probability, x.shape, self.axis)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return self._moments(x)[1].view(x.shape)

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(x).elementwise.view(x.shape)

    def noise(self, x: torch.Tensor) -> Noise:
        """``E Var(Q | m)`` of the roundings, and the factors ``m / p``."""
        p, mean, variance, gap = self._moments(x)
        factors = Factors(
            groups=self.groups,
            variance=torch.where(p > 0, (1 - p) / torch.where(p > 0, p, 1.0), 0.0),
            gap=torch.where((p > 0) & (p < 1), 1 / torch.where(p > 0, p, 1.0), 0.0),
            signal=mean,
        )
        return Noise(x.shape, variance, gap, factors=factors)

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``p``, broadcasting; mean, variance of the roundings, and their gap, ``[N, C, S]``; float64."""
        y, frame, keep = self._prepared(x)
        k, up = self.rounding._law(y)
        grid = frame.grid
        high = grid.decode(grid.codes(k + 1)).double()
        low = grid.decode(grid.codes(k)).double()
        view = [1, 1, 1]
        view[self.axis] = -1
        p = keep.probability.view(view)
        gap = high.sub_(low)
        return p, low.add_(up * gap).mul_(p), gap.square().mul_(up * (1 - up)).mul_(p), gap

    def bound(self, x: torch.Tensor) -> float:
        """``sum_i [D step_i^2 / 4 + ||x_i||^2 (1 - p_i)] / p_i``: what is rounded, and what is dropped."""
        view = rows(x)
        low, high = extremes(view, self.axis)
        grid, keep = self.rounding._grid(low, high), self.keep(x)
        per_group = view.numel() / keep.probability.numel()
        # A decoded number is off by a few units in the last place of its group's largest.
        largest = torch.maximum(low.abs(), high.abs()).double().view(-1)
        info, p = torch.finfo(view.dtype), keep.probability
        ulp = info.eps * largest
        # Step and offset are rounded once more when they are divided by p: of tiny numbers by that much, times p.
        tiny = info.smallest_normal * info.eps * p
        step = grid.step.double().view(-1)
        gap = torch.where(step > 0, step + ulp + 2 * tiny, 0.0)
        size = view.double().square().sum([axis for axis in range(3) if axis != self.axis]).sqrt()
        size += (8 * ulp + (self.format.levels + 2) * tiny) * math.sqrt(per_group)
        each = per_group / 4 * gap.square() + (1 - p) * size.square()
        return float((each * keep.weight.square() * p).sum()) * (1 + 1e-6)

    def published_bound(self, x: torch.Tensor) -> float:
        """``D / (4 B^2)`` times the sum of the ``G / b`` largest ``R_i^2`` (section 4.2).

        It leaves out what dropping groups does and is violated.
        """
        view = rows(x)
        low, high = extremes(view, self.axis)
        ranges = torch.sort(require_finite_ranges(low, high).view(-1), descending=True).values
        largest = ranges[: ranges.numel() // self.bits]
        return float(largest.square().sum() * (view.numel() / ranges.numel() / (4 * self.format.levels**2)))


@dataclass(frozen=True)
class TopK(AGP):
    """Negative control: the ``G / b`` groups of the largest ranges, always the same, and not divided by anything.

    Everything else of the gradient is lost. It is what AGP's public code does.
    """

    name: ClassVar[str] = "topk"

    @property
    def claim(self) -> Claim:
        return "biased"

    def _probabilities(self, ranges: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(ranges)
        largest = torch.sort(ranges, descending=True, stable=True).indices[: max(1, ranges.numel() // self.bits)]
        kept[largest] = 1.0
        return kept


def _of_groups(grid: Grid, axis: int, index: torch.Tensor) -> Grid:
    """The grids of some groups."""
    assert grid.offset is not None

    def chosen(t: torch.Tensor) -> torch.Tensor:
        return t.index_select(axis, index)

    return replace(
        grid,
        step=chosen(grid.step),
        scale=chosen(grid.scale),
        offset=chosen(grid.offset),
        prescale=None if grid.prescale is None else chosen(grid.prescale),
    )
