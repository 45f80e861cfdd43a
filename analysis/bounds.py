"""How tight are the bounds on the variance?

Every quantizer that is random knows its exact variance on an input and a bound on it that holds; for some the papers
have another one. Both are compared on the gradients that arrive at the layers of trained networks, one per seed, and on
synthetic inputs of 128 rows of 64 numbers:

* gaussian: independent standard normal numbers;
* heavy rows: the same, each row times exp(2 z) with a standard normal z;
* rectified: heavy rows with their negative numbers set to zero;
* two values: 1 with probability 1/4, else -0.3; rows scaled as in heavy rows;
* half steps: every row has -1, 1, and numbers between, each half a step from two points of a grid from -1 to 1;
* one large row: gaussian, one row times 1000; one row alone: all others are zero.

The ratio is exact variance over bound, at most 1 where the bound holds. A number in the middle of a step has the
variance step^2 / 4, of which the bounds are made; one whose place in its step is uniform has step^2 / 6 on average:
ratio 2/3.

End to end, theorem 2 of arXiv 2010.14298 bounds the variance of a parameter's gradient by the sum over quantizers of
their bounds times the squared operator norm of the map from their error to the gradient. The ratio is that of the
variance which draws show to that bound; every layer in between makes it smaller.

Two bounds are told apart: the quantizer's own, which holds on every input, and the published one, which for PTQ
supposes a grid from the least to the largest number and for BHQ (appendix D.4 of the same paper) the best scale of the
small rows. Expectations are of the published bound, at 4 bits and more: an interval is inside of them, outside, or, if
it holds an end, open.

Intervals are of the geometric mean over the seeds, of each of which the median over its layers (or parameters) is
taken. Where a median is 0 it is 0, without an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import fqtstats
from analysis import networks
from analysis.axes import beside, intervals
from analysis.estimates import geometric_mean
from analysis.expected import judged
from analysis.gradients import incoming
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.quantizers import Quantizer, quantizer
from fqtstats.report import style
from fqtstats.results import NORM_TOLERANCE
from fqtstats.schema import Column

QUANTIZERS = (
    Column("source", "str", "", "network, or kind of synthetic input"),
    Column("seed", "int64", "1", "of network and minibatch, or of the numbers"),
    Column("layer", "str", "", 'at which the gradient arrives; "" for synthetic inputs'),
    Column("quantizer", "str", "", "of it"),
    Column("bits", "int64", "bit", "of the quantizer"),
    Column("ratio", "float64", "1", "exact variance over the bound that holds; NaN where both are zero"),
    Column("published", "float64", "1", "exact variance over the published bound; NaN where there is none, or 0 / 0"),
)
PARAMETERS = (
    Column("source", "str", "", "network"),
    Column("seed", "int64", "1", "of network, minibatch and draws"),
    Column("quantizer", "str", "", "of the input gradient"),
    Column("bits", "int64", "bit", "of it"),
    Column("layer", "str", "", "of the parameter"),
    Column("parameter", "str", "", "its name in the layer"),
    Column("ratio", "float64", "1", "variance of its gradient, from draws, over the end-to-end bound"),
    Column("low", "float64", "1", "the lower end of the variance's 95 % interval over the bound"),
)

REAL = tuple(networks.DATA)
ROWS, WIDTH = 128, 64
OTHERS: dict[str, dict[str, Any]] = {"ptq-affine": {"name": "ptq", "grid": "affine"}}
"""Names here for quantizers with other options than their defaults."""

LEAST = 1e-3
"""The lowest ratio that is drawn."""

_COLORS = (
    style.VERMILION,
    style.BLUE,
    style.INK,
    style.ORANGE,
    style.GREEN,
    style.PURPLE,
    style.SKY,
    style.WINE,
    style.OLIVE,
)

UNPUBLISHED = ("bhq-adaptive", "dorefa", "int4_sr", "luq", "pcq", "ptq-affine")
"""For these the papers have no bound, or the one that holds is theirs."""

EXPECTED = {"ptq": (0.65, 0.80), "psq": (0.58, 0.75), "bhq": (0.008, 0.23)}
"""Ratios to the published bound expected beforehand, at 4 bits and more; of PTQ on smooth data alone."""


@dataclass(frozen=True)
class Settings:
    """Of the study; ``draws`` are those of the end-to-end variances, on ``samples`` samples (or sequences)."""

    models: tuple[str, ...] = ("preact_resnet20", "transformer")
    quantizers: tuple[str, ...] = ("ptq", "ptq-affine", "psq", "pcq", "bhq", "bhq-adaptive", "agp", "luq", "dorefa",
                                   "int4_sr")  # fmt: skip
    bits: tuple[int, ...] = (2, 4, 8)
    seeds: int = 3
    networks: tuple[str, ...] = ("mlp", "transformer")
    ends: tuple[str, ...] = ("ptq", "psq", "bhq")
    end_bits: int = 5
    end_seeds: int = 3
    draws: int = 32
    samples: int = 8


def measure(settings: Settings, parts: Parts) -> Tables:
    """Ratios of quantizers and of parameters."""
    choices = [(name, bits) for name in settings.quantizers for bits in settings.bits if bits in _widths(name)]

    def of_input(source: str, seed: int) -> Iterator[dict[str, object]]:
        for layer, x in _inputs(source, seed, settings.bits):
            for name, bits in choices:
                if layer.startswith("half") and layer != f"half {bits}":
                    continue
                q = _quantizer(name, bits)
                variance = float(q.variance(x).sum())
                yield {
                    "layer": "" if source in SYNTHETIC else layer,
                    "quantizer": name,
                    "bits": bits,
                    "ratio": _ratio(variance, q.bound(x)),
                    "published": _ratio(variance, q.published_bound(x)),
                }

    def of_network(source: str, seed: int, quantizer: str) -> Iterator[dict[str, object]]:
        network = networks.trained(source, seed, batch_size=settings.samples)
        policy = fqtstats.policies.get(f"statquant-{quantizer}", bits=settings.end_bits)
        found = fqtstats.measure(
            network.model, network.batch, network.loss, policy, settings.draws, seed, "native", bounds=True
        ).rows()
        for row in found[found["bound"] > 0].itertuples():
            yield {
                "bits": settings.end_bits,
                "layer": row.layer,
                "parameter": row.parameter,
                "ratio": row.bound_ratio,
                "low": row.variance_low / row.bound,
            }

    inputs = [*settings.models, *SYNTHETIC]
    ends = [(name, seed, q) for name in settings.networks for seed in range(settings.end_seeds) for q in settings.ends]
    return {
        "quantizers": parts.every(
            "quantizers",
            [{"source": name, "seed": seed} for name in inputs for seed in range(settings.seeds)],
            of_input,
        ),
        "parameters": parts.every(
            "end to end", [{"source": name, "seed": seed, "quantizer": q} for name, seed, q in ends], of_network
        ),
    }


def _widths(name: str) -> Any:
    return _quantizer(name, 4).widths


def _quantizer(name: str, bits: int) -> Quantizer:
    return quantizer(**{"name": name, **OTHERS.get(name, {}), "bits": bits})


def _ratio(variance: float, bound: float | None) -> float:
    return variance / bound if bound else float("inf") if bound == 0 and variance > 0 else float("nan")


def _inputs(name: str, seed: int, bits: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    if name == "half steps":
        for b in bits:
            yield f"half {b}", SYNTHETIC[name](np.random.default_rng([seed, b]), 2**b - 1)
    elif name in SYNTHETIC:
        yield "", SYNTHETIC[name](np.random.default_rng(seed), 0)
    else:
        size = 16 if networks.DATA[name] == "text" else networks.BATCH
        yield from incoming(networks.trained(name, seed, batch_size=size)).items()


# --- synthetic inputs -------------------------------------------------------------------------------------------------


def _heavy(random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((ROWS, WIDTH)) * np.exp(2 * random.standard_normal((ROWS, 1)))


def _two(random: np.random.Generator) -> np.ndarray:
    values = np.where(random.random((ROWS, WIDTH)) < 0.25, 1, -0.3)
    return values * np.exp(2 * random.standard_normal((ROWS, 1)))


def _half(random: np.random.Generator, levels: int) -> np.ndarray:
    values = (random.integers(0, levels, (ROWS, WIDTH)) + 0.5) * 2 / levels - 1
    values[:, 0], values[:, 1] = -1, 1
    return values


def _one(random: np.random.Generator, others: float) -> np.ndarray:
    values = random.standard_normal((ROWS, WIDTH))
    values[1:] *= others
    return 1000 * values


def _float32(make: Callable[[np.random.Generator, int], np.ndarray]) -> Callable[..., torch.Tensor]:
    return lambda random, levels: torch.from_numpy(make(random, levels)).float()


SYNTHETIC: dict[str, Callable[..., torch.Tensor]] = {
    "gaussian": _float32(lambda random, levels: random.standard_normal((ROWS, WIDTH))),
    "heavy rows": _float32(lambda random, levels: _heavy(random)),
    "rectified": _float32(lambda random, levels: np.maximum(_heavy(random), 0)),
    "two values": _float32(lambda random, levels: _two(random)),
    "half steps": _float32(_half),
    "one large row": _float32(lambda random, levels: _one(random, 1e-3)),
    "one row alone": _float32(lambda random, levels: _one(random, 0)),
}
"""From a generator and the number of steps of the grid."""


# --- what is said of it -----------------------------------------------------------------------------------------------


def summary(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Geometric mean over the seeds of the median over the layers, its interval (0 and none where a median is 0), and
    the largest of all."""
    found = []
    for keys, own in rows.groupby(["source", "quantizer", "bits"], sort=False):
        known = own[own[column].notna() & (own[column] < np.inf)]
        row = dict(zip(("source", "quantizer", "bits"), keys, strict=True))
        medians = known.groupby("seed")[column].median()
        if len(medians):
            mean, low, high = geometric_mean(medians) if (medians > 0).all() else (0.0, math.nan, math.nan)
            found.append({**row, "mean": mean, "low": low, "high": high, "largest": own[column].max()})
    return pd.DataFrame(found)


def read(tables: Tables) -> pd.DataFrame:
    """A row per quantizer and bits."""
    found, shown = summary(tables["quantizers"], "ratio"), []
    for (name, bits), own in tables["quantizers"].groupby(["quantizer", "bits"], sort=False):
        means = found[(found["quantizer"] == name) & (found["bits"] == bits)].set_index("source")
        row = {"quantizer": name, "bits": str(bits)}
        for network in (source for source in REAL if source in means.index):
            row[network] = with_interval(*means.loc[network, ["mean", "low", "high"]], ".2g")
        made = means[~means.index.isin(REAL)]["mean"]
        published = own["published"].dropna()
        row["synthetic"] = f"{made.min():.1g} to {made.max():.2g}"
        row["largest"] = f"{own['ratio'].max():.4f}"
        row["published"] = "" if name in UNPUBLISHED or published.empty else _most(published)
        shown.append(row)
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """Whether bounds hold, which published ones do not, and how tight they are."""
    rows, ends = tables["quantizers"], tables["parameters"]
    worst = rows.loc[rows["ratio"].idxmax()]
    told = [
        Claim(
            f"No exact variance exceeds the quantizer's own bound: {rows['ratio'].notna().sum()} inputs, the largest "
            f"ratio is {1 - worst['ratio']:.1g} below 1 ({worst['quantizer']} at {worst['bits']} bits on "
            f"{worst['source']}).",
            bool((rows["ratio"].dropna() <= 1).all()),
        )
    ]
    told += _of_published(rows)
    own, published = summary(rows, "ratio"), summary(rows, "published")
    real = [name for name in dict.fromkeys(rows["source"]) if name in REAL]
    for name, expected in EXPECTED.items():
        for kinds, where in ((["gaussian"], "gaussian numbers"), (real, "gradients of networks")):
            to_own, to_published = (
                {
                    f"{'' if kinds == ['gaussian'] else row.source + ' '}at {row.bits} bits": (
                        row.mean,
                        row.low,
                        row.high,
                    )
                    for row in part[part["source"].isin(kinds)].itertuples()
                }
                for part in (each[(each["quantizer"] == name) & (each["bits"] >= 4)] for each in (own, published))
            )
            if to_own:
                text = f"{name} on {where}: variance / published bound {_told(to_published)}"
                text += f"; variance / own bound, which holds on all inputs, {_told(to_own)}"
                smooth = name != "ptq" or kinds == ["gaussian"]  # on PTQ's wide steps gradients are no smooth data
                told.append(judged(f"{text}", to_published, expected) if smooth else Claim(f"{text}."))
    return told + _end_to_end(ends)


def _told(estimates: dict[str, tuple[float, float, float]]) -> str:
    return ", ".join(f"{with_interval(*ends, '.2g')} {name}" for name, ends in estimates.items())


def _of_published(rows: pd.DataFrame) -> list[Claim]:
    told = []
    published = rows[~rows["quantizer"].isin(UNPUBLISHED) & rows["published"].notna()]
    expected = {"agp": True, "ptq": True, "bhq": True, "psq": False}
    for name, own in published.groupby("quantizer", sort=False):
        over = own[own["published"] > 1 + 1e-6]
        if len(over):
            most = over.loc[over.groupby("bits")["published"].idxmax()]
            cells = ", ".join(
                f"{_most(over[over['bits'] == row.bits]['published'])} at {row.bits} bits ({row.source})"
                for row in most.itertuples()
            )
            real = own["source"].isin(REAL)
            text = (
                f"exceeded in {len(over)} of {len(own)} cases ({over['source'].isin(REAL).sum()} of {real.sum()} "
                f"gradients of networks); ratios up to {cells}"
            )
        else:
            text = f"not exceeded in {len(own)} cases; the largest ratio is {own['published'].max():.4f}"
        wrong = expected.get(str(name))
        told.append(Claim(f"{name}, published bound: {text}.", None if wrong is None else bool(len(over) > 0) == wrong))
    return told


def _most(ratios: pd.Series) -> str:
    most = ratios.max()
    return "bound 0" if np.isinf(most) else f"{most:.3g}"


def _end_to_end(ends: pd.DataFrame) -> list[Claim]:
    over = ends["low"] > 1 + NORM_TOLERANCE
    told = [
        Claim(
            f"End to end, the variance of {len(ends)} parameters' gradients is below the bound of theorem 2: the "
            f"largest ratio is {ends['ratio'].max():.3g}.",
            not bool(over.any()),
        )
    ]
    for (source, name), own in ends.groupby(["source", "quantizer"], sort=False):
        medians = own.groupby("seed")["ratio"].median()
        told.append(
            Claim(
                f"{source}, {name}: the variance of a parameter's gradient is "
                f"{with_interval(*geometric_mean(medians), '.2g')} of its bound (median over the parameters; from "
                f"{own['ratio'].min():.1g} to {own['ratio'].max():.2g})."
            )
        )
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Ratios to the bound that holds, by quantizer and input; to the published one; end to end by parameter."""
    rows = tables["quantizers"]
    published = rows[~rows["quantizer"].isin(UNPUBLISHED)]
    return {
        "quantizers": _ratios(rows, "ratio", "exact variance / own bound, which holds"),
        "published": _ratios(published, "published", "exact variance / published bound"),
        "end_to_end": _parameters(tables["parameters"]),
    }


def _ratios(rows: pd.DataFrame, column: str, label: str) -> Figure:
    """Medians and ranges over layers and seeds, a panel for each number of bits.

    Gradients of networks are filled, synthetic inputs hollow; what is below ``LEAST`` is at the left edge.
    """
    inputs, names = (list(dict.fromkeys(rows[name])) for name in ("source", "quantizer"))
    widths = list(dict.fromkeys(rows["bits"]))
    pitch = 0.055 * len(inputs)
    figure = style.new_figure(2 * style.COLUMN_WIDTH, pitch * len(names) + 1.0)
    panels = figure.subplots(1, len(widths), sharex=True, sharey=True, squeeze=False)[0]
    colors = dict(zip(inputs, _COLORS, strict=False))
    for ax, bits in zip(panels, widths, strict=True):
        for (name, q), own in rows[rows["bits"] == bits].groupby(["source", "quantizer"], sort=False):
            place = names.index(q) + 0.86 * ((inputs.index(name) + 0.5) / len(inputs) - 0.5)
            _range(ax, own[column].dropna(), place, colors[name], filled=name in REAL)
        ax.axvline(1, color=style.INK, linewidth=0.8)
        ax.set(xscale="log", title=f"{bits} bits")
        ax.grid(axis="x")
        ax.hlines(
            np.arange(len(names) - 1) + 0.5, 0, 1, color=style.PALE, linewidth=0.4, transform=ax.get_yaxis_transform()
        )
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_xlim(left=LEAST)
    figure.supxlabel(
        f"{label} (mark: median, line: least to largest, over layers and seeds; ◂: down to below {LEAST:g})",
        fontsize=6.5,
    )
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=3, color=color,
               markerfacecolor=color if name in REAL else "white", label=name)
        for name, color in colors.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure


def _range(ax: Axes, ratios: pd.Series, place: float, color: str, *, filled: bool) -> None:
    """A line from the least to the largest ratio with a mark at the median; an arrow where it goes on to the left."""
    if ratios.empty:
        return
    least, median, most = ratios.min(), ratios.median(), ratios.max()
    ax.hlines(place, max(least, LEAST), max(most, LEAST), color=color, linewidth=0.6)
    if least < LEAST:
        ax.plot(LEAST, place, "<", color=color, markersize=3.6, markeredgewidth=0, clip_on=False)
    if median >= LEAST:
        ax.plot(
            median, place, "o", color=color, markersize=2.2, markeredgewidth=0.5,
            markerfacecolor=color if filled else "white",
        )  # fmt: skip


def _parameters(ends: pd.DataFrame) -> Figure:
    """Every parameter in network order: geometric mean over the seeds with its interval."""
    inputs, names = (list(dict.fromkeys(ends[column])) for column in ("source", "quantizer"))
    figure = style.new_figure(style.COLUMN_WIDTH, 1.35 * len(inputs) + 0.4)
    panels = figure.subplots(len(inputs), 1, squeeze=False)[:, 0]
    marks = style.marks(names)
    for source, ax in zip(inputs, panels, strict=True):
        own = ends[ends["source"] == source]
        for index, (name, mark) in enumerate(marks.items()):
            of_quantizer = own[own["quantizer"] == name]
            values = [
                geometric_mean(each["ratio"]) for _, each in of_quantizer.groupby(["layer", "parameter"], sort=False)
            ]
            mean, low, high = np.array(values).T
            intervals(
                ax, np.arange(len(mean)) + beside(index, len(marks), 0.25), (mean, low, high),
                fmt=mark.marker, color=mark.color, markersize=2, elinewidth=0.6, label=name,
            )  # fmt: skip
        ax.axhline(1, color=style.INK, linewidth=0.8)
        ax.set(yscale="log", title=source, ylabel="variance\n/ bound of theorem 2", ylim=(own["ratio"].min() / 5, 5))
        ax.grid(axis="y")
    panels[-1].set_xlabel("parameter, from the first layer to the last")
    told = "geometric means over the seeds with 95 % intervals"
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(marks), title=told, title_fontsize=6)
    return figure


STUDY = Study(
    name="bounds",
    question="How tight are the bounds on the variance?",
    full=Settings(),
    quick=Settings(
        ("mlp",), ("ptq", "psq", "bhq", "agp"), (2, 4), seeds=2, networks=("mlp",), ends=("psq",), end_seeds=2, draws=8
    ),
    columns={"quantizers": QUANTIZERS, "parameters": PARAMETERS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Exact variance over the quantizer's own bound, which holds: geometric mean over the seeds of the median "
    "over the layers, 95 % interval (Student t); from the least to the largest mean of the synthetic inputs; the "
    "largest of all. Published: the largest ratio to the published bound, where there is another one.",
)

if __name__ == "__main__":
    main(STUDY)
