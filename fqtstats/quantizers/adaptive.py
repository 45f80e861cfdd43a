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
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fqtstats.quantizers.grid import Grid, affine
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
    order = published.order
    scale, close = _scales(published, low, high)
    # One transform for the published groups, and after them the matched ones that are tried.
    tried = ~close
    row_tried = tried[group]
    sizes = published.sizes[tried]
    both = replace(
        published,
        order=torch.cat([order, order[position[row_tried]]]),
        heads=torch.cat([published.heads, n + (sizes.cumsum(0) - sizes).long()]),
        sizes=torch.cat([published.sizes, sizes]),
        row_scale=torch.cat([published.row_scale, scale[_MATCHED][row_tried].view(-1, 1, 1)]),
    )
    y, lowest, highest = both.forward_extremes_in_torch(x)
    # Then the rows of x themselves. Where no matched candidate is tried, `row` names any other.
    parts = y.view(len(y), -1), x.view(n, -1)
    lowest, highest = torch.cat([lowest, low]), torch.cat([highest, high])
    row = torch.stack([len(y) + order[position], n - 1 + row_tried.cumsum(0), position])

    cell = (group + count * torch.arange(6, device=x.device).view(6, 1)).view(-1)

    def group_sums(values: torch.Tensor) -> torch.Tensor:
        # [..., M] to [..., K], in any order.
        sums = values.new_zeros(values.numel() // len(group) * count)
        return sums.index_add_(0, cell[: values.numel()], values.view(-1)).view(*values.shape[:-1], count)

    bounds = _intervals(parts, lowest.view(-1, 1), highest.view(-1, 1), levels, random_bits)
    weight = _weights(scale, group, rank, published.sizes, group_sums)
    bounds = group_sums(_weighted(bounds[:, row], weight))
    bounds[:, _MATCHED].masked_fill_(close, torch.inf)
    lower, upper = bounds
    choice = upper.argmin(0)
    unclear = (lower <= upper.amin(0)).sum(0) > 1
    if bool(unclear.any()):
        some = unclear[group]
        place, rank, size = (unclear.cumsum(0) - 1)[group[some]], rank[some], published.sizes[unclear]

        def tree_sums(values: torch.Tensor) -> torch.Tensor:
            return _tree_sums(values, rank, size[place])

        of = row[:, some].view(-1)
        numbers = torch.cat([parts[1][order[position[some]]], parts[0][of[len(rank) :]]])
        noise = _exact(numbers, lowest.view(-1, 1)[of], highest.view(-1, 1)[of], levels, random_bits).view(3, -1)
        exact = tree_sums(_weighted(noise, _weights(scale[:, some], place, rank, size, tree_sums)))
        exact[_MATCHED].masked_fill_(close[unclear], torch.inf)
        alone, matched, theirs = exact
        first = torch.where(matched < alone, _MATCHED, _ALONE)
        choice[unclear] = torch.where(theirs < torch.minimum(alone, matched), _PUBLISHED, first)

    of_row = choice[group]
    chosen = torch.arange(n, device=x.device)
    chosen[position] = row.gather(0, of_row.unsqueeze(0)).view(-1)
    kept, alone, matched = choice != _ALONE, position[of_row == _ALONE], position[of_row == _MATCHED]
    row_scale = torch.cat([both.row_scale, torch.ones_like(low)])[chosen]
    transform = replace(published, heads=published.heads[kept], sizes=published.sizes[kept], row_scale=row_scale)
    y[alone] = x[order[alone]]
    y[matched] = y[chosen[matched]]
    return transform, (y[:n], lowest[chosen], highest[chosen])


def _scales(published: BlockHouseholder, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the candidates of the M rows in groups, ``[3, M]``, and whose matched ones are close, ``[K]``."""
    position, group, rank = published.places
    theirs = published.row_scale.view(-1)[position]
    ranges = (high.double() - low.double()).view(-1)[published.order]
    leader, small = ranges[published.heads][group], ranges[published.heads + 1][group]
    ratio = (leader / torch.maximum(ranges[position], _SMALLEST_SHARE * small)).sqrt()
    first = published.row_scale.view(-1)[published.heads].double()
    matched = torch.where(rank == 0, theirs, (first[group] * ratio).to(theirs.dtype))
    t = theirs.double()
    apart = (matched.double() - t).abs() > _CLOSE * t
    close = torch.ones(len(published.heads), dtype=torch.bool, device=low.device)
    return torch.stack([torch.ones_like(theirs), matched, theirs]), close.index_fill_(0, group[apart], False)


# --- variance of rounded rows -----------------------------------------------------------------------------------------


def _finite_grid(low: torch.Tensor, high: torch.Tensor, levels: int) -> tuple[torch.Tensor, Grid]:
    """The ranges, ``[R, 1]`` float64, infinite where one or its row is not finite, and the grids of the others."""
    span = high.double() - low.double()
    finite = span <= torch.finfo(low.dtype).max  # false for NaN
    grid = affine(torch.where(finite, low, 0.0), torch.where(finite, high, 0.0), levels)
    return torch.where(finite, span, torch.inf), grid


def _pieces(y: torch.Tensor) -> list[slice]:
    """Rows that are worked on together."""
    step = max(1, _PIECE // y.shape[1]) if y.device.type == "cpu" else len(y)
    return [slice(start, start + step) for start in range(0, len(y), step)]


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
    return torch.where(span < torch.inf, torch.stack([lower, upper]), torch.inf).squeeze(2)


def _fractions(parts: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Sums of ``f (1 - f)`` over the rows for the fractions ``f`` of the coordinates, ``[R, 1]`` float64."""
    width = parts[0].shape[1]
    most = max(piece.stop - piece.start for y in parts for piece in _pieces(y))
    padded = parts[0].new_zeros(most, width + -width % _SUMMED)
    assert grid.offset is not None
    sums, start = [], 0
    for y in parts:
        for piece in _pieces(y):
            numbers = y[piece]
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
    """Variance of the decoded codes, summed over each row, ``[R]`` float64; infinite as :func:`_intervals`."""
    span, grid = _finite_grid(low, high, levels)
    total = []
    for piece in _pieces(y):
        of_piece = _part(grid, piece)
        k, up = up_probability(of_piece.coordinates(y[piece]), random_bits)
        gap = of_piece.decode(of_piece.codes(k + 1)).double() - of_piece.decode(of_piece.codes(k)).double()
        total.append(_tree_sum(gap.square() * (up * (1 - up))))
    return torch.where(span.view(-1) < torch.inf, torch.cat(total), torch.inf)


def _weights(
    scale: torch.Tensor,
    group: torch.Tensor,
    rank: torch.Tensor,
    sizes: torch.Tensor,
    group_sums: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``sum_j (T^-1)_jr^2`` of each row ``r``: how its variance enters the decoded rows; ``[3, M]`` float64.

    For ``T = H diag(s)`` that is ``sum_j 1 / (n s_j^2)`` for the leader and
    ``1 / (n s_1^2) + c^2 sum_{j > 1} 1 / s_j^2 + (1 - 2 c) / s_r^2`` for the others, with ``c = 1 / (n - sqrt n)``; and
    1 for rows alone.
    """
    inverse = 1 / scale.double().square()
    is_leader = rank == 0
    leader = inverse[:, is_leader][:, group]
    members = group_sums(torch.where(is_leader, 0.0, inverse))[:, group]
    n = sizes[group]
    corner = 1 / (n - n.sqrt())
    weight = (leader / n + corner * corner * members) + (1 - 2 * corner) * inverse
    weight = torch.where(is_leader, (leader + members) / n, weight)
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
