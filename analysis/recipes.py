"""Does every recipe train, on both backends, and where do their losses differ?

``python -m analysis.recipes`` trains every recipe on embedded data (:mod:`fqtstats.training.runs`), once per seed and
backend, and saves a row per run, a table with a row per recipe, and a figure. ``--data text`` is the second task.
Runs that are in ``rows.csv`` already are not repeated, so an interrupted study goes on where it was.

Runs of one seed start from the same weights and see the same batches; a recipe that starts from a network trained in
full precision takes that of the recipe ``exact`` with the same seed and backend. The backends count as equal, "within
noise", if the interval of the mean difference of the final losses over the seeds (95 %, paired t) contains 0. A recipe
trains if its final training loss is below a quarter of that of guessing, the logarithm of the number of classes, for
every seed and backend.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch

from fqtstats import models, ops
from fqtstats.data import data
from fqtstats.layers import BACKENDS
from fqtstats.provenance import provenance
from fqtstats.report import style
from fqtstats.training import loop, runs
from fqtstats.training.recipes import RECIPES
from fqtstats.trainings import MODEL

FOLDER = Path(__file__).parent / "results" / "recipes"
DATA = ("digits", "text")
SEEDS = 3
LOW = (2, 3, 4)
"""Bits at which the recipes with a choice of gradient quantizers are compared, beside their defaults."""

CASES: tuple[tuple[str, int | None], ...] = tuple(
    (name, bits)
    for name, definition in RECIPES.items()
    for bits in ((*LOW, definition.default) if name in ("statquant-ptq", "statquant-psq", "statquant-bhq") else (None,))
)
START = "exact"
"""The recipe whose networks are those trained in full precision."""

KEY = ["data", "recipe", "backend", "seed"]
TRAINED = 0.25
"""Share of the loss of guessing below which a training counts as one."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each recipe and backend, at least 2")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--recipes", nargs="+", help="instead of all: names, or name@bits")
    parser.add_argument("--model", help="instead of the run's own")
    parser.add_argument("--epochs", type=int, help="instead of the run's own")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds must be at least 2")
    wanted = [split(text) for text in given.recipes or ()] or list(CASES)
    folder: Path = given.out / given.data
    rows = pd.read_csv(folder / "rows.csv") if (folder / "rows.csv").exists() else pd.DataFrame(columns=KEY)
    done = set(rows[KEY].itertuples(index=False, name=None))
    for seed in range(given.seeds):
        for backend in given.backends:
            start: dict[str, torch.Tensor] | None = None
            for name, bits in wanted:
                if (given.data, label(name, bits), backend, seed) in done:
                    continue
                recipe = runs.run(f"{name}/{given.data}", bits).recipe
                if recipe.starts_from == "full-precision" and start is None:
                    _, start = train(START, None, given.data, backend, seed, given.model, given.epochs)
                weights = start if recipe.starts_from == "full-precision" else None
                row, found = train(name, bits, given.data, backend, seed, given.model, given.epochs, weights)
                if name == START:
                    start = found
                rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
                folder.mkdir(parents=True, exist_ok=True)
                rows.to_csv(folder / "rows.csv", index=False, float_format="%.9g")
    save(rows, folder)


def split(text: str) -> tuple[str, int | None]:
    """``"name@bits"`` or ``"name"``."""
    name, _, bits = text.partition("@")
    return name, int(bits) if bits else None


def label(name: str, bits: int | None) -> str:
    """How results call a recipe."""
    chosen = RECIPES[name].default if bits is None else bits
    return name if chosen is None else f"{name}@{chosen}"


def train(
    name: str,
    bits: int | None,
    source: str,
    backend: str,
    seed: int,
    model_name: str | None,
    epochs: int | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """One run: its row, and the weights at its end."""
    run, records = runs.run(f"{name}/{source}", bits), data(source)
    model = models.build(model_name or run.model, records, seed)
    if weights is not None:
        model.load_state_dict(weights)
    started = time.monotonic()
    result = loop.train(
        model,
        records,
        run.recipe,
        epochs=epochs or run.epochs,
        batch_size=run.batch_size,
        seed=seed,
        backend=backend,
        pretrained=weights is not None,
    )
    own = result.epochs[result.epochs["network"] == MODEL]
    last = own.iloc[-1]
    row = {
        "data": source,
        "recipe": label(name, bits),
        "backend": backend,
        "seed": seed,
        "model": model_name or run.model,
        "epochs": len(own),
        "loss": float(last["loss"]),
        "accuracy": float(last["accuracy"]),
        "test_loss": float(last["test_loss"]),
        "test_accuracy": float(last["test_accuracy"]),
        "kept_bytes": last["kept_bytes"],
        "kept_float32_bytes": last["kept_float32_bytes"],
        "seconds": time.monotonic() - started,
        "guessing": math.log(records.num_classes),
    }
    told = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key in ("loss", "test_loss", "seconds"))
    print(f"{row['recipe']}, {backend}, seed {seed}: {told}", flush=True)
    return row, {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per recipe: means over the seeds with standard deviations, and the difference of the backends."""
    found = []
    for recipe, own in rows.groupby("recipe", sort=False):
        final = own.pivot(index="seed", columns="backend", values="loss")
        row: dict[str, object] = {"recipe": recipe, "seeds": len(final)}
        for backend in final:
            row[f"loss_{backend}"] = final[backend].mean()
            row[f"sd_{backend}"] = final[backend].std(ddof=1)
        row["test_loss"], row["test_accuracy"] = own["test_loss"].mean(), own["test_accuracy"].mean()
        row["trains"] = bool((own["loss"] < TRAINED * own["guessing"]).all())
        native = own[own["backend"] == "native"].dropna(subset="kept_bytes")
        row["memory"] = float((native["kept_float32_bytes"] / native["kept_bytes"]).mean())
        if set(BACKENDS) <= set(final) and len(difference := (final["native"] - final["simulated"]).dropna()) > 1:
            n = len(difference)
            half = float(scipy.stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n))
            row["difference"], row["half_interval"] = difference.mean(), half
            row["within_noise"] = bool(abs(row["difference"]) <= half)
        found.append(row)
    return pd.DataFrame(found)


def save(rows: pd.DataFrame, folder: Path) -> None:
    """``summary.csv``, ``table.md``, ``run.json`` and ``losses.png``."""
    table = summary(rows)
    table.to_csv(folder / "summary.csv", index=False, float_format="%.6g")
    (folder / "table.md").write_text(markdown(table))
    about = {"models": sorted(set(rows["model"])), "epochs": sorted(set(map(int, rows["epochs"]))), "trained": TRAINED}
    (folder / "run.json").write_text(json.dumps({**about, **provenance(ops.isa())}, indent=2) + "\n")
    (folder / "losses.png").write_bytes(draw(rows))
    print(table.to_string(index=False))


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown: loss first, because accuracies saturate on digits."""

    def number(value: object) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.3g}"
        return str(value)

    lines = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(number(cell) for cell in line)} |\n" for line in lines)


def draw(rows: pd.DataFrame, backends: Sequence[str] = BACKENDS) -> bytes:
    """Final training loss of every run, a row of points per recipe."""
    order = list(dict.fromkeys(rows["recipe"]))
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 0.6 + 0.16 * len(order))
        ax = figure.subplots()
        for offset, (backend, color) in zip(
            (-0.15, 0.15), zip(backends, ("#D55E00", "#0072B2"), strict=True), strict=True
        ):
            own = rows[rows["backend"] == backend]
            ax.plot(own["loss"], [order.index(r) + offset for r in own["recipe"]], ".", color=color, label=backend)
        ax.set(xlabel="final training loss [nats]", xscale="log", yticks=range(len(order)))
        ax.set_yticklabels(order)
        ax.invert_yaxis()
        ax.legend()
    return style.png(figure)


if __name__ == "__main__":
    main()
