"""Is the closed form what the draws show, do the intervals cover, and what does each cost?

For a model as ``fqtstats measure`` trains it, and one minibatch:

* agreement: variance that a layer's own Q1 puts into its weight gradient, in closed form and by drawing, for a
  convolution in the middle of the network and the last linear layer. The intervals of the ratio are normal, of the mean
  of the draws' squared errors.
* coverage: how often the 95 % interval (Student t) of a total variance from n draws holds the truth, which is the mean
  of all draws of the pool that the disjoint groups of n are made of, for a small network. The intervals of the coverage
  are Clopper-Pearson's.
* cost: one closed form against the draws that give the same precision, timed side by side: medians of calls taken in
  turns, without intervals.

Where a sentence is about several intervals, they hold together with 95 % (Bonferroni).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
import pandas as pd
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import nn

import fqtstats
from analysis.shares import share
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats import experiment, layers
from fqtstats.benchmarks.measure import make_naive
from fqtstats.capture import Session
from fqtstats.determinism import seeded, single_thread
from fqtstats.estimators import exact, intervals
from fqtstats.estimators.moments import squared_norm
from fqtstats.layers import real
from fqtstats.layers.operand import images
from fqtstats.layers.state import Call, WeightGradient
from fqtstats.report import style
from fqtstats.schema import Column

_QUANTIZER = Column("quantizer", "str", "", "of all gradients")
_BITS = Column("bits", "int64", "bit", "of it")
_SQUARE = "(loss/parameter)^2"
AGREEMENT = (
    Column("layer", "str", "", "in which the weight gradient is quantized"),
    Column("kind", "str", "", "convolution or linear"),
    _QUANTIZER,
    _BITS,
    Column("draws", "int64", "1", "number of draws"),
    Column("closed_form", "float64", _SQUARE, "variance in closed form"),
    Column("monte_carlo", "float64", _SQUARE, "mean squared error of the draws"),
    Column("ratio", "float64", "1", "monte_carlo over closed_form"),
    Column("standard_error", "float64", "1", "of the ratio"),
)
COVERAGE = (
    _QUANTIZER,
    _BITS,
    Column("n", "int64", "1", "draws per interval"),
    Column("intervals", "int64", "1", "number of intervals"),
    Column("held", "int64", "1", "of them that hold the truth"),
)
COST = (
    _QUANTIZER,
    Column("variance_of", "str", "", "what has the precision: the sum over a parameter, or every element"),
    Column("precision", "float64", "1", "relative standard error"),
    Column("draws_needed", "float64", "1", "draws that give it"),
    Column("closed_form_seconds", "float64", "s", "of one closed form"),
    Column("draw_seconds", "float64", "s", "of one draw"),
    Column("naive_replicate_seconds", "float64", "s", "of a forward and a backward pass"),
    Column("ratio_to_draws", "float64", "1", "seconds of the draws needed over those of the closed form"),
    Column("ratio_to_naive", "float64", "1", "the same of forward and backward passes"),
)

PRECISION = 0.01
LEVEL = 0.95


@dataclass(frozen=True)
class Settings:
    """Of the study: draws per closed form, draws that intervals are made from, draws per interval, timings of each
    kind, and draws that tell how many a precision takes."""

    model: str = "preact_resnet20"
    data: str = "digits"
    quantizers: tuple[str, ...] = ("ptq", "psq", "bhq")
    bits: tuple[int, ...] = (8, 4, 2)
    draws: int = 20_000
    pool: int = 30_000
    sizes: tuple[int, ...] = (5, 10, 30)
    rounds: int = 15
    spread: int = 200


def measure(settings: Settings, parts: Parts) -> Tables:
    """The three tables."""
    setup = experiment.prepare(settings.model, settings.data, further=0)
    names = [{"quantizer": name} for name in settings.quantizers]
    widths = [{**name, "bits": bits} for name in names for bits in settings.bits]
    with single_thread():
        layers = chosen(gradients(setup))

        def agreeing(layer: str, quantizer: str, bits: int) -> dict[str, object]:
            return agreement(layers[layer], quantizer, bits, settings.draws)

        def covering(quantizer: str, bits: int) -> list[dict[str, object]]:
            return coverage(setup, quantizer, bits, settings.pool, settings.sizes)

        def costing(quantizer: str) -> list[dict[str, object]]:
            return costs(setup, quantizer, settings.rounds, settings.spread)

        return {
            "agreement": parts.every("agreement", [{"layer": layer, **width} for layer in layers for width in widths],
                                     agreeing),
            "coverage": parts.every("coverage", widths, covering),
            "cost": parts.every("cost", names, costing),
        }  # fmt: skip


def gradients(setup: experiment.Experiment) -> dict[str, WeightGradient]:
    """The weight gradients of a QAT pass by layer, with gradients as they arrive."""
    found: dict[str, WeightGradient] = {}

    def keep(call: Call, gradient: WeightGradient, parameters: Sequence[str]) -> None:
        found[call.layer.name] = gradient

    with session_of(setup.model, setup, "psq", 8) as session:
        session.qat(None, keep)
    return found


@contextmanager
def session_of(model: nn.Module, setup: experiment.Experiment, name: str, bits: int) -> Iterator[Session]:
    """The graph of the batch under the recipe of a quantizer."""
    policy = fqtstats.policies.get(f"statquant-{name}", bits)
    with layers.quantized(model, policy) as handle, Session(model, handle, setup.batch, setup.loss) as session:
        yield session


def chosen(found: dict[str, WeightGradient]) -> dict[str, WeightGradient]:
    """The convolution in the middle of the network, where it has one, and the last linear layer."""
    linear = [name for name, gradient in found.items() if len(gradient.shape) == 2]
    convolutions = [name for name, gradient in found.items() if len(gradient.shape) == 4]
    return {name: found[name] for name in (*convolutions[len(convolutions) // 2 :][:1], linear[-1])}


def agreement(given: WeightGradient, quantizer: str, bits: int, draws: int) -> dict[str, object]:
    """Closed form and draws of one layer's weight gradient."""
    gradient = WeightGradient(given.product, fqtstats.quantizer(quantizer, bits=bits), given.g, given.x, given.shape)
    closed = exact.summed(gradient, ["weight"])["weight"]
    norms = np.fromiter(_own_errors(gradient, draws), dtype=np.float64, count=draws)
    return {
        "kind": "linear" if len(given.shape) == 2 else "convolution",
        "draws": draws,
        "closed_form": closed,
        "monte_carlo": norms.mean(),
        "ratio": norms.mean() / closed,
        "standard_error": norms.std(ddof=1) / np.sqrt(draws) / closed,
    }


def _own_errors(gradient: WeightGradient, draws: int) -> Iterator[float]:
    """Squared errors of the weight gradient from the layer's own Q1."""
    x, shape = images(gradient.x), gradient.shape
    for index in range(draws):
        error = gradient.q(gradient.g, fqtstats.stream(seed=1, layer="agreement", draw=index)).sub_(gradient.g)
        yield squared_norm(gradient.product.grad_weight(real, images(error), x, shape))


def coverage(
    setup: experiment.Experiment, quantizer: str, bits: int, pool: int, sizes: Sequence[int]
) -> list[dict[str, object]]:
    """Student t intervals from disjoint groups of draws of a whole network, against the mean of all draws."""
    with seeded(0):
        hidden = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))
    small = replace(setup, batch=(setup.batch[0][:32], setup.batch[1][:32]))
    with session_of(model, small, quantizer, bits) as session:
        truth = session.qat()
        norms = np.array([sum(_squared_errors(session.draw(index), truth)) for index in range(pool)])
    rows: list[dict[str, object]] = []
    for n in sizes:
        groups = norms[: pool // n * n].reshape(-1, n)
        ends = np.array([intervals.t_interval(group) for group in groups])
        held = (ends[:, 0] <= norms.mean()) & (norms.mean() <= ends[:, 1])
        rows.append({"n": n, "intervals": len(groups), "held": int(held.sum())})
    return rows


def _squared_errors(draw: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [squared_norm(d.sub_(g)) for d, g in zip(draw, truth, strict=True)]


def costs(setup: experiment.Experiment, quantizer: str, rounds: int, spread: int) -> list[dict[str, object]]:
    """Seconds of a closed form and of a draw, and how many draws reach the same precision."""
    naive = copy.deepcopy(setup.model)
    make_naive(naive, per_sample=quantizer != "ptq")
    with session_of(setup.model, setup, quantizer, 5) as session:
        index = count()
        times = _interleaved(
            [
                partial(session.qat, None, lambda call, gradient, names: exact.summed(gradient, ["weight"])),
                partial(session.qat, None, lambda call, gradient, names: exact.weight_variance([gradient])),
                lambda: session.draw(next(index), ("grad_weight",)),
                lambda: torch.autograd.backward(setup.loss(naive, setup.batch)),
            ],
            rounds,
        )
        truth = session.qat()
        weights = [i for i, p in enumerate(session.parameters.values()) if p.dim() > 1]
        errors = [_squared_errors(session.draw(i, ("grad_weight",)), truth) for i in range(spread)]
    norms = np.array(errors)[:, weights]
    # The relative error of a mean of n is sd / (mean sqrt n): draws for the median parameter; that of an element's
    # sample variance, for errors with little excess kurtosis, is sqrt(2 / n).
    scalar = float(np.median((norms.std(axis=0, ddof=1) / norms.mean(axis=0) / PRECISION) ** 2))
    rows: list[dict[str, object]] = []
    for what, closed, n in (("sum", times[0], scalar), ("every element", times[1], 2 / PRECISION**2)):
        rows.append(
            {
                "variance_of": what,
                "precision": PRECISION,
                "draws_needed": n,
                "closed_form_seconds": closed,
                "draw_seconds": times[2],
                "naive_replicate_seconds": times[3],
                "ratio_to_draws": n * times[2] / closed,
                "ratio_to_naive": n * times[3] / closed,
            }
        )
    return rows


def _interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, taken in turns after one call that is not counted."""
    taken: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, times in zip(functions, taken, strict=True):
            began = time.perf_counter()
            function()
            if round_:
                times.append(time.perf_counter() - began)
    return [float(np.median(times)) for times in taken]


# --- what is said of it -----------------------------------------------------------------------------------------------


def ratios(table: pd.DataFrame, comparisons: int = 1) -> pd.DataFrame:
    """Agreement with the ends of its intervals, of which ``comparisons`` hold together with 95 %."""
    half = scipy.stats.norm.ppf(1 - (1 - LEVEL) / 2 / comparisons) * table["standard_error"]
    return table.assign(low=table["ratio"] - half, high=table["ratio"] + half)


def read(tables: Tables) -> pd.DataFrame:
    """A row per quantizer and bits."""
    shown = []
    agreed, covered = ratios(tables["agreement"]), tables["coverage"]
    for (quantizer, bits), own in agreed.groupby(["quantizer", "bits"], sort=False):
        row = {"quantizer": quantizer, "bits": str(bits)}
        for each in own.itertuples():
            row[each.kind] = with_interval(each.ratio, each.low, each.high, ".4f")
        mine = covered[(covered["quantizer"] == quantizer) & (covered["bits"] == bits)]
        for each in mine.itertuples():
            row[f"n={each.n}"] = f"{each.held / each.intervals:.3f}"
        shown.append(row)
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """Agreement, coverage by the number of draws, and cost by quantizer."""
    agreed = ratios(tables["agreement"], len(tables["agreement"]))
    far = agreed.loc[((agreed["ratio"] - 1).abs() / agreed["standard_error"]).idxmax()]
    agrees = bool(((agreed["low"] <= 1) & (agreed["high"] >= 1)).all())
    told = [
        Claim(
            f"The variance of {far['draws']} draws agrees with the closed form: "
            f"{with_interval(far['ratio'], far['low'], far['high'], '.4f')} of it where it differs most in standard "
            f"errors ({far['kind']}, {far['quantizer']}, {far['bits']} bits), and "
            f"{'all' if agrees else 'not all'} {len(agreed)} intervals hold 1 (95 % together, Bonferroni).",
            agrees,
        )
    ]
    covered = tables["coverage"]
    for n, own in covered.groupby("n"):
        rates = own["held"] / own["intervals"]
        ends = [share(row.held, row.intervals, len(covered)) for row in own.itertuples()]
        without = sum(not low <= LEVEL <= high for _, low, high in ends)
        worst = int(np.argmin(rates.to_numpy()))
        least = own.iloc[worst]
        told.append(
            Claim(
                f"Intervals of {n} draws hold the truth at rates of {rates.min():.3f} to {rates.max():.3f}, the least "
                f"{with_interval(*ends[worst], '.3f')} ({least['quantizer']}, {least['bits']} bits); the nominal "
                f"{LEVEL:g} is outside {without} of {len(own)} intervals of these rates (95 % for all {len(covered)} "
                "together, Bonferroni).",
                bool(without == 0),
            )
        )
    for what, own in tables["cost"].groupby("variance_of", sort=False):
        least, most = own["ratio_to_draws"].min(), own["ratio_to_draws"].max()
        told.append(
            Claim(
                f"Variance of {'a sum' if what == 'sum' else what} to {PRECISION * 100:g} %: the draws that one closed "
                f"form replaces (at least {own['draws_needed'].min():.0f}) take {least:.3g} to {most:.3g} times its "
                f"time ({len(own)} quantizers; medians of timings, without intervals).",
                bool(least > 1),
            )
        )
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Ratios of drawn to closed-form variance; coverage; time."""
    return {
        "agreement": _agreement(ratios(tables["agreement"])),
        "coverage": _coverage(tables["coverage"]),
        "cost": _cost(tables["cost"]),
    }


def _agreement(agreed: pd.DataFrame) -> Figure:
    """With 95 % intervals, and 1 % on both sides."""
    figure = style.new_figure(style.COLUMN_WIDTH, 0.13 * len(agreed) + 0.8)
    ax = figure.subplots()
    ax.axvspan(1 - PRECISION, 1 + PRECISION, color=style.tint("#009E73", 0.2), linewidth=0, label="within 1 %")
    ax.axvline(1, color=style.GREY, linewidth=0.5)
    for name, mark in style.marks(agreed["quantizer"]).items():
        own = agreed[agreed["quantizer"] == name]
        error = (own["ratio"] - own["low"], own["high"] - own["ratio"])
        ax.errorbar(own["ratio"], own.index, xerr=error, fmt=mark.marker, color=mark.color, elinewidth=0.8, label=name)
    ax.set_yticks(agreed.index, [f"{row.kind}, {row.quantizer} {row.bits} bits" for row in agreed.itertuples()])
    ax.set(xlabel=f"variance of {agreed['draws'].iloc[0]} draws / closed form (95 %)")
    ax.invert_yaxis()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _coverage(table: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 1.9)
    sizes = sorted(table["n"].unique())
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    widths = sorted(table["bits"].unique())
    marks = style.marks(table["quantizer"])
    for ax, n in zip(panels, sizes, strict=True):
        for index, (name, mark) in enumerate(marks.items()):
            own = table[(table["n"] == n) & (table["quantizer"] == name)]
            rate, low, high = np.array([share(row.held, row.intervals) for row in own.itertuples()]).T
            place = own["bits"].map(widths.index) + 0.2 * (index - (len(marks) - 1) / 2)
            ax.errorbar(
                place, rate, (rate - low, high - rate), fmt=mark.marker, color=mark.color, elinewidth=0.8, label=name
            )
        ax.axhline(LEVEL, color=style.GREY, linewidth=0.8)
        ax.set(title=f"{n} draws", xlabel="bits", xlim=(-0.5, len(widths) - 0.5))
        ax.set_xticks(range(len(widths)), [str(bits) for bits in widths])
        ax.grid(True, axis="y")
    panels[0].set_ylabel("coverage of 95 % intervals")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _cost(table: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 1.9)
    ax = figure.subplots()
    kinds = list(dict.fromkeys(table["variance_of"]))
    marks = style.marks(table["quantizer"])
    for index, (name, mark) in enumerate(marks.items()):
        own = table[table["quantizer"] == name]
        place = own["variance_of"].map(kinds.index) + 0.2 * (index - (len(marks) - 1) / 2)
        ax.plot(own["closed_form_seconds"], place, mark.marker, color=mark.color, label=f"{name}, closed form")
        seconds = own["draws_needed"] * own["draw_seconds"]
        ax.plot(seconds, place, mark.marker, color=mark.color, markerfacecolor="white", label=f"{name}, draws")
    ax.set(xscale="log", xlabel="seconds to a standard error of 1 % (medians)", ylim=(len(kinds) - 0.5, -0.5))
    ax.set_yticks(range(len(kinds)), kinds)
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


STUDY = Study(
    name="exact",
    question="Is the closed form what the draws show, do the intervals cover, and what does each cost?",
    full=Settings(),
    quick=Settings("mlp", "digits", ("psq",), (2,), draws=100, pool=300, sizes=(5, 10), rounds=2, spread=20),
    columns={"agreement": AGREEMENT, "coverage": COVERAGE, "cost": COST},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Variance of the draws over the closed form, for a convolution and the linear layer, with 95 % intervals; "
    "and how often 95 % intervals of n draws hold the truth.",
)

if __name__ == "__main__":
    main(STUDY)
