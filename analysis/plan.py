"""What does it gain to divide bits among the layers, and do the predictions hold?

``python -m analysis.plan`` plans the bits of the default model on the default data, and of the small transformer on the
sources of Python's standard library, each with BHQ and with PSQ for the input gradient and one grid per channel (the
recipe's) for the weight gradient; once for a mean of 4 bits and once for a budget of 1.1 sampling variances. It saves
the comparison of every plan with the simpler policies that meet the same target, the plans themselves, and a figure.
Plans that are in ``--runs`` already are not made again, so that it can be interrupted.

``factor`` is the measured variance over the plan's; ``saved`` the mean bits that the plan saves. Policies with the same
target are: the plan; the same bits everywhere ("uniform"); and, where that is better than uniform, one width for all
weight-gradient quantizers and one for all input-gradient quantizers ("by site"), which tells the gain between the two
sites from the gain between the layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.patches import Patch

import fqtstats
from fqtstats import experiment, ops
from fqtstats.plans import Plan
from fqtstats.provenance import provenance
from fqtstats.report import style

FOLDER = Path(__file__).parent / "results" / "plan"
MODELS = {"preact_resnet20": "digits", "transformer": "text"}
QUANTIZERS = ("bhq", "psq")
TARGETS: dict[str, dict[str, float]] = {"mean of 4 bits": {"mean_bits": 4}, "budget 1.1": {"budget": 1.1}}
COLORS = {"plan": "#009E73", "by site": "#56B4E9", "uniform": "#8a8a8a"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=64, help="quantized gradients drawn to measure a policy")
    parser.add_argument("--precision", type=float, default=0.05, help="of the profiles")
    parser.add_argument("--batches", type=int, default=16, help="further minibatches, for the sampling variance")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "plan", help="folder of the plans' runs")
    given = parser.parse_args()
    plans = {}
    for model, quantizer, target in itertools.product(MODELS, QUANTIZERS, TARGETS):
        place = given.runs / f"{model}-{quantizer}-{target.replace(' ', '-')}"
        if not place.exists():
            make(model, quantizer, target, given.draws, given.precision, given.batches).save(place)
        plans[model, quantizer, target] = plan = fqtstats.load_plan(place)
        print(f"{model}, {quantizer}, {target}: {plan}", flush=True)
    save(plans, given.out)


def make(model: str, quantizer: str, target: str, draws: int, precision: float, batches: int) -> Plan:
    """One plan."""
    setup = experiment.prepare(model, MODELS[model], further=batches)
    policy = fqtstats.policies.get(f"statquant-{quantizer}")
    return fqtstats.plan(
        setup.model, setup.batch, setup.loss, policy, batches=setup.further, draws=draws, precision=precision,
        **TARGETS[target],
    )  # fmt: skip


def compare(plans: dict[tuple[str, str, str], Plan]) -> pd.DataFrame:
    """One row per model, quantizer, target and policy."""
    found = []
    for (model, quantizer, target), plan in plans.items():
        rows = plan.comparison
        found.append(
            rows.assign(
                predicted_over_measured=rows["predicted"] / rows["measured"],
                factor=rows["measured"] / plan.total["measured"],
                saved=rows["mean_bits"] - plan.mean_bits,
                over_sampling=1 + rows["measured"] / rows["sampling_variance"],
            )
        )
        for column, value in (("target", target), ("quantizer", quantizer), ("model", model)):
            found[-1].insert(0, column, value)
    return pd.concat(found, ignore_index=True)


def save(plans: dict[tuple[str, str, str], Plan], folder: Path) -> None:
    """``comparison.csv``, ``comparison.json``, ``bits.csv`` and ``plan.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    comparison = compare(plans)
    comparison.to_csv(folder / "comparison.csv", index=False, float_format="%.6g")
    names = ["model", "quantizer_of_grad_input", "target"]
    tables = [plan.table.assign(**dict(zip(names, key, strict=True))) for key, plan in plans.items()]
    bits = pd.concat(tables, ignore_index=True)
    bits[[*names, *(c for c in bits.columns if c not in names)]].to_csv(
        folder / "bits.csv", index=False, float_format="%.6g"
    )
    ratio = comparison["predicted_over_measured"]
    told = {"predicted_over_measured": {"least": ratio.min(), "greatest": ratio.max()}, **provenance(ops.isa())}
    (folder / "comparison.json").write_text(
        json.dumps({**told, "rows": json.loads(comparison.to_json(orient="records"))}, indent=2) + "\n"
    )
    (folder / "plan.png").write_bytes(draw(comparison))
    print(comparison.to_string(float_format="{:.4g}".format))


def draw(comparison: pd.DataFrame) -> bytes:
    """Left: measured variance over the plan's at the same mean bits. Right: bits that it takes to meet the budget."""
    cases = [*itertools.product(MODELS, QUANTIZERS)]
    with style.applied():
        figure = style.new_figure(2 * style.COLUMN_WIDTH, 2.2)
        for ax, target, column, label in zip(
            figure.subplots(1, 2), TARGETS, ("factor", "mean_bits"),
            ("variance at a mean of 4 bits / plan's", "mean bits for a budget of 1.1"), strict=True,
        ):  # fmt: skip
            rows = comparison[comparison["target"] == target].set_index(["model", "quantizer", "policy"])[column]
            for place, policy in enumerate(COLORS):
                values = [rows.get((*case, policy), np.nan) for case in cases]
                x = np.arange(len(cases)) + 0.27 * (place - 1)
                bars = ax.bar(x, values, 0.25, color=COLORS[policy])
                ax.bar_label(bars, ["" if np.isnan(value) else f"{value:.3g}" for value in values], fontsize=5)
            ax.set_xticks(range(len(cases)), ["\n".join([*model.split("_"), quantizer]) for model, quantizer in cases])
            ax.set_xlim(-0.6, len(cases) - 0.4)
            ax.tick_params(axis="x", length=0)
            ax.set_ylabel(label)
        handles = [Patch(color=color, label=policy) for policy, color in COLORS.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return style.png(figure)


if __name__ == "__main__":
    main()
