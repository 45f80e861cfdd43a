"""Does every recipe train, on both backends, and where do their losses differ?

``python -m analysis.recipes`` trains every recipe on embedded data (:mod:`fqtstats.training.runs`), once per seed and
backend, and saves a row per run, a table with a row per recipe, and a figure. ``--data text`` is the second task.

Every run has its own file in the folder ``runs``, which appears when the run is over. What is there is not repeated:
an interrupted study goes on where it was, and processes with other ``--backends`` or ``--only-seeds`` may work on one
study at a time; whichever is last leaves the table of all. A run that diverges is a row, too, which says where.

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

A seed of which a run diverged is left out of its recipe's difference, and such a recipe of the mean of all; if it
diverged on one backend alone, or less than two seeds are left, the recipe is ``open``. Losses that agree in every bit,
as those of recipes that quantize nothing, are ``identical``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.special
import scipy.stats
import torch

from analysis.tasks import TASKS, guessing, records
from fqtstats import models, ops
from fqtstats.errors import TrainingDiverged
from fqtstats.files import write_atomically
from fqtstats.layers import BACKENDS
from fqtstats.provenance import provenance
from fqtstats.report import style
from fqtstats.training import loop, runs
from fqtstats.training.description import recipe_as_json
from fqtstats.training.divergence import tell
from fqtstats.training.recipes import RECIPES

FOLDER = Path(__file__).parent / "results" / "recipes"
SEEDS = 3
LOW = (2, 3, 4)
"""Bits at which the recipes with a choice of gradient quantizers are compared, beside their defaults."""


def cases(source: str) -> list[tuple[str, int | None]]:
    """Recipes and bits that are trained on some data."""
    low = ("statquant-ptq", "statquant-psq", "statquant-bhq") if source == "digits" else ()
    return [
        (name, bits)
        for name, definition in RECIPES.items()
        for bits in ((*LOW, definition.default) if name in low else (None,))
    ]


START = "exact"
"""The recipe whose networks are those trained in full precision."""

MEASURED = ("loss", "accuracy", "test_loss", "test_accuracy", "kept_bytes", "kept_float32_bytes")
"""Columns of a run that are unknown if it diverged."""

LEVEL = 0.05
LIMIT = math.sqrt(2)
"""Margin in typical standard deviations of the log loss over the seeds: the root mean square difference of two."""

RESOLUTION = float(np.finfo(np.float32).eps)
"""Of a log loss, as losses are made of float32 numbers: standard deviations below it are taken for it."""

Weights = dict[str, torch.Tensor]
Vector = npt.NDArray[np.float64]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=TASKS, default="digits")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each recipe and backend, at least 2")
    parser.add_argument("--only-seeds", type=int, nargs="+", help="of these, the ones to run in this process")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--recipes", nargs="+", help="instead of all: names, or name@bits")
    parser.add_argument("--model", help="instead of the run's own")
    parser.add_argument("--epochs", type=int, help="instead of the run's own")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds must be at least 2")
    seeds = range(given.seeds) if given.only_seeds is None else given.only_seeds
    if not set(seeds) <= set(range(given.seeds)):
        parser.error(f"--only-seeds must be of 0 to {given.seeds - 1}")
    wanted = [split(text) for text in given.recipes or ()] or cases(given.data)
    folder: Path = given.out / given.data
    for seed in seeds:
        for backend in given.backends:
            own = Study(given.data, backend, seed, given.model, given.epochs)
            start: tuple[dict[str, Any], Weights] | None = None
            for name, bits in wanted:
                file = folder / "runs" / f"{label(name, bits)}-{backend}-{seed}.json"
                if file.exists():
                    check(json.loads(file.read_text()), own.row(name, bits), file)
                    continue
                weights = None
                if runs.run(f"{name}/{given.data}", bits).recipe.starts_from == "full-precision":
                    start = start or own.train(START, None)
                    if start[0]["diverged"]:
                        write(file, own.row(name, bits) | {"diverged": f"its start: {start[0]['diverged']}"})
                        continue
                    weights = start[1]
                row, found = own.train(name, bits, weights)
                if name == START:
                    start = row, found
                write(file, row)
    save(read(folder), folder)


def split(text: str) -> tuple[str, int | None]:
    """``"name@bits"`` or ``"name"``."""
    name, _, bits = text.partition("@")
    return name, int(bits) if bits else None


def label(name: str, bits: int | None) -> str:
    """How results call a recipe."""
    chosen = RECIPES[name].default if bits is None else bits
    return name if chosen is None else f"{name}@{chosen}"


class Study:
    """What the runs of one process, backend and seed have in common."""

    def __init__(self, source: str, backend: str, seed: int, model: str | None, epochs: int | None) -> None:
        self.source, self.backend, self.seed, self.model, self.epochs = source, backend, seed, model, epochs
        self.task, self.records = TASKS[source], records(source)
        self.fingerprint = self.records.fingerprint()

    def row(self, name: str, bits: int | None) -> dict[str, Any]:
        """The row of a run of which nothing is known yet."""
        run = runs.run(f"{name}/{self.source}", bits)
        return {
            "data": self.source,
            "recipe": label(name, bits),
            "backend": self.backend,
            "seed": self.seed,
            "model": self.model or run.model,
            "epochs": self.epochs or self.task.longer.get(name) or self.task.epochs or run.epochs,
            "trained_sha256": self.digest(run),
            **dict.fromkeys(MEASURED, math.nan),
            "seconds": 0.0,
            "guessing": guessing(self.records),
            "diverged": "",
        }

    def digest(self, run: runs.Run) -> str:
        """sha256 of the recipe, of that which its network starts from, of the size of the batches and of the data."""
        recipes = [run.recipe]
        if run.recipe.starts_from == "full-precision":
            recipes.append(runs.run(f"{START}/{self.source}").recipe)
        trained = [*map(recipe_as_json, recipes), self.task.batch_size or run.batch_size, self.fingerprint]
        return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()

    def train(self, name: str, bits: int | None, weights: Weights | None = None) -> tuple[dict[str, Any], Weights]:
        """One run: its row, and the weights at its end."""
        run, row = runs.run(f"{name}/{self.source}", bits), self.row(name, bits)
        model = models.build(row["model"], self.records, self.seed)
        if weights is not None:
            model.load_state_dict(weights)
        started = time.monotonic()
        try:
            result = loop.train(
                model,
                self.records,
                run.recipe,
                epochs=row["epochs"],
                batch_size=self.task.batch_size or run.batch_size,
                seed=self.seed,
                backend=self.backend,
                pretrained=weights is not None,
            )
        except TrainingDiverged as failure:
            found = failure.diagnosis
            row["diverged"] = f"epoch {found['epoch']}, {found['reason']}; {tell(found)}"
        else:
            last = result.final
            row |= {key: float(last[key]) for key in ("loss", "accuracy", "test_loss", "test_accuracy")}
            if not pd.isna(last["kept_bytes"]):
                row |= {key: int(last[key]) for key in ("kept_bytes", "kept_float32_bytes")}
        row["seconds"] = time.monotonic() - started
        told = row["diverged"] or ", ".join(f"{key} {row[key]:.4g}" for key in ("loss", "test_loss", "seconds"))
        print(f"{row['recipe']}, {self.backend}, seed {self.seed}: {told}", flush=True)
        return row, {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def check(stored: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    """That a run that is not repeated is the one that is wanted."""
    for key in ("model", "epochs"):
        if stored[key] != wanted[key]:
            raise SystemExit(f"{file} has {key} {stored[key]}, not {wanted[key]}; give another --out, or remove it")
    if stored.get("trained_sha256") != wanted["trained_sha256"]:
        raise SystemExit(f"{file} is of another recipe, batch size or data; give another --out, or remove it")


def write(file: Path, row: dict[str, Any]) -> None:
    """A run's file, whole or not at all."""
    known = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    put(file, (json.dumps(known, indent=2) + "\n").encode())


def put(file: Path, content: bytes) -> None:
    write_atomically(file, lambda opened: opened.write(content))


def read(folder: Path) -> pd.DataFrame:
    """A row per run, in the order of the recipes."""
    rows = pd.DataFrame([json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*.json"))])
    rows = rows.astype(dict.fromkeys(MEASURED, np.float64))
    order = {label(name, bits): index for index, (name, bits) in enumerate(cases("digits"))}
    place = rows["recipe"].map(lambda recipe: order.get(recipe, len(order)))
    return rows.assign(place=place).sort_values(["place", "recipe", "backend", "seed"]).drop(columns="place")


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


def verdict(p_equal: float, p_differs: float) -> str:
    return "equal" if p_equal < LEVEL else "differs" if p_differs < LEVEL else "open"


def variances(deviations: Sequence[float]) -> Vector:
    return np.maximum(np.array(deviations, dtype=np.float64), RESOLUTION) ** 2


def log_variances(variances: Vector, df: Vector) -> Vector:
    """Unbiased estimates of the logarithms of the true variances, from estimates with ``df`` degrees of freedom."""
    # One that is almost 0 by chance would outweigh all others.
    logs = np.log(np.maximum(variances, 1e-5 * np.median(variances)))
    return logs + np.log(df / 2) - scipy.special.digamma(df / 2)


def typical(variances: Vector, df: Vector) -> float:
    """Lower confidence limit of the geometric mean of the standard deviations; of one alone there is none but 0."""
    k = len(variances)
    if k < 2:
        return 0.0
    logs = log_variances(variances, df)
    half = scipy.stats.t.ppf(1 - LEVEL, k - 1) * logs.std(ddof=1) / math.sqrt(k)
    return math.exp((logs.mean() - half) / 2)


def moderated(variances: Vector, df: Vector) -> tuple[Vector, Vector]:
    """Variances shrunk towards each other, and their degrees of freedom (Smyth 2004, section 6.2).

    The true variances are taken to follow a scaled inverse chi-square distribution, whose mean and degrees of freedom
    are found by the moments of the logarithms; where those spread no more than equal variances do, all are pooled.
    """
    if len(variances) < 2:
        return variances, df
    logs = log_variances(variances, df)
    spread = float(logs.var(ddof=1) - scipy.special.polygamma(1, df / 2).mean())
    if spread <= 0:
        pooled = float((df * variances).sum() / df.sum())
        return np.full_like(variances, pooled), np.full_like(df, df.sum())
    half = scipy.optimize.brentq(lambda x: float(scipy.special.polygamma(1, x)) - spread, 1e-6, 1e9)
    prior = math.exp(logs.mean() + scipy.special.digamma(half) - math.log(half))
    total = 2 * half + df
    # No more degrees of freedom than all the data have.
    return (2 * half * prior + df * variances) / total, np.minimum(total, df.sum())


def overall(rows: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """Of all recipes whose losses differ: what the backends do on average, and as a share of what seeds do.

    Made from runs and their :func:`summary`. ``ratio``: geometric mean of the ratios of the losses over the recipes
    that have every seed on both backends, with the 95 % interval of the mean over the ``seeds`` (t distribution);
    ``verdict``: of this mean, with the recipes' ``margin``. ``share``: root mean square difference of the backends over
    that of two seeds, in log loss; the median over the recipes. Empty for less than two recipes or seeds.
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
        "share": float(np.sqrt(within / (2 * own["sd_seeds"].clip(lower=RESOLUTION) ** 2)).median()),
    }


# --- results ----------------------------------------------------------------------------------------------------------


def save(rows: pd.DataFrame, folder: Path) -> None:
    """``rows.csv``, ``summary.csv``, ``table.md``, ``run.json`` and ``losses.png``."""
    table = summary(rows)
    about = {
        "models": sorted(set(rows["model"])),
        "epochs": sorted(set(map(int, rows["epochs"]))),
        "trained": {name: TASKS[name].trained for name in sorted(set(rows["data"]))},
        "level": LEVEL,
        "limit": LIMIT,
        "overall": overall(rows, table),
    }
    for name, content in {
        "rows.csv": rows.to_csv(index=False, float_format="%.9g"),
        "summary.csv": table.to_csv(index=False, float_format="%.6g"),
        "table.md": markdown(table, about["overall"]),
        "run.json": json.dumps({**about, **provenance(ops.isa())}, indent=2) + "\n",
    }.items():
        put(folder / name, content.encode())
    put(folder / "losses.png", draw(rows))
    print(readable(table).to_string(index=False))
    print(in_words(about["overall"]))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The part of the table that is to be read, as text: loss first, because accuracies saturate on digits."""

    def loss(row: pd.Series, backend: str) -> str:
        told = with_deviation(row[f"loss_{backend}"], row[f"loss_sd_{backend}"])
        diverged = row[f"diverged_{backend}"]
        return f"{told} ({diverged:g} diverged)".lstrip() if diverged > 0 else told

    def ratio(row: pd.Series) -> str:
        if math.isnan(row.get("ratio_low", math.nan)):
            return "" if math.isnan(row.get("ratio", math.nan)) else f"{row['ratio']:.2f}"
        return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"

    backends = [backend for backend in BACKENDS if f"loss_{backend}" in table]
    return pd.DataFrame(
        {
            "recipe": row["recipe"],
            **({"epochs": str(row["epochs"])} if table["epochs"].nunique() > 1 else {}),
            **{f"loss, {backend}": loss(row, backend) for backend in backends},
            "trains": "yes" if row["trains"] else "no",
            "ratio (95 %)": ratio(row),
            "backends": row["verdict"],
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
    return f"{mean:.{digits}f}±{deviation:.{digits}f}"


def in_words(found: dict[str, Any]) -> str:
    """What :func:`overall` says; "" for nothing."""
    if not found:
        return ""
    return (
        f"All {found['recipes']} recipes whose losses differ, over {found['seeds']} seeds: native / simulated "
        f"{found['ratio']:.3f} ({found['ratio_low']:.3f}-{found['ratio_high']:.3f}), {found['verdict']} by a margin of "
        f"{found['margin']:.2f}.\nA difference of the backends is {found['share']:.2f} times that of two seeds."
    )


def markdown(table: pd.DataFrame, found: dict[str, Any]) -> str:
    """What is to be read of the table, and what its columns are."""
    shown = readable(table)
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.itertuples(index=False)]
    legend = (
        "Loss: final training loss [nats], mean and standard deviation over the seeds. Ratio: native / simulated, "
        "geometric mean with the recipe's own 95 % interval. Backends: whether they move the loss by less than a seed "
        "does; open: not to be told from these runs. Memory: how many times less is kept for the backward pass than "
        "in float32, by the layers that are quantized."
    )
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "\n".join(filter(None, [rows, f"{legend}\n", in_words(found)])).rstrip() + "\n"


def draw(rows: pd.DataFrame) -> bytes:
    """Final training loss of every run, a row of points per recipe; runs that diverged stand at the right edge."""
    order = list(dict.fromkeys(rows["recipe"]))
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 0.6 + 0.16 * len(order))
        ax = figure.subplots()
        for offset, backend, color in zip((0.15, -0.15), BACKENDS, ("#D55E00", "#0072B2"), strict=True):
            own = rows[rows["backend"] == backend]
            places = np.array([order.index(recipe) + offset for recipe in own["recipe"]])
            ax.plot(own["loss"], places, ".", color=color, label=backend)
            lost = places[(own["diverged"] != "").to_numpy()]
            if len(lost):
                edge = ax.get_yaxis_transform()
                ax.plot(np.ones(len(lost)), lost, "x", color=color, transform=edge, clip_on=False)
        if (rows["diverged"] != "").any():
            ax.plot([], [], "x", color=style.INK, label="diverged")
        ax.set(xlabel="final training loss [nats]", xscale="log", yticks=range(len(order)))
        # Below a factor of four there may be no power of ten: there every tick has its number.
        every = rows["loss"].max() < 4 * rows["loss"].min()
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if every else "")
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.set_yticklabels(order)
        ax.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=3)
    return style.png(figure)


if __name__ == "__main__":
    main()
