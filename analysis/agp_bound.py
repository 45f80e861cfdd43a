"""Does the published bound on the variance of activation gradient pruning (AGP) hold, and the corrected one?

AGP (arXiv 2408.14267) keeps row ``i``, of range ``R_i``, with probability ``p_i``, on average ``N / b`` rows, and
quantizes kept rows to ``b`` bits: ``Q(x_i) = PSQ_b(x_i) m_i / p_i``, ``step_i = R_i / B``, ``B = 2^b - 1``. With
``p_i = N R_i / (b sum R)``, where that is below 1 (water-filling: a row with more is kept always, and the others share
what is left), the exact variance is

    sum_ij [step_i^2 f_ij (1 - f_ij) + x_ij^2 (1 - p_i)] / p_i,

because ``E[Q^2] = E[PSQ_b(x)^2] / p``. The published bound, ``D / (4 B^2) sum R_i^2`` over the ``N / b`` largest rows,
leaves out the second part, which is that of the mask, and the ``1 / p_i`` of the first. The corrected one is
``sum_i [D step_i^2 / 4 + ||x_i||^2 (1 - p_i)] / p_i``.

Written with its own short formulas. Every kind of rows has one input, drawn once: given that, the variance and both
bounds are exact numbers without intervals. The draws check the exact variance; their intervals are normal, of the mean
squared error, and hold together with 95 % (Bonferroni). Shape legend: N rows, D elements per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

from analysis.known import Known
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.report import style
from fqtstats.schema import Column

COLUMNS = (
    Column("rows", "str", "", "kind of rows"),
    Column("bits", "int64", "bit", "b"),
    Column("always_kept", "int64", "1", "rows with probability 1"),
    Column("variance", "float64", "1", "exact, over all elements, of which Gaussian rows have unit size"),
    Column("of_mask", "float64", "1", "part of it from the mask"),
    Column("of_rounding", "float64", "1", "part of it from rounding"),
    Column("sampled", "float64", "1", "mean squared error of the draws"),
    Column("standard_error", "float64", "1", "of it"),
    Column("draws", "int64", "1", "number of draws"),
    Column("published_bound", "float64", "1", "on the variance"),
    Column("corrected_bound", "float64", "1", "on the variance"),
    Column("over_published", "float64", "1", "exact variance over the published bound"),
    Column("over_corrected", "float64", "1", "exact variance over the corrected bound"),
)

N, D = 128, 256

Array = npt.NDArray[np.float64]


def _normal(random: np.random.Generator) -> Array:
    return random.standard_normal((N, D))


ROWS: Known[Callable[[np.random.Generator], Array]] = Known(
    "rows",
    {
        "equal": _normal,
        "log-normal 1": lambda random: _normal(random) * np.exp(random.standard_normal((N, 1))),
        "log-normal 2": lambda random: _normal(random) * np.exp(2 * random.standard_normal((N, 1))),
        "log-normal 3": lambda random: _normal(random) * np.exp(3 * random.standard_normal((N, 1))),
        "power law": lambda random: _normal(random) * np.arange(1, N + 1)[:, None] ** -1.0,
        "rectified": lambda random: np.maximum(_normal(random), 0) * np.exp(2 * random.standard_normal((N, 1))),
    },
)
"""Rows of Gaussian elements with these ranges, except for the last."""


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    rows: tuple[str, ...] = tuple(ROWS)
    bits: tuple[int, ...] = (2, 4, 8)
    draws: int = 2000


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row per kind of rows and bits."""

    def case(rows: str, bits: int) -> dict[str, object]:
        x = ROWS[rows](np.random.default_rng(0))
        return compare(x, bits, np.random.default_rng([list(ROWS).index(rows), bits]), settings.draws)

    cases = [{"rows": rows, "bits": bits} for rows in settings.rows for bits in settings.bits]
    return {"bounds": parts.every("rows", cases, case)}


def probabilities(ranges: Array, b: int) -> Array:
    """Water-filling: in proportion to the ranges, at most 1, ``N / b`` in sum."""
    kept = np.zeros(len(ranges), dtype=bool)
    while True:
        left = len(ranges) / b - kept.sum()
        p = np.where(kept, 1.0, left * ranges / max(ranges[~kept].sum(), 1e-300))
        if not (p > 1).any():
            return p
        kept |= p > 1


def compare(x: Array, b: int, random: np.random.Generator, draws: int) -> dict[str, object]:
    """Exact and sampled variance of AGP, and its bounds."""
    levels = 2**b - 1
    low, ranges = x.min(1, keepdims=True), np.ptp(x, axis=1)
    p, step = probabilities(ranges, b)[:, None], ranges[:, None] / levels
    y = (x - low) / step
    f = y - np.floor(y)
    rounding = float((step**2 * f * (1 - f) / p).sum())
    mask = float((x**2 * (1 - p) / p).sum())
    squared = np.empty(draws)
    for i in range(draws):
        kept = random.random((N, 1)) < p
        codes = np.floor(y) + (random.random(x.shape) < f)
        squared[i] = np.square(np.where(kept, (codes * step + low) / p, 0.0) - x).sum()
    largest = np.sort(ranges)[::-1][: N // b]
    published = D / (4 * levels**2) * float(np.square(largest).sum())
    corrected = float(((D * step[:, 0] ** 2 / 4 + np.square(x).sum(1) * (1 - p[:, 0])) / p[:, 0]).sum())
    return {
        "always_kept": int((p == 1).sum()),
        "variance": rounding + mask,
        "of_mask": mask,
        "of_rounding": rounding,
        "sampled": squared.mean(),
        "standard_error": squared.std(ddof=1) / np.sqrt(draws),
        "draws": draws,
        "published_bound": published,
        "corrected_bound": corrected,
        "over_published": (rounding + mask) / published,
        "over_corrected": (rounding + mask) / corrected,
    }


# --- what is said of it -----------------------------------------------------------------------------------------------


def drawn(table: pd.DataFrame) -> pd.DataFrame:
    """Variance of the draws over the exact one, with intervals that hold together with 95 %."""
    half = scipy.stats.norm.ppf(1 - 0.025 / len(table)) * table["standard_error"] / table["variance"]
    ratio = table["sampled"] / table["variance"]
    return table[["rows", "bits"]].assign(ratio=ratio, low=ratio - half, high=ratio + half)


def read(tables: Tables) -> pd.DataFrame:
    """A row per kind of rows and bits."""
    table = tables["bounds"]
    return pd.DataFrame(
        {
            "rows": table["rows"],
            "bits": table["bits"].astype(str),
            "variance": [f"{value:.3g}" for value in table["variance"]],
            "of mask": [f"{value:.1%}" for value in table["of_mask"] / table["variance"]],
            "drawn/exact": [with_interval(row.ratio, row.low, row.high, ".3f") for row in drawn(table).itertuples()],
            "/published": [f"{value:.3g}" for value in table["over_published"]],
            "/corrected": [f"{value:.3g}" for value in table["over_corrected"]],
        }
    )


def claims(tables: Tables) -> list[Claim]:
    """Which bound is exceeded where."""
    table = tables["bounds"]
    over = table[table["over_published"] > 1]
    worst = table.loc[table["over_published"].idxmax()]
    closest = table.loc[table["over_corrected"].idxmax()]
    of_bits = ", ".join(
        f"{int((own['over_published'] > 1).sum())} of {len(own)} at {bits} bits" for bits, own in table.groupby("bits")
    )
    ratios = drawn(table)
    far = ratios.loc[(ratios["ratio"] - 1).abs().idxmax()]
    hold = (ratios["low"] <= 1) & (ratios["high"] >= 1)
    return [
        Claim(
            f"The published bound does not bound the variance: the exact variance exceeds it for {len(over)} of "
            f"{len(table)} inputs ({of_bits}), by a factor of up to {worst['over_published']:.3g} ({worst['rows']} "
            f"rows, {worst['bits']} bits), of which the mask that it leaves out makes "
            f"{worst['of_mask'] / worst['variance']:.1%}.",
            len(over) > 0,
        ),
        Claim(
            f"The corrected bound holds for all {len(table)} inputs: the exact variance is at most "
            f"{closest['over_corrected']:.5g} of it ({closest['rows']} rows, {closest['bits']} bits), at least "
            f"{table['over_corrected'].min():.2g}.",
            bool((table["over_corrected"] <= 1).all()),
        ),
        Claim(
            f"The exact variance is that of the draws: the mean squared error of {table['draws'].iloc[0]} draws is "
            f"{with_interval(far['ratio'], far['low'], far['high'], '.4f')} of it where it differs most "
            f"({far['rows']} rows, {far['bits']} bits), and {hold.sum()} of {len(table)} intervals hold 1; all are "
            f"within {max(1 - ratios['low'].min(), ratios['high'].max() - 1):.1%} of it (95 % together, Bonferroni).",
            bool(hold.all()),
        ),
    ]


def draw(tables: Tables) -> dict[str, Figure]:
    """Exact variance over both bounds; draws over the exact variance."""
    return {"bounds": _bounds(tables["bounds"]), "draws": _draws(tables["bounds"])}


_MARKERS = ("v", "o", "^", "s", "D")


def _places(table: pd.DataFrame) -> tuple[dict[str, int], dict[int, tuple[str, float]]]:
    """Places of the kinds of rows; of every number of bits a marker and a shift."""
    bits = sorted(table["bits"].unique())
    shifts = np.linspace(-0.2, 0.2, len(bits)) if len(bits) > 1 else [0.0]
    kinds = {kind: place for place, kind in enumerate(dict.fromkeys(table["rows"]))}
    return kinds, {b: (marker, shift) for b, marker, shift in zip(bits, _MARKERS, shifts, strict=False)}


def _bounds(table: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 2.3)
    ax = figure.subplots()
    kinds, looks = _places(table)
    for column, label, color, fill, aside in (
        ("over_published", "published", style.VERMILION, "full", -0.05),
        ("over_corrected", "corrected", style.BLUE, "none", 0.05),
    ):
        for b, (marker, shift) in looks.items():
            part = table[table["bits"] == b]
            x = part["rows"].map(kinds) + shift + aside
            ax.plot(x, part[column], marker, color=color, fillstyle=fill, label=f"{label}, b = {b}")
    ax.axhline(1, color=style.INK, linewidth=0.8)
    ax.annotate("bound", (len(kinds) - 0.55, 1), va="bottom")
    ax.set(yscale="log", ylabel="exact variance / bound", xlim=(-0.5, len(kinds) + 0.1))
    ax.set_xticks(range(len(kinds)), [kind.replace(" ", "\n").replace("-", "-\n") for kind in kinds])
    ax.grid(True, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _draws(table: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 1.9)
    ax = figure.subplots()
    kinds, looks = _places(table)
    ratios = drawn(table)
    for b, (marker, shift) in looks.items():
        part = ratios[ratios["bits"] == b]
        error = (part["ratio"] - part["low"], part["high"] - part["ratio"])
        x = part["rows"].map(kinds) + shift
        ax.errorbar(x, part["ratio"], error, fmt=marker, color=style.BLUE, elinewidth=0.8, label=f"b = {b}")
    ax.axhline(1, color=style.GREY, linewidth=0.8)
    ax.set(ylabel="variance of draws / exact\n(95 % together)", xlim=(-0.5, len(kinds) - 0.5))
    ax.set_xticks(range(len(kinds)), [kind.replace(" ", "\n").replace("-", "-\n") for kind in kinds])
    ax.grid(True, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


STUDY = Study(
    name="agp_bound",
    question="Does the published bound on the variance of activation gradient pruning hold, and the corrected one?",
    full=Settings(),
    quick=Settings(("equal", "log-normal 2"), (2, 8), draws=200),
    columns={"bounds": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Variance: exact; of mask: its part from pruning. drawn/exact: variance of the draws over it, with "
    "intervals that hold together with 95 % (Bonferroni). /published, /corrected: exact variance over either bound.",
)

if __name__ == "__main__":
    main(STUDY)
