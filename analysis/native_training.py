"""Does training on integer products reach the loss that training on simulated ones does?

A network is trained with PTQ at 8 bits everywhere, on both backends, once per seed: by default for its whole schedule.

The two runs of a seed start from the same weights and see the same batches and random numbers. They part at the first
rounding that differs, because a number on the edge between two codes then falls to the other side; from there on they
are two runs of a random algorithm.

Final losses are compared by two one-sided t tests (TOST, 5 % each) of their log ratio, paired by seed. The margin is
that of the study of recipes (:mod:`analysis.recipes`) on digits, taken from its saved runs, which train the same
network for more epochs: the root mean square difference of two seeds of a typical recipe. It does not depend on the
runs of this study, so that noise here makes it harder to find losses equal, and not easier. They are equal within the
margin if the 90 % interval of the ratio, which is what these tests amount to, lies inside; they are not if it lies
outside; otherwise the question is open. Only the last epoch is tested; the intervals of the others are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fqtstats
from analysis import networks, recipes
from analysis.estimates import geometric_mean, mean_interval
from analysis.study import RESULTS, Claim, Parts, Row, Study, Tables, load, main, with_interval
from fqtstats import models
from fqtstats.data import data
from fqtstats.layers import BACKENDS
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.training import pretrain

COLUMNS = (
    Column("backend", "str", "", "that multiplies"),
    Column("seed", "int64", "1", "of initialization, batch order and rounding"),
    Column("epoch", "int64", "1", "from 1"),
    Column("loss", "float64", "nats", "mean training loss over the epoch"),
    Column("test_accuracy", "float64", "1", "share of the test data that is classified correctly; of the last epoch"),
)


@dataclass(frozen=True)
class Settings:
    """Of the study; ``epochs`` 0 is the network's own schedule."""

    model: str = "preact_resnet20"
    policy: str = "statquant-ptq"
    bits: int = 8
    epochs: int = 0
    seeds: int = 8


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per backend, seed and epoch."""
    source = data(networks.DATA[settings.model])
    schedule = pretrain.default_config(settings.model, networks.DATA[settings.model])
    assert schedule is not None

    def train(backend: str, seed: int) -> list[Row]:
        config = replace(schedule, seed=seed, epochs=settings.epochs or schedule.epochs)
        model = models.build(settings.model, source, seed)
        policy = fqtstats.policies.get(settings.policy, bits=settings.bits)
        with fqtstats.quantized(model, policy, backend=backend, seed=seed) as handle:

            def next_step(epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
                handle.step = (epoch - 1) * steps + step

            history = pretrain.pretrain(model, source, config, next_step)
        accuracies = [np.nan] * (config.epochs - 1) + [history.test_accuracy]
        return [
            {"epoch": epoch, "loss": loss, "test_accuracy": accuracy}
            for epoch, (loss, accuracy) in enumerate(zip(history.losses, accuracies, strict=True), 1)
        ]

    cases = [{"backend": backend, "seed": seed} for seed in range(settings.seeds) for backend in BACKENDS]
    return {"losses": parts.every("trainings", cases, train)}


# --- what is said of it -----------------------------------------------------------------------------------------------


TESTED = 1 - 2 * recipes.LEVEL
"""Level of the interval that two one-sided tests amount to."""


def margin() -> float:
    """The factor up to which losses count as equal: that of the study of recipes.

    Raises:
        InputError: it has no saved results.
    """
    rows = load(recipes.STUDY, RESULTS / recipes.STUDY.name).tables["runs"]
    return float(recipes.summary(rows[rows["data"] == networks.DATA["preact_resnet20"]])["margin"].max())


def compare(losses: pd.DataFrame) -> pd.DataFrame:
    """A row per epoch: mean losses of both backends with 95 % intervals, and their ratio, native / simulated.

    ``ratio`` is the geometric mean over the seeds, ``low`` and ``high`` the ends of its 95 % interval, ``tested_low``
    and ``tested_high`` those of its 90 % interval; ``error`` is the standard error of its logarithm.
    """
    found = []
    for epoch, own in losses.groupby("epoch"):
        loss = own.pivot(index="seed", columns="backend", values="loss")
        ratios = loss["native"] / loss["simulated"]
        row: dict[str, object] = {"epoch": epoch, "seeds": len(loss)}
        for backend in BACKENDS:
            ends = zip(("", "_low", "_high"), mean_interval(loss[backend]), strict=True)
            row |= {f"{backend}{end}": value for end, value in ends}
        row |= dict(zip(("ratio", "low", "high"), geometric_mean(ratios), strict=True))
        row |= dict(zip(("tested_low", "tested_high"), geometric_mean(ratios, TESTED)[1:], strict=True))
        found.append({**row, "error": float(np.log(ratios).std(ddof=1)) / math.sqrt(len(ratios))})
    return pd.DataFrame(found)


def read(tables: Tables) -> pd.DataFrame:
    """A row per epoch."""
    return pd.DataFrame(
        {
            "epoch": str(row.epoch),
            **{
                f"loss, {backend}": with_interval(
                    *(getattr(row, f"{backend}{end}") for end in ("", "_low", "_high")), ".3g"
                )
                for backend in BACKENDS
            },
            "native / simulated": with_interval(row.ratio, row.low, row.high, ".3f"),
        }
        for row in compare(tables["losses"]).itertuples()
    )


def claims(tables: Tables) -> list[Claim]:
    """Of the last epoch."""
    last, limit = compare(tables["losses"]).iloc[-1], margin()
    p = float(scipy.stats.t.sf((math.log(limit) - abs(math.log(last["ratio"]))) / last["error"], last["seeds"] - 1))
    inside = 1 / limit < last["tested_low"] and last["tested_high"] < limit
    outside = last["tested_low"] > limit or last["tested_high"] < 1 / limit
    verdict = "equal within" if inside else "outside of" if outside else "not shown to be equal within"
    final = tables["losses"].dropna(subset="test_accuracy")
    accuracy = final.pivot(index="seed", columns="backend", values="test_accuracy")
    accuracies = " and ".join(f"{with_interval(*mean_interval(accuracy[name]), '.4f')} {name}" for name in BACKENDS)
    difference = mean_interval(accuracy["native"] - accuracy["simulated"])
    losses = [with_interval(*(last[f"{name}{end}"] for end in ("", "_low", "_high")), ".4f") for name in BACKENDS]
    return [
        Claim(
            f"After {last['epoch']:.0f} epochs and over {last['seeds']:.0f} seeds the mean training loss is "
            f"{losses[0]} nats on {BACKENDS[0]} products and {losses[1]} on {BACKENDS[1]} ones. Native / simulated is "
            f"{with_interval(last['ratio'], last['low'], last['high'], '.3f')} (95 %, paired), {verdict} the margin of "
            f"a factor of {limit:.2f} (two one-sided tests: p = {p:.2g}; the margin is that of the study of recipes).",
            True if inside else False if outside else None,
            "not examined" if outside else "",
        ),
        Claim(
            f"Mean test accuracies are {accuracies}; native less simulated, paired by seed: "
            f"{with_interval(*difference, '+.4f')}."
        ),
    ]


def draw(tables: Tables) -> dict[str, Figure]:
    """Losses by epoch, and their ratio beside the margin."""
    found, limit = compare(tables["losses"]), margin()
    figure = style.new_figure(style.COLUMN_WIDTH, 3.3)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _losses(top, tables["losses"], found)
    bottom.axhspan(
        1 / limit, limit, color=style.tint(style.GREY, 0.25), linewidth=0, label=f"margin, factor {limit:.2f}"
    )
    bottom.axhline(1, color=style.GREY, linewidth=0.5)
    around = (found["ratio"] - found["tested_low"], found["tested_high"] - found["ratio"])
    bottom.errorbar(
        found["epoch"], found["ratio"], around, fmt="o-", color=style.INK, label=f"mean, {100 * TESTED:.0f} %"
    )
    bottom.set(xlabel="epoch", ylabel="native / simulated\n(log scale)", xticks=found["epoch"], yscale="log")
    bottom.set_yticks([1 / limit, 1, limit], [f"{tick:.2f}" for tick in (1 / limit, 1, limit)])
    bottom.minorticks_off()
    bottom.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return {"losses": figure}


def _losses(ax: Axes, losses: pd.DataFrame, found: pd.DataFrame) -> None:
    """A thin line per seed, and the mean with its interval."""
    for backend, color, shift in zip(BACKENDS, (style.VERMILION, style.BLUE), (-0.04, 0.04), strict=True):
        curves = losses[losses["backend"] == backend].pivot(index="epoch", columns="seed", values="loss")
        ax.plot(curves.index + shift, curves, color=style.tint(color, 0.35), linewidth=0.4)
        mean = found[backend]
        around = (mean - found[f"{backend}_low"], found[f"{backend}_high"] - mean)
        ax.errorbar(found["epoch"] + shift, mean, around, fmt="o-", color=color, label=backend)
    ax.set(ylabel="training loss [nats]", yscale="log")
    ax.legend(title="mean (95 %); thin: seeds", title_fontsize=6)


STUDY = Study(
    name="native_training",
    question="Does training on integer products reach the loss that training on simulated ones does?",
    full=Settings(),
    quick=Settings("mlp", epochs=2, seeds=3),
    columns={"losses": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Loss: mean training loss over the epoch in nats, mean over the seeds. Native / simulated: ratio of the "
    "losses, geometric mean over the seeds, paired. 95 % intervals (Student t).",
)

if __name__ == "__main__":
    main(STUDY)
