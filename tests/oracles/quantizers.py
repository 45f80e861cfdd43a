"""Oracles of packing, rounding and quantizers: plain loops over Python numbers, written from the formulas alone.

A tensor is a list of rows; a row is a list of floats. ``B`` is the number of bins, ``2^bits - 1``. Everything is exact
(``Fraction``) or double precision, and nothing here knows how the library does it.
"""

from __future__ import annotations

import math
from fractions import Fraction

Matrix = list[list[float]]


# --- formats ----------------------------------------------------------------------------------------------------------


def pack(codes: list[int], width: int) -> bytes:
    """Codes of ``width`` bits, the first in the lowest bits of the first byte."""
    whole = sum(code << (width * place) for place, code in enumerate(codes))
    return whole.to_bytes(-(-len(codes) * width // 8), "little")


# --- rounding ---------------------------------------------------------------------------------------------------------


def round_stochastically(y: float, word: int, random_bits: int) -> int:
    """Up if and only if ``word < floor(f 2^r)``."""
    low = math.floor(y)
    threshold = math.floor((Fraction(y) - low) * 2**random_bits)
    return low + (1 if word < threshold else 0)


def sr_variance(x: float, low: float, step: float) -> float:
    """``(x - l)(h - x)`` on the grid ``low + j step``: the variance of ideal stochastic rounding."""
    if step == 0:
        return 0.0
    y = (Fraction(x) - Fraction(low)) / Fraction(step)
    f = y - math.floor(y)
    return float(Fraction(step) ** 2 * f * (1 - f))


# --- grids ------------------------------------------------------------------------------------------------------------


def affine(values: list[float], levels: int) -> tuple[float, float]:
    """Lowest point and step of the grid from the minimum to the maximum."""
    return min(values), (max(values) - min(values)) / levels


def zero_on_grid(values: list[float], levels: int) -> tuple[float, float]:
    """Lowest point and step of the finest grid with zero on it: every place of zero is tried."""
    if min(values) == max(values):
        return min(values), 0.0
    low, high = min(0.0, *values), max(0.0, *values)
    best = math.inf, 0
    for k in range(levels + 1):
        if (low < 0 and k == 0) or (high > 0 and k == levels):
            continue
        best = min(best, (max(-low / k if low < 0 else 0.0, high / (levels - k) if high > 0 else 0.0), k))
    step, k = best
    return affine(values, levels) if step == math.inf else (-k * step, step)


def mirrored(values: list[float], levels: int) -> tuple[float, float]:
    """Lowest point and step of the grid from minus to plus the largest magnitude; no step for equal values."""
    if min(values) == max(values):
        return min(values), 0.0
    largest = max(map(abs, values))
    return -largest, 2 * largest / levels


def symmetric(values: list[float], levels: int) -> tuple[float, float]:
    """Likewise with one point fewer, so that zero is a point."""
    low, step = mirrored(values, levels - 1)
    return low, step


def logarithmic_variance(x: Matrix, magnitudes: int) -> Matrix:
    """``|x| (alpha - |x|)`` below alpha, ``alpha^2 (z - 2^n) (2^(n + 1) - z)`` above, in exact arithmetic."""
    values = [abs(Fraction(v)) for row in x for v in row]
    if len({v for row in x for v in row}) == 1:
        return [[0.0] * len(row) for row in x]
    alpha = max(values) / 2 ** (magnitudes - 1)

    def one(size: Fraction) -> float:
        if size < alpha:
            return float(size * (alpha - size))
        low = alpha
        while 2 * low <= size:
            low *= 2
        return float((size - low) * (2 * low - size))

    return [[one(abs(Fraction(v))) for v in row] for row in x]


def grouped_variance(x: Matrix, groups: list[list[tuple[int, int]]], grid, levels: int) -> Matrix:
    """Variance of stochastic rounding where each group of positions ``(row, column)`` has a grid of its own."""
    variance = [[0.0] * len(row) for row in x]
    for group in groups:
        low, step = grid([x[i][j] for i, j in group], levels)
        for i, j in group:
            variance[i][j] = sr_variance(x[i][j], low, step)
    return variance


def whole(x: Matrix) -> list[list[tuple[int, int]]]:
    """One group."""
    return [[(i, j) for i in range(len(x)) for j in range(len(x[0]))]]


def by_row(x: Matrix) -> list[list[tuple[int, int]]]:
    """One group per sample."""
    return [[(i, j) for j in range(len(x[0]))] for i in range(len(x))]


def by_channel(x: Matrix, space: int) -> list[list[tuple[int, int]]]:
    """One group per channel of ``space`` columns, over the samples."""
    return [
        [(i, j) for i in range(len(x)) for j in range(first, first + space)] for first in range(0, len(x[0]), space)
    ]


# --- block Householder ------------------------------------------------------------------------------------------------


def row_range(row: list[float]) -> Fraction:
    return Fraction(max(row)) - Fraction(min(row))


def bhq_groups(ranges: list[Fraction]) -> list[list[int]]:
    """Groups of row indices, leader first: StatQuant's rule in exact arithmetic, rounding half up."""
    n_rows = len(ranges)
    order = sorted(range(n_rows), key=lambda i: -ranges[i])  # stable
    lam = [ranges[i] for i in order]
    small = next(m for m in range(1, n_rows) if m * lam[n_rows - m - 1] >= sum(lam[: n_rows - m]))
    leaders = n_rows - small
    groups, taken = [], 0
    for i in range(leaders):
        end = math.floor(small * sum(lam[: i + 1]) / sum(lam[:leaders]) + Fraction(1, 2))
        groups.append([order[i], *(order[leaders + j] for j in range(taken, end))])
        taken = end
    return groups


def bhq_distance_to_tie(ranges: list[Fraction]) -> float:
    """How far the nearest decision of :func:`bhq_groups` is from turning the other way, relative."""
    lam = sorted(ranges, reverse=True)
    n_rows = len(lam)
    distance = min(
        abs(1 - m * lam[n_rows - m - 1] / sum(lam[: n_rows - m])) for m in range(1, n_rows)
    )  # of the number of leaders
    leaders = len(bhq_groups(ranges))
    for i in range(leaders - 1):
        share = (n_rows - leaders) * sum(lam[: i + 1]) / sum(lam[:leaders])
        distance = min(distance, abs(share - math.floor(share) - Fraction(1, 2)) / share)
    return float(distance)


def householder(n: int) -> Matrix:
    """``I - 2 v v^T / v^T v`` with ``v = 1 / sqrt(n) - e_1``."""
    v = [1 / math.sqrt(n) - (1 if i == 0 else 0) for i in range(n)]
    norm = sum(a * a for a in v)
    return [[(1 if i == j else 0) - 2 * v[i] * v[j] / norm for j in range(n)] for i in range(n)]


def bhq_t(n: int, largest: float, second: float) -> float:
    """``((n - 1) lambda_1 / (sqrt n kappa lambda_2))^(1/3)`` with ``kappa = max |H|``, to 24 significant bits."""
    kappa = max(abs(h) for row in householder(n) for h in row)
    mantissa, exponent = math.frexp(((n - 1) * largest / (math.sqrt(n) * kappa * second)) ** (1 / 3))
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def bhq_matrices(groups: list[list[int]], ranges: list[Fraction]) -> tuple[Matrix, Matrix]:
    """Dense ``T`` (transformed rows in group order) and ``T^-1``; groups with lambda_2 = 0 are left alone."""
    n_rows = len(ranges)
    forward = [[0.0] * n_rows for _ in range(n_rows)]
    inverse = [[0.0] * n_rows for _ in range(n_rows)]
    first = 0
    for group in groups:
        n = len(group)
        second = float(ranges[group[1]])
        h = householder(n) if second > 0 else [[float(i == j) for j in range(n)] for i in range(n)]
        t = bhq_t(n, float(ranges[group[0]]), second) if second > 0 else 1.0
        for i in range(n):
            for j in range(n):
                forward[first + i][group[j]] = h[i][j] * (1 if j == 0 else t)
                inverse[group[i]][first + j] = h[i][j] / (1 if i == 0 else t)
        first += n
    return forward, inverse


def matmul(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [[math.fsum(p * q for p, q in zip(row, column, strict=True) if p) for column in columns] for row in a]


def bhq_variance(x: Matrix, levels: int) -> Matrix:
    """``Var_jd = sum_r (T^-1)_jr^2 step_r^2 f_rd (1 - f_rd)``, each row of ``T x`` on its own affine grid."""
    ranges = [row_range(row) for row in x]
    if len(x) == 1 or max(ranges) == 0:
        return grouped_variance(x, by_row(x), affine, levels)
    forward, inverse = bhq_matrices(bhq_groups(ranges), ranges)
    y = matmul(forward, x)
    return matmul([[entry**2 for entry in row] for row in inverse], grouped_variance(y, by_row(y), affine, levels))


def bhq_candidates(lam: list[float]) -> list[list[float] | None]:
    """Scales of one group's rows, leader first, for each candidate of adaptive grouping; None: the rows as they are."""
    candidates: list[list[float] | None] = [None]
    if lam[1] > 0:
        t = bhq_t(len(lam), lam[0], lam[1])
        matched = [math.sqrt(lam[0] / max(small, lam[1] / 4)) for small in lam[1:]]
        if any(abs(s - t) > t / 16 for s in matched):
            candidates.append([1.0, *matched])
        candidates.append([1.0, *[t] * len(matched)])
    return candidates


def bhq_adaptive_variance(x: Matrix, levels: int) -> Matrix:
    """Of each group's candidates the one with the least summed variance."""
    ranges = [row_range(row) for row in x]
    if len(x) == 1 or max(ranges) == 0:
        return grouped_variance(x, by_row(x), affine, levels)
    result: Matrix = [[] for _ in x]
    for group in bhq_groups(ranges):
        rows, h, found = [x[i] for i in group], householder(len(group)), []
        for scale in bhq_candidates([float(ranges[i]) for i in group]):
            if scale is None:
                found.append(grouped_variance(rows, by_row(rows), affine, levels))
                continue
            y = matmul([[a * s for a, s in zip(row, scale, strict=True)] for row in h], rows)
            weights = [[(a / s) ** 2 for a in row] for row, s in zip(h, scale, strict=True)]
            found.append(matmul(weights, grouped_variance(y, by_row(y), affine, levels)))
        best = min(found, key=lambda variance: math.fsum(math.fsum(row) for row in variance))
        for i, row in zip(group, best, strict=True):
            result[i] = row
    return result


def bhq_published_bound(x: Matrix, levels: int) -> float:
    """Sum over groups of ``D / (4 B^2) (lambda_1^(2/3) n^(-1/3) + lambda_2^(2/3) n^(2/3))^3``."""
    ranges = [row_range(row) for row in x]
    total = 0.0
    for group in bhq_groups(ranges):
        n, largest, second = len(group), float(ranges[group[0]]), float(ranges[group[1]])
        total += (largest ** (2 / 3) * n ** (-1 / 3) + second ** (2 / 3) * n ** (2 / 3)) ** 3
    return len(x[0]) * total / (4 * levels**2)
