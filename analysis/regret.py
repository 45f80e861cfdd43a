"""How does regret grow with the variance of an unbiased quantizer, with SGD and with Adam?

Measured: regret of every run by optimizer, variance and seed, and of the runs without noise. Told: exponents of the
regret's excess over the run without noise, against the variance, with 95 % intervals (least squares in logarithms,
covariance clustered by seed, t distribution), over all variances and over those that are at least ten times the largest
squared gradient of the run without noise.

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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import statsmodels.api as sm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from analysis.estimates import mean_interval
from analysis.study import Claim, Parts, Study, Tables, interval, main, with_interval
from fqtstats.report import style
from fqtstats.schema import Column

COLUMNS = (
    Column("optimizer", "str", "", "sgd or adam"),
    Column("variance", "float64", "(loss/parameter)^2", "sigma^2, summed over the parameters; 0: without noise"),
    Column("seed", "int64", "1", "of the noise"),
    Column("steps", "int64", "1", "number of steps"),
    Column("regret", "float64", "nat", "sum over the steps of the loss above the least one"),
    Column("largest_gradient", "float64", "(loss/parameter)^2", "largest squared norm in the run without noise"),
    Column("excess", "float64", "nat", "regret beyond that of the run without noise"),
)

STEP = {"sgd": 1.0, "adam": 0.1}
"""``a`` of the step ``a / sqrt t``: in units of 1/L for SGD, L the largest curvature."""
THEORY = {"sgd": 1.0, "adam": 0.5}
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
REGULARIZATION = 1e-2
DOMINATES = 10.0

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Of the study; ``variances`` of them are spread evenly in the logarithm over sigma^2 from 0.1 to 1000, in units of
    the squared gradient at the start."""

    steps: int = 8000
    seeds: int = 10
    variances: int = 9


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


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row for each optimizer, variance and seed; variance 0 once."""

    def of_optimizer(optimizer: str) -> list[dict[str, object]]:
        return run(optimizer, settings)

    return {"regret": parts.every("optimizers", [{"optimizer": name} for name in OPTIMIZERS], of_optimizer)}


def run(optimizer: str, settings: Settings) -> list[dict[str, object]]:
    """Regret of runs from zero weights, which go side by side."""
    problem = Problem()
    start = float(np.square(problem(np.zeros((1, problem.parameters)))[1]).sum())
    variances = [float(v) * start for v in np.logspace(-1, 3, settings.variances)]
    runs = [(0.0, 0), *((v, seed) for v in variances for seed in range(settings.seeds))]
    step = np.sqrt(6 * np.array([[v] for v, _ in runs]) / problem.parameters)
    random = np.random.default_rng(0)
    move = OPTIMIZERS[optimizer](STEP[optimizer] / (problem.curvature if optimizer == "sgd" else 1.0))
    w = np.zeros((len(runs), problem.parameters))
    regret, largest = np.zeros(len(runs)), 0.0
    for t in range(1, settings.steps + 1):
        loss, g = problem(w)
        regret += loss - problem.least
        largest = max(largest, float(np.square(g[0]).sum()))
        w -= move(rounded(g, step, random), t)
    return [
        {
            "variance": variance,
            "seed": seed,
            "steps": settings.steps,
            "regret": own,
            "largest_gradient": largest,
            "excess": own - regret[0],
        }
        for (variance, seed), own in zip(runs, regret, strict=True)
    ]


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


OPTIMIZERS = {"sgd": _sgd, "adam": _adam}
NAMES = {"sgd": "SGD", "adam": "Adam"}


# --- what is said of it -----------------------------------------------------------------------------------------------


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


def read(tables: Tables) -> pd.DataFrame:
    """The exponents."""
    found = fit(tables["regret"])
    return pd.DataFrame(
        {
            "optimizer": found["optimizer"].map(NAMES),
            "variances": found["variances"],
            "from": [f"{value:.3g}" for value in found["least"]],
            "to": [f"{value:.3g}" for value in found["most"]],
            "runs": found["runs"].astype(str),
            "exponent": [with_interval(row.exponent, row.low, row.high, ".3f") for row in found.itertuples()],
            "theory": found["theory"].astype(str),
        }
    )


def claims(tables: Tables) -> list[Claim]:
    """Exponents where sigma dominates, against theory and each other; over all variances."""
    runs = tables["regret"]
    found = fit(runs).set_index(["variances", "optimizer"])
    told = []
    for (variances, optimizer), row in found.iterrows():
        slope = with_interval(row["exponent"], row["low"], row["high"], ".3f")
        where = f"{NAMES[optimizer]}, {runs['steps'].iloc[0]} steps, {int(row['runs'])} runs"
        if variances == "all":
            told.append(
                Claim(f"{where} of all variances: the regret's excess grows with the exponent {slope} of sigma².")
            )
        else:
            inside = bool(row["low"] <= row["theory"] <= row["high"])
            told.append(
                Claim(
                    f"{where} where sigma dominates: the regret's excess grows with the exponent {slope} of sigma²; "
                    f"the bound grows with {row['theory']:g}, which the interval "
                    f"{'holds' if inside else 'leaves out'}.",
                    inside,
                )
            )
    sgd, adam = (found.loc[("sigma dominates", name)] for name in ("sgd", "adam"))
    apart = bool(adam["high"] < sgd["low"])
    told.append(
        Claim(
            f"Where sigma dominates, the excess grows more slowly with Adam than with SGD: the exponents' intervals "
            f"{interval(adam['low'], adam['high'], '.3f')} and {interval(sgd['low'], sgd['high'], '.3f')} "
            f"{'do not overlap' if apart else 'overlap'} (95 % each).",
            apart,
        )
    )
    return sorted(told, key=lambda claim: claim.holds is None)


def draw(tables: Tables) -> dict[str, Figure]:
    """Excess against variance, a panel for each optimizer: means with 95 % intervals, the fit, and theory's slope."""
    runs = tables["regret"]
    exponents = fit(runs)
    figure = style.new_figure(style.COLUMN_WIDTH, 3.9)
    panels = figure.subplots(2, 1, sharex=True)
    for ax, (name, color) in zip(panels, (("sgd", "#0072B2"), ("adam", "#D55E00")), strict=True):
        noisy = runs[(runs["optimizer"] == name) & (runs["variance"] > 0)]
        places = sorted(noisy["variance"].unique())
        ends = np.array([mean_interval(noisy[noisy["variance"] == place]["excess"]) for place in places])
        shown = ends[:, 0] > 0
        mean, low, high = ends[shown].T
        ax.errorbar(
            np.array(places)[shown], mean, (mean - low, high - mean), fmt="o", color=color, elinewidth=0.8,
            label="mean over seeds, 95 %",
        )  # fmt: skip
        row = exponents[(exponents["optimizer"] == name) & (exponents["variances"] == "sigma dominates")].iloc[0]
        x = np.array([row["least"], row["most"]])
        fitted = np.exp(row["constant"]) * x ** row["exponent"]
        ax.plot(
            x, fitted, color=color, label=f"exponent {with_interval(row['exponent'], row['low'], row['high'], '.3f')}"
        )
        power = r"$\sigma^2$" if name == "sgd" else r"$\sigma$"
        reference = fitted[0] * (x / x[0]) ** row["theory"] * 0.5
        ax.plot(x, reference, "--", color=style.INK, label=f"slope of the bound: {power}")
        largest = float(noisy["largest_gradient"].iloc[0])
        ax.axvline(largest, color=style.GREY, linestyle=":", linewidth=0.8)
        ax.annotate(
            r"largest $\|g\|^2$", (largest, 0.02), xycoords=("data", "axes fraction"), xytext=(2, 0),
            textcoords="offset points", color=style.GREY,
        )  # fmt: skip
        ax.set(xscale="log", yscale="log", title=NAMES[name], ylabel="regret beyond that\nwithout noise [nat]")
        ax.grid(True)
        ax.legend(loc="upper left", frameon=True, facecolor="white", edgecolor="none", framealpha=1)
    panels[-1].set_xlabel(r"variance $\sigma^2$ of the quantized gradient")
    return {"regret": figure}


STUDY = Study(
    name="regret",
    question="How does regret grow with the variance of an unbiased quantizer, with SGD and with Adam?",
    full=Settings(),
    quick=Settings(steps=300, seeds=3, variances=5),
    columns={"regret": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Exponent of sigma² in the regret's excess over the run without noise: least squares in logarithms, 95 % "
    "intervals (clustered by seed, t distribution). Theory: exponent of the upper bound. sigma dominates: sigma² at "
    "least ten times the largest squared gradient.",
)

if __name__ == "__main__":
    main(STUDY)
