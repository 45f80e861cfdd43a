"""How heavy do the tails of the gradient's rows become during training, and what does that do to PTQ, PSQ and BHQ?

A network is trained in full precision; after some of its epochs the QAT gradients of one minibatch that arrive at its
layers are looked at, sample by sample (a row is dL/dY of one sample). The range of a row is its largest less its
smallest number: the step of a quantizer with a grid per row (PSQ), while one with a grid per tensor (PTQ) takes that of
the whole tensor. Tails are told by quantiles of the row ranges relative to their median, the largest among them, and by
Hill's estimate of the tail index from the tenth with the largest ranges: the smaller, the heavier.

What it does to the quantizers is their exact variance on the same gradients, summed over the elements and relative to
the squared norm. With fractions that are uniform in a step, PTQ / PSQ would be the squared range of the tensor over the
mean square of the rows'. How the ratios PTQ / PSQ and PSQ / BHQ go with the tail is fitted over layers and epochs: the
exponent of the largest relative range by least squares in logarithms, and Spearman's rank correlation.

Numbers of an epoch are medians over the layers; intervals are of the mean over the seeds, of logarithms where ratios
are. Expectations (the ranges 1.2 to 1.6 at initialization and 69 to 420 from epoch 5) come from a comparable network;
an interval is inside of them, outside, or, if it holds an end, open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats
import statsmodels.api as sm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import networks
from analysis.estimates import geometric_mean, mean_interval
from analysis.expected import judged
from analysis.gradients import incoming
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.quantizers import quantizer
from fqtstats.report import style
from fqtstats.schema import Column

QUANTIZERS = ("ptq", "psq", "bhq")
QUANTILES = {"q90": 0.9, "q99": 0.99, "top": 1.0}
"""Of the row ranges relative to their median, by column."""
TAIL = 0.1
"""Share of the rows of which the tail index is estimated."""

_SQUARE = "(loss/activation)^2"
COLUMNS = (
    Column("model", "str", "", "network"),
    Column("seed", "int64", "1", "of network and minibatch"),
    Column("epoch", "int64", "1", "after which the network is; 0: as initialized"),
    Column("layer", "str", "", "at which the gradient arrives"),
    *(
        Column(name, "float64", "1", f"quantile {share:g} of the row ranges over their median")
        for name, share in QUANTILES.items()
    ),
    Column("bits", "int64", "bit", "of the quantizers"),
    Column("index", "float64", "1", "Hill's estimate of the tail index of the row ranges"),
    Column("norm_sq", "float64", _SQUARE, "squared norm of the QAT gradient"),
    *(Column(name, "float64", _SQUARE, f"exact variance of {name}, summed") for name in QUANTIZERS),
)

EXPECTED = {"at initialization": (1.2, 1.6), "from epoch 5": (69.0, 420.0)}
"""Largest row range over the median one in a comparable network."""


@dataclass(frozen=True)
class Settings:
    """Of the study; ``bits`` of the quantizers."""

    model: str = "preact_resnet20"
    epochs: tuple[int, ...] = (0, 1, 2, 3, 5, 7, 10)
    bits: int = 4
    seeds: int = 5


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row per seed, epoch and layer."""
    quantizers = {name: quantizer(name, bits=settings.bits) for name in QUANTIZERS}

    def of_seed(model: str, seed: int) -> Iterator[dict[str, object]]:
        for epoch, network in networks.snapshots(model, seed, settings.epochs):
            for layer, gradient in incoming(network).items():
                variances = {name: float(q.variance(gradient).sum()) for name, q in quantizers.items()}
                norm_sq = float(gradient.double().square().sum())
                yield {"epoch": epoch, "layer": layer, "bits": settings.bits, **tail(gradient), "norm_sq": norm_sq,
                       **variances}  # fmt: skip

    cases = [{"model": settings.model, "seed": seed} for seed in range(settings.seeds)]
    return {"layers": parts.every("seeds", cases, of_seed)}


def tail(gradient: torch.Tensor) -> dict[str, float]:
    """Quantiles of the row ranges of ``gradient``, ``[N, ...]``, over their median, and Hill's tail index."""
    low, high = gradient.flatten(1).double().aminmax(dim=1)
    ranges = (high - low).sort().values
    found = {name: float(ranges.quantile(share) / ranges.median()) for name, share in QUANTILES.items()}
    k = max(1, int(TAIL * len(ranges)))
    excess = (ranges[-k:] / ranges[-k - 1]).log().mean()
    return {**found, "index": float(1 / excess) if excess > 0 else math.inf}


# --- what is said of it -----------------------------------------------------------------------------------------------


def ratios(layers: pd.DataFrame) -> pd.DataFrame:
    """With the quantizers' ratios, and their variances relative to the squared norm."""
    relative = {f"{name}_share": layers[name] / layers["norm_sq"] for name in QUANTIZERS}
    return layers.assign(ptq_psq=layers["ptq"] / layers["psq"], psq_bhq=layers["psq"] / layers["bhq"], **relative)


def by_epoch(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Of medians over the layers the geometric mean over the seeds and its interval, by epoch."""
    medians = ratios(layers).groupby(["epoch", "seed"])[column].median()
    rows = {epoch: geometric_mean(own) for epoch, own in medians.groupby("epoch")}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])


def exponents(layers: pd.DataFrame, ratio: str) -> dict[str, tuple[float, float, float]]:
    """Of the ratio in the largest relative range, and the rank correlation, over layers and epochs: mean of seeds."""
    found: dict[str, list[float]] = {"exponent": [], "rank": []}
    for _, own in ratios(layers).groupby("seed"):
        x, y = np.log(own["top"].to_numpy()), np.log(own[ratio].to_numpy())
        found["exponent"].append(float(sm.OLS(y, sm.add_constant(x)).fit().params[1]))
        found["rank"].append(float(scipy.stats.spearmanr(x, y).statistic))
    return {name: mean_interval(values) for name, values in found.items()}


def read(tables: Tables) -> pd.DataFrame:
    """A row per epoch."""
    layers = tables["layers"]
    shown = {"largest": "top", "tail index": "index", "PTQ / PSQ": "ptq_psq", "PSQ / BHQ": "psq_bhq"}
    columns = {
        name: [with_interval(*row, ".2g") for row in by_epoch(layers, column).to_numpy()]
        for name, column in shown.items()
    }
    return pd.DataFrame({"epoch": sorted(map(str, layers["epoch"].unique()), key=int), **columns})


def claims(tables: Tables) -> list[Claim]:
    """Tails over the epochs, and what they do."""
    layers = tables["layers"]
    largest, seeds = by_epoch(layers, "top"), layers["seed"].nunique()
    expected = layers["model"].iloc[0] == "preact_resnet20"
    told = []
    for when, (low, high) in EXPECTED.items():
        own = largest[largest.index == 0] if when == "at initialization" else largest[largest.index >= 5]
        if own.empty:
            continue
        estimates = {f"epoch {epoch}": tuple(ends) for epoch, *ends in own.itertuples()}
        numbers = "; ".join(f"{epoch}: {with_interval(*ends)}" for epoch, ends in estimates.items())
        text = (
            f"The largest row range is so many times the median one {when}: {numbers} (median over the layers; "
            f"{seeds} seeds)"
        )
        told.append(judged(text, estimates, (low, high)) if expected else Claim(f"{text}."))
    first, last, bits = largest.index[0], largest.index[-1], layers["bits"].iloc[0]
    for name in QUANTIZERS:
        own = by_epoch(layers, f"{name}_share")
        told.append(
            Claim(
                f"{name}@{bits}: the variance is {with_interval(*own.loc[first], '.2g')} of the squared norm at epoch "
                f"{first}, {with_interval(*own.loc[last], '.2g')} at epoch {last}."
            )
        )
    for ratio, name in (("ptq_psq", "PTQ / PSQ"), ("psq_bhq", "PSQ / BHQ")):
        own, fitted = by_epoch(layers, ratio), exponents(layers, ratio)
        told.append(
            Claim(
                f"{name} goes from {with_interval(*own.loc[first], '.3g')} at epoch {first} to "
                f"{with_interval(*own.loc[last], '.3g')} at epoch {last}, and grows with the tail: as its power "
                f"{with_interval(*fitted['exponent'], '.2f')}, rank correlation "
                f"{with_interval(*fitted['rank'], '.2f')} over layers and epochs.",
                bool(fitted["rank"][1] > 0) if seeds > 1 else None,
            )
        )
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Tails and variances over the epochs; ratios against tails."""
    return {"tails": _epochs(tables["layers"]), "ratios": _ratios(tables["layers"])}


def _epochs(layers: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 4.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = sorted(layers["epoch"].unique())
    each = layers.groupby("epoch")["top"]
    upper.fill_between(
        epochs,
        each.min(),
        each.max(),
        color=style.GREY,
        alpha=0.2,
        linewidth=0,
        label="largest: range over layers and seeds",
    )
    for index, (column, name, marker) in enumerate(
        (("top", "largest", "v"), ("q99", "99 % quantile", "p"), ("q90", "90 % quantile", "."))
    ):  # fmt: skip
        color = style.tint(style.INK, 1 - 0.25 * index)
        _line(upper, by_epoch(layers, column), style.Mark(color, marker), index - 1, name)
    upper.set(yscale="log", ylabel="row range / median row range")
    for index, (name, mark) in enumerate(style.marks(QUANTIZERS).items()):
        _line(lower, by_epoch(layers, f"{name}_share"), mark, index - 1, name)
    lower.axhline(1, color=style.GREY, linewidth=0.8)
    bits = layers["bits"].iloc[0]
    lower.set(yscale="log", ylabel=f"variance with {bits} bits / squared norm", xlabel="epoch", xticks=epochs)
    told = "lines: medians over layers, means over seeds with 95 % intervals"
    for ax, columns in ((upper, 2), (lower, 3)):
        ax.grid(axis="y")
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.02), ncols=columns, title=told, title_fontsize=6)
    return figure


def _line(ax: Axes, rows: pd.DataFrame, mark: style.Mark, place: int, name: str) -> None:
    mean, low, high = rows.to_numpy().T
    # Beside each other, so that no interval hides another.
    at = rows.index + 0.012 * rows.index[-1] * place
    ax.errorbar(
        at, mean, (mean - low, high - mean), marker=mark.marker, color=mark.color, elinewidth=0.8, label=name
    )  # fmt: skip


def _ratios(layers: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 3.7)
    panels = figure.subplots(2, 1, sharex=True)
    each = ratios(layers).groupby(["epoch", "layer"])[["top", "ptq_psq", "psq_bhq"]]
    rows = each.agg(lambda values: geometric_mean(values)[0]).reset_index()
    epochs = sorted(rows["epoch"].unique())
    for ax, ratio, name in zip(panels, ("ptq_psq", "psq_bhq"), ("PTQ / PSQ", "PSQ / BHQ"), strict=True):
        for index, epoch in enumerate(epochs):
            own = rows[rows["epoch"] == epoch]
            color = style.tint(style.BLUE, 0.25 + 0.75 * index / max(1, len(epochs) - 1))
            ax.plot(own["top"], own[ratio], "o", markersize=2, color=color, label=str(epoch))
        slope = with_interval(*exponents(layers, ratio)["exponent"], ".2f")
        ax.axhline(1, color=style.GREY, linewidth=0.8)
        ax.set(xscale="log", yscale="log", ylabel=f"variance {name}", title=f"exponent {slope}")
        ax.grid()
    panels[-1].set_xlabel("largest row range / median row range\n(a point per layer: geometric means over the seeds)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(epochs), title="epoch", title_fontsize=6,
                  markerscale=2, handletextpad=0)  # fmt: skip
    return figure


STUDY = Study(
    name="tails",
    question="How heavy do the tails of the gradient's rows become during training, and what does that do to PTQ, PSQ "
    "and BHQ?",
    full=Settings(),
    quick=Settings("mlp", (0, 2), seeds=2),
    columns={"layers": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Medians over the layers; geometric means over the seeds, 95 % intervals (Student t). Largest: row range "
    "over the median one. Tail index: Hill's estimate from the tenth with the largest ranges; heavier tails have "
    "smaller ones. PTQ / PSQ and PSQ / BHQ: ratios of exact variances with 4 bits.",
)

if __name__ == "__main__":
    main(STUDY)
