"""How does regret grow with the variance of an unbiased quantizer, with SGD and with Adam?

Measured: regret of every run by optimizer, step size, variance and seed, and of the runs without noise, over all steps
and over the first quarter of them. Steps are ``a / sqrt t``, the same for all variances. Three sizes ``a`` are
measured, and all of them told: SGD with 1/L, L the largest curvature, a quarter of that and four times that; Adam with
0.1 and the same factors.

Told: exponents of the regret's excess over the run without noise, against the variance. An exponent is the least
squares slope of the logarithm of the mean excess over the seeds against the logarithm of the variance, each variance
with equal weight; its 95 % interval follows from the standard errors of the means (delta method, t distribution with
Welch and Satterthwaite's degrees of freedom). A slope needs no power law to be defined; whether there is one is seen
from the slopes of the lower and the upper half of the variances. The range is fixed by a rule that does not look at the
excess: variances of at least ten times the squared gradient at the start, where all runs begin ("sigma dominates"). No
run in it is left out, whatever its sign; a range with a mean that is not positive has no exponent. The delta method
takes errors of the means to be small: where a standard error is above a quarter of its mean the intervals are rough,
which is said.

Theory (arXiv 2408.14267, section 3; both follow from the standard bounds for convex losses, for iterates within a
distance D of the best weights): with step ``a / sqrt t`` the regret of SGD is at most
``D^2 sqrt T / (2 a) + a sqrt T (G^2 + sigma^2)``, whose last part grows with ``sigma^2`` for any ``a``; that of Adam
goes with ``E ||g_{1:T,i}||_2 <= sqrt(T (G_i^2 + sigma_i^2))``, so with ``sigma``, once ``sigma`` is what dominates.
These are exponents of upper bounds at a fixed schedule: the regret may grow with another one below them, and over a
limited range with a larger one, too. So equality is no prediction, and what is told is what was measured. Tuned for
each variance, SGD's bound grows with ``sigma``, too.

The problem is convex: L2-regularized logistic regression, even against odd digits, full batches, so that the quantizer
is the only noise. The quantizer is stochastic rounding onto a grid of step ``d`` whose offset is uniform on
``[0, d)``: unbiased, and as the fraction is uniform, of variance exactly ``d^2 / 6`` for every element, whatever the
gradient. ``sigma^2`` is the sum over the elements.

Shape legend: R runs side by side, P parameters, M samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from analysis.estimates import LEVEL, mean_interval
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.report import style
from fqtstats.schema import Column

COLUMNS = (
    Column("optimizer", "str", "", "sgd or adam"),
    Column("size", "float64", "1", "a of the step a / sqrt t: over 1/L for sgd, over 0.1 for adam"),
    Column("variance", "float64", "(loss/parameter)^2", "sigma^2, summed over the parameters; 0: without noise"),
    Column("seed", "int64", "1", "of the noise; every run of an optimizer and a size has its own"),
    Column("steps", "int64", "1", "number of steps"),
    Column("regret", "float64", "nat", "sum over the steps of the loss above the least one"),
    Column("first_gradient", "float64", "(loss/parameter)^2", "squared norm at the start"),
    Column("largest_gradient", "float64", "(loss/parameter)^2", "largest squared norm in the run without noise"),
    Column("excess", "float64", "nat", "regret beyond that of the run without noise"),
)

BOUND = {"sgd": 1.0, "adam": 0.5}
"""Exponent of sigma^2 in the upper bound."""
ADAM = 0.1
"""The size that is 1 for Adam."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
REGULARIZATION = 1e-2
DOMINATES = 10.0
ROUGH = 0.25
"""Relative standard error of a mean above which the delta method is called rough."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Of the study; ``variances`` of them are spread evenly in the logarithm over sigma^2 from 0.1 to 1000, in units of
    the squared gradient at the start; ``sizes`` of the steps are in units of 1/L (SGD) and 0.1 (Adam)."""

    steps: int = 8000
    seeds: int = 20
    variances: int = 9
    sizes: tuple[float, ...] = (0.25, 1.0, 4.0)


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
        small = np.exp(-np.abs(margin))
        loss = (np.maximum(-margin, 0) + np.log1p(small)).mean(1) + REGULARIZATION / 2 * np.square(w).sum(1)
        slope = -self.sign * np.where(margin > 0, small, 1) / (1 + small)
        return loss, slope @ self.x / len(self.x) + REGULARIZATION * w


def rounded(g: Array, step: Array, random: np.random.Generator) -> Array:
    """Stochastic rounding of ``g`` ``[R, P]`` onto grids of ``step`` ``[R, 1]`` with uniform offsets; 0: as it is."""
    offset, u = random.random((2, *g.shape))
    y = np.divide(g, step, out=np.zeros_like(g), where=step > 0) - offset
    low = np.floor(y)
    return np.where(step > 0, step * (low + (u < y - low) + offset), g)


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row for each optimizer, size, variance, seed and number of steps; variance 0 once."""

    def of_size(optimizer: str, size: float) -> list[dict[str, object]]:
        return run(optimizer, size, settings)

    cases = [{"optimizer": name, "size": size} for name in OPTIMIZERS for size in settings.sizes]
    return {"regret": parts.every("optimizers", cases, of_size)}


def run(optimizer: str, size: float, settings: Settings) -> list[dict[str, object]]:
    """Regret of runs from zero weights, which go side by side."""
    problem = Problem()
    start = float(np.square(problem(np.zeros((1, problem.parameters)))[1]).sum())
    variances = [float(v) * start for v in np.logspace(-1, 3, settings.variances)]
    runs = [(0.0, 0), *((v, seed) for v in variances for seed in range(settings.seeds))]
    step = np.sqrt(6 * np.array([[v] for v, _ in runs]) / problem.parameters)
    random = np.random.default_rng([list(OPTIMIZERS).index(optimizer), settings.sizes.index(size)])
    move = OPTIMIZERS[optimizer](size * (1 / problem.curvature if optimizer == "sgd" else ADAM))
    w = np.zeros((len(runs), problem.parameters))
    regret, largest, rows = np.zeros(len(runs)), 0.0, []
    for t in range(1, settings.steps + 1):
        loss, g = problem(w)
        regret += loss - problem.least
        largest = max(largest, float(np.square(g[0]).sum()))
        w -= move(rounded(g, step, random), t)
        if t in (settings.steps // 4, settings.steps):
            rows += [
                {
                    "variance": variance,
                    "seed": seed,
                    "steps": t,
                    "regret": own,
                    "first_gradient": start,
                    "largest_gradient": largest,
                    "excess": own - regret[0],
                }
                for (variance, seed), own in zip(runs, regret, strict=True)
            ]
    return rows


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


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean excess over the seeds, its interval (``low``, ``high``) and standard ``error``, by everything else."""
    by = ["optimizer", "size", "steps", "variance"]
    found = []
    for key, own in runs[runs["variance"] > 0].groupby(by, sort=False):
        excess = own["excess"].to_numpy()
        mean, low, high = mean_interval(excess)
        dominates = key[-1] >= DOMINATES * own["first_gradient"].iloc[0] * (1 - 1e-9)
        row = dict(zip(by, key, strict=True)) | {"mean": mean, "low": low, "high": high, "seeds": len(excess)}
        found.append({**row, "error": excess.std(ddof=1) / math.sqrt(len(excess)), "dominates": dominates})
    return pd.DataFrame(found)


def slope_weights(rows: pd.DataFrame) -> Array:
    """Of the logarithms of the means, for their least squares slope against that of the variance."""
    x = np.log(rows["variance"].to_numpy())
    return (x - x.mean()) / np.square(x - x.mean()).sum()


def combined(rows: pd.DataFrame, weights: Array) -> tuple[float, float, float]:
    """Weighted sum of the logarithms of the (independent) means, and its 95 % interval; NaN where one is not positive.

    The interval is that of the delta method, with Welch and Satterthwaite's degrees of freedom.
    """
    mean, error, seeds = (rows[name].to_numpy() for name in ("mean", "error", "seeds"))
    if not (mean > 0).all():
        return math.nan, math.nan, math.nan
    value, parts = float(weights @ np.log(mean)), np.square(weights * error / mean)
    df = parts.sum() ** 2 / (parts**2 / (seeds - 1)).sum()
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, df)) * math.sqrt(parts.sum())
    return value, value - half, value + half


def exponents(runs: pd.DataFrame) -> pd.DataFrame:
    """Where sigma dominates, a row per optimizer, size and number of steps, with a 95 % interval in every cell.

    ``whole``: exponent over all these variances; ``lower`` and ``upper``: over either half of them, which share the one
    in the middle; ``bend``: upper less lower. ``error``: the largest standard error of a mean, relative to it.
    """
    rows, found = means(runs), []
    by = ["optimizer", "size", "steps"]
    for key, own in rows[rows["dominates"]].sort_values("variance").groupby(by):
        half = (len(own) + 1) // 2
        lower, upper = np.zeros(len(own)), np.zeros(len(own))
        lower[:half], upper[-half:] = slope_weights(own[:half]), slope_weights(own[-half:])
        weights = {"whole": slope_weights(own), "lower": lower, "upper": upper, "bend": upper - lower}
        row = dict(zip(by, key, strict=True))
        row["error"] = float((own["error"] / own["mean"].abs()).max())
        found.append({**row, **{name: combined(own, weight) for name, weight in weights.items()}})
    return pd.DataFrame(found)


def sgd_less_adam(runs: pd.DataFrame) -> pd.DataFrame:
    """Difference of the exponents with its 95 % interval (``apart``) and ``error``, by size and number of steps."""
    rows, found = means(runs), []
    by = ["size", "steps"]
    for key, own in rows[rows["dominates"]].sort_values("variance").groupby(by):
        sgd, adam = (own[own["optimizer"] == name] for name in ("sgd", "adam"))
        weights = np.concatenate([slope_weights(sgd), -slope_weights(adam)])
        row = {**dict(zip(by, key, strict=True)), "error": float((own["error"] / own["mean"].abs()).max())}
        found.append({**row, "apart": combined(pd.concat([sgd, adam]), weights)})
    return pd.DataFrame(found)


def read(tables: Tables) -> pd.DataFrame:
    """The exponents, a row per optimizer, number of steps and size."""
    runs, shown = tables["regret"], []
    quiet = runs[runs["variance"] == 0].set_index(["optimizer", "size", "steps"])
    for row in exponents(runs).sort_values(["optimizer", "steps"], kind="stable", ascending=False).itertuples():
        own = quiet.loc[row.optimizer, row.size, row.steps]
        shown.append(
            {
                "optimizer": NAMES[row.optimizer],
                "steps": str(row.steps),
                "a": _step(row.optimizer, row.size),
                "regret without noise": f"{own['regret']:.3g}",
                "largest / first gradient": f"{own['largest_gradient'] / own['first_gradient']:.3g}",
                "error of means": f"{row.error:.2g}",
                "exponent": _told(row.whole, ".3f"),
                "lower half": _told(row.lower),
                "upper half": _told(row.upper),
                "bound": f"{BOUND[row.optimizer]:g}",
            }
        )
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """All exponents, beside those of the bounds, of parts of the range, and of the other optimizer."""
    runs = tables["regret"]
    found, apart, rows = exponents(runs), sgd_less_adam(runs), means(runs)
    most = rows["variance"].max() / runs["first_gradient"].iloc[0]
    where = f"for σ² of {DOMINATES:g} to {most:.3g} times the squared gradient at the start"
    told = []
    for optimizer, name in NAMES.items():
        own = found[found["optimizer"] == optimizer]
        sides = [_side(ends, BOUND[optimizer]) for ends in own["whole"]]
        told.append(
            Claim(
                f"{name}, {where}: the regret's excess over that without noise grows as σ² to the power of "
                f"{_list(own, 'whole', partial(_step, optimizer))}. The bound's power at such a schedule is "
                f"{BOUND[optimizer]:g}; being that of an upper bound, it is no prediction to confirm: "
                f"{sides.count('above')} of {len(sides)} intervals are above it, {sides.count('below')} below, "
                f"{sides.count('open')} hold it.{_rough(own, optimizer)}"
            )
        )
    bends = {name: [_side(ends, 0.0) for ends in own["bend"]] for name, own in found.groupby("optimizer", sort=False)}
    cells = ", ".join(
        f"falls in {sides.count('below')} of {len(sides)} cases with {NAMES[name]} (rises in {sides.count('above')})"
        for name, sides in bends.items()
    )
    told.append(
        Claim(
            "A power law has one exponent over the whole range. From the lower half of these variances to the upper "
            f"half it {cells}; the other 95 % intervals of the difference hold 0."
        )
    )
    rough = apart["error"] > ROUGH
    sides = ["open" if vague else _side(ends, 0.0) for ends, vague in zip(apart["apart"], rough, strict=True)]
    told.append(
        Claim(
            "At the same relative step size the excess grows more slowly with Adam than with SGD: the exponent of SGD "
            f"less that of Adam is {_list(apart, 'apart', lambda size: f'{size:g}')}; {sides.count('above')} of "
            f"{len(sides)} intervals are above 0, {sides.count('below')} below, and {sides.count('open')} open, of "
            f"which {rough.sum()} because they are rough.",
            True if set(sides) == {"above"} else False if "below" in sides else None,
            "not examined" if "below" in sides else "",
        )
    )
    return told


def _rough(rows: pd.DataFrame, optimizer: str) -> str:
    """Which intervals are rough, if any."""
    rough = rows[rows["error"] > ROUGH]
    if rough.empty:
        return ""
    which = ", ".join(dict.fromkeys(_step(optimizer, size) for size in rough["size"]))
    return f" Intervals with {which} are rough, as standard errors are up to {rough['error'].max():.2g} of the means."


def _list(rows: pd.DataFrame, column: str, name: Callable[[float], str]) -> str:
    """Numbers with their intervals, by size, and by number of steps."""
    return "; ".join(
        ", ".join(f"{_told(ends)} ({name(size)})" for size, ends in zip(own["size"], own[column], strict=True))
        + f" over {steps} steps"
        for steps, own in sorted(rows.groupby("steps"), reverse=True)
    )


def _told(ends: tuple[float, float, float], form: str = ".2f") -> str:
    return "none" if math.isnan(ends[0]) else with_interval(*ends, form)


def _side(ends: tuple[float, float, float], border: float) -> str:
    """Of the border, on which an interval lies; "none" where there is none."""
    value, low, high = ends
    return "none" if math.isnan(value) else "above" if low > border else "below" if high < border else "open"


def _step(optimizer: str, size: float) -> str:
    return f"{size:g}/L" if optimizer == "sgd" else f"{size * ADAM:g}"


_LOOKS = (("v", style.SKY), ("o", style.BLUE), ("^", style.INK), ("D", style.ORANGE), ("s", style.PURPLE))


def draw(tables: Tables) -> dict[str, Figure]:
    """Mean excess against variance over all steps, a panel for each optimizer."""
    runs = tables["regret"]
    rows, found = (each[each["steps"] == each["steps"].max()] for each in (means(runs), exponents(runs)))
    figure = style.new_figure(style.COLUMN_WIDTH, 4.8)
    panels = figure.subplots(2, 1, sharex=True)
    for ax, (optimizer, name) in zip(panels, NAMES.items(), strict=True):
        own = rows[rows["optimizer"] == optimizer]
        for exponent, look in zip(found[found["optimizer"] == optimizer].itertuples(), _LOOKS, strict=False):
            label = f"a = {_step(optimizer, exponent.size)}: {_told(exponent.whole)}"
            _means(ax, own[own["size"] == exponent.size], *look, label)
        _bound(ax, own, optimizer)
        ax.set(xscale="log", yscale="log", ylabel="regret beyond that\nwithout noise [nat]")
        ax.grid(True)
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.02), ncols=2, title_fontsize=6,
                  title=f"{name}, step a / √t: exponent of σ² with 95 % interval, on the line")  # fmt: skip
    panels[-1].set_xlabel(
        "variance σ² of the quantized gradient\n"
        f"({rows['steps'].iloc[0]} steps; means over the seeds, 95 %;\nhollow: mean not above 0)"
    )
    return {"regret": figure}


def _means(ax: Axes, rows: pd.DataFrame, marker: str, color: str, label: str) -> None:
    shown = rows[rows["mean"] > 0]
    mean, low, high = (shown[name].to_numpy() for name in ("mean", "low", "high"))
    ax.errorbar(
        shown["variance"], mean, (mean - low, high - mean), fmt=marker, color=color, elinewidth=0.8, label=label
    )
    lost = rows.loc[rows["mean"] <= 0, "variance"]
    if len(lost):
        ax.plot(lost, np.zeros(len(lost)), marker, color=color, markerfacecolor="white", clip_on=False,
                transform=ax.get_xaxis_transform())  # fmt: skip
    inside = shown[shown["dominates"]]
    ax.plot(inside["variance"], inside["mean"], color=color, linewidth=0.8)


def _bound(ax: Axes, rows: pd.DataFrame, optimizer: str) -> None:
    """The power of the bound, at a height of no meaning: above all means where sigma dominates."""
    inside = rows[rows["dominates"]]
    x = np.array([inside["variance"].min(), inside["variance"].max()])
    y = 2 * (inside["mean"] / inside["variance"] ** BOUND[optimizer]).max() * x ** BOUND[optimizer]
    ax.plot(x, y, "--", color=style.GREY, label=f"bound's power: {BOUND[optimizer]:g}")


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
    legend="Exponent of σ² in the mean excess of the regret over the run without noise: least squares in logarithms "
    "over variances of at least ten times the squared gradient at the start, and over either half of them, with 95 % "
    "intervals (delta method, Student t: rough where the largest relative standard error of a mean, error of means, is "
    "above a quarter); none: a mean is not positive. a: of the step a / √t. Largest / first "
    "gradient: squared norms, in the run without noise. Bound: exponent of the upper bound.",
)

if __name__ == "__main__":
    main(STUDY)
