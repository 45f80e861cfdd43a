"""Does the variance profile add up to what draws show, and what does it cost?

``agreement``: the total variance by probes, with the quantizers switched on one at a time, and from draws of the whole
gradient, of an MLP, a ResNet with batch normalization and a transformer. Intervals are over probes or draws, and of a
ratio as if those of its two sides were independent, on the logarithm.

``cost``: what ResNet-20 takes to a precision of 5 %, by probes and one at a time, and what a plain loop around the
model would take for the same number of passes. The draws that a precision takes are themselves estimated and differ by
seed: a row per seed, and intervals over the seeds.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import fqtstats
from analysis import networks
from analysis.axes import ratio_axis
from analysis.estimates import geometric_mean
from analysis.study import Claim, Parts, Row, Study, Tables, main, with_interval
from fqtstats import experiment
from fqtstats.benchmarks.measure import make_naive
from fqtstats.determinism import single_thread
from fqtstats.report import style
from fqtstats.schema import Column

_SQUARE = "(loss/parameter)^2"
AGREEMENT = (
    Column("model", "str", "", "network"),
    Column("quantizer", "str", "", "input-gradient quantizer"),
    Column("bits", "int64", "bit", "of it"),
    Column("method", "str", "", "probes, one-at-a-time, or draws of the whole gradient"),
    Column("variance", "float64", _SQUARE, "total over all gradients"),
    Column("standard_error", "float64", _SQUARE, "of it"),
)
COST = (
    Column("quantizer", "str", "", "input-gradient quantizer"),
    Column("seed", "int64", "1", "of probes and draws"),
    Column("bits", "int64", "bit", "of the quantizer"),
    Column("precision", "float64", "1", "that is asked for"),
    Column("probes", "int64", "1", "that it takes"),
    Column("probes_reached", "float64", "1", "precision that is reached"),
    Column("probes_passes", "int64", "1", "backward passes"),
    Column("probes_seconds", "float64", "s", "on one thread"),
    Column("single_draws", "int64", "1", "that it takes one at a time"),
    Column("single_reached", "float64", "1", "precision that is reached"),
    Column("single_passes", "int64", "1", "backward passes"),
    Column("single_seconds", "float64", "s", "on one thread"),
    Column("naive_seconds", "float64", "s", "of a plain loop with single_passes passes, on one thread"),
)


@dataclass(frozen=True)
class Settings:
    """Of the study; ``most_probes`` ends the profiles whose totals are compared."""

    models: tuple[str, ...] = ("mlp", "preact_resnet20", "transformer")
    quantizers: tuple[str, ...] = ("ptq", "psq", "bhq")
    bits: int = 5
    draws: int = 300
    most_probes: int = 24
    batch_size: int = 16
    cost_model: str = "preact_resnet20"
    precision: float = 0.05
    seeds: int = 5


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per network, quantizer and method; and one per quantizer and seed."""

    def agreement(model: str, quantizer: str) -> Iterator[Row]:
        setup = experiment.prepare(model, networks.DATA[model], batch_size=settings.batch_size, further=0)
        policy = fqtstats.policies.get(f"statquant-{quantizer}", settings.bits)
        for method, variance, error in _totals(setup, policy, settings):
            yield {"bits": settings.bits, "method": method, "variance": variance, "standard_error": error}

    def cost(quantizer: str, seed: int) -> Row:
        setup = experiment.prepare(settings.cost_model, networks.DATA[settings.cost_model], further=0)
        return _cost(setup, quantizer, seed, settings)

    names = settings.quantizers
    compared = [{"model": model, "quantizer": name} for model in settings.models for name in names]
    timed = [{"quantizer": name, "seed": seed} for seed in range(settings.seeds) for name in names]
    return {"agreement": parts.every("agreement", compared, agreement), "cost": parts.every("cost", timed, cost)}


def _totals(
    setup: experiment.Experiment, policy: fqtstats.Policy, settings: Settings
) -> Iterator[tuple[str, float, float]]:
    """Total variance by each method, with its standard error."""
    for method in ("probes", "one-at-a-time"):
        with warnings.catch_warnings():
            # One at a time, small models take more draws than are worth waiting for; the error says what is known.
            warnings.simplefilter("ignore", UserWarning)
            found = fqtstats.profile(
                setup.model, setup.batch, setup.loss, policy, settings.precision, method=method,
                most_probes=settings.most_probes,
            )  # fmt: skip
        total = found.parameters.iloc[-1]
        yield method, float(total["variance"]), float(total["standard_error"])
    result = fqtstats.measure(setup.model, setup.batch, setup.loss, policy, draws=settings.draws, method="montecarlo")
    total = result.total()
    yield "draws", float(total["variance"]), float(total["variance_high"] - total["variance_low"]) / (2 * 1.96)


def _cost(setup: experiment.Experiment, quantizer: str, seed: int, settings: Settings) -> Row:
    """Seconds and backward passes to the same precision, each on one thread."""
    policy = fqtstats.policies.get(f"statquant-{quantizer}", settings.bits)
    (probes, fast), (single, slow) = (
        _timed(setup, policy, method, seed, settings.precision) for method in ("probes", "one-at-a-time")
    )
    passes = int(str(single.metadata["backward_passes"]))
    return {
        "bits": settings.bits,
        "precision": settings.precision,
        "probes": probes.metadata["probes"],
        "probes_reached": probes.metadata["precision_reached"],
        "probes_passes": probes.metadata["backward_passes"],
        "probes_seconds": fast,
        "single_draws": single.metadata["probes"],
        "single_reached": single.metadata["precision_reached"],
        "single_passes": passes,
        "single_seconds": slow,
        "naive_seconds": passes * _replicate_seconds(setup, per_sample=quantizer != "ptq"),
    }


def _timed(
    setup: experiment.Experiment, policy: fqtstats.Policy, method: str, seed: int, precision: float
) -> tuple[fqtstats.Profile, float]:
    began = time.perf_counter()
    found = fqtstats.profile(
        setup.model, setup.batch, setup.loss, policy, precision, seed=seed, method=method, most_probes=1000
    )
    return found, time.perf_counter() - began


def _replicate_seconds(setup: experiment.Experiment, per_sample: bool) -> float:
    """A forward and backward pass of the model as one writes it without this package; the median of nine."""
    naive = copy.deepcopy(setup.model)
    make_naive(naive, per_sample=per_sample)
    taken = []
    with single_thread():
        for _ in range(10):
            began = time.perf_counter()
            torch.autograd.backward(setup.loss(naive, setup.batch))
            taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


# --- what is said of it -----------------------------------------------------------------------------------------------


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Totals over those of draws, with the standard error of the logarithm and the 95 % interval."""
    drawn = rows[rows["method"] == "draws"].set_index(["model", "quantizer"])
    others = rows[rows["method"] != "draws"].reset_index(drop=True)
    of = drawn.loc[list(others[["model", "quantizer"]].itertuples(index=False, name=None))].reset_index(drop=True)
    ratio = others["variance"] / of["variance"]
    error = np.sqrt((others["standard_error"] / others["variance"]) ** 2 + (of["standard_error"] / of["variance"]) ** 2)
    low, high = (ratio * np.exp(side * 1.96 * error) for side in (-1, 1))
    return others.assign(ratio=ratio, error=error, low=low, high=high)


COSTS = {
    "one at a time": "single_seconds",
    "in a plain loop": "naive_seconds",
}


def read(tables: Tables) -> pd.DataFrame:
    """A row per network and quantizer."""
    found = ratios(tables["agreement"]).set_index(["model", "quantizer", "method"])
    drawn = tables["agreement"][tables["agreement"]["method"] == "draws"]
    return pd.DataFrame(
        {
            "model": row.model,
            "quantizer": row.quantizer,
            "variance by draws": f"{row.variance:.3g} ± {row.standard_error:.1g}",
            **{
                f"{method} / draws": with_interval(
                    *found.loc[(row.model, row.quantizer, method), ["ratio", "low", "high"]]
                )
                for method in ("probes", "one-at-a-time")
            },
        }
        for row in drawn.itertuples()
    )


def claims(tables: Tables) -> list[Claim]:
    """Whether totals agree, and what they cost."""
    found, told = ratios(tables["agreement"]), []
    limit = NormalDist().inv_cdf(1 - 0.05 / (2 * len(found)))
    for method, own in found.groupby("method", sort=False):
        off = own[np.log(own["ratio"]).abs() > limit * own["error"]]
        far = own.loc[np.log(own["ratio"]).abs().idxmax()]
        told.append(
            Claim(
                f"By {method}: {len(own) - len(off)} of {len(own)} totals agree with those of draws within their "
                f"errors (5 % over all {len(found)} comparisons, Bonferroni); the farthest is {far['model']}, "
                f"{far['quantizer']} with {with_interval(far['ratio'], far['low'], far['high'])} times.",
                off.empty,
                "" if off.empty else f"off are {', '.join(f'{row.model} {row.quantizer}' for row in off.itertuples())}",
            )
        )
    for quantizer, own in tables["cost"].groupby("quantizer", sort=False):
        seconds = with_interval(*geometric_mean(own["probes_seconds"]))
        longer = {name: geometric_mean(own[column] / own["probes_seconds"]) for name, column in COSTS.items()}
        times = " and ".join(f"{with_interval(*ratio)} times as long {name}" for name, ratio in longer.items())
        faster = [name for name, (_, _, high) in longer.items() if high < 1]
        told.append(
            Claim(
                f"{quantizer}: a precision of {own['precision'].iloc[0]:.0%} takes {seconds} s by probes (one thread), "
                f"{times}, over {len(own)} seeds.",
                False if faster else True if all(low > 1 for _, low, _ in longer.values()) else None,
                f"it takes less time {' and '.join(faster)}" if faster else "",
            )
        )
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Totals relative to those of draws; and how many times as long other ways take."""
    return {"agreement": _agreement(ratios(tables["agreement"])), "cost": _costs(tables["cost"])}


def _agreement(rows: pd.DataFrame) -> Figure:
    cases = list(dict.fromkeys(rows[["model", "quantizer"]].itertuples(index=False, name=None)))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.75 + 0.19 * len(cases))
    ax = figure.subplots()
    ax.axvspan(1 / 1.05, 1.05, color=style.tint(style.GREEN, 0.15), lw=0)
    ax.axvline(1, color=style.GREY, lw=0.5)
    for offset, (method, color) in zip(
        (-0.15, 0.15), {"probes": style.BLUE, "one-at-a-time": style.ORANGE}.items(), strict=True
    ):
        own = rows[rows["method"] == method]
        places = [cases.index(case) + offset for case in own[["model", "quantizer"]].itertuples(index=False, name=None)]
        around = (own["ratio"] - own["low"], own["high"] - own["ratio"])
        ax.errorbar(own["ratio"], places, xerr=around, fmt="o", ms=2, elinewidth=0.8, color=color, label=method)
    ax.set_yticks(range(len(cases)), [f"{model}, {quantizer}" for model, quantizer in cases])
    ax.set(ylim=(len(cases) - 0.5, -0.5), xlabel="total variance / that of draws (95 %)\nshaded: within 5 %")
    ratio_axis(ax)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _costs(rows: pd.DataFrame) -> Figure:
    quantizers = list(dict.fromkeys(rows["quantizer"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.8 + 0.3 * len(quantizers))
    ax = figure.subplots()
    ax.axvline(1, color=style.GREY, lw=0.5)
    for offset, (name, column), color in zip((-0.15, 0.15), COSTS.items(), (style.ORANGE, style.INK), strict=True):
        for place, quantizer in enumerate(quantizers):
            values = (rows[column] / rows["probes_seconds"])[rows["quantizer"] == quantizer]
            mean, low, high = geometric_mean(values)
            label = name if place == 0 else None
            ax.plot(values, [place + offset] * len(values), ".", color=style.tint(color, 0.4), markersize=2)
            ax.errorbar(mean, place + offset, xerr=[[mean - low], [high - mean]], fmt="o", color=color, label=label)
    ax.set_yticks(range(len(quantizers)), quantizers)
    ax.set(ylim=(len(quantizers) - 0.5, -0.5))
    ax.set_xlabel("time to the same precision / that by probes\n(geometric mean over seeds, 95 %; dots: seeds)")
    ratio_axis(ax)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


STUDY = Study(
    name="profile",
    question="Does the variance profile add up to what draws show, and what does it cost?",
    full=Settings(),
    quick=Settings(("mlp",), ("psq",), draws=30, most_probes=8, cost_model="mlp", precision=0.3, seeds=2),
    columns={"agreement": AGREEMENT, "cost": COST},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Variance by draws of the whole gradient, with its standard error; the others as multiples of it, with 95 % "
    "intervals of both errors.",
)

if __name__ == "__main__":
    main(STUDY)
