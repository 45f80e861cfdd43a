"""Does every recipe train, on both backends, and where do their losses differ?

Every recipe is trained on embedded data (:mod:`fqtstats.training.runs`), once per seed and backend. A run that diverges
is a row, too, which says where.

Every run has its own file, which appears when the run is over and stays. What is there is not repeated: an interrupted
study goes on where it was, and processes share the work if each runs some of ``--data``, ``--seeds`` or ``--backends``
with its own ``--out``, and the last of them all. A run is taken for another if model, epochs, recipe, batch size or
data are others.

Runs of one seed start from the same weights and see the same batches; a recipe that starts from a network trained in
full precision takes that of the recipe ``exact`` with the same seed and backend. A recipe trains if its final training
loss is below a stated share of that of guessing (:mod:`analysis.tasks`: a quarter on digits, nine tenths on text) for
every seed and backend. On text the recipes that learn slowest have twice the epochs.

The backends compute with the same codes; their products differ by float rounding, after which trajectories part. So the
question is not whether final losses are equal but whether the backend moves them by less than the seed does. It is
answered on the logarithm of the final training loss, where spreads of recipes with small and large losses are alike:

- The margin is the root mean square difference of two seeds, sqrt(2) standard deviations, for the study's typical
  recipe: the geometric mean of the recipes' standard deviations, which three seeds do not tell one by one. As this is
  an estimate, too, its lower 95 % confidence limit is taken. A recipe that seeds move more than others is held to the
  same margin.
- The standard deviation of a recipe's differences native - simulated has two degrees of freedom with three seeds. It is
  moderated: variances are shrunk towards those of the other recipes, as much as these are alike (G. Smyth, "Linear
  models and empirical Bayes methods", 2004).
- ``equal``: the mean difference is below the margin, by two one-sided t tests (TOST). ``differs``: it is not 0, by a
  t test. ``equal`` comes first: a difference that is there and below the margin shows in ``p_differs``. With neither
  the recipe is ``open``. The p-values are multiplied by the number of recipes (Bonferroni). As at most one of a
  recipe's two null hypotheses is true, the probability of any false verdict is 5 % over both tests together.

How much can be told depends on how far the backends' trajectories part. Where they part as those of two seeds do, a
difference of the backends is as large as one of two seeds, and three seeds cannot show any recipe to be ``equal``: the
standard error of the mean difference, sqrt(2 / 3) standard deviations, is too much for this margin. In simulations of
31 recipes half of them are found ``equal`` with 20 seeds, three quarters with 30; with three seeds 3 % at half that
difference and 56 % at 0.3 of it. A shift of three standard deviations ``differs`` in a quarter of the recipes, of four
in a half. So ``open`` is what three seeds are expected to give, and speaks neither for nor against the backends.

The main statement is on all recipes together (:func:`overall`): the mean difference over the recipes, and whether it is
below the margin. Recipes are not independent, as they share seeds, weights and batches; its interval takes the seeds as
the independent unit. A mean hides shifts of either sign. These show in the share, the size of a difference of the
backends over that of two seeds: it is 1 where trajectories part and nothing else happens, and above it with shifts.

Of 31 intervals some leave out 1 by chance, and those of three seeds by much. So a recipe whose own interval does, and
which is not ``equal``, is run with further seeds, and these alone decide, by a t test with their own standard deviation
(Bonferroni over the recipes that are run again): what the first seeds were picked for does not count twice.

A seed of which a run diverged is left out of its recipe's difference, and such a recipe of the mean of all; if it
diverged on one backend alone, or less than two seeds are left, the recipe is ``open``. Losses that agree in every bit,
as those of recipes that quantize nothing, are ``identical``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.axes import ratio_axis
from analysis.estimates import moderated, typical
from analysis.known import with_bits
from analysis.study import Claim, Parts, Row, Study, Tables, main
from analysis.tasks import TASKS, guessing, records
from fqtstats import models
from fqtstats.data.base import InMemory
from fqtstats.errors import InputError, TrainingDiverged
from fqtstats.layers import BACKENDS
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.training import loop, runs
from fqtstats.training.description import recipe_as_json
from fqtstats.training.divergence import tell
from fqtstats.training.recipes import RECIPES

LOW = (2, 3, 4)
"""Bits at which the recipes with a choice of gradient quantizers are compared, beside their defaults."""

START = "exact"
"""The recipe whose networks are those trained in full precision."""

COLUMNS = (
    Column("data", "str", "", "that it is trained on"),
    Column("recipe", "str", "", "name, or name@bits"),
    Column("backend", "str", "", "that multiplies"),
    Column("seed", "int64", "1", "of initialization, batch order and rounding"),
    Column("model", "str", "", "network"),
    Column("epochs", "int64", "1", "of the run"),
    Column("trained_sha256", "str", "", "of the recipe, of that which its network starts from, of batch size and data"),
    Column("loss", "float64", "nats", "training loss of the last epoch; NaN if the run diverged, as what follows"),
    Column("accuracy", "float64", "1", "training accuracy of the last epoch"),
    Column("test_loss", "float64", "nats", "at the end"),
    Column("test_accuracy", "float64", "1", "at the end"),
    Column("kept_bytes", "float64", "byte", "kept for the backward pass, or NaN"),
    Column("kept_float32_bytes", "float64", "byte", "the same in float32, or NaN"),
    Column("seconds", "float64", "s", "that the run took"),
    Column("guessing", "float64", "nats", "loss of the best answer that does not look at the input"),
    Column("diverged", "str", "", "where and why the run diverged; empty if it did not"),
)
MEASURED = ("loss", "accuracy", "test_loss", "test_accuracy", "kept_bytes", "kept_float32_bytes")
"""Columns of a run that are unknown if it diverged."""

LEVEL = 0.05
LIMIT = math.sqrt(2)
"""Margin in typical standard deviations of the log loss over the seeds: the root mean square difference of two."""

RESOLUTION = float(np.finfo(np.float32).eps)
"""Of a log loss, as losses are made of float32 numbers: standard deviations below it are taken for it."""

Weights = dict[str, torch.Tensor]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Of the study; recipes are ``name``, ``name@bits`` or ``all``; no model and 0 epochs are the run's own."""

    data: tuple[str, ...] = tuple(TASKS)
    recipes: tuple[str, ...] = ("all",)
    backends: tuple[str, ...] = tuple(BACKENDS)
    seeds: tuple[int, ...] = (0, 1, 2)
    further: int = 12
    model: str = ""
    epochs: int = 0


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per run."""
    for kind, found, known in (("data", settings.data, TASKS), ("backend", settings.backends, BACKENDS)):
        if other := sorted(set(found) - set(known)):
            raise InputError(f"unknown {kind} {other[0]!r}; known: {', '.join(known)}")
    trainer = Trainer(settings.model, settings.epochs)
    cases = [
        trainer.case(source, name, bits, backend, seed)
        for source in settings.data
        for seed in settings.seeds
        for backend in settings.backends  # so that what starts from a trained network follows the one that trains it
        for name, bits in chosen(source, settings.recipes)
    ]
    first = ordered(parts.every("runs", cases, trainer.run))
    again = [
        trainer.case(data, *with_bits(recipe), backend, seed)
        for data, _, table in by_data({"runs": first})
        for seed in range(max(settings.seeds) + 1, max(settings.seeds) + 1 + settings.further)
        for backend in settings.backends
        for recipe in conspicuous(table)
    ]
    further = parts.every("runs", again, trainer.run) if again else pd.DataFrame(columns=list(first))
    return {"runs": first, "further": ordered(further)}


def chosen(source: str, recipes: Sequence[str]) -> list[tuple[str, int | None]]:
    """Recipes and bits that are trained on some data."""
    if "all" not in recipes:
        return [with_bits(text) for text in recipes]
    low = ("statquant-ptq", "statquant-psq", "statquant-bhq") if source == "digits" else ()
    return [
        (name, bits)
        for name, definition in RECIPES.items()
        for bits in ((*LOW, definition.default) if name in low else (None,))
    ]


def label(name: str, bits: int | None) -> str:
    """How results call a recipe."""
    own = RECIPES[name].default if bits is None else bits
    return name if own is None else f"{name}@{own}"


class Trainer:
    """What the runs of one process have in common; the network that others start from is kept until it is another.

    Args:
        model: instead of the runs' own; "": these.
        epochs: likewise; 0: these.
    """

    def __init__(self, model: str, epochs: int) -> None:
        self.model, self.epochs = model, epochs
        self.sources: dict[str, tuple[InMemory, str, float]] = {}
        self.start: tuple[tuple[str, str, int], Row, Weights] | None = None

    def source(self, data: str) -> tuple[InMemory, str, float]:
        """Data, their fingerprint, and the loss of guessing."""
        if data not in self.sources:
            found = records(data)
            self.sources[data] = found, found.fingerprint(), guessing(found)
        return self.sources[data]

    def case(self, data: str, name: str, bits: int | None, backend: str, seed: int) -> dict[str, Any]:
        """All that a run depends on."""
        run, task = runs.run(f"{name}/{data}", bits), TASKS[data]
        return {
            "data": data,
            "recipe": label(name, bits),
            "backend": backend,
            "seed": seed,
            "model": self.model or run.model,
            "epochs": self.epochs or task.longer.get(name) or task.epochs or run.epochs,
            "trained_sha256": self.digest(run, data),
        }

    def digest(self, run: runs.Run, data: str) -> str:
        """sha256 of the recipe, of that which its network starts from, of the size of the batches and of the data."""
        recipes = [run.recipe]
        if run.recipe.starts_from == "full-precision":
            recipes.append(runs.run(f"{START}/{data}").recipe)
        trained = [*map(recipe_as_json, recipes), TASKS[data].batch_size or run.batch_size, self.source(data)[1]]
        return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()

    def run(self, data: str, recipe: str, backend: str, seed: int, model: str, epochs: int, trained_sha256: str) -> Row:
        """The row of one run."""
        name, bits = with_bits(recipe)
        of = (data, backend, seed)
        weights = None
        if runs.run(f"{name}/{data}", bits).recipe.starts_from == "full-precision":
            if self.start is None or self.start[0] != of:
                first = self.case(data, START, None, backend, seed)
                self.start = of, *self.train(*of, START, None, first["model"], first["epochs"])
            if trouble := self.start[1]["diverged"]:
                return self.unknown(data) | {"diverged": f"its start: {trouble}"}
            weights = self.start[2]
        row, found = self.train(*of, name, bits, model, epochs, weights)
        if name == START:
            self.start = of, row, found
        return row

    def unknown(self, data: str) -> dict[str, object]:
        """The row of a run of which nothing is known yet."""
        return {**dict.fromkeys(MEASURED, math.nan), "seconds": 0.0, "guessing": self.source(data)[2], "diverged": ""}

    def train(
        self, data: str, backend: str, seed: int, name: str, bits: int | None, model: str, epochs: int,
        weights: Weights | None = None,
    ) -> tuple[dict[str, object], Weights]:  # fmt: skip
        """One run: its row, and the weights at its end."""
        run, row, examples = runs.run(f"{name}/{data}", bits), self.unknown(data), self.source(data)[0]
        network = models.build(model, examples, seed)
        if weights is not None:
            network.load_state_dict(weights)
        started = time.monotonic()
        try:
            result = loop.train(
                network,
                examples,
                run.recipe,
                epochs=epochs,
                batch_size=TASKS[data].batch_size or run.batch_size,
                seed=seed,
                backend=backend,
                pretrained=weights is not None,
            )
        except TrainingDiverged as failure:
            found = failure.diagnosis
            row["diverged"] = f"epoch {found['epoch']}, {found['reason']}; {tell(found)}"
        else:
            last = result.final[list(MEASURED)]
            row |= {key: math.nan if pd.isna(value) else float(value) for key, value in last.items()}
        row["seconds"] = time.monotonic() - started
        return row, {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """In the order of the data and the recipes."""
    order = {label(name, bits): index for index, (name, bits) in enumerate(chosen("digits", ("all",)))}
    place = rows["recipe"].map(lambda recipe: order.get(recipe, len(order)))
    rows = rows.assign(task=rows["data"].map(list(TASKS).index), place=place)
    return rows.sort_values(["task", "place", "recipe", "backend", "seed"]).drop(columns=["task", "place"])


# --- statistics -------------------------------------------------------------------------------------------------------


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per recipe: mean losses, and the ratio of those of the backends (native / simulated, geometric means).

    ``ratio_low`` and ``ratio_high`` are its 95 % interval for the recipe alone, ``margin`` is the factor up to which
    losses count as equal; ``sd_seeds`` and ``sd_backends``, of the log loss over the seeds within a backend and of the
    difference of the backends, are the recipe's own, not moderated. ``pairs`` are the seeds that both backends came to
    the end with. ``memory`` is how many times the bytes kept for the backward pass would be more in float32, in the
    layers that the recipe quantizes.
    """
    found, tested = [], []
    for recipe, own in rows.groupby("recipe", sort=False):
        final = own.pivot(index="seed", columns="backend", values="loss")
        row: dict[str, Any] = {"recipe": recipe, "seeds": len(final), "epochs": int(own["epochs"].max())}
        for backend in final:
            row[f"loss_{backend}"], row[f"loss_sd_{backend}"] = final[backend].mean(), final[backend].std()
            row[f"diverged_{backend}"] = int((own.loc[own["backend"] == backend, "diverged"] != "").sum())
        row["test_loss"], row["test_accuracy"] = own["test_loss"].mean(), own["test_accuracy"].mean()
        row["trains"] = bool((own["loss"] < own["data"].map(lambda name: TASKS[name].trained) * own["guessing"]).all())
        native = own[own["backend"] == "native"].dropna(subset="kept_bytes")
        row["memory"] = float((native["kept_float32_bytes"] / native["kept_bytes"]).mean())
        row["pairs"], row["verdict"] = 0, "open"
        if set(BACKENDS) <= set(final):
            logs = np.log(final[list(BACKENDS)].dropna().to_numpy(dtype=np.float64))
            difference = logs[:, BACKENDS.index("native")] - logs[:, BACKENDS.index("simulated")]
            row["pairs"], alone = len(difference), diverged_alone(own)
            if len(difference):
                row["ratio"] = math.exp(difference.mean())
            if len(difference) > 1 and difference.any():
                row["sd_seeds"] = math.sqrt(logs.var(axis=0, ddof=1).mean())
                row["sd_backends"] = difference.std(ddof=1)
                tested.append((row, alone))
            elif len(difference) > 1 and not alone:
                row["verdict"] = "identical"
        found.append(row)
    judge(tested)
    return pd.DataFrame(found)


def diverged_alone(own: pd.DataFrame) -> bool:
    """Whether a seed that both backends have run diverged on one of them and not on the other."""
    of_seed = (own["diverged"] != "").groupby(own["seed"]).agg(["sum", "size"])
    return bool(((of_seed["size"] == len(BACKENDS)) & (of_seed["sum"] == 1)).any())


def judge(tested: list[tuple[dict[str, Any], bool]]) -> None:
    """Fill in interval, margin and p-values of rows whose losses differ; the verdict if no backend diverged alone."""
    if not tested:
        return
    n = np.array([row["pairs"] for row, _ in tested], dtype=np.float64)
    mean = np.array([math.log(row["ratio"]) for row, _ in tested])
    backends, df = moderated(variances([row["sd_backends"] for row, _ in tested]), n - 1)
    error, margin = np.sqrt(backends / n), LIMIT * typical(variances([row["sd_seeds"] for row, _ in tested]), n - 1)
    half = scipy.stats.t.ppf(1 - LEVEL / 2, df) * error
    p_equal = np.minimum(1, len(tested) * scipy.stats.t.sf((margin - abs(mean)) / error, df))
    p_differs = np.minimum(1, len(tested) * 2 * scipy.stats.t.sf(abs(mean) / error, df))
    for index, (row, alone) in enumerate(tested):
        row["ratio_low"], row["ratio_high"] = np.exp(mean[index] + np.array([-1, 1]) * half[index])
        row["margin"] = math.exp(margin)
        row["p_equal"], row["p_differs"] = p_equal[index], p_differs[index]
        if not alone:
            row["verdict"] = verdict(p_equal[index], p_differs[index])


def conspicuous(table: pd.DataFrame) -> list[str]:
    """Recipes of a :func:`summary` whose own interval leaves out 1 and that are not shown to be equal."""
    if "ratio_low" not in table:
        return []
    outside = (table["ratio_low"] > 1) | (table["ratio_high"] < 1)
    return list(table.loc[outside & (table["verdict"] != "equal"), "recipe"])


def again(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per recipe and data set of further seeds: ratio, simultaneous 95 % interval, p-value (Bonferroni)."""
    found = []
    groups = rows.groupby(["data", "recipe"], sort=False)
    for (data, recipe), own in groups:
        logs = np.log(own.pivot(index="seed", columns="backend", values="loss").dropna())
        difference = (logs["native"] - logs["simulated"]).to_numpy(dtype=np.float64)
        n = len(difference)
        row = {"data": data, "recipe": recipe, "pairs": n, "ratio": math.exp(difference.mean()) if n else math.nan}
        row |= dict.fromkeys(("ratio_low", "ratio_high"), math.nan) | {"p_differs": 1.0}
        if n > 1:
            error = max(float(difference.std(ddof=1)), RESOLUTION) / math.sqrt(n)
            half = scipy.stats.t.ppf(1 - LEVEL / (2 * groups.ngroups), n - 1) * error
            row["ratio_low"], row["ratio_high"] = np.exp(difference.mean() + np.array([-1, 1]) * half)
            p = 2 * scipy.stats.t.sf(abs(difference.mean()) / error, n - 1)
            row["p_differs"] = min(1.0, groups.ngroups * float(p))
        found.append(row)
    return pd.DataFrame(found)


def verdict(p_equal: float, p_differs: float) -> str:
    return "equal" if p_equal < LEVEL else "differs" if p_differs < LEVEL else "open"


def variances(deviations: Sequence[float]) -> Vector:
    return np.maximum(np.array(deviations, dtype=np.float64), RESOLUTION) ** 2


def overall(rows: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """Of all recipes whose losses differ: what the backends do on average, and as a share of what seeds do.

    Made from runs and their :func:`summary`. ``ratio``: geometric mean of the ratios of the losses over the recipes
    that have every seed on both backends, with the 95 % interval of the mean over the ``seeds`` (t distribution);
    ``verdict``: of this mean, with the recipes' ``margin``. ``share``: root mean square difference of the backends over
    that of two seeds, in log loss; the median over the recipes, with their quartiles. Empty for less than two recipes
    or seeds.
    """
    if "sd_backends" not in table or len(own := table.dropna(subset="sd_backends")) < 2:
        return {}
    logs = rows.assign(log=np.log(rows["loss"])).pivot(index=["recipe", "seed"], columns="backend", values="log")
    difference = (logs["native"] - logs["simulated"]).unstack("seed").loc[own["recipe"]]
    difference = difference.dropna(axis="columns", how="all").dropna()
    recipes, seeds = difference.shape
    if recipes < 2:
        return {}
    of_seed = difference.to_numpy(dtype=np.float64).mean(axis=0)
    mean, df = float(of_seed.mean()), seeds - 1
    error = max(float(of_seed.std(ddof=1)), RESOLUTION) / math.sqrt(seeds)
    half = float(scipy.stats.t.ppf(1 - LEVEL / 2, df)) * error
    margin = float(own["margin"].iloc[0])
    p_equal = float(scipy.stats.t.sf((math.log(margin) - abs(mean)) / error, df))
    p_differs = 2 * float(scipy.stats.t.sf(abs(mean) / error, df))
    within = own["sd_backends"] ** 2 * (1 - 1 / own["pairs"]) + np.log(own["ratio"]) ** 2
    shares = np.sqrt(within / (2 * own["sd_seeds"].clip(lower=RESOLUTION) ** 2))
    return {
        "recipes": recipes,
        "seeds": seeds,
        "ratio": math.exp(mean),
        "ratio_low": math.exp(mean - half),
        "ratio_high": math.exp(mean + half),
        "margin": margin,
        "p_equal": p_equal,
        "p_differs": p_differs,
        "verdict": verdict(p_equal, p_differs),
        **dict(zip(("share_low", "share", "share_high"), shares.quantile([0.25, 0.5, 0.75]), strict=True)),
    }


# --- what is said of it -----------------------------------------------------------------------------------------------


def by_data(tables: Tables) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Of each data set its name, the runs, and their :func:`summary`."""
    return [(str(name), own, summary(own)) for name, own in tables["runs"].groupby("data", sort=False)]


def read(tables: Tables) -> pd.DataFrame:
    """A row per data set and recipe."""
    return readable(pd.concat([table.assign(data=name) for name, _, table in by_data(tables)], ignore_index=True))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The part of the table that is to be read, as text: loss first, because accuracies saturate on digits."""

    def loss(row: pd.Series, backend: str) -> str:
        told = with_deviation(row[f"loss_{backend}"], row[f"loss_sd_{backend}"])
        diverged = row[f"diverged_{backend}"]
        return f"{told} ({diverged:g} diverged)".lstrip() if diverged > 0 else told

    def ratio(row: pd.Series) -> str:
        if math.isnan(row.get("ratio_low", math.nan)):
            return "" if math.isnan(row.get("ratio", math.nan)) else f"{row['ratio']:.2f}"
        return f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"

    backends = [backend for backend in BACKENDS if f"loss_{backend}" in table]
    several = [name for name in ("data", "epochs") if name in table and table[name].nunique() > 1]
    return pd.DataFrame(
        {
            **({"data": row["data"]} if "data" in several else {}),
            "recipe": row["recipe"],
            **({"epochs": str(row["epochs"])} if "epochs" in several else {}),
            **{f"loss, {backend}": loss(row, backend) for backend in backends},
            "trains": "yes" if row["trains"] else "no",
            "native / simulated": ", ".join(filter(None, (ratio(row), row["verdict"]))),
            "memory": "" if math.isnan(row["memory"]) else f"{row['memory']:.1f}x",
        }
        for _, row in table.iterrows()
    )


def with_deviation(mean: float, deviation: float) -> str:
    """Mean and standard deviation, to the second digit of the latter; "" for none."""
    if math.isnan(mean):
        return ""
    if math.isnan(deviation) or deviation == 0:
        return f"{mean:.3g}"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def claims(tables: Tables) -> list[Claim]:
    """Of each data set: which recipes train, what the backends do on average, and the verdicts on single recipes."""
    told = []
    for data, rows, table in by_data(tables):
        failing = list(table.loc[~table["trains"], "recipe"])
        limit = TASKS[data].trained * float(rows["guessing"].iloc[0])
        told.append(
            Claim(
                f"{data}: {len(table) - len(failing)} of {len(table)} recipes train, with a final training loss below "
                f"{limit:.3g} nats ({TASKS[data].trained:g} times that of guessing) in each of their runs"
                + (f"; not: {', '.join(failing)}." if failing else "."),
                not failing,
                "not examined" if failing else "",
            )
        )
        if not (found := overall(rows, table)):
            told.append(Claim(f"{data}: backends are not compared; it takes two recipes with both, and two seeds."))
            continue
        below = {"equal": True, "differs": False, "open": None}[found["verdict"]]
        told += [Claim(in_words(data, found), below, "not examined" if below is False else "")]
        told.append(_verdicts(data, table))
    return [*told, *map(_again, again(tables["further"]).to_dict("records"))]


def _again(row: dict[str, Any]) -> Claim:
    """On a recipe that was run again."""
    differs = row["p_differs"] < LEVEL
    return Claim(
        f"{row['data']}, {row['recipe']}, whose interval above leaves out 1: with {row['pairs']} further seeds native "
        f"/ simulated is {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] (simultaneous for the "
        f"recipes that were run again), so a difference of the backends "
        f"{'shows again' if differs else 'does not show again'} (p = {row['p_differs']:.2g}).",
        not differs,
    )


def in_words(data: str, found: dict[str, Any]) -> str:
    """What :func:`overall` says."""
    words = {"equal": "below", "differs": "not 0, nor shown to be below", "open": "not shown to be below"}
    return (
        f"{data}: all {found['recipes']} recipes whose losses differ, over {found['seeds']} seeds: native / simulated "
        f"{found['ratio']:.3f} [{found['ratio_low']:.3f}, {found['ratio_high']:.3f}], a mean difference "
        f"{words[found['verdict']]} the margin of a factor of {found['margin']:.2f} (p = {found['p_equal']:.2g}). A "
        f"recipe's difference of the backends is {found['share']:.2f} times that of two seeds (median over the "
        f"recipes; quartiles [{found['share_low']:.2f}, {found['share_high']:.2f}])."
    )


def _verdicts(data: str, table: pd.DataFrame) -> Claim:
    """On single recipes."""
    counts = {name: list(table.loc[table["verdict"] == name, "recipe"]) for name in _COLORS}
    shifted = table[table["verdict"] == "differs"]
    which = "; ".join(
        f"{row.recipe} {row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]" for row in shifted.itertuples()
    )
    told = ", ".join(f"{len(recipes)} {name}" for name, recipes in counts.items())
    same = f"; identical: {', '.join(counts['identical'])}" if counts["identical"] else ""
    return Claim(
        f"{data}: of single recipes, with p-values times their number (Bonferroni): {told}"
        + (f" ({which})" if which else "")
        + f"{same}. Open is not to be told from these runs.",
        shifted.empty,
        "" if shifted.empty else "further seeds, below, tell whether the backends do that or chance.",
    )


_COLORS = {"equal": style.GREEN, "identical": style.GREY, "open": style.INK, "differs": style.PURPLE}
"""By verdict."""


def draw(tables: Tables) -> dict[str, Figure]:
    """A figure per data set: the final loss of every run, and the ratio of the backends, a line per recipe."""
    return {data: _figure(rows, table) for data, rows, table in by_data(tables)}


def _figure(rows: pd.DataFrame, table: pd.DataFrame) -> Figure:
    order = list(table["recipe"])
    figure = style.new_figure(style.COLUMN_WIDTH, 0.75 + 0.135 * len(order))
    compared = "ratio_low" in table
    losses, *others = figure.subplots(1, 1 + compared, sharey=True, squeeze=False)[0]
    _losses(losses, rows, order)
    for ax in others:
        _ratios(ax, table)
        ax.tick_params(axis="y", length=0)
    losses.set_yticks(range(len(order)), order)
    losses.set_ylim(len(order) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _losses(ax: Axes, rows: pd.DataFrame, order: list[str]) -> None:
    """A point per run; runs that diverged stand at the right edge."""
    for offset, backend, color in zip((0.15, -0.15), BACKENDS, (style.VERMILION, style.BLUE), strict=True):
        own = rows[rows["backend"] == backend]
        places = np.array([order.index(recipe) + offset for recipe in own["recipe"]])
        ax.plot(own["loss"], places, ".", color=color, label=backend)
        lost = places[(own["diverged"] != "").to_numpy()]
        if len(lost):
            edge = ax.get_yaxis_transform()
            ax.plot(np.ones(len(lost)), lost, "x", color=color, transform=edge, clip_on=False)
    if (rows["diverged"] != "").any():
        ax.plot([], [], "x", color=style.INK, label="diverged")
    ax.set(xlabel="final training loss\n[nats], a point per seed")
    # Below a factor of four there may be no power of ten.
    if rows["loss"].max() < 4 * rows["loss"].min():
        ax.xaxis.set_major_locator(MaxNLocator(4))
    else:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    ax.grid(axis="x")


def _ratios(ax: Axes, table: pd.DataFrame) -> None:
    """Each with its own interval; the band is within the margin."""
    tested = table.dropna(subset="ratio_low")
    ax.axvspan(1 / tested["margin"].iloc[0], tested["margin"].iloc[0], color=style.tint(style.GREY, 0.25), linewidth=0)
    ax.axvline(1, color=style.GREY, linewidth=0.5)
    for verdict, color in _COLORS.items():
        own = table[table["verdict"] == verdict].dropna(subset="ratio")
        if own.empty:
            continue
        around = [(own["ratio"] - own["ratio_low"]).fillna(0), (own["ratio_high"] - own["ratio"]).fillna(0)]
        ax.errorbar(
            own["ratio"], own.index, xerr=around, fmt="D", markersize=2, elinewidth=0.8, color=color, label=verdict
        )
    ax.set(xlabel="native / simulated\n(95 %; band: margin)")
    ratio_axis(ax, most=4)  # as it is short


STUDY = Study(
    name="recipes",
    question="Does every recipe train, on both backends, and where do their losses differ?",
    full=Settings(),
    quick=Settings(("digits",), ("exact", "luq", "statquant-psq@4"), seeds=(0, 1), further=2, model="mlp", epochs=1),
    columns={"runs": COLUMNS, "further": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Loss: final training loss [nats], mean and standard deviation over the seeds. Ratio: native / simulated, "
    "geometric mean with the recipe's own 95 % interval. Backends: whether they move the loss by less than a seed "
    "does; open: not to be told from these runs. Memory: how many times less is kept for the backward pass than "
    "in float32, by the layers that are quantized.",
    keeps_cases=True,
)

if __name__ == "__main__":
    main(STUDY)
