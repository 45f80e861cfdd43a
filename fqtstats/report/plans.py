"""Figure and terminal table of a plan of bits, and the same content as plain data for ``--json``."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Group, RenderableType
from rich.text import Text

from fqtstats.plans import Plan
from fqtstats.report import style
from fqtstats.report.columns import SITES
from fqtstats.report.figures import root
from fqtstats.report.fitted import FittedColumn, FittedTable, unquantized
from fqtstats.report.numbers import percent, plain, plain_rows, ratio, relative_interval, scientific
from fqtstats.schema import Json

__all__ = ["layer_table", "plot_bits", "render_all", "summary", "to_dict", "total_table"]

_COLORS = {"grad_weight": style.ORANGE, "grad_input": style.BLUE}
"""Of the two quantizers of a layer."""

_MEANING_FIXED = " (* not the plan's to choose)"

_PITCH = 0.17
_WIDEST = 6.9
_LABEL_PITCH = 0.1
"""Sizes in inches: of a layer, of a page, and between two layers' names at least."""


def plot_bits(plan: Plan, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """The bits of each layer's two gradient quantizers over the network, and their mean.

    Args:
        plan: what to draw.
        ax: draw there; by default a new figure.
        width: of a new figure, in inches.
    """
    layers = list(dict.fromkeys(plan.table["layer"]))
    with style.applied():
        if ax is None:
            width = min(_WIDEST, max(style.COLUMN_WIDTH, 0.6 + _PITCH * len(layers))) if width is None else width
            figure = style.new_figure(width, 2.4)
            ax = figure.subplots()
        else:
            figure = root(ax)
            width = ax.get_window_extent().width / figure.dpi
        mean = ax.axhline(plan.mean_bits, color=style.INK, linewidth=0.6, linestyle="--", zorder=3)
        for offset, (site, color) in zip((-0.21, 0.21), _COLORS.items(), strict=True):
            rows = plan.table[(plan.table["site"] == site) & plan.table["bits"].notna()]
            x = np.array([layers.index(layer) for layer in rows["layer"]], dtype=np.float64) + offset
            ax.bar(x, rows["bits"].to_numpy(dtype=np.float64), 0.38, color=color)
        every = math.ceil(_LABEL_PITCH * len(layers) / (0.9 * width))
        places = range(0, len(layers), every)
        names = [layers[i] or "(model)" for i in places]
        ax.set_xticks(list(places), [name if len(name) <= 28 else "…" + name[-27:] for name in names], rotation=90)
        ax.set_xlim(-0.6, len(layers) - 0.4)
        ax.tick_params(axis="x", length=0)
        ax.set_yticks(range(max(8, int(plan.table["bits"].max(skipna=True) or 0)) + 1))
        ax.grid(axis="y")
        ax.set_ylabel("bits")
        handles = [
            Patch(color=_COLORS["grad_weight"], label="weight gradient (Q1)"),
            Patch(color=_COLORS["grad_input"], label="input gradient (Q2)"),
        ]
        mean.set_label(f"mean {plan.mean_bits:.3g}")
        figure.legend(handles=[*handles, mean], loc="outside upper center", ncols=3)
    return figure


def render_all(plan: Plan) -> dict[str, bytes]:
    """All figures, as PNG files by name (without the suffix)."""
    return {"bits": style.png(plot_bits(plan))}


def summary(plan: Plan) -> RenderableType:
    """The bits of each layer with the shares of the predicted variance; then predicted against measured totals."""
    return Group(layer_table(plan), Text(""), total_table(plan), *_conclusions(plan), *unquantized(plan.metadata))


def layer_table(plan: Plan) -> RenderableType:
    """One row per layer, with the bits of both quantizers as numbers and bars, and their mean."""
    layers = list(dict.fromkeys(plan.table["layer"]))
    names = [*(Text(layer or "(model)") for layer in layers), Text("mean, sum")]
    columns = [FittedColumn("layer", names, 100, names=True)]
    meanings = {
        "Q1": f"bits of the weight-gradient quantizer{_MEANING_FIXED if plan.table['fixed'].any() else ''}",
        "Q2": "of the input-gradient quantizer",
    }
    for site, name in SITES.items():
        rows = plan.table[plan.table["site"] == site].set_index("layer").reindex(layers)
        found = [rows.loc[layer] for layer in layers]
        known = rows["bits"].dropna()
        mean = Text(f"{known.mean():.2f}" if len(known) else "")
        share = Text(percent(float(rows["share"].sum())))
        columns += [
            FittedColumn(name, [*(Text(_bits(row)) for row in found), mean], 95, meaning=meanings[name]),
            FittedColumn("bar", [*(Text(_bar(row), _COLORS[site]) for row in found), Text("")], 50, names=True),
            FittedColumn("share", [*(Text(percent(float(row["share"]))) for row in found), share], 80),
        ]
    columns[-1] = replace(columns[-1], meaning="of the predicted variance")
    return FittedTable(_title(plan), columns, total=True)


def total_table(plan: Plan) -> RenderableType:
    """The plan and the simpler policies: predicted against measured variance."""
    rows = [plan.comparison.iloc[index] for index in range(len(plan.comparison))]
    ratios = [ratio(float(row["predicted"]), float(row["measured"])) for row in rows]
    errors = [ratio(float(row["predicted_error"]), float(row["predicted"])) for row in rows]
    sampled = [1 + ratio(_found(row), float(row["sampling_variance"])) for row in rows]
    columns = [
        FittedColumn("policy", [Text(_policy(row)) for row in rows], 100, names=True),
        FittedColumn("bits", [Text(f"{row['mean_bits']:.2f}") for row in rows], 95),
        FittedColumn("predicted", [Text(scientific(float(row["predicted"]))) for row in rows], 90),
        FittedColumn("±", [Text(percent(error)) for error in errors], 70),
        FittedColumn("measured", [Text(scientific(float(row["measured"]))) for row in rows], 90),
        FittedColumn("95 %", [Text(_interval(row)) for row in rows], 75),
        FittedColumn("ratio", [Text(plain(one)) for one in ratios], 85, meaning="predicted / measured"),
        FittedColumn(
            "/ sampling", [Text("" if math.isnan(one) else f"{one:.4g}") for one in sampled], 80,
            meaning="noise and sampling variance together, over the sampling variance",
        ),
    ]  # fmt: skip
    return FittedTable("gradient variance from quantization", columns, total=False)


def to_dict(plan: Plan) -> dict[str, Json]:
    """The plan as plain data for ``--json``: strict JSON, with null where a table has NaN."""
    return {
        "table": plain_rows(plan.table),
        "comparison": plain_rows(plan.comparison),
        "policy": plan.code,
        "metadata": plan.metadata,
    }


def _title(plan: Plan) -> str:
    target = plan.metadata.get("target", {})
    kinds = ", ".join(sorted(set(plan.table["quantizer"])))
    goal = f"budget {target['budget']:g}" if "budget" in target else f"mean of {target.get('mean_bits', 0):g} bits"
    return f"plan for {kinds}: {goal}"


def _conclusions(plan: Plan) -> list[Text]:
    """What the plan gains over the simpler policies."""
    others = [plan.comparison.iloc[index] for index in range(1, len(plan.comparison))]
    if "budget" in plan.metadata.get("target", {}):
        gains = [f"{float(other['mean_bits']) - plan.mean_bits:.2f} bits per quantizer fewer than" for other in others]
    else:
        gains = [f"{plain(ratio(_found(other), _found(plan.total)))} times less variance than" for other in others]
    told = [f"{gain} {_policy(other)}" for gain, other in zip(gains, others, strict=True)]
    return [Text(f"the plan has {', '.join(told)}", "bold")] if told else []


def _policy(row: pd.Series) -> str:
    if row["policy"] == "uniform":
        return f"{row['q1_bits'] if pd.isna(row['q2_bits']) else row['q2_bits']} bits everywhere"
    return f"Q1 {row['q1_bits']}, Q2 {row['q2_bits']} bits" if row["policy"] == "by site" else "plan"


def _found(row: pd.Series) -> float:
    """The measured variance, or the predicted one where it was not measured."""
    return float(row["predicted"] if math.isnan(row["measured"]) else row["measured"])


def _interval(row: pd.Series) -> str:
    """The ends relative to the measured variance."""
    return relative_interval(*(float(row[name]) for name in ("measured", "measured_low", "measured_high")))


def _bits(row: pd.Series) -> str:
    if pd.isna(row["bits"]):
        return "" if pd.isna(row["quantizer"]) else "?*"
    return f"{int(row['bits'])}{'*' if row['fixed'] else ''}"


def _bar(row: pd.Series) -> str:
    return "" if pd.isna(row["bits"]) else "█" * int(row["bits"])
