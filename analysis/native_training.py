"""Does training on integer products reach the loss that training on simulated ones does?

``python -m analysis.native_training`` trains the default model on the default data for its whole schedule, with PTQ at 8
bits everywhere, on both backends, once per seed, and saves the losses, their comparison and a figure.

The two runs of a seed start from the same weights and see the same batches and random numbers. They part at the first
rounding that differs, because a number on the edge between two codes then falls to the other side; from there on they
are two runs of a random algorithm. "Within seed noise" is: the interval of the mean difference of the final losses over
the seeds (95 %, paired t) contains 0, and the mean difference is below the standard deviation of the simulated final
losses over the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

import fqtstats
from fqtstats import models, ops
from fqtstats.data import data
from fqtstats.layers import BACKENDS
from fqtstats.provenance import provenance
from fqtstats.report import style
from fqtstats.training import pretrain

FOLDER = Path(__file__).parent / "results" / "native_training"
MODEL, DATA, POLICY, BITS = "preact_resnet20", "digits", "statquant-ptq", 8
SEEDS = 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs per backend, at least 3")
    parser.add_argument("--epochs", type=int, help="instead of the whole schedule")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    if given.seeds < 3:
        parser.error("--seeds must be at least 3")
    losses = pd.concat([train(backend, seed, given.epochs) for seed in range(given.seeds) for backend in BACKENDS])
    save(losses, given.out)


def train(backend: str, seed: int, epochs: int | None = None) -> pd.DataFrame:
    """One run: a row per epoch with ``backend``, ``seed``, ``epoch``, mean training ``loss`` and ``test_accuracy``."""
    source = data(DATA)
    config = pretrain.default_config(MODEL, DATA)
    assert config is not None
    config = replace(config, seed=seed, epochs=epochs or config.epochs)
    model = models.build(MODEL, source, seed)
    policy = fqtstats.policies.get(POLICY, bits=BITS)
    with fqtstats.quantized(model, policy, backend=backend, seed=seed) as handle:

        def next_step(epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
            handle.step = (epoch - 1) * steps + step

        history = pretrain.pretrain(model, source, config, next_step)
    print(f"{backend}, seed {seed}: losses {history.losses}, test accuracy {history.test_accuracy}", flush=True)
    return pd.DataFrame(
        {
            "backend": backend,
            "seed": seed,
            "epoch": range(1, config.epochs + 1),
            "loss": history.losses,
            "test_accuracy": [np.nan] * (config.epochs - 1) + [history.test_accuracy],
        }
    )


def compare(losses: pd.DataFrame) -> dict[str, object]:
    """The final losses of both backends, and whether they differ by more than seeds do."""
    last = losses[losses["epoch"] == losses["epoch"].max()]
    final = last.pivot(index="seed", columns="backend", values="loss")
    difference = final["native"] - final["simulated"]
    n = len(difference)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    mean, noise = float(difference.mean()), float(final["simulated"].std(ddof=1))
    accuracy = last.groupby("backend")["test_accuracy"].mean()
    return {
        "seeds": n,
        "epochs": int(losses["epoch"].max()),
        "final_loss": {backend: float(final[backend].mean()) for backend in BACKENDS},
        "test_accuracy": {backend: float(accuracy[backend]) for backend in BACKENDS},
        "difference": mean,
        "difference_low": mean - half,
        "difference_high": mean + half,
        "seed_standard_deviation": noise,
        "within_seed_noise": abs(mean) <= noise and abs(mean) <= half,
    }


def save(losses: pd.DataFrame, folder: Path) -> None:
    """``losses.csv``, ``comparison.json`` and ``losses.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    losses.to_csv(folder / "losses.csv", index=False, float_format="%.9g")
    told = compare(losses)
    about = {"model": MODEL, "data": DATA, "policy": POLICY, "bits": BITS, **told, **provenance(ops.isa())}
    (folder / "comparison.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "losses.png").write_bytes(draw(losses))
    print(json.dumps(told, indent=2))


def draw(losses: pd.DataFrame, backends: Sequence[str] = BACKENDS) -> bytes:
    """Mean training loss per epoch: a thin line per seed, a thick one for their mean."""
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 2.2)
        ax = figure.subplots()
        for backend, color in zip(backends, ("#D55E00", "#0072B2"), strict=True):
            curves = losses[losses["backend"] == backend].pivot(index="epoch", columns="seed", values="loss")
            ax.plot(curves.index, curves, color=style.tint(color, 0.35), linewidth=0.4)
            ax.plot(curves.index, curves.mean(axis=1), color=color, marker="o", label=backend)
        ax.set(xlabel="epoch", ylabel="training loss [nats]", yscale="log", xticks=sorted(set(losses["epoch"])))
        ax.legend()
    return style.png(figure)


if __name__ == "__main__":
    main()
