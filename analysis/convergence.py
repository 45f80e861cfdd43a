"""Does the gradient's variance tell how training goes?

Networks are trained from the same weights on the same batches for equally many steps; only the gradient quantizers
differ. On the way the variance of the quantized gradient is measured (:func:`fqtstats.training.loop.train` with
``variance_every``), which does not change the training.

Margin: ``||g|| / sqrt(3 Var)`` with the QAT gradient g and the summed variance of the quantized gradient; below 1 the
quantizers' noise dominates. Within an epoch squared norms and variances are averaged. With few bits the first epoch has
a margin many decades below the others, as in a network as initialized the noise grows from layer to layer. So two
numbers are told of a training: the geometric mean over its epochs, in which the first has a large part, and the margin
of its last epoch.

Loss: mean cross entropy over the minibatches of the last epoch, as they were trained on. A run that diverged counts
with the loss of guessing, and its margins are those of the steps before that. A run trains if its loss is below a
quarter of guessing's, as in the studies of recipes.

Configurations are ranked by margin and by loss within every seed; the p-value of Spearman's correlation is that of
permutations of the configurations, one-sided, and corrected over the seeds by Holm's method. Intervals are of the mean
over the seeds. The margin at which the loss is twice that of QAT is interpolated between configurations, in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from statsmodels.stats.multitest import multipletests

from analysis.estimates import crossing, geometric_mean, mean_interval
from analysis.known import with_bits
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from analysis.tasks import TASKS, guessing, records
from fqtstats import models
from fqtstats.errors import TrainingDiverged
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.training import loop, runs
from fqtstats.trainings import Training

_SQUARE = "(loss/parameter)^2"
COLUMNS = (
    Column("recipe", "str", "", "quantizer@bits of the input gradient; qat and exact quantize no gradient"),
    Column("seed", "int64", "1", "of weights, batches and rounding"),
    Column("epoch", "int64", "1", "from 1"),
    Column("loss", "float64", "nat", "mean training loss of the epoch; of guessing where the run diverged"),
    Column("test_loss", "float64", "nat", "after the epoch; NaN where the run diverged"),
    Column("grad_norm_sq", "float64", _SQUARE, "mean squared norm of the QAT gradient, over the measured steps"),
    Column("variance", "float64", _SQUARE, "mean variance of the quantized gradient, over the same steps"),
    Column("diverged", "bool", "", "whether the run ended in this epoch"),
    Column("guessing", "float64", "nat", "loss of guessing by the classes' frequencies"),
)

SOURCE = "digits"
PERMUTATIONS = 99_999
SHOWN = 4e-3
"""Smallest margin on an axis of the figures: those of runs that explode are many decades below."""
TWICE = 2.0
"""Loss, relative to QAT's, that is called worse."""


MEASURES = {"margin": "geometric mean of the epochs' margins", "last": "margin of the last epoch"}
"""Numbers that tell a training's margin, by column."""


@dataclass(frozen=True)
class Settings:
    """Of the study; ``recipes`` are quantizers with their bits, beside qat and exact."""

    model: str = "preact_resnet20"
    recipes: tuple[str, ...] = (
        *("ptq@1", "ptq@2", "ptq@3", "ptq@4", "ptq@5", "ptq@8"),
        *("psq@1", "psq@2", "psq@3", "psq@4"),
        *("bhq@1", "bhq@2", "bhq@3", "bhq@4"),
    )
    epochs: int = 6
    seeds: int = 3
    every: int = 11
    draws: int = 2


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row per run and epoch."""

    def of_run(recipe: str, seed: int) -> Iterator[dict[str, object]]:
        data, draws = records(SOURCE), settings.draws
        name, bits = with_bits(recipe)
        run = runs.run(f"{name if name == 'exact' else f'statquant-{name}'}/{SOURCE}", bits)
        every = settings.every if bits else 0
        ended: int | None = None
        try:
            training = loop.train(
                models.build(settings.model, data, seed), data, run.recipe, epochs=settings.epochs,
                batch_size=run.batch_size, seed=seed, backend="native", variance_every=every, variance_draws=draws,
            )  # fmt: skip
        except TrainingDiverged as failure:
            training, epoch = failure.partial_result, failure.diagnosis["epoch"]
            assert isinstance(training, Training)
            assert isinstance(epoch, int)
            ended = epoch
        guess = guessing(data)
        measured = training.totals.groupby("epoch")[["grad_norm_sq", "variance"]].mean()
        curve = training.curve().set_index("epoch")
        for epoch in range(1, (ended or settings.epochs) + 1):
            diverged = epoch == ended
            yield {
                "epoch": epoch,
                "loss": guess if diverged else curve.loc[epoch, "loss"],
                "test_loss": math.nan if diverged else curve.loc[epoch, "test_loss"],
                "grad_norm_sq": measured["grad_norm_sq"].get(epoch, math.nan),
                "variance": measured["variance"].get(epoch, math.nan),
                "diverged": diverged,
                "guessing": guess,
            }

    recipes = ("exact", "qat", *settings.recipes)
    cases = [{"recipe": recipe, "seed": seed} for seed in range(settings.seeds) for recipe in recipes]
    return {"epochs": parts.every("trainings", cases, of_run)}


# --- what is said of it -----------------------------------------------------------------------------------------------


def margins(epochs: pd.DataFrame) -> pd.DataFrame:
    """The rows with a variance, and their ``margin``."""
    own = epochs.dropna(subset="variance")
    return own.assign(margin=np.sqrt(own["grad_norm_sq"] / (3 * own["variance"])))


def of_runs(epochs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: final ``loss``, the same ``relative`` to QAT's of the seed, and the numbers of ``MEASURES``."""
    final = epochs.groupby(["recipe", "seed"], sort=False).tail(1).set_index(["recipe", "seed"])
    own = margins(epochs).groupby(["recipe", "seed"], sort=False)["margin"]
    found = final.assign(
        margin=own.agg(lambda values: math.exp(np.log(values).mean())), first=own.first(), last=own.last()
    ).reset_index()
    qat = found[found["recipe"] == "qat"].set_index("seed")["loss"]
    relative = found["loss"] / found["seed"].map(qat)
    trains = found["loss"] < TASKS[SOURCE].trained * found["guessing"]
    return found.assign(relative=relative, trains=trains, bits=[bits_of(recipe) for recipe in found["recipe"]])


def bits_of(recipe: str) -> float:
    """Of the input gradient; NaN where it is not quantized."""
    bits = recipe.partition("@")[2]
    return float(bits) if bits else math.nan


def rank_test(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[float, float]:
    """Spearman's correlation, and the share of permutations with one as low."""
    ranks = [scipy.stats.rankdata(values) for values in (x, y)]
    first, second = (values - values.mean() for values in ranks)
    scale = math.sqrt(float(first @ first) * float(second @ second))
    rho = float(first @ second) / scale
    shuffled = np.random.default_rng(0).permuted(np.tile(second, (PERMUTATIONS, 1)), axis=1) @ first / scale
    return rho, float(1 + (shuffled <= rho + 1e-12).sum()) / (1 + PERMUTATIONS)


def doubling(found: pd.DataFrame, measure: str) -> list[float]:
    """Margin (one of ``MEASURES``) at which the loss is twice QAT's, of the seeds that have one."""
    places = []
    for _, own in found.dropna(subset=measure).groupby("seed"):
        rows = own.sort_values(measure)
        places.append(math.exp(crossing(np.log(rows[measure]), rows["relative"], TWICE)))
    return [place for place in places if not math.isnan(place)]


def read(tables: Tables) -> pd.DataFrame:
    """A row per configuration; geometric means over the seeds."""
    shown = []
    for recipe, own in of_runs(tables["epochs"]).groupby("recipe", sort=False):
        row = {"gradient": recipe, "loss": with_interval(*geometric_mean(own["loss"]))}
        row["/ QAT"] = with_interval(*geometric_mean(own["relative"]), ".2g")
        for name, column in (("margin, mean", "margin"), ("first epoch", "first"), ("last epoch", "last")):
            values = own[column].dropna()
            row[name] = with_interval(*geometric_mean(values), ".2g") if len(values) else ""
        row["train"] = f"{own['trains'].sum()} of {len(own)}"
        shown.append(row)
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """Of either margin: ranks, the margin that is needed, and whether it separates."""
    found = of_runs(tables["epochs"])
    own = found.dropna(subset="margin")
    told = [_epochs_apart(own)]
    for measure, name in MEASURES.items():
        told += _ranks(own, measure, name)
    told += [_separates(own, measure, name) for measure, name in MEASURES.items()]
    trains, not_ = own[own["trains"]], own[~own["trains"]]
    if len(not_) and len(trains):
        for measure, name in MEASURES.items():
            low, high = trains[measure].min(), not_[measure].max()
            told.append(
                Claim(
                    f"{len(not_)} of {len(own)} runs do not train ({own['diverged'].sum()} diverge): their {name} is "
                    f"up to {high:.2g}, that of those that train {low:.2g} or more: "
                    + (f"anything from {high:.2g} to {low:.2g} separates them." if high < low else "they overlap.")
                )
            )
    else:
        told.append(Claim(f"{len(trains)} of {len(own)} runs train; the smallest margin is {own['margin'].min():.2g}."))
    return told


def _epochs_apart(own: pd.DataFrame) -> Claim:
    """How far the first epoch is from the last, where that is farthest."""
    several = own[own["first"] != own["last"]]
    if several.empty:
        return Claim("Every run has its margin of one epoch.")
    apart = several.groupby("recipe", sort=False)[["first", "last"]].agg(lambda values: geometric_mean(values)[0])
    recipe = (apart["last"] / apart["first"]).idxmax()
    first, mean, last = (
        with_interval(*geometric_mean(own.loc[own["recipe"] == recipe, column]), ".2g")
        for column in ("first", "margin", "last")
    )
    return Claim(
        f"The mean over the epochs is not the margin of most of them: {recipe} has {first} in the first epoch, {last} "
        f"in the last, and a geometric mean of {mean}."
    )


def _ranks(own: pd.DataFrame, measure: str, name: str) -> list[Claim]:
    by_seed = [rows for _, rows in own.groupby("seed")]
    tests = [rank_test(rows[measure], rows["loss"]) for rows in by_seed]
    by_bits = [rank_test(rows["bits"], rows["loss"])[0] for rows in by_seed]
    rhos = [rho for rho, _ in tests]
    p = float(multipletests([p for _, p in tests], method="holm")[1].max())
    recipes, seeds = own["recipe"].nunique(), len(by_seed)
    limited = [np.clip(mean_interval(values), -1, 1) for values in (rhos, by_bits)]
    gain = mean_interval([bits - rho for bits, rho in zip(by_bits, rhos, strict=True)])
    enough = math.factorial(recipes) > 20 * seeds  # few permutations have no small p
    better = True if gain[1] > 0 else False if gain[2] < 0 else None
    told = [
        Claim(
            f"The larger the {name}, the lower the final loss: Spearman's correlation over {recipes} configurations is "
            f"{with_interval(*limited[0], '.2f')} ({seeds} seeds; largest p {p:.2g}, Holm).",
            p < 0.05 if enough else None,
        ),
        Claim(
            f"Bits alone rank the losses with {with_interval(*limited[1], '.2f')}; the {name} is better by "
            f"{with_interval(*gain, '.2f')}.",
            better if enough else None,
            "not examined" if enough and better is False else "",
        ),
    ]
    if places := doubling(own, measure):
        told.append(
            Claim(
                f"The loss is twice that of QAT where the {name} is {with_interval(*geometric_mean(places), '.2g')} "
                f"({len(places)} of {seeds} seeds have such a margin)."
            )
        )
    return told


def _separates(own: pd.DataFrame, measure: str, name: str) -> Claim:
    below, above = own[own[measure] < 1], own[own[measure] >= 1]
    worse, failed = below["relative"] > TWICE, above["relative"] > TWICE
    separates = bool(not failed.any() and worse.all())
    good = below.loc[~worse, measure]
    because = "" if separates or good.empty else (
        f"the loss rises gradually below 1: runs with less than twice QAT's go down to {good.min():.2g}"
    )  # fmt: skip
    return Claim(
        f"The {name} separates good from worse at 1: above it {failed.sum()} of {len(above)} runs end with more than "
        f"twice QAT's loss, below it {worse.sum()} of {len(below)}.",
        separates,
        because if separates or because else "not examined",
    )


def draw(tables: Tables) -> dict[str, Figure]:
    """Loss against margin, and the margin over the training."""
    return {"loss_margin": _loss(of_runs(tables["epochs"])), "margin_epochs": _margin(margins(tables["epochs"]))}


def _loss(found: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 4.8)
    panels = figure.subplots(2, 1, sharey=True)
    own = found.dropna(subset="margin")
    for ax, (measure, name) in zip(panels, MEASURES.items(), strict=True):
        _against(ax, found, own, measure)
        ax.set_xlabel(f"{name}, ‖g‖ / √(3 variance)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, title_fontsize=6,
                  title="geometric means over the seeds with 95 % intervals;\npale: each seed; numbers: bits of the "
                  "input gradient")  # fmt: skip
    return figure


_ASIDE = {"ptq": (-6.5, 2.0), "psq": (1.0, -8.0)}
"""Where a number stands beside its mark, in points: neighbours are of different quantizers."""
_RIGHT = (3.0, 2.5)


def _against(ax: Axes, found: pd.DataFrame, own: pd.DataFrame, measure: str) -> None:
    """Final losses against one of ``MEASURES``."""
    marks = style.marks(recipe.partition("@")[0] for recipe in own["recipe"])
    last = own.loc[own[measure].idxmax(), "recipe"]
    for recipe, rows in own.groupby("recipe", sort=False):
        quantizer, _, bits = recipe.partition("@")
        mark = marks[quantizer]
        (x, *x_ends), (y, *y_ends) = geometric_mean(rows[measure]), geometric_mean(rows["loss"])
        if x < SHOWN:
            told = f"◂ {recipe}: margin {x:.0e}"
            ax.annotate(told, (SHOWN, rows["loss"].mean()), (2, 2), textcoords="offset points", fontsize=6,
                        color=mark.color)  # fmt: skip
            continue
        ax.plot(rows[measure], rows["loss"], mark.marker, color=style.tint(mark.color, 0.4), markersize=1.8)
        ax.errorbar(
            x, y, [[y - y_ends[0]], [y_ends[1] - y]], [[x - x_ends[0]], [x_ends[1] - x]], mark.marker,
            color=mark.color, elinewidth=0.6, label=quantizer if quantizer not in ax.get_legend_handles_labels()[1]
            else None,
        )  # fmt: skip
        aside = _RIGHT if recipe == last else _ASIDE.get(quantizer, _RIGHT)
        ax.annotate(bits, (x, y), aside, textcoords="offset points", fontsize=6, color=mark.color)
    guess = found["guessing"].iloc[0]
    qat, low, high = geometric_mean(found.loc[found["recipe"] == "qat", "loss"])
    ax.axhspan(low, high, color=style.GREY, alpha=0.2, linewidth=0)
    for height, name in ((qat, "QAT, 95 %"), (guess, "guessing")):
        ax.axhline(height, color=style.GREY, linewidth=0.8)
        ax.annotate(
            name, (0, height), (2, -7), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=6, color=style.INK,
        )  # fmt: skip
    ax.axvline(1, color=style.GREY, linewidth=0.8, linestyle=":")
    ax.set_xscale("log")
    ax.set_xlim(SHOWN, 1.5 * own[list(MEASURES)].max().max())  # room for the last label
    ax.set(yscale="log", ylabel="final training loss [nat]")
    ax.grid()


def _margin(rows: pd.DataFrame) -> Figure:
    quantizers = list(dict.fromkeys(recipe.partition("@")[0] for recipe in rows["recipe"]))
    marks = style.marks(quantizers)
    figure = style.new_figure(style.COLUMN_WIDTH, 1.15 * len(quantizers) + 0.4)
    panels = figure.subplots(len(quantizers), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, quantizer in zip(panels, quantizers, strict=True):
        recipes = [name for name in dict.fromkeys(rows["recipe"]) if name.partition("@")[0] == quantizer]
        for index, recipe in enumerate(recipes):
            own = rows[rows["recipe"] == recipe]
            # An epoch that not every seed came to is of other seeds than the others.
            whole = [(epoch, of["margin"]) for epoch, of in own.groupby("epoch") if len(of) == own["seed"].nunique()]
            values = np.array([geometric_mean(of) for _, of in whole])
            epochs = np.array([epoch for epoch, _ in whole])
            color = style.tint(marks[quantizer].color, 0.4 + 0.6 * (index + 1) / len(recipes))
            ax.plot(
                epochs, values[:, 0], color=color, marker=marks[quantizer].marker, markersize=2,
                label=recipe.partition("@")[2],
            )  # fmt: skip
            ax.fill_between(epochs, values[:, 1], values[:, 2], color=color, alpha=0.25, linewidth=0)
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), title="bits",
                  title_fontsize=6)  # fmt: skip
        ax.axhline(1, color=style.GREY, linewidth=0.8, linestyle=":")
        ax.set(yscale="log", ylabel="margin", title=quantizer)
        ax.grid(axis="y")
    last = rows["epoch"].max()
    panels[-1].set(
        xlabel=f"epoch (geometric means over the seeds, band: 95 %;\nmargins below {SHOWN:g} are not shown)",
        xticks=range(1, last + 1),
    )
    panels[-1].set_ylim(max(SHOWN, panels[-1].get_ylim()[0]))
    return figure


STUDY = Study(
    name="convergence",
    question="Does the gradient's variance tell how training goes?",
    full=Settings(),
    quick=Settings("mlp", ("ptq@2", "ptq@8", "bhq@2"), epochs=1, seeds=2),
    columns={"epochs": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Geometric means over the seeds, 95 % intervals (Student t). Loss: final training loss [nat], and as a "
    "multiple of QAT's. Margin: ‖g‖ / √(3 variance): geometric mean over the epochs, and those of the first and the "
    "last epoch; below 1 the noise dominates. Train: runs with a loss below a quarter of guessing's.",
)

if __name__ == "__main__":
    main(STUDY)
