"""Which recipe for which model?

Nothing is trained here: the runs of the study of recipes (:mod:`analysis.recipes`) are compared, of a convolutional
network on digits and a transformer on text. Every recipe has its own optimizer and schedule, so what is compared are
recipes as they are given, not numbers of bits. Nor do all train equally long: some start from the trained network of
``exact``, whose epochs are counted in, and on text those that learn slowest have twice the epochs.

A run's loss is its final training loss relative to that of ``exact`` (full precision) with the same seed and backend;
one that diverged counts with the loss of guessing. Of a seed the logarithm is averaged over both backends; intervals
are of the mean over the seeds. Memory is how many times the bytes that the quantized layers keep for the backward pass
on the native backend would be in float32: below 1 they keep more than float32 does. Bytes are counted, so it has no
interval.

Recipes are classed by the bits of the weights in their last stage, and compared with those of their class that were
trained for as many epochs in all; others are told without a verdict. Of those that are compared the one with the lowest
mean is told from another where Tukey's range test says so, which allows for the choice of the lowest among all: an
analysis of variance with the seeds as blocks, so that the recipes share one variance. P-values are multiplied by the
number of such groups (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import recipes
from analysis.axes import beside
from analysis.estimates import geometric_mean, mean_interval, range_tests
from analysis.known import Known, with_bits
from analysis.study import Claim, Parts, Study, Tables, main, tables_of, with_interval
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


def measure(settings: Settings, parts: Parts) -> Tables:
    """The saved runs, relative to those in full precision."""
    saved = tables_of(recipes.STUDY, parts)["runs"]
    saved = saved[saved["seed"] < settings.seeds].assign(diverged=saved["diverged"] != "")
    of_data = Known("data", dict(iter(saved.groupby("data"))))
    return {"runs": pd.concat([_relative(of_data[data]) for data in settings.data], ignore_index=True)}


def _relative(rows: pd.DataFrame) -> pd.DataFrame:
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
    return get(*with_bits(name))


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


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """:func:`summary` with what comparisons say, the groups of one model, class and number of epochs together.

    ``of`` is the number of recipes in the group, ``ratio`` that of the loss to the lowest, and ``p`` that of their
    difference, times the number of groups; NaN in a group of one.
    """
    logs, rows = of_seeds(runs), summary(runs)
    groups = []
    for _, own in rows.groupby(["model", "forward", "epochs"], sort=False):
        block = logs.loc[[*own[["model", "forward", "recipe"]].itertuples(index=False, name=None)]]
        values = block.dropna(axis="columns").to_numpy(dtype=np.float64)
        means = values.mean(axis=1)
        found = own.assign(of=len(own), ratio=np.exp(means - means.min()), p=range_tests(values))
        groups.append(found.iloc[np.argsort(means)])
    table = pd.concat(groups, ignore_index=True)
    tested = table.loc[table["p"].notna(), ["model", "forward", "epochs"]].drop_duplicates()
    return table.assign(p=(table["p"] * len(tested)).clip(upper=1))


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
        row["memory"] = ", ".join("-" if math.isnan(value) else f"{value:.2g}x" for value in known["memory"])
        shown.append(row)
    return pd.DataFrame(shown)


def _told(mean: float, low: float, high: float) -> str:
    return "" if math.isnan(mean) else with_interval(mean, low, high)


def _kind(model: str) -> str:
    return KINDS.get(model, model)


def claims(tables: Tables) -> list[Claim]:
    """The lowest loss of each class and model among those trained equally long, and how alike the models are."""
    runs = tables["runs"]
    table = compared(runs)
    told = []
    for (forward, model), own in table.groupby(["forward", "model"], sort=True):
        for epochs, group in own.groupby("epochs", sort=True):
            where = f"{_kind(str(model))}, {forward}-bit forward, {epochs:.0f} epochs in all"
            first, others = _described(group.iloc[0]), group.iloc[1:]
            if others.empty:
                told.append(Claim(f"{where}: {first}; no other recipe to compare it with."))
                continue
            alike = others[others["p"] >= LEVEL] if not group["p"].isna().any() else others
            second = others.iloc[0]
            p = "" if math.isnan(second["p"]) else f", p {second['p']:.2g}, Tukey and Bonferroni"
            if alike.empty:
                verdict = f"lower than that of {'the other' if len(others) == 1 else f'all {len(others)} others'}"
            else:
                verdict = f"the lowest of {len(group)}, not told from {', '.join(alike['recipe'])}"
            following = f"next: {second['recipe']}, ratio {second['ratio']:.3g}{p}"
            told.append(Claim(f"{where}: {first}; {verdict} ({following})."))
    if runs["model"].nunique() > 1:
        told.append(_alike(runs, table))
    return told


def _described(row: pd.Series) -> str:
    """A recipe's loss, and what it keeps: more than float32 does, too."""
    told = f"{row['recipe']} has {_told(*row[['mean', 'low', 'high']])} times the loss of {REFERENCE}"
    memory = row["memory"]
    if math.isnan(memory):
        return told
    less = f"keeps {memory:.2g} times less memory than float32"
    return f"{told} and {less if memory >= 1 else f'keeps {1 / memory:.3g} times the memory of float32'}"


def _alike(runs: pd.DataFrame, table: pd.DataFrame) -> Claim:
    """Whether the two models rank recipes alike, of those trained as long as the reference was."""
    logs = of_seeds(runs).droplevel("forward")
    base = runs[runs["recipe"] == REFERENCE].groupby("model")["epochs"].max()
    models = list(dict.fromkeys(runs["model"]))
    kept = [set(table.loc[(table["model"] == model) & (table["epochs"] == base[model]), "recipe"]) for model in models]
    first, second = (logs.xs(model, level="model") for model in models)
    shared = [recipe for recipe in first.index if all(recipe in own for own in kept)]
    ranks = []
    for seed in first.columns.intersection(second.columns):
        pair = pd.concat([first.loc[shared, seed], second.loc[shared, seed]], axis=1).dropna().to_numpy()
        ranks.append(float(scipy.stats.spearmanr(pair[:, 0], pair[:, 1]).statistic))
    correlation = (float(np.tanh(value)) for value in mean_interval(np.arctanh(ranks)))
    return Claim(
        f"Over the {len(shared)} recipes that both models were trained with for as many epochs as {REFERENCE}, the "
        f"rank correlation of the losses is {with_interval(*correlation, '.2f')} (mean over {len(ranks)} seeds, by "
        "Fisher's transform)."
    )


_FACES = ("lowest at its bits, epochs", "not told from it", "higher", "alone")
"""What the face of a mark tells, from the fullest."""


def _face(row: Any, color: str) -> tuple[float, float, float]:
    """Full for the lowest, pale for those not told from it, and white."""
    if row.of == 1:
        return style.tint(style.GREY, 0.4)
    if row.ratio == 1:
        return style.tint(color, 1)
    return style.tint(color, 0 if row.p < LEVEL else 0.4)


def draw(tables: Tables) -> dict[str, Figure]:
    """Losses and memory of all recipes, the models side by side."""
    rows = compared(tables["runs"]).sort_values("forward", kind="stable")
    models = list(dict.fromkeys(tables["runs"]["model"]))
    recipes = summary(tables["runs"]).sort_values("forward", kind="stable").drop_duplicates("recipe")
    places = _places(recipes["forward"].to_list())
    place = dict(zip(recipes["recipe"], places, strict=True))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.115 * max(places) + 1.5)
    panels = figure.subplots(1, len(models) + 1, sharey=True, width_ratios=[*[1.0] * len(models), 0.7])
    *losses, memory = panels
    marks = dict(zip(models, style.marks(["psq", "ptq"]).values(), strict=False))
    for index, (ax, model) in enumerate(zip(losses, models, strict=True)):
        mark = marks[model]
        for row in rows[rows["model"] == model].itertuples():
            ax.errorbar(
                row.mean, place[row.recipe], xerr=[[row.mean - row.low], [row.high - row.mean]], fmt=mark.marker,
                color=mark.color, markerfacecolor=_face(row, mark.color), markersize=3, elinewidth=0.7,
                markeredgewidth=0.7,
            )  # fmt: skip
            if not math.isnan(row.memory):
                at = place[row.recipe] + beside(index, len(models), 0.3)
                memory.plot(row.memory, at, mark.marker, color=mark.color, markersize=2.2)
        ax.axvline(1, color=style.GREY, linewidth=0.8)
        ax.set(xscale="log", title=f"{_kind(model)}:\nloss / {REFERENCE}'s")
        low, high = ax.get_xlim()
        ax.set_xticks([at for at in ((1, 10, 100) if high > 10 * low else (0.9, 1, 1.2)) if low < at < high])
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(lambda value, _: "")
    memory.axvline(1, color=style.GREY, linewidth=0.8)
    memory.set(xscale="log", xlim=(0.6, 24), title="memory:\nfactor", xticks=[1, 4, 16], xticklabels=["1", "4", "16"])
    memory.minorticks_off()
    losses[0].set_yticks(list(place.values()), [_with_epochs(rows, recipe, models) for recipe in place])
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
    figure.legend(handles=_legend(marks), loc="outside upper center", ncols=3)
    figure.supxlabel(
        f"Numbers: epochs in all ({', '.join(map(_kind, models))}). Loss: geometric mean\nover seeds, 95 % interval. "
        "Factor: bytes that float32 would keep\nfor the backward pass over those kept, in quantized layers.",
        fontsize=6,
    )  # fmt: skip
    return {"recipe_of_model": figure}


def _with_epochs(rows: pd.DataFrame, recipe: str, models: Sequence[str]) -> str:
    """The name of a recipe, and its epochs by model."""
    own = rows[rows["recipe"] == recipe].set_index("model")["epochs"]
    return f"{recipe}  {', '.join(f'{own[model]:.0f}' if model in own else '-' for model in models)}"


def _legend(marks: Mapping[str, style.Mark]) -> list[Line2D]:
    """The marks of the models, and their faces."""
    shapes = [
        Line2D([], [], linestyle="", marker=mark.marker, color=mark.color, markersize=3, label=_kind(model))
        for model, mark in marks.items()
    ]
    tints = (style.INK, style.tint(style.INK, 0.4), "white", style.tint(style.GREY, 0.4))
    faces = [
        Line2D([], [], linestyle="", marker="o", color=edge, markerfacecolor=face, markersize=3, markeredgewidth=0.7,
               label=label)
        for face, edge, label in zip(tints, (*[style.INK] * 3, style.GREY), _FACES, strict=True)
    ]  # fmt: skip
    return [*shapes, *faces]


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
    "Epochs, of both models: with those of the trained network that a recipe starts from; only recipes of one class "
    "and as many epochs are compared. Memory, likewise: how many times what the quantized layers keep for the backward "
    "pass would be in float32; below 1x they keep more than float32 does.",
)

if __name__ == "__main__":
    main(STUDY)
