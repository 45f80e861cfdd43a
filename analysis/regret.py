"""How does regret grow with the variance of an unbiased quantizer, with SGD and with Adam?

``python -m analysis.regret`` (some minutes) writes to ``analysis/results/regret/``:

* ``regret.csv``: regret of every run by optimizer, variance and seed, and of the runs without noise;
* ``exponents.csv``: exponents of the regret's excess over the run without noise, against the variance, with 95 %
  intervals (least squares in logarithms, covariance clustered by seed, t distribution), over all variances and over
  those that are at least ten times the largest squared gradient of the run without noise;
* ``regret.png``.

Found with 8000 steps, where sigma dominates: exponent 1.01 (0.95 to 1.07) of sigma^2 for SGD, theory 1; 0.54 (0.52 to
0.56) for Adam, theory 0.5, which the interval leaves out. Adam's exponent depends on the horizon: 2000 steps gave 0.44
(0.43 to 0.46), because the regret of the largest variances then nears that of not moving at all, and over all variances
it is 0.64, above theory, because small ones are no more than part of what Adam divides by. It depends on the step as
well: of the steps that were tried before this one was fixed, others gave 0.17 to 0.39 for Adam and 0.64 to 1.02 for
SGD. Runs with less regret than without noise (SGD's at the smallest variances) have no logarithm and are left out of
"all", which flattens that slope.

Theory (arXiv 2408.14267, section 3; both follow from the standard bounds for convex losses): with step ``a / sqrt t``
the regret of SGD is at most ``D^2 sqrt T / (2 a) + a sqrt T (G^2 + sigma^2)``, so its excess grows with ``sigma^2``;
that of Adam goes with ``E ||g_{1:T,i}||_2 <= sqrt(T (G_i^2 + sigma_i^2))``, so with ``sigma``, once ``sigma`` is what
dominates. These are upper bounds: what is fitted here is how the regret itself grows. Steps are the same for all
variances. Tuned for each of them, SGD would have regret in proportion to ``sigma``, too, and the two could not be told
apart.

The problem is convex: L2-regularized logistic regression, even against odd digits, full batches, so that the quantizer
is the only noise. The quantizer is stochastic rounding onto a grid of step ``d`` whose offset is uniform on
``[0, d)``: unbiased, and as the fraction is uniform, of variance exactly ``d^2 / 6`` for every element, whatever the
gradient. ``sigma^2`` is the sum over the elements.

Shape legend: R runs side by side, P parameters, M samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.stats
import statsmodels.api as sm
from sklearn.datasets import load_digits

from fqtstats.report import style

FOLDER = Path(__file__).parent / "results" / "regret"
STEPS, SEEDS = 8000, 10
VARIANCES = tuple(float(v) for v in np.logspace(-1, 3, 9))
"""sigma^2 in units of the squared gradient at the start."""
STEP = {"sgd": 1.0, "adam": 0.1}
"""``a`` of the step ``a / sqrt t``: in units of 1/L for SGD, L the largest curvature."""
THEORY = {"sgd": 1.0, "adam": 0.5}
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
REGULARIZATION = 1e-2
DOMINATES = 10.0

Array = npt.NDArray[np.float64]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs for each variance")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = measure(given.steps, given.seeds)
    exponents = fit(runs)
    runs.to_csv(given.out / "regret.csv", index=False, float_format="%.8g")
    exponents.to_csv(given.out / "exponents.csv", index=False, float_format="%.5g")
    (given.out / "regret.png").write_bytes(draw(runs, exponents))
    print(exponents.to_string(index=False))


class Problem:
    """Mean logistic loss of even against odd digits plus ``REGULARIZATION / 2 ||w||^2``, of R weights at once."""

    def __init__(self) -> None:
        x, labels = load_digits(return_X_y=True)
        self.x: Array = np.hstack([x / 16, np.ones((len(x), 1))])
        self.sign: Array = np.where(labels % 2 == 0, 1.0, -1.0)
        self.curvature = float(np.linalg.eigvalsh(self.x.T @ self.x / len(x))[-1]) / 4 + REGULARIZATION
        self.parameters = self.x.shape[1]
        best = scipy.optimize.minimize(
            lambda w: tuple(part[0] for part in self(w[None])),
            np.zeros(self.parameters),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
        )
        self.least = float(best.fun)

    def __call__(self, w: Array) -> tuple[Array, Array]:
        """Losses ``[R]`` and gradients ``[R, P]`` at ``w`` ``[R, P]``."""
        margin = (w @ self.x.T) * self.sign
        loss = np.logaddexp(0, -margin).mean(1) + REGULARIZATION / 2 * np.square(w).sum(1)
        slope = -self.sign / (1 + np.exp(margin))
        return loss, slope @ self.x / len(self.x) + REGULARIZATION * w


def rounded(g: Array, step: Array, random: np.random.Generator) -> Array:
    """Stochastic rounding of ``g`` ``[R, P]`` onto grids of ``step`` ``[R, 1]`` with uniform offsets; 0: as it is."""
    offset, u = random.random((2, *g.shape))
    y = np.divide(g, step, out=np.zeros_like(g), where=step > 0) - offset
    low = np.floor(y)
    return np.where(step > 0, step * (low + (u < y - low) + offset), g)


def measure(steps: int, seeds: int) -> pd.DataFrame:
    """Regret of runs from zero weights, one row for each optimizer, variance and seed; variance 0 once."""
    problem = Problem()
    start = float(np.square(problem(np.zeros((1, problem.parameters)))[1]).sum())
    settings = [(0.0, 0), *((v * start, seed) for v in VARIANCES for seed in range(seeds))]
    step = np.sqrt(6 * np.array([[v] for v, _ in settings]) / problem.parameters)
    tables = []
    for name, optimizer in (("sgd", _sgd), ("adam", _adam)):
        random = np.random.default_rng(0)
        move = optimizer(STEP[name] / (problem.curvature if name == "sgd" else 1.0))
        w = np.zeros((len(settings), problem.parameters))
        regret, largest = np.zeros(len(settings)), 0.0
        for t in range(1, steps + 1):
            loss, g = problem(w)
            regret += loss - problem.least
            largest = max(largest, float(np.square(g[0]).sum()))
            w -= move(rounded(g, step, random), t)
        table = pd.DataFrame(settings, columns=["variance", "seed"])
        tables.append(table.assign(optimizer=name, steps=steps, regret=regret, largest_gradient=largest))
    runs = pd.concat(tables, ignore_index=True)
    exact = runs[runs["variance"] == 0].set_index("optimizer")["regret"]
    runs["excess"] = runs["regret"] - runs["optimizer"].map(exact)
    return runs


def _sgd(a: float) -> Callable[[Array, int], Array]:
    return lambda g, t: a / np.sqrt(t) * g


def _adam(a: float) -> Callable[[Array, int], Array]:
    mean, square = np.zeros(1), np.zeros(1)

    def move(g: Array, t: int) -> Array:
        nonlocal mean, square
        mean = BETA1 * mean + (1 - BETA1) * g
        square = BETA2 * square + (1 - BETA2) * g * g
        scaled: Array = mean / (1 - BETA1**t) / (np.sqrt(square / (1 - BETA2**t)) + EPSILON)
        return a / np.sqrt(t) * scaled

    return move


def fit(runs: pd.DataFrame) -> pd.DataFrame:
    """Exponent of the excess against the variance, with 95 % intervals."""
    rows = []
    for name, noisy in runs[runs["variance"] > 0].groupby("optimizer", sort=False):
        for label, least in (("all", 0.0), ("sigma dominates", DOMINATES)):
            used = noisy[noisy["variance"] >= least * noisy["largest_gradient"] * (1 - 1e-9)]
            used = used[used["excess"] > 0]
            model = sm.OLS(np.log(used["excess"]), sm.add_constant(np.log(used["variance"])))
            found = model.fit(cov_type="cluster", cov_kwds={"groups": used["seed"]}, use_t=True)
            low, high = found.conf_int(0.05).loc["variance"]
            rows.append(
                {
                    "optimizer": name,
                    "variances": label,
                    "least": used["variance"].min(),
                    "most": used["variance"].max(),
                    "runs": len(used),
                    "exponent": found.params["variance"],
                    "low": low,
                    "high": high,
                    "constant": found.params["const"],
                    "theory": THEORY[str(name)],
                }
            )
    return pd.DataFrame(rows)


def draw(runs: pd.DataFrame, exponents: pd.DataFrame) -> bytes:
    """Excess against variance, a panel for each optimizer: means with 95 % intervals, the fit, and theory's slope."""
    with style.applied():
        figure = style.new_figure(2 * style.COLUMN_WIDTH, 2.3)
        panels = figure.subplots(1, 2)
        for axes, (name, title, color) in zip(
            panels, (("sgd", "SGD", "#0072B2"), ("adam", "Adam", "#D55E00")), strict=True
        ):
            noisy = runs[(runs["optimizer"] == name) & (runs["variance"] > 0)]
            groups = noisy.groupby("variance")["excess"]
            mean, count = groups.mean(), groups.count()
            half = scipy.stats.t.ppf(0.975, count - 1) * groups.std() / np.sqrt(count)
            shown = mean > 0
            axes.errorbar(
                mean.index[shown], mean[shown], half[shown], fmt="o", color=color, capsize=1.5, label="mean, 95 %"
            )
            row = exponents[(exponents["optimizer"] == name) & (exponents["variances"] == "sigma dominates")].iloc[0]
            x = np.array([row["least"], row["most"]])
            fitted = np.exp(row["constant"]) * x ** row["exponent"]
            label = f"fit: {row['exponent']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            axes.plot(x, fitted, color=color, label=label)
            reference = fitted[0] * (x / x[0]) ** row["theory"] * 0.5
            power = r"$\sigma^2$" if name == "sgd" else r"$\sigma$"
            axes.plot(x, reference, "--", color=style.INK, label=f"slope of the bound: {power}")
            axes.axvline(float(noisy["largest_gradient"].iloc[0]), color=style.GREY, linestyle=":", linewidth=0.8)
            axes.annotate(
                r"largest $\|g\|^2$",
                (float(noisy["largest_gradient"].iloc[0]), 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(2, 0),
                textcoords="offset points",
                color=style.GREY,
                fontsize=5.5,
            )
            axes.set(xscale="log", yscale="log", title=title, xlabel=r"variance $\sigma^2$ of the quantized gradient")
            axes.grid(True)
            axes.legend(loc="upper left", frameon=True, facecolor="white", edgecolor="none", framealpha=1)
        panels[0].set_ylabel("regret beyond that without noise")
        return style.png(figure)


if __name__ == "__main__":
    main()
