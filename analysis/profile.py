"""Does the variance profile add up to what draws show, and what does it cost?

``python -m analysis.profile`` (some forty minutes) writes to ``analysis/results/profile/``:

* ``agreement.csv``, ``agreement.png``: the total variance by probes, with the quantizers switched on one at a time, and
  from draws of the whole gradient, of an MLP, a ResNet with batch normalization and a transformer.
* ``cost.csv``: what ResNet-20 takes to a precision of 5 %, by probes and one at a time, and what a plain loop around
  the model would take for the same number of passes. The draws that a precision takes are themselves estimated and
  differ by seed: a row per seed, and one of medians.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torch import nn

import fqtstats
from fqtstats import experiment
from fqtstats.benchmarks.measure import make_naive
from fqtstats.determinism import single_thread
from fqtstats.report import style

FOLDER = Path(__file__).parent / "results" / "profile"
PARTS = ["cost", "agreement"]
QUANTIZERS, BITS = ("ptq", "psq", "bhq"), 5
PRECISION = 0.05
MODELS = {
    "MLP": ("mlp", "digits"),
    "ResNet-20": ("preact_resnet20", "digits"),
    "transformer": ("transformer", "text"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"which of {', '.join(PARTS)}; all of them")
    parser.add_argument("--draws", type=int, default=300, help="draws of the whole gradient")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the costs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    make = {"cost": lambda: costs(given.seeds), "agreement": lambda: agreement(given.draws)}
    for part in given.parts:
        table = make[part]()
        table.to_csv(given.out / f"{part}.csv", index=False, float_format="%.6g")
        print(table.to_string(), flush=True)
        if part == "agreement":
            (given.out / "agreement.png").write_bytes(draw(table))


def costs(seeds: int) -> pd.DataFrame:
    """Seconds and backward passes to the same precision, each on one thread; per quantizer the medians come last."""
    setup = experiment.prepare(*MODELS["ResNet-20"], further=0)
    rows = []
    for seed, name in track([(seed, name) for seed in range(seeds) for name in QUANTIZERS], "cost"):
        policy = fqtstats.policies.get(f"statquant-{name}", BITS)
        found = {method: _timed(setup, policy, method, seed) for method in ("probes", "one-at-a-time")}
        replicate = _replicate_seconds(setup, per_sample=name != "ptq")
        (probes, fast), (single, slow) = found["probes"], found["one-at-a-time"]
        passes = int(str(single.metadata["backward_passes"]))
        rows.append(
            {
                "quantizer": name,
                "bits": BITS,
                "precision": PRECISION,
                "seed": str(seed),
                "probes": probes.metadata["probes"],
                "probes_reached": probes.metadata["precision_reached"],
                "probes_passes": probes.metadata["backward_passes"],
                "probes_seconds": fast,
                "single_draws": single.metadata["probes"],
                "single_reached": single.metadata["precision_reached"],
                "single_passes": passes,
                "single_seconds": slow,
                "naive_seconds": passes * replicate,
                "ratio_to_single": slow / fast,
                "ratio_to_naive": passes * replicate / fast,
            }
        )
    table = pd.DataFrame(rows)
    medians = table.drop(columns="seed").groupby("quantizer", sort=False).median().reset_index().assign(seed="median")
    return pd.concat([table, medians[table.columns]], ignore_index=True)


def _timed(
    setup: experiment.Experiment, policy: fqtstats.Policy, method: str, seed: int
) -> tuple[fqtstats.Profile, float]:
    began = time.perf_counter()
    found = fqtstats.profile(
        setup.model, setup.batch, setup.loss, policy, PRECISION, seed=seed, method=method, most_probes=1000
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


def agreement(draws: int) -> pd.DataFrame:
    """Total variance by each method, with its standard error."""
    rows: list[dict[str, object]] = []
    cases = [(label, *names, name) for label, names in MODELS.items() for name in QUANTIZERS]
    for label, model, data, name in track(cases, "agreement"):
        setup = experiment.prepare(model, data, batch_size=16, further=0)
        policy = fqtstats.policies.get(f"statquant-{name}", BITS)
        for method, variance, error in _totals(setup.model, setup, policy, draws):
            rows.append(
                {
                    "model": label,
                    "quantizer": name,
                    "bits": BITS,
                    "method": method,
                    "variance": variance,
                    "standard_error": error,
                }
            )
    table = pd.DataFrame(rows)
    drawn = table[table["method"] == "draws"].set_index(["model", "quantizer"])["variance"]
    return table.assign(
        ratio_to_draws=table["variance"]
        / drawn.loc[list(zip(table["model"], table["quantizer"], strict=True))].to_numpy()
    )


def _totals(
    model: nn.Module, setup: experiment.Experiment, policy: fqtstats.Policy, draws: int
) -> Iterator[tuple[str, float, float]]:
    for method in ("probes", "one-at-a-time"):
        with warnings.catch_warnings():
            # One at a time, small models take more draws than are worth waiting for; the error says what is known.
            warnings.simplefilter("ignore", UserWarning)
            found = fqtstats.profile(model, setup.batch, setup.loss, policy, PRECISION, method=method, most_probes=24)
        total = found.parameters.iloc[-1]
        yield method, float(total["variance"]), float(total["standard_error"])
    table = fqtstats.measure(model, setup.batch, setup.loss, policy, draws=draws, method="montecarlo").table
    total = table[table["layer"] == "total"].iloc[0]
    yield "draws", float(total["variance"]), float(total["variance_high"] - total["variance_low"]) / (2 * 1.96)


def draw(table: pd.DataFrame) -> bytes:
    """Totals relative to those of draws, with 95 % intervals."""
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 2.4)
        ax = figure.subplots()
        labels = [f"{model}, {name}" for model in MODELS for name in QUANTIZERS]
        heights = -np.arange(len(labels), dtype=float)
        drawn = table[table["method"] == "draws"]["variance"].to_numpy()
        for offset, (method, color) in zip(
            (0.2, 0, -0.2), {"probes": "#0072B2", "one-at-a-time": "#E69F00", "draws": "#000000"}.items(), strict=True
        ):
            rows = table[table["method"] == method]
            error = 1.96 * rows["standard_error"].to_numpy() / drawn
            ratio = rows["variance"].to_numpy() / drawn
            ax.errorbar(ratio, heights + offset, xerr=error, fmt="o", ms=2, lw=0.7, color=color, label=method)
        ax.axvspan(1 - PRECISION, 1 + PRECISION, color=style.tint("#009E73", 0.15), lw=0)
        ax.axvline(1, color=style.GREY, lw=0.5)
        ax.set_yticks(heights, labels, fontsize=5)
        ax.set_xlabel("total variance / that of draws; shaded: within 5 %")
        figure.legend(loc="outside upper center", ncols=3)
        return style.png(figure)


if __name__ == "__main__":
    main()
