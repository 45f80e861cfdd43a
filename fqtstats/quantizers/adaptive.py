"""Which map a group of the block Householder quantizer gets: the one of three with the least variance on this input.

Ours; StatQuant's quantizer has one map for all groups. The groups stay the published ones. The candidates of a group,
in order of preference where they are equal:

1. *alone*: its rows as they are, which is PSQ;
2. *matched*: the reflection, with ``s_i = s_1 sqrt(lambda_1 / lambda_i)`` for small row ``i``;
3. *published*: the reflection, with one ``t`` for all small rows.

Matched scales: transformed row ``i`` holds the leader with range ``s_1 lambda_1 / sqrt n`` and its own row with
``s_i lambda_i``, up to terms of order 1/n, and its variance enters the decoded rows with weight
``1 / (n s_1^2) + 1 / s_i^2``. If the two add as independent numbers do, in their squares, that product is least at
``s_i / s_1 = sqrt(lambda_1 / lambda_i)``; ``lambda_i`` is taken to be at least a quarter of ``lambda_2``. Where all of
them are within 1/16 of ``t`` they are left out: the two would differ by little and take long to tell apart.

The exact variance of each candidate decides, which is that of its codes as they are decoded, summed over the group. So
no input has more variance than with the published maps or with PSQ: a sum of minima is at most the minimum of sums. The
choice is a function of the input alone, and the quantizer stays unbiased.

Exact values are defined operation by operation, in float64, so that every implementation decides alike. They are only
needed where proven intervals, from sums in any order, leave open which candidate is least.

Shape legend: N rows, D elements per row, K groups of n rows, leader first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fqtstats.quantizers.grid import Grid, affine_of
from fqtstats.rounding import up_probability

if TYPE_CHECKING:
    from fqtstats.quantizers.base import Transformed
    from fqtstats.quantizers.bhq import BlockHouseholder

__all__ = ["adapt"]

_SMALLEST_SHARE = 0.25
"""Of lambda_2: a smaller range counts as this much, so that constant rows have a scale."""

_CLOSE = 2.0**-4
"""Relative difference of scales up to which they count as the same."""

_SUMMATION = 2.0**-16
"""Relative error of a sum within the intervals; a generous bound."""

_SUMMED = 128
"""Elements that are added in the compute dtype, in any order: an error of at most 2^-17. Their sums are float64."""

_PIECE = 1 << 16
"""Elements at a time on a CPU: the temporaries stay in the cache."""

_ALONE, _MATCHED, _PUBLISHED = range(3)


def adapt(
    published: BlockHouseholder, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, random_bits: int
) -> tuple[BlockHouseholder, Transformed]:
    """The transform with the best candidate in each of the groups of ``published``.

    Args:
        published: transform of the rows of ``x``.
        x: ``[N, C, S]``, float32 or float64.
        low: minimum of each row, ``[N, 1, 1]``; ``high - low`` is finite.
        high: maximum of each row, likewise.
        levels: ``B = 2^bits - 1``.
        random_bits: random bits per decision.

    Returns:
        The transform, and what its ``forward_extremes`` gives for ``x``: the rows of all candidates are found on the
        way.
    """
    n, count = len(x), len(published.heads)
    if count == 0:
        return published, published.forward_extremes_in_torch(x)
    position, group, rank = published.places
    leader = torch.arange(len(rank), device=x.device) - rank
    own = published.order.index_select(0, position)
    ranges = (high.double() - low.double()).view(-1).index_select(0, own)
    scale, close = _scales(published, ranges, leader)
    found = _rows_of_candidates(published, x, scale[_MATCHED], close)
    lowest, highest = found.extremes(low.view(-1, 1), high.view(-1, 1))

    cell = (group + count * torch.arange(6, device=x.device).view(6, 1)).view(-1)

    def group_sums(values: torch.Tensor) -> torch.Tensor:
        # [..., M] to [..., K], in any order.
        sums = values.new_zeros(values.numel() // len(group) * count)
        return sums.index_add_(0, cell[: values.numel()], values.view(-1)).view(*values.shape[:-1], count)

    bounds = _intervals(found.parts, lowest, highest, levels, random_bits)
    size = published.sizes.index_select(0, group)
    weight = _weights(scale, leader, rank, size, lambda values: group_sums(values).index_select(1, group))
    bounds = group_sums(_weighted(bounds[:, found.row], weight))
    bounds[:, _MATCHED].masked_fill_(close, torch.inf)
    lower, upper = bounds
    choice = upper.argmin(0)
    unclear = (lower <= upper.amin(0)).sum(0) > 1
    if bool(unclear.any()):
        some = unclear[group]
        of = found.row[:, some].view(-1)
        noise = _exact(found.numbers(of), lowest[of], highest[of], levels, random_bits).view(3, -1)
        place = (unclear.cumsum(0) - 1)[group[some]]
        choice[unclear] = _least(noise, scale[:, some], place, rank[some], published.sizes[unclear], close[unclear])

    chosen = torch.arange(n, device=x.device)
    chosen[position] = found.row.gather(0, choice.index_select(0, group).unsqueeze(0)).view(-1)
    kept = choice != _ALONE
    transform = replace(
        published,
        heads=published.heads[kept],
        sizes=published.sizes[kept],
        row_scale=found.row_scale.index_select(0, chosen).view(-1, 1, 1),
    )
    lowest, highest = (ends.index_select(0, chosen).unsqueeze(2) for ends in (lowest, highest))
    return transform, (found.first_(chosen).view_as(x), lowest, highest)


@dataclass(frozen=True)
class _Rows:
    """Rows under all candidates.

    Shape legend: M rows in groups, as they are placed; R rows here, of which the first N are those under the published
    maps.

    Attributes:
        parts: the rows, ``[., D]`` each, one after another; the last part may be those of the input.
        row_scale: their scales, ``[R]``.
        row: which one each of the M rows is under its three maps, ``[3, M]``; any other where the matched one is close.
    """

    parts: tuple[torch.Tensor, ...]
    row_scale: torch.Tensor
    row: torch.Tensor

    def numbers(self, index: torch.Tensor) -> torch.Tensor:
        """Some of the rows."""
        first = self.parts[0]
        if len(self.parts) == 1:
            return first.index_select(0, index)
        numbers = first.index_select(0, index.clamp(max=len(first) - 1))
        later = index >= len(first)
        numbers[later] = self.parts[1].index_select(0, index[later] - len(first))
        return numbers

    def first_(self, index: torch.Tensor) -> torch.Tensor:
        """:meth:`numbers` for N rows, which may take the place of the first ones."""
        if len(self.parts) == 1:
            return self.numbers(index)
        first = self.parts[0][: len(index)]
        changed = torch.nonzero(index != torch.arange(len(index), device=index.device)).view(-1)
        return first.index_copy_(0, changed, self.numbers(index.index_select(0, changed)))

    def extremes(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of each row, ``[R, 1]``; those of the input are known."""
        first = self.parts[0]
        lowest, highest = first.amin(1, keepdim=True), first.amax(1, keepdim=True)
        if len(self.parts) == 1:
            return lowest, highest
        return torch.cat([lowest, low]), torch.cat([highest, high])


def _rows_of_candidates(
    published: BlockHouseholder, x: torch.Tensor, matched: torch.Tensor, close: torch.Tensor
) -> _Rows:
    """The rows of ``x``, ``[N, C, S]``, under all candidates.

    Args:
        published: transform of the rows.
        x: the rows.
        matched: scales of the M rows in groups.
        close: groups whose matched scales are left out, ``[K]``.
    """
    n, order, scale = len(x), published.order, published.row_scale.view(-1)
    position, group, _ = published.places
    flat, own = x.view(n, -1), order.index_select(0, position)
    if x.numel() <= _PIECE:
        # To transform all rows side by side takes less time than to tell the groups apart.
        both = torch.stack([scale, scale.index_copy(0, position, matched)])
        y = published.reflect_(flat.index_select(0, order).unsqueeze(1) * both.t().unsqueeze(2))
        row = torch.stack([2 * n + own, n + position, position])
        return _Rows((torch.cat([y[:, 0], y[:, 1], flat]),), torch.cat([both.view(-1), torch.ones_like(scale)]), row)
    tried = ~close
    row_tried = tried[group]
    sizes = published.sizes[tried]
    row_scale = torch.cat([scale, matched[row_tried]])
    transform = replace(
        published,
        order=torch.cat([order, own[row_tried]]),
        heads=torch.cat([published.heads, n + (sizes.cumsum(0) - sizes).long()]),
        sizes=torch.cat([published.sizes, sizes]),
        row_scale=row_scale.view(-1, 1, 1),
    )
    y = transform.forward_in_torch(x).view(len(row_scale), -1)
    row = torch.stack([len(y) + own, n - 1 + row_tried.cumsum(0), position])
    return _Rows((y, flat), torch.cat([row_scale, torch.ones_like(scale)]), row)


def _least(
    noise: torch.Tensor,
    scale: torch.Tensor,
    group: torch.Tensor,
    rank: torch.Tensor,
    sizes: torch.Tensor,
    close: torch.Tensor,
) -> torch.Tensor:
    """The candidate of least exact variance for each of K groups of M rows together, ``[K]``; of equal ones the first.

    Args:
        noise: :func:`_exact` of each row under each candidate, ``[3, M]``, groups contiguous.
        scale: of each row, likewise.
        group: of each row, ``[M]``.
        rank: place of each row in its group, ``[M]``.
        sizes: of the groups, ``[K]``.
        close: whose matched candidate is left out, ``[K]``.
    """
    leader, size = torch.arange(len(rank), device=rank.device) - rank, sizes[group]
    weight = _weights(scale, leader, rank, size, lambda values: _tree_sums(values, rank, size)[:, group])
    alone, matched, published = _tree_sums(_weighted(noise, weight), rank, size)
    matched.masked_fill_(close, torch.inf)
    first = torch.where(matched < alone, _MATCHED, _ALONE)
    return torch.where(published < torch.minimum(alone, matched), _PUBLISHED, first)


def _scales(
    published: BlockHouseholder, ranges: torch.Tensor, leader: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the candidates of the M rows in groups, ``[3, M]``, and whose matched ones are close, ``[K]``.

    Args:
        published: the transform.
        ranges: of the rows, ``[M]`` float64.
        leader: place of each row's leader among them, ``[M]``.
    """
    position, group, rank = published.places
    theirs = published.row_scale.view(-1).index_select(0, position)
    t = theirs.double()
    first, second = ranges.index_select(0, leader), ranges.index_select(0, leader + 1)
    ratio = (first / torch.maximum(ranges, _SMALLEST_SHARE * second)).sqrt()
    matched = torch.where(rank == 0, theirs, (t.index_select(0, leader) * ratio).to(theirs.dtype))
    apart = (matched.double() - t).abs() > _CLOSE * t
    close = torch.ones(len(published.heads), dtype=torch.bool, device=ranges.device)
    return torch.stack([torch.ones_like(theirs), matched, theirs]), close.index_fill_(0, group[apart], False)


# --- variance of rounded rows -----------------------------------------------------------------------------------------


def _finite_grid(low: torch.Tensor, high: torch.Tensor, levels: int) -> tuple[torch.Tensor, Grid]:
    """The ranges, ``[R, 1]`` float64, infinite where one or its row is not finite, and the grids of the others."""
    span = high.double() - low.double()
    finite = span <= torch.finfo(low.dtype).max  # false for NaN
    if bool(finite.all()):
        return span, affine_of(span, low, levels)
    grid = affine_of(torch.where(finite, span, 0.0), torch.where(finite, low, 0.0), levels)
    return torch.where(finite, span, torch.inf), grid


def _decodes(grid: Grid) -> torch.Tensor:
    """Whether all codes of a row stand for finite numbers, ``[R, 1]``."""
    assert grid.offset is not None
    return (grid.step * grid.levels + grid.offset).isfinite()


def _pieces(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that are worked on together."""
    return torch.split(y, max(1, _PIECE // y.shape[1] if y.device.type == "cpu" else len(y)))


def _part(grid: Grid, piece: slice) -> Grid:
    assert grid.offset is not None
    prescale = None if grid.prescale is None else grid.prescale[piece]
    return replace(grid, step=grid.step[piece], scale=grid.scale[piece], offset=grid.offset[piece], prescale=prescale)


def _intervals(
    parts: Sequence[torch.Tensor], low: torch.Tensor, high: torch.Tensor, levels: int, random_bits: int
) -> torch.Tensor:
    """Bounds of :func:`_exact`, ``[2, R]`` float64; infinite where a row or its range is not finite.

    Args:
        parts: some of the R rows each, ``[., D]``.
        low: minimum of each row, ``[R, 1]``.
        high: maximum of each row, ``[R, 1]``.
        levels: of the grids.
        random_bits: of the decisions.
    """
    info = torch.finfo(low.dtype)
    span, grid = _finite_grid(low, high, levels)
    total = _fractions(parts, grid)
    # A probability lies up to 2^-n below f, and f (1 - f) is rounded.
    slack = parts[0].shape[1] * (2.0**-random_bits + 2 * info.eps)
    # Two decoded neighbours are a step apart, up to the rounding of product and sum.
    step = grid.step.double()
    largest = torch.maximum(low.abs(), high.abs()).double()
    smallest = info.smallest_normal * info.eps
    gap = torch.where(step > 0, 1.01 * info.eps * (span + largest) + 4 * smallest, 0.0)
    lower = (step - gap).clamp(min=0).square() * (total * (1 - _SUMMATION) - slack).clamp(min=0)
    upper = (step + gap).square() * (total * (1 + _SUMMATION) + slack)
    upper = torch.where(_decodes(grid), upper, torch.inf)
    return torch.where(span < torch.inf, torch.stack([lower, upper]), torch.inf).squeeze(2)


def _fractions(parts: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Sums of ``f (1 - f)`` over the rows for the fractions ``f`` of the coordinates, ``[R, 1]`` float64."""
    width = parts[0].shape[1]
    pieces = [piece for y in parts for piece in _pieces(y)]
    padded = pieces[0].new_zeros(max(map(len, pieces)), width + -width % _SUMMED)
    assert grid.offset is not None
    sums, start = [], 0
    for numbers in pieces:
        rows = slice(start, start := start + len(numbers))
        part = padded[: len(numbers)]
        f = torch.sub(numbers, grid.offset[rows], out=part[:, :width])
        if grid.prescale is not None:
            f.mul_(grid.prescale[rows])
        f.mul_(grid.scale[rows]).clamp_(max=grid.levels).frac_()  # a coordinate is not negative
        f.addcmul_(f, f, value=-1)
        sums.append(part.view(len(part), -1, _SUMMED).sum(2).double().sum(1, keepdim=True))
    return torch.cat(sums)


def _exact(y: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, random_bits: int) -> torch.Tensor:
    """Variance of the decoded codes, summed over each row, ``[R]`` float64; infinite as :func:`_intervals`.

    Infinite, too, where the largest code overflows: at the very end of the dtype, a code stands for no finite number.
    """
    span, grid = _finite_grid(low, high, levels)
    total, start = [], 0
    for numbers in _pieces(y):
        of_piece = _part(grid, slice(start, start := start + len(numbers)))
        k, up = up_probability(of_piece.coordinates(numbers), random_bits)
        gap = of_piece.decode(of_piece.codes(k + 1)).double() - of_piece.decode(of_piece.codes(k)).double()
        total.append(_tree_sum(gap.square() * (up * (1 - up))))
    known = (span < torch.inf) & _decodes(grid)
    return torch.where(known.view(-1), torch.cat(total), torch.inf)


def _weights(
    scale: torch.Tensor,
    leader: torch.Tensor,
    rank: torch.Tensor,
    size: torch.Tensor,
    group_sums: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``sum_j (T^-1)_jr^2`` of each row ``r``: how its variance enters the decoded rows; ``[3, M]`` float64.

    For ``T = H diag(s)`` that is ``sum_j 1 / (n s_j^2)`` for the leader and
    ``1 / (n s_1^2) + c^2 sum_{j > 1} 1 / s_j^2 + (1 - 2 c) / s_r^2`` for the others, with ``c = 1 / (n - sqrt n)``; and
    1 for rows alone.

    Args:
        scale: of each row under each candidate, ``[3, M]``.
        leader: place of its leader, ``[M]``.
        rank: place in its group, ``[M]``.
        size: of its group, ``[M]`` float64.
        group_sums: sum over its group, for each row; ``[3, M]`` to ``[3, M]``.
    """
    inverse = 1 / scale.double().square()
    is_leader = rank == 0
    first = inverse.index_select(1, leader)
    members = group_sums(torch.where(is_leader, 0.0, inverse))
    corner = 1 / (size - size.sqrt())
    weight = (first / size + corner * corner * members) + (1 - 2 * corner) * inverse
    weight = torch.where(is_leader, (first + members) / size, weight)
    weight[_ALONE] = 1
    return weight


def _weighted(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.where(values < torch.inf, values * weight, torch.inf)


def _tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis: zeros make it a power of two, and halves are added to each other until one is left."""
    width = 1 << (values.shape[-1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[-1]))
    while width > 1:
        width //= 2
        values = values[..., :width] + values[..., width:]
    return values.squeeze(-1)


def _tree_sums(values: torch.Tensor, rank: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """:func:`_tree_sum` of each group.

    Args:
        values: ``[3, M]``, groups contiguous.
        rank: place of each column in its group, ``[M]``.
        size: of its group, ``[M]``.
    """
    values = values.clone()
    width = 1 << (int(size.max()) - 1).bit_length()
    while width > 1:
        width //= 2
        target = torch.nonzero((rank < width) & (rank + width < size)).view(-1)
        values[:, target] += values[:, target + width]
    return values[:, rank == 0]
