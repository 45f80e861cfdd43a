"""Is the closed form what the draws show, do the intervals cover, and what does each cost?

``python -m analysis.exact`` (some twenty minutes) writes to ``analysis/results/exact/``, for the default model on the
default data, trained as ``fqtstats measure`` trains it:

* ``agreement.csv``, ``agreement.png``: variance that a layer's own Q1 puts into its weight gradient, in closed form and
  by drawing, for a convolution and the linear layer.
* ``coverage.csv``: how often the 95 % interval of a total variance from n draws holds the truth.
* ``cost.csv``: one closed form against the draws that give the same precision, timed side by side.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torch import nn

import fqtstats
from fqtstats import experiment, layers
from fqtstats.benchmarks.measure import make_naive
from fqtstats.capture import Session
from fqtstats.determinism import seeded, single_thread
from fqtstats.estimators import exact, intervals
from fqtstats.estimators.moments import squared_norm
from fqtstats.layers import real
from fqtstats.layers.operand import images
from fqtstats.layers.state import Call, WeightGradient
from fqtstats.report import style

FOLDER = Path(__file__).parent / "results" / "exact"
MODEL, DATA = "preact_resnet20", "digits"
QUANTIZERS = ("ptq", "psq", "bhq")
BITS = (8, 4, 2)
PRECISION = 0.01
SIZES = (5, 10, 30)
PARTS = ["cost", "coverage", "agreement"]
VARIANCE_DRAWS = 200


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"which of {', '.join(PARTS)}; all of them")
    parser.add_argument("--draws", type=int, default=20_000, help="draws per closed form")
    parser.add_argument("--pool", type=int, default=30_000, help="draws that intervals are made from")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each kind")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    setup = experiment.prepare(MODEL, DATA, further=0)
    make = {
        "cost": lambda: costs(setup, given.rounds),
        "coverage": lambda: coverage(setup, given.pool),
        "agreement": lambda: agreement(setup, given.draws),
    }
    for part in given.parts:
        with single_thread():
            table = make[part]()
        table.to_csv(given.out / f"{part}.csv", index=False, float_format="%.6g")
        print(table.to_string(), flush=True)
        if part == "agreement":
            (given.out / "agreement.png").write_bytes(draw(table))


def gradients(setup: experiment.Experiment) -> dict[str, WeightGradient]:
    """The weight gradients of a QAT pass by layer, with gradients as they arrive."""
    found: dict[str, WeightGradient] = {}

    def keep(call: Call, gradient: WeightGradient, parameters: Sequence[str]) -> None:
        found[call.layer.name] = gradient

    with session_of(setup.model, setup, "psq", 8) as session:
        session.qat(None, keep)
    return found


@contextmanager
def session_of(model: nn.Module, setup: experiment.Experiment, name: str, bits: int) -> Iterator[Session]:
    """The graph of the batch under the recipe of a quantizer."""
    policy = fqtstats.policies.get(f"statquant-{name}", bits)
    with layers.quantized(model, policy) as handle, Session(model, handle, setup.batch, setup.loss) as session:
        yield session


def chosen(found: dict[str, WeightGradient]) -> dict[str, WeightGradient]:
    """The linear layer, and the convolution in the middle of the network."""
    linear = [name for name, gradient in found.items() if len(gradient.shape) == 2]
    convolutions = [name for name, gradient in found.items() if len(gradient.shape) == 4]
    return {name: found[name] for name in (convolutions[len(convolutions) // 2], linear[-1])}


def agreement(setup: experiment.Experiment, draws: int) -> pd.DataFrame:
    """Closed form and draws, for every quantizer at every width."""
    rows = []
    cases = [(*case, name, bits) for case in chosen(gradients(setup)).items() for name in QUANTIZERS for bits in BITS]
    for layer, given, name, bits in track(cases, "agreement"):
        gradient = WeightGradient(given.product, fqtstats.quantizer(name, bits=bits), given.g, given.x, given.shape)
        closed = exact.summed(gradient, ["weight"])["weight"]
        norms = np.fromiter(_own_errors(gradient, draws), dtype=np.float64, count=draws)
        error = norms.std(ddof=1) / np.sqrt(draws) / closed
        kind = "linear" if len(given.shape) == 2 else "convolution"
        rows.append(
            {
                "layer": layer,
                "kind": kind,
                "quantizer": name,
                "bits": bits,
                "draws": draws,
                "closed_form": closed,
                "monte_carlo": norms.mean(),
                "ratio": norms.mean() / closed,
                "standard_error": error,
            }
        )
    return pd.DataFrame(rows)


def _own_errors(gradient: WeightGradient, draws: int) -> Iterator[float]:
    """Squared errors of the weight gradient from the layer's own Q1."""
    x, shape = images(gradient.x), gradient.shape
    for index in range(draws):
        error = gradient.q(gradient.g, fqtstats.stream(seed=1, layer="agreement", draw=index)).sub_(gradient.g)
        yield squared_norm(gradient.product.grad_weight(real, images(error), x, shape))


def coverage(setup: experiment.Experiment, pool: int) -> pd.DataFrame:
    """Student t intervals from disjoint groups of draws of a whole network, against the mean of all draws."""
    rows = []
    with seeded(0):
        hidden = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))
    small = replace(setup, batch=(setup.batch[0][:32], setup.batch[1][:32]))
    for name in track(QUANTIZERS, "coverage"):
        for bits in BITS:
            with session_of(model, small, name, bits) as session:
                truth = session.qat()
                norms = np.array([sum(_squared_errors(session.draw(index), truth)) for index in range(pool)])
            for n in SIZES:
                groups = norms[: pool // n * n].reshape(-1, n)
                ends = np.array([intervals.t_interval(group) for group in groups])
                held = (ends[:, 0] <= norms.mean()) & (norms.mean() <= ends[:, 1])
                rate = held.mean()
                rows.append(
                    {
                        "quantizer": name,
                        "bits": bits,
                        "n": n,
                        "intervals": len(groups),
                        "coverage": rate,
                        "standard_error": np.sqrt(rate * (1 - rate) / len(groups)),
                    }
                )
    return pd.DataFrame(rows)


def _squared_errors(draw: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [squared_norm(d.sub_(g)) for d, g in zip(draw, truth, strict=True)]


def costs(setup: experiment.Experiment, rounds: int) -> pd.DataFrame:
    """Seconds of a closed form and of a draw, and how many draws reach the same precision."""
    rows = []
    for name in track(QUANTIZERS, "cost"):
        naive = copy.deepcopy(setup.model)
        make_naive(naive, per_sample=name != "ptq")
        with session_of(setup.model, setup, name, 5) as session:
            index = count()
            times = _interleaved(
                [
                    partial(session.qat, None, lambda call, gradient, names: exact.summed(gradient, ["weight"])),
                    partial(session.qat, None, lambda call, gradient, names: exact.weight_variance([gradient])),
                    lambda session=session, index=index: session.draw(next(index), ("grad_weight",)),
                    lambda naive=naive: torch.autograd.backward(setup.loss(naive, setup.batch)),
                ],
                rounds,
            )
            truth = session.qat()
            weights = [i for i, p in enumerate(session.parameters.values()) if p.dim() > 1]
            errors = [_squared_errors(session.draw(i, ("grad_weight",)), truth) for i in range(VARIANCE_DRAWS)]
        norms = np.array(errors)[:, weights]
        # The relative error of a mean of n is sd / (mean sqrt n): draws for the median parameter; that of an element's
        # sample variance, for errors with little excess kurtosis, is sqrt(2 / n).
        scalar = float(np.median((norms.std(axis=0, ddof=1) / norms.mean(axis=0) / PRECISION) ** 2))
        for what, closed, n in (("sum", times[0], scalar), ("every element", times[1], 2 / PRECISION**2)):
            rows.append(
                {
                    "quantizer": name,
                    "variance_of": what,
                    "precision": PRECISION,
                    "draws_needed": n,
                    "closed_form_seconds": closed,
                    "draw_seconds": times[2],
                    "naive_replicate_seconds": times[3],
                    "ratio_to_draws": n * times[2] / closed,
                    "ratio_to_naive": n * times[3] / closed,
                }
            )
    return pd.DataFrame(rows)


def _interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, taken in turns after one call that is not counted."""
    taken: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, times in zip(functions, taken, strict=True):
            began = time.perf_counter()
            function()
            if round_:
                times.append(time.perf_counter() - began)
    return [float(np.median(times)) for times in taken]


def draw(agreed: pd.DataFrame) -> bytes:
    """Ratios of drawn to closed-form variance, with 95 % intervals, and 1 % on both sides."""
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 2.4)
        ax = figure.subplots()
        labels = [f"{row.quantizer} {row.bits} bits, {row.kind}" for row in agreed.itertuples()]
        heights = -np.arange(len(agreed))
        ax.axvspan(1 - PRECISION, 1 + PRECISION, color=style.tint("#009E73", 0.2), lw=0, label="within 1 %")
        ax.axvline(1, color=style.GREY, lw=0.5)
        ax.errorbar(
            agreed["ratio"], heights, xerr=1.96 * agreed["standard_error"], fmt="o", ms=2, lw=0.7, color="#0072B2"
        )
        ax.set_yticks(heights, labels, fontsize=4.5)
        ax.set(xlabel=f"variance of {agreed['draws'].iloc[0]} draws / closed form", xlim=(0.98, 1.02))
        ax.legend(loc="upper right")
        return style.png(figure)


if __name__ == "__main__":
    main()
