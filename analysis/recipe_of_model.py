"""Which recipe for which model?

Nothing is trained here: the runs of the study of recipes (:mod:`analysis.recipes`) are compared, of a convolutional
network on digits and a transformer on text. Every recipe has its own optimizer and schedule, so what is compared are
recipes as they are given, not numbers of bits. Nor do all train equally long: some start from the trained network of
``exact``, whose epochs are counted in, and on text those that learn slowest have twice the epochs.

A run's loss is its final training loss relative to that of ``exact`` (full precision) with the same seed and backend;
one that diverged counts with the loss of guessing. Of a seed the logarithm is averaged over both backends; intervals
are of the mean over the seeds. Memory is how many times less the quantized layers keep for the backward pass than in
float32, on the native backend.

Recipes are classed by the bits of the weights in their last stage. The best recipe of a class is the one with the
lowest mean; it is called better than the runner-up where Tukey's range test says so, which allows for the choice of the
best among all: an analysis of variance of the class with the seeds as blocks, so that its recipes share one variance.
These p-values are corrected over all classes and models by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure
from statsmodels.stats.multitest import multipletests

from analysis import recipes
from analysis.estimates import geometric_mean, mean_interval
from analysis.study import RESULTS, Claim, Parts, Study, Tables, load, main, with_interval
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.training.recipes import Recipe, get

COLUMNS = (
    Column("data", "str", "", "what the network is trained on"),
    Column("model", "str", "", "network"),
    Column("recipe", "str", "", "with its bits where it has a choice"),
    Column("forward", "int64", "bit", "of the weights in the last stage; 32: in full precision"),
    Column("epochs", "int64", "1", "of the run, with those of the trained network that it starts from"),
    Column("backend", "str", "", "how products are computed"),
    Column("seed", "int64", "1", "of the run"),
    Column("loss", "float64", "nat", "final training loss; of guessing where the run diverged"),
    Column("relative", "float64", "1", "the same over that of exact with the same seed and backend"),
    Column("memory", "float64", "1", "bytes kept for the backward pass in float32 / as they are; NaN: nothing is kept"),
    Column("diverged", "bool", "", "whether the run diverged"),
)

REFERENCE = "exact"
LEVEL = 0.05
KINDS = {"preact_resnet20": "CNN", "transformer": "transformer"}


@dataclass(frozen=True)
class Settings:
    """Of the study; ``seeds`` of the runs that are read."""

    data: tuple[str, ...] = ("digits", "text")
    seeds: int = 3


def saved_runs(data: str) -> pd.DataFrame:
    """What the study of recipes saved: a row per run.

    Raises:
        InputError: nothing is there.
    """
    rows = load(recipes.STUDY, RESULTS / recipes.STUDY.name).tables["runs"]
    return rows[rows["data"] == data].assign(diverged=rows["diverged"] != "")


def measure(settings: Settings, parts: Parts) -> Tables:
    """The saved runs, relative to those in full precision."""
    return {"runs": pd.concat([_relative(data, settings.seeds) for data in settings.data], ignore_index=True)}


def _relative(data: str, seeds: int) -> pd.DataFrame:
    rows = saved_runs(data)
    rows = rows[rows["seed"] < seeds]
    start = rows.loc[rows["recipe"] == REFERENCE, "epochs"].max()
    loss = rows["loss"].where(~rows["diverged"], rows["guessing"])
    exact = loss[rows["recipe"] == REFERENCE].set_axis(_runs(rows[rows["recipe"] == REFERENCE]))
    return rows.assign(
        loss=loss,
        relative=loss / exact.reindex(_runs(rows)).to_numpy(),
        memory=(rows["kept_float32_bytes"] / rows["kept_bytes"]).where(rows["backend"] == "native"),
        forward=rows["recipe"].map(forward_bits),
        epochs=rows["epochs"] + start * (rows["recipe"].map(starts_trained)),
    )[[column.name for column in COLUMNS]]


def _runs(rows: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(rows[["seed", "backend"]])


def forward_bits(recipe: str) -> int:
    """Of the weights in the last stage; 32 in full precision."""
    return int(getattr(_recipe(recipe).stages[-1].policy.weight, "bits", 32))


def starts_trained(recipe: str) -> bool:
    """Whether it starts from a network trained in full precision."""
    return _recipe(recipe).starts_from == "full-precision"


def _recipe(name: str) -> Recipe:
    name, _, bits = name.partition("@")
    return get(name, int(bits) if bits else None)


# --- what is said of it -----------------------------------------------------------------------------------------------


def of_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Log of the relative loss by seed, the backends' mean; rows: model, class and recipe. Whole blocks alone."""
    logs = runs.assign(log=np.log(runs["relative"]))
    found = logs.pivot_table(index=["model", "forward", "recipe"], columns="seed", values="log", sort=False)
    return pd.DataFrame(found.drop(index=REFERENCE, level="recipe", errors="ignore"))


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per model and recipe: ``mean``, ``low`` and ``high`` of the relative loss, ``memory`` and ``epochs``."""
    known, found = runs.groupby(["model", "recipe"])[["memory", "epochs"]].mean(), of_seeds(runs)
    return pd.DataFrame(
        {
            "model": model,
            "forward": forward,
            "recipe": recipe,
            **dict(zip(("mean", "low", "high"), geometric_mean(np.exp(values[~np.isnan(values)])), strict=True)),
            **known.loc[(model, recipe)],
        }
        for (model, forward, recipe), values in zip(found.index, found.to_numpy(dtype=np.float64), strict=True)
    )


def best(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per model and class: the best recipe, the runner-up, the ratio of their losses and p, corrected."""
    found = []
    logs = of_seeds(runs)
    for (model, forward), own in logs.groupby(level=["model", "forward"], sort=False):
        block = own.droplevel(["model", "forward"]).dropna(axis="columns")
        first, *others = block.mean(axis=1).sort_values().index
        row = {"model": model, "forward": forward, "best": first, "of": len(block), "seeds": block.shape[1]}
        if others:
            row["second"] = others[0]
            row["ratio"] = math.exp(block.loc[others[0]].mean() - block.loc[first].mean())
            row["p"] = range_test(block.to_numpy(dtype=np.float64))
        found.append(row)
    table = pd.DataFrame(found)
    if "p" in table and (known := table["p"].notna()).any():
        table.loc[known, "p"] = multipletests(table.loc[known, "p"], method="holm")[1]
    return table


def range_test(block: np.ndarray) -> float:
    """P-value of the lowest mean against the next, ``[recipes, seeds]``, by Tukey's studentized range."""
    recipes, seeds = block.shape
    if seeds < 2:
        return math.nan
    residual = block - block.mean(axis=1, keepdims=True) - block.mean(axis=0, keepdims=True) + block.mean()
    df = (recipes - 1) * (seeds - 1)
    error = math.sqrt(float(np.square(residual).sum()) / df / seeds)
    low, next_ = np.sort(block.mean(axis=1))[:2]
    return float(scipy.stats.studentized_range.sf((next_ - low) / error, recipes, df)) if error > 0 else 0.0


def read(tables: Tables) -> pd.DataFrame:
    """A row per recipe, both models."""
    rows = summary(tables["runs"])
    models = list(dict.fromkeys(rows["model"]))
    shown = []
    for (forward, recipe), own in rows.sort_values("forward", kind="stable").groupby(["forward", "recipe"], sort=False):
        row = {"forward": str(forward), "recipe": recipe}
        known = own.set_index("model").reindex(models)
        for model, values in known.iterrows():
            row[_kind(model)] = _told(*values[["mean", "low", "high"]])
        row["epochs"] = ", ".join("-" if math.isnan(value) else f"{value:.0f}" for value in known["epochs"])
        row["memory"] = ", ".join("-" if math.isnan(value) else f"{value:.1f}x" for value in known["memory"])
        shown.append(row)
    return pd.DataFrame(shown)


def _told(mean: float, low: float, high: float) -> str:
    return "" if math.isnan(mean) else with_interval(mean, low, high)


def _kind(model: str) -> str:
    return KINDS.get(model, model)


def claims(tables: Tables) -> list[Claim]:
    """The best recipe of each class and model, and how alike the models are."""
    runs = tables["runs"]
    rows = summary(runs).set_index(["model", "recipe"])
    chosen, told = best(runs), []
    for row in chosen.sort_values("forward", kind="stable").itertuples():
        own = rows.loc[row.model, row.best]
        text = (
            f"{_kind(row.model)}, {row.forward}-bit forward: {row.best} has "
            f"{with_interval(own['mean'], own['low'], own['high'])} times the loss of {REFERENCE} after "
            f"{own['epochs']:.0f} epochs"
            + (f" and keeps {own['memory']:.1f} times less memory" if own["memory"] > 1 else "")
        )
        if row.of == 1:
            text += "; there is no other."
        else:
            other = f"{row.second} after {rows.loc[(row.model, row.second), 'epochs']:.0f} (ratio {row.ratio:.3g}"
            other += ")" if math.isnan(row.p) else f", p {row.p:.2g}, Holm)"
            better = f"the best of {row.of}, better than" if row.p < LEVEL else f"the lowest of {row.of}, not told from"
            text += f"; {better} {other}."
        told.append(Claim(text))
    if runs["model"].nunique() > 1:
        told.append(_alike(runs, chosen))
    return told


def _alike(runs: pd.DataFrame, chosen: pd.DataFrame) -> Claim:
    """Whether the two models rank recipes alike."""
    logs = of_seeds(runs).droplevel("forward")
    first, second = (logs.xs(model, level="model") for model in dict.fromkeys(runs["model"]))
    shared = [recipe for recipe in first.index if recipe in second.index]
    ranks = []
    for seed in first.columns.intersection(second.columns):
        pair = pd.concat([first.loc[shared, seed], second.loc[shared, seed]], axis=1).dropna().to_numpy()
        ranks.append(float(scipy.stats.spearmanr(pair[:, 0], pair[:, 1]).statistic))
    same = chosen.groupby("forward")["best"].agg(["nunique", "size"])
    same = same[same["size"] > 1]
    return Claim(
        f"The lowest loss is that of the same recipe on both models in {(same['nunique'] == 1).sum()} of {len(same)} "
        f"classes; over the {len(shared)} recipes that both were trained with, the rank correlation of the losses is "
        f"{with_interval(*mean_interval(ranks), '.2f')} (mean over {len(ranks)} seeds)."
    )


def draw(tables: Tables) -> dict[str, Figure]:
    """Losses and memory of all recipes, the models side by side."""
    rows = summary(tables["runs"]).sort_values("forward", kind="stable")
    models = list(dict.fromkeys(tables["runs"]["model"]))
    recipes = rows.drop_duplicates("recipe")
    places = _places(recipes["forward"].to_list())
    place = dict(zip(recipes["recipe"], places, strict=True))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.115 * max(places) + 0.9)
    panels = figure.subplots(1, len(models) + 1, sharey=True, width_ratios=[*[1.0] * len(models), 0.6])
    *losses, memory = panels
    chosen = set(best(tables["runs"])[["model", "best"]].itertuples(index=False, name=None))
    for ax, model, mark in zip(losses, models, style.marks(["psq", "ptq"]).values(), strict=False):
        for row in rows[rows["model"] == model].itertuples():
            lowest = (model, row.recipe) in chosen
            ax.errorbar(
                row.mean, place[row.recipe], xerr=[[row.mean - row.low], [row.high - row.mean]], fmt=mark.marker,
                color=mark.color, markerfacecolor=mark.color if lowest else "white", markersize=3, elinewidth=0.7,
                markeredgewidth=0.7,
            )  # fmt: skip
            if not math.isnan(row.memory):
                memory.plot(row.memory, place[row.recipe], mark.marker, color=mark.color, markersize=2.4)
        ax.axvline(1, color=style.GREY, linewidth=0.8)
        ax.set(xscale="log", title=f"{_kind(model)}\nloss / {REFERENCE}")
        low, high = ax.get_xlim()
        ax.set_xticks([at for at in ((1, 10, 100, 1000) if high > 10 * low else (0.9, 1, 1.2)) if low < at < high])
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(lambda value, _: "")
    memory.axvline(1, color=style.GREY, linewidth=0.8)
    memory.set(xscale="log", xlim=(0.6, 24), title="memory\nfactor", xticks=[1, 4, 16], xticklabels=["1", "4", "16"])
    memory.minorticks_off()
    losses[0].set_yticks(list(place.values()), list(place))
    losses[0].set_ylim(max(places) + 0.8, -1.6)
    for ax in panels:
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    for forward in recipes["forward"].unique():
        top = min(at for at, each in zip(places, recipes["forward"], strict=True) if each == forward)
        losses[0].annotate(
            f"{forward}-bit forward", (-0.03, top - 0.95), xycoords=("axes fraction", "data"), fontsize=6,
            fontweight="bold", ha="right", va="center", annotation_clip=False,
        )  # fmt: skip
    return {"recipe_of_model": figure}


def _places(forward: Sequence[int]) -> list[float]:
    """Heights of the recipes, with room for the name of every class above its first."""
    classes = list(dict.fromkeys(forward))
    return [index + 1.3 * classes.index(each) for index, each in enumerate(forward)]


STUDY = Study(
    name="recipe_of_model",
    question="Which recipe for which model (CNN, transformer)?",
    full=Settings(),
    quick=Settings(("digits",)),
    columns={"runs": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Forward: bits of the weights in the last stage. CNN, transformer: final training loss as a multiple of "
    "that in full precision with the same seed and backend; geometric means over the seeds, 95 % intervals (t). "
    "Epochs, of both models: with those of the trained network that a recipe starts from. Memory, likewise: how many "
    "times less the quantized layers keep for the backward pass than in float32.",
)

if __name__ == "__main__":
    main(STUDY)
