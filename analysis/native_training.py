"""Does training on integer products reach the loss that training on simulated ones does?

A network is trained with PTQ at 8 bits everywhere, on both backends, once per seed: by default for its whole schedule.

The two runs of a seed start from the same weights and see the same batches and random numbers. They part at the first
rounding that differs, because a number on the edge between two codes then falls to the other side; from there on they
are two runs of a random algorithm. "Within seed noise" is: the interval of the mean difference of the final losses over
the seeds (95 %, paired t) contains 0, and the mean difference is below the standard deviation of the simulated final
losses over the seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fqtstats
from analysis import networks
from analysis.estimates import mean_interval
from analysis.study import Claim, Parts, Row, Study, Tables, main, with_interval
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


def compare(losses: pd.DataFrame) -> pd.DataFrame:
    """A row per epoch: the losses of both backends, and whether they differ by more than seeds do.

    ``difference`` is native - simulated, the mean over the seeds with its interval (``low`` and ``high``); ``noise`` is
    the standard deviation of the simulated losses over the seeds.
    """
    found = []
    for epoch, own in losses.groupby("epoch"):
        loss = own.pivot(index="seed", columns="backend", values="loss")
        mean, low, high = mean_interval(loss["native"] - loss["simulated"])
        noise = float(loss["simulated"].std(ddof=1))
        accuracy = own.groupby("backend")["test_accuracy"].mean()
        row: dict[str, object] = {"epoch": epoch, "seeds": len(loss)}
        for backend in BACKENDS:
            ends = zip(("", "_low", "_high"), mean_interval(loss[backend]), strict=True)
            row |= {f"{backend}{end}": value for end, value in ends}
            row[f"{backend}_accuracy"] = accuracy[backend]
        row |= {"difference": mean, "low": low, "high": high, "noise": noise}
        found.append({**row, "within": low <= 0 <= high and abs(mean) <= noise})
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
            "difference": with_interval(row.difference, row.low, row.high, "+.2g"),
            "SD of seeds": f"{row.noise:.2g}",
        }
        for row in compare(tables["losses"]).itertuples()
    )


def claims(tables: Tables) -> list[Claim]:
    """Of the last epoch."""
    last = compare(tables["losses"]).iloc[-1]
    different = "within seed noise" if last["within"] else "more than seed noise"
    accuracies = " and ".join(f"{last[f'{backend}_accuracy']:.2%} {backend}" for backend in BACKENDS)
    return [
        Claim(
            f"After {last['epoch']} epochs and over {last['seeds']} seeds the mean training loss is "
            f"{last['native']:.4f} nats on native products and {last['simulated']:.4f} on simulated ones, a difference "
            f"of {with_interval(last['difference'], last['low'], last['high'], '+.4f')}: {different}, of which the "
            f"standard deviation is {last['noise']:.4f}.",
            bool(last["within"]),
        ),
        Claim(f"Mean test accuracies are {accuracies}."),
    ]


def draw(tables: Tables) -> dict[str, Figure]:
    """Losses by epoch, and their difference in standard deviations of the seeds."""
    found = compare(tables["losses"])
    figure = style.new_figure(style.COLUMN_WIDTH, 3.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _losses(top, tables["losses"], found)
    ends = [found[name] / found["noise"] for name in ("difference", "low", "high")]
    bottom.axhspan(-1, 1, color=style.tint(style.GREY, 0.25), linewidth=0)
    bottom.axhline(0, color=style.GREY, linewidth=0.5)
    bottom.errorbar(found["epoch"], ends[0], (ends[0] - ends[1], ends[2] - ends[0]), fmt="o-", color=style.INK)
    bottom.set(xlabel="epoch", ylabel="native - simulated\n/ SD over seeds", xticks=found["epoch"])
    return {"losses": figure}


def _losses(ax: Axes, losses: pd.DataFrame, found: pd.DataFrame) -> None:
    """A thin line per seed, and the mean with its interval."""
    for backend, color, shift in zip(BACKENDS, ("#D55E00", "#0072B2"), (-0.04, 0.04), strict=True):
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
    legend="Loss: mean training loss over the epoch in nats, mean over the seeds; difference: native - simulated, "
    "paired; 95 % intervals (Student t). SD of seeds: standard deviation of the simulated losses.",
)

if __name__ == "__main__":
    main(STUDY)
