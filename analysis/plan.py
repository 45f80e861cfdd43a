"""What does it gain to divide bits among the layers, and do the predictions hold?

Bits are planned (``fqtstats.plan``) for the default model on the default data, and for the small transformer on the
sources of Python's standard library, each with BHQ and with PSQ for the input gradient and one grid per channel (the
recipe's) for the weight gradient; once for a mean number of bits and once for a budget of sampling variances.

Policies with the same target are: the plan; the same bits everywhere ("uniform"); and, where that is better than
uniform, one width for all weight-gradient quantizers and one for all input-gradient quantizers ("by site"), which tells
the gain between the two sites from the gain between the layers.

Every statement is on one network and minibatch; intervals are over the draws that the variances are measured with, and
of a ratio as if those of its two sides were independent, on the logarithm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import fqtstats
from analysis import networks
from analysis.study import Claim, Parts, Row, Study, Tables, interval, main, with_interval
from fqtstats import experiment
from fqtstats.plans import COMPARISON, TABLE
from fqtstats.report import style
from fqtstats.schema import Column

MARKS = {"plan": (style.GREEN, "D"), "by site": (style.SKY, "^"), "uniform": (style.GREY, "o")}
"""Colour and marker of each policy."""

_CASE = (
    Column("model", "str", "", "network"),
    Column("quantizer_of_grad_input", "str", "", "input-gradient quantizer"),
    Column("target", "str", "", "mean bits, or budget"),
)
COLUMNS = {"comparison": (*_CASE, *COMPARISON), "bits": (*_CASE, *TABLE)}


@dataclass(frozen=True)
class Settings:
    """Of the study.

    ``mean_bits`` and ``budget`` (times the sampling variance) are the two targets; ``draws`` measure a policy,
    ``precision`` is that of the profiles, and ``batches`` further minibatches tell the sampling variance.
    """

    models: tuple[str, ...] = ("preact_resnet20", "transformer")
    quantizers: tuple[str, ...] = ("bhq", "psq")
    mean_bits: float = 4.0
    budget: float = 1.1
    draws: int = 48
    precision: float = 0.05
    batches: int = 16


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per network, quantizer, target and policy, and a row per quantizer of every plan."""
    targets = {"mean bits": {"mean_bits": settings.mean_bits}, "budget": {"budget": settings.budget}}

    def make(model: str, quantizer_of_grad_input: str, target: str) -> Iterator[Row]:
        setup = experiment.prepare(model, networks.DATA[model], further=settings.batches)
        policy = fqtstats.policies.get(f"statquant-{quantizer_of_grad_input}")
        plan = fqtstats.plan(
            setup.model, setup.batch, setup.loss, policy, batches=setup.further, draws=settings.draws,
            precision=settings.precision, **targets[target],
        )  # fmt: skip
        for table, rows in (("comparison", plan.comparison), ("bits", plan.table)):
            # By way of JSON, which knows no missing integers.
            for row in json.loads(rows.to_json(orient="records", double_precision=15)):
                yield {"of": table, **row}

    cases = [
        {"model": model, "quantizer_of_grad_input": quantizer, "target": target}
        for model in settings.models
        for quantizer in settings.quantizers
        for target in targets
    ]
    rows = parts.every("plans", cases, make)
    return {
        name: rows.loc[rows["of"] == name, [column.name for column in columns]] for name, columns in COLUMNS.items()
    }


# --- what is said of it -----------------------------------------------------------------------------------------------

_CASES = ["model", "quantizer_of_grad_input", "target"]


def compare(comparison: pd.DataFrame) -> pd.DataFrame:
    """The rows with what they are beside their plan.

    ``factor`` is the measured variance over the plan's, with ``factor_low`` and ``factor_high``; ``saved`` the mean
    bits that the plan saves; ``over`` the variance of a step's gradient over the sampling variance, with its ends;
    ``held`` predicted over measured, and ``held_error`` the standard error of its logarithm.
    """
    plans = comparison[comparison["policy"] == "plan"].set_index(_CASES)
    own = plans.loc[list(comparison[_CASES].itertuples(index=False, name=None))].reset_index(drop=True)
    found = comparison.reset_index(drop=True)
    error, reference = (_relative_error(rows) for rows in (found, own))
    half = np.where(found["policy"] == "plan", 0.0, 1.96 * np.sqrt(error**2 + reference**2))
    factor = found["measured"] / own["measured"]
    return found.assign(
        factor=factor,
        factor_low=factor * np.exp(-half),
        factor_high=factor * np.exp(half),
        saved=found["mean_bits"] - own["mean_bits"],
        **{f"over{end}": 1 + found[f"measured{end}"] / found["sampling_variance"] for end in ("", "_low", "_high")},
        held=found["predicted"] / found["measured"],
        held_error=np.sqrt(error**2 + (found["predicted_error"] / found["predicted"]) ** 2),
    )


def _relative_error(rows: pd.DataFrame) -> pd.Series:
    """Standard error of the measured variance, as a share of it."""
    return (rows["measured_high"] - rows["measured_low"]) / (2 * 1.96 * rows["measured"])


def read(tables: Tables) -> pd.DataFrame:
    """A row per policy."""
    return pd.DataFrame(
        {
            "model": row.model,
            "Q2": row.quantizer_of_grad_input,
            "target": row.target,
            "policy": row.policy + ("" if pd.isna(row.q1_bits) else f" {row.q1_bits}, {row.q2_bits}"),
            "mean bits": f"{row.mean_bits:.2f}",
            "variance / plan's": with_interval(row.factor, row.factor_low, row.factor_high, ".3g")
            if row.policy != "plan"
            else "1",
            "step / sampling": with_interval(row.over, row.over_low, row.over_high, ".3f"),
            "predicted / measured": f"{row.held:.3f} ± {row.held * row.held_error:.3f}",
        }
        for row in compare(tables["comparison"]).itertuples()
    )


def claims(tables: Tables) -> list[Claim]:
    """What plans gain at the same bits, what they save within the budget, and whether predictions hold."""
    rows, told = compare(tables["comparison"]), []
    for (model, quantizer, target), own in rows.groupby(_CASES, sort=False):
        plan = own.iloc[0]
        others = own[own["policy"] != "plan"]
        if target == "mean bits":
            told += [
                Claim(
                    f"{model}, {quantizer}, {plan['mean_bits']:g} bits in the mean: the {row.policy} policy has "
                    f"{with_interval(row.factor, row.factor_low, row.factor_high)} times the plan's variance.",
                    True if row.factor_low > 1 else False if row.factor_high < 1 else None,
                    f"the {row.policy} policy has the smaller variance" if row.factor_high < 1 else "",
                )
                for row in others.itertuples()
            ]
            continue
        fewer = others[others["saved"] < 0]
        bits = " and ".join(f"{row.policy} {row.mean_bits:.2f}" for row in others.itertuples())
        told.append(
            Claim(
                f"{model}, {quantizer}, within the budget: the plan takes {plan['mean_bits']:.2f} bits in the mean"
                + (f", {bits}" if bits else "")
                + f" (counted); a step's gradient then has "
                f"{with_interval(plan['over'], plan['over_low'], plan['over_high'], '.3f')} times the sampling "
                "variance.",
                fewer.empty,
                "" if fewer.empty else f"{' and '.join(fewer['policy'])} takes fewer bits",
            )
        )
    error = NormalDist().inv_cdf(1 - 0.05 / (2 * len(rows)))
    off = (np.log(rows["held"]).abs() > error * rows["held_error"]).sum()
    ends = [rows.loc[rows["held"].idxmin()], rows.loc[rows["held"].idxmax()]]
    least, most = (
        f"{row['held']:.3f} {interval(*(row['held'] * math.exp(side * 1.96 * row['held_error']) for side in (-1, 1)))}"
        for row in ends
    )
    told.append(
        Claim(
            f"Predicted variances are {least} to {most} times the measured ones; {off} of {len(rows)} differ by more "
            "than both their errors (5 % over all, Bonferroni).",
            bool(off == 0),
            f"{off} predictions are off" if off else "",
        )
    )
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Above: measured variance over the plan's at the same mean bits. Below: bits that it takes to meet the budget."""
    rows = compare(tables["comparison"])
    cases = list(dict.fromkeys(rows[_CASES[:2]].itertuples(index=False, name=None)))
    figure = style.new_figure(style.COLUMN_WIDTH, 3.2)
    above, below = figure.subplots(2, 1, sharex=True)
    of_mean_bits = rows[(rows["target"] == "mean bits") & (rows["policy"] != "plan")]
    of_budget = rows[rows["target"] == "budget"]
    for ax, own in ((above, of_mean_bits), (below, of_budget)):
        policies = [policy for policy in MARKS if (own["policy"] == policy).any()]
        for place, policy in enumerate(policies):
            found = own[own["policy"] == policy]
            at = [cases.index(case) for case in found[_CASES[:2]].itertuples(index=False, name=None)]
            x = np.array(at) + 0.2 * (place - (len(policies) - 1) / 2)
            y = found["factor" if ax is above else "mean_bits"]
            error = (y - found["factor_low"], found["factor_high"] - y) if ax is above else None
            color, marker = MARKS[policy]
            ax.errorbar(x, y, error, fmt=marker, color=color, elinewidth=0.8, capsize=2, label=policy)
            for where, value in zip(x, y, strict=True):
                text = f"{value:.2f}"
                ax.annotate(text, (where, value), (4, 0), textcoords="offset points", va="center", fontsize=5.5)
    above.axhline(1, color=MARKS["plan"][0], linewidth=0.8, linestyle="--", label="plan")
    above.set(yscale="log", ylabel="variance at the same mean\nbits / plan's (95 %)")
    above.set_ylim(0.9, 1.25 * of_mean_bits["factor_high"].max())
    ticks = [tick for tick in (1, 2, 4, 8, 16) if tick < above.get_ylim()[1]]
    above.set_yticks(ticks, [f"{tick}x" for tick in ticks])
    above.minorticks_off()
    below.set(ylabel="mean bits to meet the\nbudget (counted)")
    below.margins(y=0.15)
    below.set_xticks(range(len(cases)), [f"{model}\n{quantizer}".replace("preact_", "") for model, quantizer in cases])
    below.set_xlim(-0.5, len(cases) - 0.3)
    for ax in (above, below):
        ax.grid(True, axis="y")
        ax.tick_params(axis="x", length=0)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderpad=0)
    return {"plan": figure}


STUDY = Study(
    name="plan",
    question="What does it gain to divide bits among the layers, and do the predictions hold?",
    full=Settings(),
    quick=Settings(("mlp",), ("psq",), draws=4, precision=0.3, batches=4),
    columns=COLUMNS,
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Q2: input-gradient quantizer. Policy: with its bits of the weight- and of the input-gradient quantizers. "
    "Step / sampling: variance of a step's gradient over the sampling variance. 95 % intervals over draws; predicted / "
    "measured with one standard error.",
)

if __name__ == "__main__":
    main(STUDY)
