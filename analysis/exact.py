"""Is the closed form what the draws show, do the intervals cover, and what does each cost?

For a model as ``fqtstats measure`` trains it, and one minibatch:

* agreement: variance that a layer's own Q1 puts into its weight gradient, in closed form and by drawing, for a
  convolution in the middle of the network and the last linear layer. The intervals of the ratio are normal, of the mean
  of the draws' squared errors, and hold together with 95 % (Bonferroni); every case has draws of its own.
* coverage: how often the 95 % interval (Student t) of a total variance from n draws holds the truth, which is the mean
  of all draws of the pool that the disjoint groups of n are made of, for a small network. Every case has draws of its
  own, so that all cases can be counted together. The intervals of the coverage are Clopper-Pearson's; those of single
  cases hold together with 95 % (Bonferroni).
* cost: one closed form against the draws that give the same precision: medians of processor times of calls taken in
  turns. Their 95 % intervals are those of the bootstrap, over rounds of timings and over the draws that tell how many a
  precision takes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
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
from analysis.gradients import session, weight_products
from analysis.shares import share, told
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats import experiment
from fqtstats.benchmarks.measure import make_naive
from fqtstats.determinism import seeded, single_thread
from fqtstats.estimators import exact, intervals
from fqtstats.estimators.moments import squared_norm
from fqtstats.layers import real
from fqtstats.layers.operand import images
from fqtstats.layers.state import WeightGradient
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
    Column("skewness", "float64", "1", "of the squared errors of all draws"),
)
_ENDS = {"": "", "_low": "(lower end of the 95 % interval)", "_high": "(upper end)"}
_TIMED = {"closed_form": "of one closed form", "draws": "of the draws needed",
          "naive": "of as many forward and backward passes"}  # fmt: skip
COST = (
    _QUANTIZER,
    Column("variance_of", "str", "", "what has the precision: the sum over a parameter, or every element"),
    Column("precision", "float64", "1", "relative standard error"),
    Column("draws_needed", "float64", "1", "draws that give it"),
    *(Column(f"{name}_seconds{end}", "float64", "s", f"{of} {what}".rstrip())
      for name, of in _TIMED.items() for end, what in _ENDS.items()),
    *(Column(f"{name}_ratio{end}", "float64", "1", f"seconds {_TIMED[name]} over a closed form's {what}".rstrip())
      for name in list(_TIMED)[1:] for end, what in _ENDS.items()),
)  # fmt: skip

PRECISION = 0.01
LEVEL = 0.95
RESAMPLED = 1000


@dataclass(frozen=True)
class Settings:
    """Of the study: draws per closed form, draws that intervals are made from, draws per interval, timings of each
    kind, and draws that tell how many a precision takes."""

    model: str = "preact_resnet20"
    data: str = "digits"
    quantizers: tuple[str, ...] = ("ptq", "psq", "bhq")
    bits: tuple[int, ...] = (8, 4, 2)
    draws: int = 3_000
    pool: int = 4_000
    sizes: tuple[int, ...] = (5, 10, 30)
    rounds: int = 15
    spread: int = 100


def measure(settings: Settings, parts: Parts) -> Tables:
    """The three tables."""
    setup = experiment.prepare(settings.model, settings.data, further=0)
    names = [{"quantizer": name} for name in settings.quantizers]
    widths = [{**name, "bits": bits} for name in names for bits in settings.bits]
    with single_thread():
        layers = chosen(weight_products(setup))

        def agreeing(layer: str, quantizer: str, bits: int) -> dict[str, object]:
            return agreement(layer, layers[layer], quantizer, bits, settings.draws)

        def covering(quantizer: str, bits: int) -> list[dict[str, object]]:
            seed = widths.index({"quantizer": quantizer, "bits": bits})
            return coverage(setup, quantizer, bits, seed, settings.pool, settings.sizes)

        def costing(quantizer: str) -> list[dict[str, object]]:
            return costs(setup, quantizer, settings.rounds, settings.spread)

        return {
            "agreement": parts.every("agreement", [{"layer": layer, **width} for layer in layers for width in widths],
                                     agreeing),
            "coverage": parts.every("coverage", widths, covering),
            "cost": parts.every("cost", names, costing),
        }  # fmt: skip


def chosen(found: dict[str, WeightGradient]) -> dict[str, WeightGradient]:
    """The convolution in the middle of the network, where it has one, and the last linear layer."""
    linear = [name for name, gradient in found.items() if len(gradient.shape) == 2]
    convolutions = [name for name, gradient in found.items() if len(gradient.shape) == 4]
    return {name: found[name] for name in (*convolutions[len(convolutions) // 2 :][:1], linear[-1])}


def agreement(layer: str, given: WeightGradient, quantizer: str, bits: int, draws: int) -> dict[str, object]:
    """Closed form and draws of one layer's weight gradient."""
    gradient = WeightGradient(given.product, fqtstats.quantizer(quantizer, bits=bits), given.g, given.x, given.shape)
    closed = exact.summed(gradient, ["weight"])["weight"]
    streams = (fqtstats.stream(seed=1, layer=layer, site=f"agreement {quantizer} {bits}", draw=i) for i in range(draws))
    norms = np.fromiter(_own_errors(gradient, streams), dtype=np.float64, count=draws)
    return {
        "kind": "linear" if len(given.shape) == 2 else "convolution",
        "draws": draws,
        "closed_form": closed,
        "monte_carlo": norms.mean(),
        "ratio": norms.mean() / closed,
        "standard_error": norms.std(ddof=1) / np.sqrt(draws) / closed,
    }


def _own_errors(gradient: WeightGradient, streams: Iterator[fqtstats.Stream]) -> Iterator[float]:
    """Squared errors of the weight gradient from the layer's own Q1."""
    x, shape = images(gradient.x), gradient.shape
    for stream in streams:
        error = gradient.q(gradient.g, stream).sub_(gradient.g)
        yield squared_norm(gradient.product.grad_weight(real, images(error), x, shape))


def coverage(
    setup: experiment.Experiment, quantizer: str, bits: int, seed: int, pool: int, sizes: Sequence[int]
) -> list[dict[str, object]]:
    """Student t intervals from disjoint groups of draws of a whole network, against the mean of all draws."""
    with seeded(0):
        hidden = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))
    small = replace(setup, model=model, batch=(setup.batch[0][:32], setup.batch[1][:32]))
    with session(small, quantizer, bits, seed) as opened:
        truth = opened.qat()
        norms = np.array([sum(_squared_errors(opened.draw(index), truth)) for index in range(pool)])
    skewness = float(scipy.stats.skew(norms))
    rows: list[dict[str, object]] = []
    for n in sizes:
        groups = norms[: pool // n * n].reshape(-1, n)
        ends = np.array([intervals.t_interval(group) for group in groups])
        held = (ends[:, 0] <= norms.mean()) & (norms.mean() <= ends[:, 1])
        rows.append({"n": n, "intervals": len(groups), "held": int(held.sum()), "skewness": skewness})
    return rows


def _squared_errors(draw: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [squared_norm(d.sub_(g)) for d, g in zip(draw, truth, strict=True)]


def costs(setup: experiment.Experiment, quantizer: str, rounds: int, spread: int) -> list[dict[str, object]]:
    """Seconds of a closed form and of a draw, and how many draws reach the same precision."""
    naive = copy.deepcopy(setup.model)
    make_naive(naive, per_sample=quantizer != "ptq")
    with session(setup, quantizer, 5) as opened:
        index = count()
        times = _interleaved(
            [
                partial(opened.qat, None, lambda call, gradient, names: exact.summed(gradient, ["weight"])),
                partial(opened.qat, None, lambda call, gradient, names: exact.weight_variance([gradient])),
                lambda: opened.draw(next(index), ("grad_weight",)),
                lambda: torch.autograd.backward(setup.loss(naive, setup.batch)),
            ],
            rounds,
        )
        truth = opened.qat()
        weights = [i for i, p in enumerate(opened.parameters.values()) if p.dim() > 1]
        errors = [_squared_errors(opened.draw(i, ("grad_weight",)), truth) for i in range(spread)]
    norms = np.array(errors)[:, weights]
    rng = np.random.default_rng(0)
    # Whole rounds are drawn anew, whose calls share what the machine did at the time.
    again = [(np.arange(rounds), np.arange(spread))]
    again += [(rng.integers(rounds, size=rounds), rng.integers(spread, size=spread)) for _ in range(RESAMPLED)]
    rows: list[dict[str, object]] = []
    for what, own in (("sum", 0), ("every element", 1)):
        found = []
        for chosen_rounds, chosen_draws in again:
            closed, draw, naive_seconds = np.median(times[chosen_rounds], axis=0)[[own, 2, 3]]
            n = _draws_needed(norms[chosen_draws]) if what == "sum" else 2 / PRECISION**2
            found.append((n, closed, n * draw, n * naive_seconds, n * draw / closed, n * naive_seconds / closed))
        low, high = np.quantile(found[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        row: dict[str, object] = {"variance_of": what, "precision": PRECISION, "draws_needed": found[0][0]}
        names = [*(f"{name}_seconds" for name in _TIMED), *(f"{name}_ratio" for name in list(_TIMED)[1:])]
        for place, name in enumerate(names, start=1):
            row |= {name: found[0][place], f"{name}_low": low[place], f"{name}_high": high[place]}
        rows.append(row)
    return rows


def _draws_needed(norms: np.ndarray) -> float:
    """Draws that tell the variance of the median parameter to the precision; from squared errors ``[n, parameters]``.

    The relative error of a mean of n is sd / (mean sqrt n); that of an element's sample variance, for errors with
    little excess kurtosis, is sqrt(2 / n).
    """
    return float(np.median((norms.std(axis=0, ddof=1) / norms.mean(axis=0) / PRECISION) ** 2))


def _interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> np.ndarray:
    """Processor seconds ``[rounds, functions]``, taken in turns after one call of each that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        times = []
        for function in functions:
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
        taken.append(times)
    return np.array(taken[1:])


# --- what is said of it -----------------------------------------------------------------------------------------------


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Agreement with the ends of its intervals, which hold together with 95 %."""
    half = scipy.stats.norm.ppf(1 - (1 - LEVEL) / 2 / len(table)) * table["standard_error"]
    return table.assign(low=table["ratio"] - half, high=table["ratio"] + half)


def read(tables: Tables) -> pd.DataFrame:
    """A row per quantizer and bits, and all of them together."""
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
    together = {"quantizer": "all", "bits": "all", **dict.fromkeys(agreed["kind"], "")}
    return pd.DataFrame([*shown, {**together, **{f"n={n}": _all(own) for n, own in covered.groupby("n")}}])


def _all(own: pd.DataFrame) -> str:
    return told(int(own["held"].sum()), int(own["intervals"].sum()))


def claims(tables: Tables) -> list[Claim]:
    """Agreement, coverage by the number of draws, and cost by quantizer."""
    agreed = ratios(tables["agreement"])
    answer = []
    for kind, own in agreed.groupby("kind", sort=False):
        far = own.loc[((own["ratio"] - 1).abs() / own["standard_error"]).idxmax()]
        hold = ((own["low"] <= 1) & (own["high"] >= 1)).sum()
        within = ((own["low"] >= 1 - PRECISION) & (own["high"] <= 1 + PRECISION)).sum()
        n = len(own)
        answer.append(
            Claim(
                f"The variance of {far['draws']} draws of the layer ({kind}) is that of the closed form: {within} of "
                f"{n} intervals lie within {PRECISION:.0%} of it, and {hold} hold 1 (95 % for all {len(agreed)} of "
                f"both layers together, Bonferroni). It differs most in standard errors for {far['quantizer']}, "
                f"{far['bits']} bits: {with_interval(far['ratio'], far['low'], far['high'], '.4f')} of it.",
                False if hold < n else True if within == n else None,
                f"{n - hold} of {n} intervals leave out 1" if hold < n else "",
            )
        )
    covered = tables["coverage"]
    for n, own in covered.groupby("n"):
        held, of = int(own["held"].sum()), int(own["intervals"].sum())
        _, low, high = share(held, of)
        ends = [share(row.held, row.intervals, len(covered)) for row in own.itertuples()]
        outside = sum(not below <= LEVEL <= above for _, below, above in ends)
        rates = own["held"] / own["intervals"]
        where = "below" if high < LEVEL else "above" if low > LEVEL else "not told from"
        answer.append(
            Claim(
                f"Intervals of {n} draws hold the truth at a rate of {told(held, of)} ({of} intervals, all "
                f"{len(own)} cases): {where} the nominal {LEVEL:g}. Single cases: {rates.min():.3f} to "
                f"{rates.max():.3f}, the nominal outside of {outside} of {len(own)} intervals (95 % for all "
                f"{len(covered)} together, Bonferroni).",
                None if low <= LEVEL <= high else False,
                f"the squared errors of draws have a skewness of {own['skewness'].min():.2g} to "
                f"{own['skewness'].max():.2g}, and Student's t takes them for normal"
                if not low <= LEVEL <= high
                else "",
            )
        )
    for what, own in tables["cost"].groupby("variance_of", sort=False):
        by_quantizer = ", ".join(
            f"{row.quantizer} {with_interval(row.draws_ratio, row.draws_ratio_low, row.draws_ratio_high)}"
            for row in own.itertuples()
        )
        slow = own.loc[own["draws_ratio_high"] < 1, "quantizer"]
        answer.append(
            Claim(
                f"Variance of {'a sum' if what == 'sum' else what} to {PRECISION * 100:g} %: the draws that one closed "
                f"form replaces (at least {own['draws_needed'].min():.0f}) take so many times its processor time: "
                f"{by_quantizer} (95 % each, bootstrap over timings"
                f"{' and draws' if what == 'sum' else ''}).",
                False if len(slow) else True if (own["draws_ratio_low"] > 1).all() else None,
                f"the draws take less time than the closed form for {', '.join(slow)}" if len(slow) else "",
            )
        )
    return answer


def draw(tables: Tables) -> dict[str, Figure]:
    """Ratios of drawn to closed-form variance; coverage; time."""
    return {
        "agreement": _agreement(ratios(tables["agreement"])),
        "coverage": _coverage(tables["coverage"]),
        "cost": _cost(tables["cost"]),
    }


def _agreement(agreed: pd.DataFrame) -> Figure:
    """With intervals that hold together, and 1 % on both sides."""
    figure = style.new_figure(style.COLUMN_WIDTH, 0.13 * len(agreed) + 0.8)
    ax = figure.subplots()
    ax.axvspan(1 - PRECISION, 1 + PRECISION, color=style.tint(style.GREEN, 0.2), linewidth=0, label="within 1 %")
    ax.axvline(1, color=style.GREY, linewidth=0.5)
    for name, mark in style.marks(agreed["quantizer"]).items():
        own = agreed[agreed["quantizer"] == name]
        error = (own["ratio"] - own["low"], own["high"] - own["ratio"])
        ax.errorbar(own["ratio"], own.index, xerr=error, fmt=mark.marker, color=mark.color, elinewidth=0.8, label=name)
    ax.set_yticks(agreed.index, [f"{row.kind}, {row.quantizer} {row.bits} bits" for row in agreed.itertuples()])
    ax.set(xlabel=f"variance of {agreed['draws'].iloc[0]} draws / closed form\n(95 % for all intervals together)")
    ax.invert_yaxis()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _coverage(table: pd.DataFrame) -> Figure:
    """By case, with intervals that hold together, and of all cases."""
    figure = style.new_figure(style.COLUMN_WIDTH, 2.1)
    sizes = sorted(table["n"].unique())
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    widths = sorted(table["bits"].unique())
    marks = style.marks(table["quantizer"])
    for ax, n in zip(panels, sizes, strict=True):
        _, low, high = share(*(int(table.loc[table["n"] == n, name].sum()) for name in ("held", "intervals")))
        ax.axhspan(low, high, color=style.tint(style.INK, 0.2), linewidth=0, label="all cases")
        for index, (name, mark) in enumerate(marks.items()):
            own = table[(table["n"] == n) & (table["quantizer"] == name)]
            found = [share(row.held, row.intervals, len(table)) for row in own.itertuples()]
            rate, low, high = np.array(found).T
            place = own["bits"].map(widths.index) + 0.2 * (index - (len(marks) - 1) / 2)
            ax.errorbar(
                place, rate, (rate - low, high - rate), fmt=mark.marker, color=mark.color, elinewidth=0.8, label=name
            )
        ax.axhline(LEVEL, color=style.GREY, linewidth=0.8, linestyle="--")
        ax.set(title=f"{n} draws", xlabel="bits", xlim=(-0.5, len(widths) - 0.5))
        ax.set_xticks(range(len(widths)), [str(bits) for bits in widths])
        ax.grid(True, axis="y")
    panels[0].set_ylabel("coverage of 95 % intervals\n(bars: 95 % together; band: 95 %)")
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
        for of, face in (("closed_form", mark.color), ("draws", "white")):
            seconds, low, high = (own[f"{of}_seconds{end}"] for end in _ENDS)
            ax.errorbar(
                seconds, place, xerr=(seconds - low, high - seconds), fmt=mark.marker, color=mark.color,
                markerfacecolor=face, elinewidth=0.8, label=f"{name}, {of.replace('_', ' ')}",
            )  # fmt: skip
    ax.set(xscale="log", xlabel="processor seconds to a standard error of 1 %\n(95 % each)")
    ax.set_ylim(len(kinds) - 0.5, -0.5)
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
    legend="Variance of the draws over the closed form, for a convolution and the linear layer, with intervals that "
    "hold together with 95 %; and how often 95 % intervals of n draws hold the truth, of all cases with its 95 % "
    "interval.",
)

if __name__ == "__main__":
    main(STUDY)
