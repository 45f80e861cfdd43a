"""Figure and terminal table of a comparison of trainings, and the same content as plain data for ``--json``."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group, RenderableType
from rich.text import Text

from fqtstats.comparison import CONFIDENCE, METRICS, Comparison
from fqtstats.errors import InputError
from fqtstats.report import style
from fqtstats.report.figures import root
from fqtstats.report.fitted import FittedColumn, FittedTable
from fqtstats.report.numbers import plain, plain_rows
from fqtstats.schema import Json

__all__ = ["plot_curves", "render_all", "summary", "to_dict"]

_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY, style.WINE, style.OLIVE)
_LABELS = {
    "loss": "training loss [nats]",
    "test_loss": "test loss [nats]",
    "accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
}

_LEGEND_LINE = 0.12
"""Height in inches."""


def plot_curves(
    comparison: Comparison, metric: str = "loss", ax: Axes | None = None, *, width: float | None = None
) -> Figure:
    """A metric by epoch: a thin line for each run, a thick one for a group's mean with its 95 % interval.

    Args:
        comparison: what to draw.
        metric: one of :data:`fqtstats.comparison.METRICS`.
        ax: draw there; by default a new figure.
        width: of a new figure, in inches.

    Raises:
        InputError: unknown metric.
    """
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    with style.applied():
        width = style.COLUMN_WIDTH if width is None else width
        names = {
            group: _legend(str(group), rows, width) for group, rows in comparison.curves.groupby("group", sort=False)
        }
        own = ax is None
        if ax is None:
            lines = sum(name.count("\n") + 1 for name in names.values())
            figure = style.new_figure(width, 2.2 + _LEGEND_LINE * lines)
            ax = figure.subplots()
        else:
            figure = root(ax)
        for index, (group, rows) in enumerate(comparison.curves.groupby("group", sort=False)):
            color = _COLORS[index % len(_COLORS)]
            table = rows.pivot(index="epoch", columns="seed", values=metric)
            epochs = table.index.to_numpy(dtype=np.float64)
            if table.shape[1] > 1:
                ax.plot(epochs, table.to_numpy(), color=style.tint(color, 0.35), linewidth=0.4)
                mean, n = table.mean(axis=1), table.count(axis=1)
                half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(n - 1, 1)) * table.std(axis=1) / np.sqrt(n)
                ax.fill_between(epochs, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
            ax.plot(epochs, table.mean(axis=1), color=color, label=names[group])
        if metric.endswith("loss"):
            ax.set_yscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        ax.set(xlabel="epoch", ylabel=_LABELS[metric])
        if own:
            figure.legend(loc="outside upper center")
        else:
            ax.legend()
    return figure


def _legend(group: str, rows: pd.DataFrame, width: float) -> str:
    """A group's name and its number of runs, in lines that a figure of so many inches has room for."""
    return textwrap.fill(f"{group} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{rows['seed'].nunique()})", round(16 * width))


def render_all(comparison: Comparison) -> dict[str, bytes]:
    """A figure for each metric that there are numbers of, as PNG files by name (without the suffix)."""
    shown = [metric for metric in METRICS if comparison.curves[metric].notna().any()]
    return {metric: style.png(plot_curves(comparison, metric)) for metric in shown}


def summary(comparison: Comparison, metric: str = "loss") -> RenderableType:
    """The groups with all metrics, and the pairs by one of them."""
    parts: list[RenderableType] = [_groups(comparison)]
    pairs = comparison.pairs[comparison.pairs["metric"] == metric]
    if len(pairs):
        parts += [Text(""), _pairs(pairs, metric)]
    return Group(*parts)


def to_dict(comparison: Comparison) -> dict[str, Json]:
    """The comparison as plain data for ``--json``: strict JSON, with null where a table has NaN."""
    return {
        "groups": plain_rows(comparison.groups),
        "pairs": plain_rows(comparison.pairs),
        "metadata": comparison.metadata,
    }


def _groups(comparison: Comparison) -> RenderableType:
    names = list(dict.fromkeys(comparison.groups["group"]))
    rows = {(row["group"], row["metric"]): row for _, row in comparison.groups.iterrows()}
    first = [rows[name, METRICS[0]] for name in names]
    columns = [
        FittedColumn("runs of", [Text(name) for name in names], 100, names=True),
        FittedColumn("seeds", [Text(str(row["runs"])) for row in first], 95),
        FittedColumn("diverged", [Text(str(row["diverged"]) if row["diverged"] else "") for row in first], 90),
    ]
    for priority, metric in zip((99, 85, 70, 80), METRICS, strict=True):
        own = [rows[name, metric] for name in names]
        columns.append(FittedColumn(metric.replace("_", " "), [Text(plain(row["mean"])) for row in own], priority))
        columns.append(FittedColumn("±", [Text(plain(row["high"] - row["mean"])) for row in own], priority - 1))
    return FittedTable("last epoch: mean over the seeds, ± its 95 % interval", columns, total=False)


def _pairs(pairs: pd.DataFrame, metric: str) -> RenderableType:
    rows = [row for _, row in pairs.iterrows()]
    columns = [
        FittedColumn("second", [Text(row["second"]) for row in rows], 100, names=True),
        FittedColumn("first", [Text(row["first"]) for row in rows], 99, names=True),
        FittedColumn("seeds", [Text(str(row["seeds"])) for row in rows], 80),
        FittedColumn("difference", [Text(plain(row["difference"])) for row in rows], 95, meaning="second - first"),
        FittedColumn("95 %", [Text(_interval(row)) for row in rows], 85),
        FittedColumn("p", [Text(plain(row["p"])) for row in rows], 70, meaning="of no difference, paired t test"),
        FittedColumn("p Holm", [Text(plain(row["p_holm"])) for row in rows], 90, meaning="corrected for all pairs"),
    ]
    return FittedTable(f"{metric.replace('_', ' ')} over the seeds that both have", columns, total=False)


def _interval(row: pd.Series) -> str:
    return "" if math.isnan(row["low"]) else f"{plain(row['low'])} to {plain(row['high'])}"
