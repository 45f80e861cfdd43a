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

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fqtstats.quantizers.grid import affine
from fqtstats.rounding import up_probability

if TYPE_CHECKING:
    from fqtstats.quantizers.bhq import BlockHouseholder

__all__ = ["adapt"]

_SMALLEST_SHARE = 0.25
"""Of lambda_2: a smaller range counts as this much, so that constant rows have a scale."""

_CLOSE = 2.0**-4
"""Relative difference of scales up to which they count as the same."""

_SUMMATION = 2.0**-16
"""Relative error of a sum within the intervals; a generous bound."""


def adapt(
    published: BlockHouseholder, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, random_bits: int
) -> BlockHouseholder:
    """The transform with the best candidate in each of the groups of ``published``.

    Args:
        published: transform of the rows of ``x``.
        x: ``[N, C, S]``, float32 or float64.
        low: minimum of each row, ``[N, 1, 1]``; ``high - low`` is finite.
        high: maximum of each row, likewise.
        levels: ``B = 2^bits - 1``.
        random_bits: random bits per decision.
    """
    if published.heads.numel() == 0:
        return published
    order, heads, sizes = published.order, published.heads, published.sizes.long()
    group = _groups_of_positions(published)
    rows, low, high = x.reshape(len(x), -1)[order], low.view(-1, 1)[order], high.view(-1, 1)[order]
    matched, close = _matched_scale(published, low, high, group)
    scale = torch.stack([matched, published.row_scale], 1).view(len(x), 2, 1)
    both = replace(published, row_scale=scale)
    y = both.of_ordered(rows.unsqueeze(1))
    reflected = y, y.amin(2, keepdim=True), y.amax(2, keepdim=True)

    lower, upper = _intervals(*reflected, levels, random_bits)
    weight = _weights(both, group)
    lower, upper = (
        _group_sums(torch.where(v.isfinite(), v * weight, torch.inf), group, len(heads)) for v in (lower, upper)
    )
    lower[:, 0], upper[:, 0] = (torch.where(close, torch.inf, v[:, 0]) for v in (lower, upper))
    best = upper.amin(1)
    # The rows alone: often the leader's variance says enough.
    alone_lower, alone_upper = (
        v.view(-1) for v in _intervals(rows[heads], low[heads], high[heads], levels, random_bits)
    )
    unsure = torch.cat([alone_lower <= best, best.new_zeros(1, dtype=torch.bool)])
    chosen = unsure[group]
    some_lower, some_upper = (
        _group_sums(v, group[chosen], len(heads)).view(-1)
        for v in _intervals(rows[chosen], low[chosen], high[chosen], levels, random_bits)
    )
    alone_lower = torch.where(unsure[:-1], some_lower, alone_lower)
    alone_upper = torch.where(unsure[:-1], some_upper, torch.inf)
    lower, upper = torch.cat([alone_lower.view(-1, 1), lower], 1), torch.cat([alone_upper.view(-1, 1), upper], 1)
    choice = upper.argmin(1)
    beaten = lower > upper.gather(1, choice.view(-1, 1))
    for g in torch.nonzero(beaten.sum(1) < 2).view(-1).tolist():
        of_group = slice(int(heads[g]), int(heads[g]) + int(sizes[g]))
        values = [float(_tree_sum(_exact(rows[of_group], low[of_group], high[of_group], levels, random_bits)))]
        for candidate in range(2):
            if candidate == 0 and close[g]:
                values.append(math.inf)
                continue
            candidate_rows, lowest, highest = (part[of_group, candidate] for part in reflected)
            noise = _exact(candidate_rows, lowest, highest, levels, random_bits)
            values.append(float(_tree_sum(_exact_weights(scale[of_group, candidate, 0]) * noise)))
        choice[g] = values.index(min(values))
    return _chosen(published, scale, choice, group)


def _groups_of_positions(transform: BlockHouseholder) -> torch.Tensor:
    """Index of the group of each position, K where it is in none, ``[N]``."""
    position = torch.arange(len(transform.order), device=transform.order.device)
    group = torch.searchsorted(transform.heads, position, right=True) - 1
    inside = (group >= 0) & (position < (transform.heads + transform.sizes.long())[group.clamp(min=0)])
    return torch.where(inside, group, len(transform.heads))


def _matched_scale(
    published: BlockHouseholder, low: torch.Tensor, high: torch.Tensor, group: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the matched candidate, ``[N, 1, 1]``, and in which groups they are close to the published ones."""
    heads, count = published.heads, len(published.heads)
    ranges, theirs = (high.double() - low.double()).view(-1), published.row_scale.view(-1).double()
    of_row = torch.cat([heads, heads.new_zeros(1)])[group]
    leader, small = ranges[of_row], ranges[(of_row + 1).clamp(max=len(ranges) - 1)]
    ratio = (leader / torch.maximum(ranges, _SMALLEST_SHARE * small)).sqrt()
    scale = (theirs[of_row] * ratio).to(published.row_scale.dtype)
    scale[heads] = published.row_scale.view(-1)[heads]
    scale = torch.where(group < count, scale, 1.0)
    apart = (scale.double() - theirs).abs() > _CLOSE * theirs
    close = torch.ones(count + 1, dtype=torch.bool, device=group.device).index_fill_(0, group[apart], False)
    return scale.view(-1, 1, 1), close[:count]


def _chosen(
    published: BlockHouseholder, scale: torch.Tensor, choice: torch.Tensor, group: torch.Tensor
) -> BlockHouseholder:
    kept = choice > 0
    per_position = torch.cat([choice, choice.new_zeros(1)])[group]
    ours, theirs = scale.view(-1, 2).unbind(1)
    chosen = torch.where(per_position == 1, ours, torch.where(per_position == 2, theirs, 1.0))
    return replace(published, heads=published.heads[kept], sizes=published.sizes[kept], row_scale=chosen.view(-1, 1, 1))


# --- variance of rounded rows -----------------------------------------------------------------------------------------


def _intervals(
    y: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, random_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of :func:`_exact` for each row, float64; infinite where a row or its range is not finite.

    Args:
        y: ``[..., D]``.
        low: minimum of each row, ``[..., 1]``.
        high: maximum of each row, ``[..., 1]``.
        levels: of the grids.
        random_bits: of the decisions.
    """
    info = torch.finfo(y.dtype)
    span = high.double() - low.double()
    finite = low.isfinite() & high.isfinite() & (span <= info.max)
    span = torch.where(finite, span, 0.0)
    grid = affine(torch.where(finite, low, 0.0), torch.where(finite, high, 0.0), levels)
    f = grid.coordinates(y).clamp_(max=levels).frac_()  # a coordinate is not negative
    total = f.addcmul_(f, f, value=-1).sum(-1, keepdim=True, dtype=torch.float64)
    # A probability lies up to 2^-n below f, and f (1 - f) is rounded.
    slack = y.shape[-1] * (2.0**-random_bits + 2 * info.eps)
    # Two decoded neighbours are a step apart, up to the rounding of product and sum.
    step = grid.step.double()
    largest = torch.where(finite, torch.maximum(low.abs(), high.abs()), 0.0).double()
    smallest = info.smallest_normal * info.eps
    gap = torch.where(step > 0, (1.01 * info.eps * (span + largest) + 4 * smallest) / step, 0.0)
    lower = (step * (1 - gap).clamp(min=0)).square() * (total * (1 - _SUMMATION) - slack).clamp(min=0)
    upper = (step * (1 + gap)).square() * (total * (1 + _SUMMATION) + slack)
    return torch.where(finite, lower, torch.inf).squeeze(-1), torch.where(finite, upper, torch.inf).squeeze(-1)


def _exact(y: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, random_bits: int) -> torch.Tensor:
    """Variance of the decoded codes, summed over each row; ``[n]``, float64, infinite where a number is not finite."""
    if not bool((low.isfinite() & high.isfinite() & (high.double() - low.double() <= torch.finfo(y.dtype).max)).all()):
        return torch.full_like(low.view(-1), torch.inf, dtype=torch.float64)
    grid = affine(low, high, levels)
    k, up = up_probability(grid.coordinates(y), random_bits)
    gap = grid.decode(grid.codes(k + 1)).double() - grid.decode(grid.codes(k)).double()
    return _tree_sum(gap.square() * (up * (1 - up)))


def _exact_weights(scale: torch.Tensor) -> torch.Tensor:
    """:func:`_weights` of one group, ``[n]``, operation by operation."""
    inverse = 1 / scale.double().square()
    members = _tree_sum(torch.cat([torch.zeros_like(inverse[:1]), inverse[1:]]))
    return _weights_of(inverse, inverse[0], members, torch.tensor(float(len(scale)), dtype=torch.float64), first=0)


def _weights(transform: BlockHouseholder, group: torch.Tensor) -> torch.Tensor:
    """``sum_j (T^-1)_jr^2`` of each position ``r``: how its variance enters the decoded rows; ``[N, 2]``, float64.

    For ``T = H diag(s)`` that is ``sum_j 1 / (n s_j^2)`` for the leader and
    ``1 / (n s_1^2) + c^2 sum_{j > 1} 1 / s_j^2 + (1 - 2 c) / s_r^2`` for the others, with ``c = 1 / (n - sqrt n)``.
    """
    count = len(transform.heads)
    inverse = 1 / transform.row_scale.squeeze(2).double().square()
    first = inverse[transform.heads]
    members = _group_sums(inverse.index_fill(0, transform.heads, 0.0), group, count)
    inside = group.clamp(max=count - 1)
    n = transform.sizes[inside].view(-1, 1)
    return _weights_of(inverse, first[inside], members[inside], n, first=transform.heads)


def _weights_of(
    inverse: torch.Tensor,
    leader: torch.Tensor,
    members: torch.Tensor,
    n: torch.Tensor,
    *,
    first: int | torch.Tensor,
) -> torch.Tensor:
    corner = 1 / (n - n.sqrt())
    weight = (leader / n + corner * corner * members) + (1 - 2 * corner) * inverse
    weight[first] = ((leader + members) / n).expand_as(weight)[first]
    return weight


def _group_sums(values: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Sums over the groups, in any order; the first axis becomes ``count``."""
    return values.new_zeros(count + 1, *values.shape[1:]).index_add_(0, group, values)[:count]


def _tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis: zeros make it a power of two, and halves are added to each other until one is left."""
    width = 1 << (values.shape[-1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - values.shape[-1]))
    while width > 1:
        width //= 2
        values = values[..., :width] + values[..., width:]
    return values.squeeze(-1)
