"""Block Householder quantizer (BHQ).

Source: J. Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks" (arXiv
2010.14298), section 4.2 and appendix D. The gradient of a well-trained network has few large rows. BHQ groups each
large row (the leader) with small ones and spreads it over the group with a Householder reflection, so that the large
row's range, and with it its quantization noise, is shared.

Where rows are not Gaussian the published groups can have more variance than the rows alone (PSQ), and the published
scales leave some on the table. ``grouping="adaptive"`` (ours, :mod:`fqtstats.quantizers.adaptive`) takes the better of
three maps for each group, by its exact variance on this input.

Shape legend: N rows (samples), D elements per row, B = 2^bits - 1 bins; a group has n rows, leader first;
lambda_i is the range (maximum - minimum) of row i, lambda_1 of a leader, lambda_2 of its group's largest small row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch

from fqtstats.errors import InputError
from fqtstats.ops.householder import Groups as NativeGroups
from fqtstats.ops.householder import householder_adapt, householder_forward, householder_groups, householder_inverse
from fqtstats.ops.quantize import Recipe, require_finite_ranges
from fqtstats.quantizers.adaptive import adapt
from fqtstats.quantizers.base import StochasticQuantizer, Transform, Transformed, extremes, rows

__all__ = ["BHQ", "AdaptiveBHQ", "BlockHouseholder", "Groups", "group_rows", "prefix_sums"]

_PIECE = 1 << 16
"""Elements at a time on a CPU: what is subtracted stays in the cache."""


@dataclass(frozen=True, slots=True)
class Groups:
    """A partition of the rows; all tensors are ``[N]``, in group order (groups contiguous, leader first).

    Attributes:
        order: row index of each position.
        rank: place within its group, 0 for the leader.
        size: n, number of rows of its group.
        leader_range: lambda_1 of its group, float64.
        small_range: lambda_2 of its group, float64; 0 in a group of one row.
    """

    order: torch.Tensor
    rank: torch.Tensor
    size: torch.Tensor
    leader_range: torch.Tensor
    small_range: torch.Tensor


def group_rows(ranges: torch.Tensor) -> Groups:
    """StatQuant's grouping: as many leaders as have a proportional share of the small rows.

    With rows sorted by range, descending, ``m`` is the smallest number >= 1 of small rows with
    ``m lambda_{N-m} >= sum_{i <= N-m} lambda_i``; the first ``G = N - m`` rows are leaders, and leader ``i`` takes
    small rows ``c_{i-1} + 1 .. c_i`` with ``c_i = round(m sum_{j<=i} lambda_j / sum_{j<=G} lambda_j)``. Every group
    has at least two rows.

    Args:
        ranges: lambda, ``[N]`` float64, N >= 2, at least one of them positive.
    """
    n_rows = ranges.numel()
    device = ranges.device
    sorted_ranges, by_range = torch.sort(ranges, descending=True, stable=True)
    cumulative = prefix_sums(sorted_ranges)
    leaders_if = torch.arange(1, n_rows, device=device)  # G = 1 .. N - 1
    enough = (n_rows - leaders_if) * sorted_ranges[:-1] >= cumulative[:-1]
    leaders = int(leaders_if[enough].max())
    small = n_rows - leaders
    index = torch.arange(1, leaders + 1, device=device)
    # Round half up. In exact arithmetic neighbouring c differ by at least 1 and c_G = m; the clamps keep that true
    # when a quotient lies within rounding of a half.
    ends = torch.floor(small * cumulative[:leaders] / cumulative[leaders - 1] + 0.5).long()
    ends = torch.cummax(ends - index, 0).values + index
    ends = torch.minimum(torch.maximum(ends, index), small - (leaders - index))
    ends[-1] = small
    group_of_small = torch.searchsorted(ends, torch.arange(1, small + 1, device=device))
    group = torch.cat([index - 1, group_of_small])  # of each row in sorted order
    position = torch.argsort(group, stable=True)  # leaders come first in sorted order, hence first in their group
    group = group[position]
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)) + 1
    starts = torch.cumsum(sizes, 0) - sizes
    ordered = sorted_ranges[position]
    return Groups(
        order=by_range[position],
        rank=torch.arange(n_rows, device=device) - starts[group],
        size=sizes[group],
        leader_range=ordered[starts][group],
        small_range=ordered[starts + 1][group],
    )


def prefix_sums(values: torch.Tensor) -> torch.Tensor:
    """Inclusive prefix sums in a prescribed order (Hillis and Steele), the same on every device."""
    sums = values.clone()
    shift = 1
    while shift < sums.numel():
        sums = torch.cat([sums[:shift], sums[shift:] + sums[:-shift]])
        shift *= 2
    return sums


def small_row_scale(groups: Groups) -> torch.Tensor:
    """``t = ((n - 1) lambda_1 / (sqrt(n) kappa lambda_2))^(1/3)`` with ``kappa = max |H_ij|``; 1 where lambda_2 = 0.

    ``[N]`` float64. This ``kappa`` brings the variance within 6 % of the best ``t``; ``sqrt(n)`` instead costs up to
    95 %.
    """
    n = groups.size.double()
    corner = 1 / (n - n.sqrt())  # minus the off-diagonal entries of H, which exist from n = 3 on
    kappa = torch.maximum(1 / n.sqrt(), (1 - corner).abs())
    kappa = torch.where(groups.size > 2, torch.maximum(kappa, corner), kappa)
    ratio = torch.where(groups.small_range > 0, groups.leader_range / groups.small_range, 1.0)
    # pow() may differ in its last bit from device to device; 24 significant bits are the same everywhere.
    mantissa, exponent = torch.frexp(((n - 1) / (n.sqrt() * kappa) * ratio).pow(1 / 3))
    t = torch.ldexp((mantissa * 2.0**24).round(), exponent - 24)
    return torch.where(groups.small_range > 0, t, 1.0)


@dataclass(frozen=True)
class BlockHouseholder(Transform):
    """``T = H diag(s, s t, .., s t)`` in every group, rows in group order; the identity in groups of one row.

    ``H = I - 2 v v^T`` with ``v`` proportional to ``1 / sqrt(n) - e_1``: its first row and column are ``1 / sqrt(n)``,
    the others ``delta_ij - 1 / (n - sqrt n)``. It is applied as a rank-1 update, O(N D).

    Shape legend: K groups that are transformed, M small rows in them.

    Attributes:
        order: row index of each position, ``[N]``.
        heads: position of each transformed group's leader, ``[K]``.
        sizes: n of each transformed group, ``[K]`` float64.
        row_scale: ``s`` of a leader, ``s t`` of a small row, 1 elsewhere, ``[N, 1, 1]`` in the compute dtype.
    """

    order: torch.Tensor
    heads: torch.Tensor
    sizes: torch.Tensor
    row_scale: torch.Tensor

    @staticmethod
    def of(groups: Groups, dtype: torch.dtype) -> BlockHouseholder:
        """The transform of a grouping.

        Where ``lambda_2 = 0`` (``t`` infinite) the group is left alone: its small rows are constant and exactly
        representable by themselves. ``s`` is a power of two that keeps tiny groups out of the subnormal range and the
        sums of huge ones finite; it cancels.
        """
        transformed = groups.small_range > 0
        # `edge` bounds the ranges that need no help. `lift` leaves room for t, which is below 2^34 in the tiny groups
        # of float32 (largest ratio of ranges 2^89) and below 2^165 in those of float64.
        edge, lift = (2.0**60, 2.0**80) if dtype == torch.float32 else (2.0**600, 2.0**800)
        s = torch.ones_like(groups.leader_range)
        s = torch.where(groups.leader_range < 1 / edge, lift, torch.where(groups.leader_range > edge, 1 / edge, s))
        scale = torch.where(groups.rank > 0, s * small_row_scale(groups), s)
        scale = torch.where(transformed, scale, 1.0)
        heads = torch.nonzero(transformed & (groups.rank == 0)).view(-1)
        return BlockHouseholder(
            order=groups.order,
            heads=heads,
            sizes=groups.size[heads].double(),
            row_scale=scale.to(dtype).view(-1, 1, 1),
        )

    @staticmethod
    def of_ranges(ranges: torch.Tensor, dtype: torch.dtype) -> BlockHouseholder:
        """The transform of rows with these ranges, as :func:`group_rows` takes them."""
        native = householder_groups(ranges) if dtype == torch.float32 else None
        return BlockHouseholder.of(group_rows(ranges), dtype) if native is None else BlockHouseholder.of_native(native)

    @staticmethod
    def of_native(groups: NativeGroups) -> BlockHouseholder:
        """The transform with groups and float32 scales that are known already."""
        return BlockHouseholder(groups.order, groups.heads, groups.sizes, groups.scale.view(-1, 1, 1))

    # The native kernels do not need what follows: it is made when it is asked for.

    @cached_property
    def members(self) -> torch.Tensor:
        """Position of each small row of the transformed groups, ``[M]``."""
        position, _, rank = self.places
        return position[rank > 0]

    @cached_property
    def head_of_member(self) -> torch.Tensor:
        """Index of the group of each of ``members``, ``[M]``."""
        _, group, rank = self.places
        return group[rank > 0]

    @cached_property
    def tree(self) -> tuple[torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor], ...], torch.Tensor]:
        """How groups are summed, pairwise.

        Positions of the rows of even rank, where sums begin; per level, the sums that are added to, and those that are
        added (at the first level, positions of rows); the sums that are the groups'.
        """
        position, group, rank = self.places
        size = self.sizes[group]
        even = rank % 2 == 0
        index = even.cumsum(0) - 1
        levels = []
        width, largest = 1, int(self.sizes.max()) if len(self.sizes) > 0 else 0
        while width < largest:
            target = torch.nonzero((rank % (2 * width) == 0) & (rank + width < size)).view(-1)
            levels.append((index[target], position[target + 1] if width == 1 else index[target + width]))
            width *= 2
        return position[even], tuple(levels), index[rank == 0]

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row of the transformed groups: position, index of its group, place within it."""
        sizes = self.sizes.long()
        group = torch.repeat_interleave(sizes)
        rank = torch.arange(group.numel(), device=group.device) - (sizes.cumsum(0) - sizes)[group]
        return self.heads[group] + rank, group, rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Rows of x in their own order, the result in group order.
        return self.forward_extremes(x)[0]

    def forward_extremes(self, x: torch.Tensor) -> Transformed:
        native = householder_forward(x, self._native_groups())
        if native is not None:
            y, low, high = native
            return y, low.view(-1, 1, 1), high.view(-1, 1, 1)
        return self.forward_extremes_in_torch(x)

    def forward_extremes_in_torch(self, x: torch.Tensor) -> Transformed:
        """:meth:`forward_extremes` without the native kernels."""
        y = self.forward_in_torch(x)
        return y, y.amin((1, 2), keepdim=True), y.amax((1, 2), keepdim=True)

    def forward_in_torch(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` without the native kernels; ``order`` may name a row of ``x`` more than once."""
        return self.reflect_(x.index_select(0, self.order).mul_(self.row_scale))

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        if self.row_scale.dtype == torch.float32:
            native = householder_inverse(y, self._native_groups())
            if native is not None:
                return native
        x = self.reflect_(y).div_(self.row_scale.to(y.dtype))
        return torch.empty_like(x).index_copy_(0, self.order, x)

    def _native_groups(self) -> NativeGroups:
        return NativeGroups(self.order, self.heads, self.sizes, self.row_scale)

    def inverse_adjoint(self, x: torch.Tensor) -> torch.Tensor:
        # With P the order of the rows, T = H diag(s) P and T^-1 = P^T diag(1 / s) H; H is symmetric.
        return self.reflect_(x[self.order].div_(self.row_scale.to(x.dtype)))

    def inverse_squared(self, variance: torch.Tensor) -> torch.Tensor:
        v = variance.double()
        n = self.sizes.view(-1, 1, 1)
        corner = 1 / (n - n.sqrt())  # minus the off-diagonal entries of H
        total, first = self._group_sums(v), v[self.heads]
        others = first / n + corner.square() * (total - first)
        diagonal = (1 - 2 * corner)[self.head_of_member]  # (1 - corner)^2 - corner^2
        v[self.members] = v[self.members].mul_(diagonal).add_(others[self.head_of_member])
        v[self.heads] = total / n
        v = v.div_(self.row_scale.double().square())
        return torch.empty_like(v).index_copy_(0, self.order, v)

    def reflect_(self, z: torch.Tensor) -> torch.Tensor:
        """``H z`` in place, ``[N, C, S]`` in group order."""
        # H z = z - w u / (1 - 1/sqrt n) with w = 1/sqrt n - e_1 and u = w^T z = sum(z) / sqrt n - z_1, which
        # is sum(z) / sqrt n in the first row and z_i - u / (sqrt n - 1) in the others.
        root = (1 / self.sizes.sqrt()).to(z.dtype).view(-1, 1, 1)
        spread = (1 / (self.sizes.sqrt() - 1)).to(z.dtype).view(-1, 1, 1)
        mean = self._group_sums(z).mul_(root)
        shift = (mean - z.index_select(0, self.heads)).mul_(spread)
        step = max(1, _PIECE // z[0].numel()) if z.device.type == "cpu" else max(1, len(z))
        for members, heads in zip(self.members.split(step), self.head_of_member.split(step), strict=True):
            z.index_add_(0, members, shift.index_select(0, heads), alpha=-1)
        return z.index_copy_(0, self.heads, mean)

    def _group_sums(self, z: torch.Tensor) -> torch.Tensor:
        """Sum of each transformed group, ``[K, C, S]``: a pairwise tree in group order, which fixes its rounding."""
        even, levels, of_group = self.tree
        sums, added = z.index_select(0, even), z
        for target, source in levels:
            sums.index_add_(0, target, added.index_select(0, source))
            added = sums
        return sums.index_select(0, of_group)

    @property
    def nbytes(self) -> int:
        tensors = (self.order, self.heads, self.sizes, self.row_scale)
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class BHQ(StochasticQuantizer):
    """Block Householder quantizer: transform groups of rows, quantize each transformed row on its own affine grid.

    Args:
        bits: 1 to 8.
        random_bits: random bits per decision.
        grouping: ``"published"`` reflects every group; ``"adaptive"`` also considers other scales and the rows as they
            are, and takes for each group what has the least exact variance on this input: never more in sum than the
            published quantizer or PSQ (see :mod:`fqtstats.quantizers.adaptive`).

    With one row, or with all ranges zero, it is PSQ. Rows of one group are correlated.
    """

    grouping: Literal["published", "adaptive"] = "published"
    name: ClassVar[str] = "bhq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grouping not in ("published", "adaptive"):
            raise InputError(f"grouping must be 'published' or 'adaptive', got {self.grouping!r}")

    @property
    def recipe(self) -> Recipe:
        return Recipe(0, "affine", self.bits, self.random_bits)

    def transform(self, x: torch.Tensor) -> BlockHouseholder | None:
        return self._transformed(x)[0]

    def _transformed(self, x: torch.Tensor) -> tuple[BlockHouseholder | None, Transformed | None]:
        view = rows(x)
        low, high = extremes(view, 0)
        ranges = self._ranges(low, high)
        if ranges is None:
            return None, None
        if self.grouping == "published":
            return BlockHouseholder.of_ranges(ranges, view.dtype), None
        native = householder_adapt(view, low.view(-1), high.view(-1), self.bits, self.random_bits)
        if native is not None:
            return BlockHouseholder.of_native(native), None
        published = BlockHouseholder.of(group_rows(ranges), view.dtype)
        return adapt(published, view, low, high, self.format.levels, self.random_bits)

    @staticmethod
    def _ranges(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
        # None where there is nothing to group.
        ranges = require_finite_ranges(low, high).view(-1)
        return None if ranges.numel() < 2 or not bool((ranges > 0).any()) else ranges

    def bound(self, x: torch.Tensor) -> float:
        """Sum over groups of ``D / (4 B^2) (1 + (n-1) / t^2) (lambda_1 / sqrt n + t (n-1) / sqrt n lambda_2)^2``.

        Every transformed row has a range of at most the second bracket (times s), and the squared entries of T^-1 add
        up to the first. Valid for the ``t`` that is used, unlike the published form, which is its minimum over ``t``.
        With adaptive grouping a group adds at most ``D / (4 B^2) sum_i lambda_i^2``, the bound of its rows alone.
        """
        view = rows(x)
        low, high = extremes(view, 0)
        ranges = self._ranges(low, high)
        per_row = view[0].numel() / (4 * self.format.levels**2)
        # Each transformed row also carries the rounding of transform and decoder: a few units in the last place of the
        # largest element, covered by widening the ranges; and a subnormal step is rounded up by two units at most.
        info, largest = torch.finfo(view.dtype), float(torch.maximum(low.abs(), high.abs()).max())
        slack = self.format.levels * (8 * info.eps * largest + 2 * info.smallest_normal * info.eps)
        span = (high.double() - low.double()).view(-1)
        rows_alone = torch.where(span > 0, span + slack, 0.0).square()
        if ranges is None:
            return float(per_row * rows_alone.sum())
        groups = group_rows(ranges)
        n, t = groups.size.double(), small_row_scale(groups)
        reach = (groups.leader_range + t * (n - 1) * groups.small_range) / n.sqrt() + slack
        shared = (1 + (n - 1) / t.square()) * reach.square()
        alone = torch.where(groups.leader_range > 0, groups.leader_range + slack, 0.0).square()
        per_group = torch.where(groups.small_range > 0, shared, alone)[groups.rank == 0]
        if self.grouping == "adaptive":
            group = torch.cumsum(groups.rank == 0, 0) - 1
            apart = torch.zeros_like(per_group).index_add_(0, group, rows_alone[groups.order])
            per_group = torch.minimum(per_group, apart)
        return float(per_row * per_group.sum())

    def published_bound(self, x: torch.Tensor) -> float:
        """Sum over groups of ``D / (4 B^2) (lambda_1^(2/3) n^(-1/3) + lambda_2^(2/3) n^(2/3))^3`` (appendix D.4).

        It does not hold in groups with ``lambda_2 = 0``, where it says ``lambda_1^2 / n`` although the leader is
        rounded alone. Adaptive grouping is not published: there it is :meth:`bound`.
        """
        if self.grouping == "adaptive":
            return self.bound(x)
        view = rows(x)
        low, high = extremes(view, 0)
        ranges = self._ranges(low, high)
        per_row = view[0].numel() / (4 * self.format.levels**2)
        if ranges is None:
            return float(per_row * (high.double() - low.double()).square().sum())
        groups = group_rows(ranges)
        n = groups.size.double()
        two_thirds = 2 / 3
        bracket = groups.leader_range**two_thirds * n ** (-1 / 3) + groups.small_range**two_thirds * n**two_thirds
        return float(per_row * bracket.pow(3)[groups.rank == 0].sum())


@dataclass(frozen=True)
class AdaptiveBHQ(BHQ):
    """BHQ with adaptive grouping; never more variance than ``bhq`` or ``psq`` on any input.

    It takes 1.1 to 1.5 times as long as ``bhq`` where rows have some hundred elements or more, and about twice as long
    for thousands of rows of a few elements; longer where candidates are so close that sums in float64 decide.
    """

    grouping: Literal["published", "adaptive"] = "adaptive"
    name: ClassVar[str] = "bhq-adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grouping != "adaptive":
            raise InputError(f"grouping of {self.name!r} must be 'adaptive', got {self.grouping!r}; use 'bhq' for it")
