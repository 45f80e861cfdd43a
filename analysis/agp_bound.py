"""Does the published bound on the variance of activation gradient pruning (AGP) hold? And the corrected one?

``python -m analysis.agp_bound`` (seconds) writes to ``analysis/results/agp_bound/``:

* ``bounds.csv``: for rows of several shapes and ``b`` = 2, 4 and 8 bits, the exact variance, its part from the mask and
  from rounding, the variance of draws with its standard error, and both bounds;
* ``bounds.png``: exact variance over bound.

AGP (arXiv 2408.14267) keeps row ``i``, of range ``R_i``, with probability ``p_i``, on average ``N / b`` rows, and
quantizes kept rows to ``b`` bits: ``Q(x_i) = PSQ_b(x_i) m_i / p_i``, ``step_i = R_i / B``, ``B = 2^b - 1``. With
``p_i = N R_i / (b sum R)``, where that is below 1 (water-filling: a row with more is kept always, and the others share
what is left), the exact variance is

    sum_ij [step_i^2 f_ij (1 - f_ij) + x_ij^2 (1 - p_i)] / p_i,

because ``E[Q^2] = E[PSQ_b(x)^2] / p``. The published bound, ``D / (4 B^2) sum R_i^2`` over the ``N / b`` largest rows,
leaves out the second part, which is that of the mask, and the ``1 / p_i`` of the first. The corrected one is
``sum_i [D step_i^2 / 4 + ||x_i||^2 (1 - p_i)] / p_i``.

Written with its own short formulas. Shape legend: N rows, D elements per row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from fqtstats.report import style

FOLDER = Path(__file__).parent / "results" / "agp_bound"
N, D = 128, 256
BITS = (2, 4, 8)
DRAWS = 2000

Array = npt.NDArray[np.float64]


def _normal(random: np.random.Generator) -> Array:
    return random.standard_normal((N, D))


ROWS: dict[str, Callable[[np.random.Generator], Array]] = {
    "equal": _normal,
    "log-normal 1": lambda random: _normal(random) * np.exp(random.standard_normal((N, 1))),
    "log-normal 2": lambda random: _normal(random) * np.exp(2 * random.standard_normal((N, 1))),
    "log-normal 3": lambda random: _normal(random) * np.exp(3 * random.standard_normal((N, 1))),
    "power law": lambda random: _normal(random) * np.arange(1, N + 1)[:, None] ** -1.0,
    "rectified": lambda random: np.maximum(_normal(random), 0) * np.exp(2 * random.standard_normal((N, 1))),
}
"""Rows of Gaussian elements with these ranges, except for the last."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of every quantized gradient")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        [
            compare(kind, rows(np.random.default_rng(0)), b, np.random.default_rng([i, b]), given.draws)
            for i, (kind, rows) in enumerate(ROWS.items())
            for b in BITS
        ]
    )
    table.to_csv(given.out / "bounds.csv", index=False, float_format="%.6g")
    (given.out / "bounds.png").write_bytes(draw(table))
    print(table.to_string(index=False, float_format="%.4g"))


def probabilities(ranges: Array, b: int) -> Array:
    """Water-filling: in proportion to the ranges, at most 1, ``N / b`` in sum."""
    kept = np.zeros(len(ranges), dtype=bool)
    while True:
        left = len(ranges) / b - kept.sum()
        p = np.where(kept, 1.0, left * ranges / max(ranges[~kept].sum(), 1e-300))
        if not (p > 1).any():
            return p
        kept |= p > 1


def compare(kind: str, x: Array, b: int, random: np.random.Generator, draws: int) -> dict[str, object]:
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
        "rows": kind,
        "bits": b,
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


def draw(table: pd.DataFrame) -> bytes:
    """Exact variance over either bound, by kind of rows, a marker for each number of bits."""
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 2.1)
        axes = figure.subplots()
        place = {kind: i for i, kind in enumerate(ROWS)}
        for column, label, color, fill in (
            ("over_published", "published", "#D55E00", "full"),
            ("over_corrected", "corrected", "#0072B2", "none"),
        ):
            for b, marker, shift in zip(BITS, ("v", "o", "^"), (-0.2, 0.0, 0.2), strict=True):
                part = table[table["bits"] == b]
                x = part["rows"].map(place) + shift
                axes.plot(x, part[column], marker, color=color, fillstyle=fill, label=f"{label}, b = {b}")
        axes.axhline(1, color=style.INK, linewidth=0.8)
        axes.annotate("bound", (len(place) - 0.4, 1), va="bottom", fontsize=5.5)
        axes.set(yscale="log", ylabel="exact variance / bound", xlim=(-0.5, len(place) + 0.1))
        axes.set_xticks(range(len(place)), [kind.replace(" ", "\n") for kind in place], fontsize=5.5)
        axes.grid(True, axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return style.png(figure)


if __name__ == "__main__":
    main()
