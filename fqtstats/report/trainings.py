"""Figures and terminal table of a training, and the same content as plain data for ``--json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group, RenderableType
from rich.text import Text

from fqtstats.report import style
from fqtstats.report.columns import QUANTITIES
from fqtstats.report.figures import decades, root
from fqtstats.report.fitted import FittedColumn, FittedTable, unquantized
from fqtstats.report.numbers import percent, plain, plain_rows, scientific
from fqtstats.schema import Json
from fqtstats.trainings import MODEL, Training

__all__ = [
    "epoch_line",
    "plot_accuracy",
    "plot_loss",
    "plot_variance",
    "render_all",
    "summary",
    "to_dict",
]

_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)
"""Of networks."""

_HEIGHT = 2.2
_SHOWN = 24
"""Epochs in the terminal's table; of more, the first and the last."""


def plot_loss(training: Training, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """The mean loss of each epoch's minibatches, and the loss on the test data (dashed); a line where a stage begins.

    Args:
        training: what to draw.
        ax: draw there; by default a new figure.
        width: of a new figure, in inches.
    """
    return _curves(training, ("loss", "test_loss"), "cross entropy [nats]", ax, width, log=True)


def plot_accuracy(training: Training, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """The accuracy on each epoch's minibatches, and on the test data (dashed); arguments as :func:`plot_loss`."""
    return _curves(training, ("accuracy", "test_accuracy"), "accuracy [%]", ax, width, log=False)


def plot_variance(training: Training, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """The variance of the quantized gradient (with its 95 % interval) and the squared norm of the gradient, by step.

    Arguments as :func:`plot_loss`.
    """
    rows = training.totals
    with style.applied():
        figure, ax = _place(ax, width)
        steps = rows["step"].to_numpy(dtype=np.float64)
        variance, low, high = (
            _positive(rows[name].to_numpy(dtype=np.float64)) for name in ("variance", "variance_low", "variance_high")
        )
        mark = "o" if len(steps) < 60 else ""
        ax.fill_between(steps, np.where(np.isnan(low), variance, low), high, color=_COLORS[0], alpha=0.2, linewidth=0)
        ax.plot(steps, variance, color=_COLORS[0], marker=mark, label="variance, 95 % interval")
        norm = _positive(rows["grad_norm_sq"].to_numpy(dtype=np.float64))
        ax.plot(steps, norm, color=style.INK, linestyle="--", linewidth=0.7, label=r"$\|g\|^2$")
        ax.set_yscale("log")
        decades(ax, "y")
        ax.grid(axis="y", which="major")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="step", ylabel="gradient [(loss/parameter)$^2$]")
        ax.legend()
    return figure


def render_all(training: Training) -> dict[str, bytes]:
    """All figures for which there are numbers, as PNG files by name (without the suffix)."""
    found = {}
    if len(training.epochs):
        found["loss"] = style.png(plot_loss(training))
        found["accuracy"] = style.png(plot_accuracy(training))
    if len(training.variance):
        found["gradient_variance"] = style.png(plot_variance(training))
    return found


def summary(training: Training) -> RenderableType:
    """One row per epoch; of a run that diverged, where it shows."""
    parts: list[RenderableType] = [_table(training, network) for network in training.networks or [MODEL]]
    if len(training.variance):
        spent = training.epochs["variance_seconds"].sum()
        rest = training.epochs["seconds"].sum() - spent
        share = 100 * spent / rest if rest > 0 else math.nan
        count = len(training.totals)
        times = f"{count} step{'s' * (count != 1)}"
        parts.append(Text(f"variance measured at {times}: {share:.0f} % on top of the training"))
    if training.diverged:
        parts.append(_diagnosis(training.metadata["diverged"]))
    return Group(*parts, *unquantized(training.metadata))


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """One line for an epoch's row, while the training goes on."""
    told = [f"epoch {row['epoch']}/{epochs}"]
    told += [] if row["network"] == MODEL else [str(row["network"])]
    told += [f"loss {plain(row['loss'])}", f"accuracy {percent(row['accuracy'])}"]
    if not math.isnan(row["test_loss"]):
        told += [f"test loss {plain(row['test_loss'])}", f"test accuracy {percent(row['test_accuracy'])}"]
    return ", ".join(told)


def to_dict(training: Training) -> dict[str, Json]:
    """The training as plain data for ``--json``: strict JSON, with null where a table has NaN."""
    return {
        "epochs": plain_rows(training.epochs),
        "variance": plain_rows(training.variance),
        "metadata": training.metadata,
    }


def _place(ax: Axes | None, width: float | None) -> tuple[Figure, Axes]:
    if ax is not None:
        return root(ax), ax
    figure = style.new_figure(style.COLUMN_WIDTH if width is None else width, _HEIGHT)
    return figure, figure.subplots()


def _positive(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _curves(
    training: Training, names: tuple[str, str], label: str, ax: Axes | None, width: float | None, *, log: bool
) -> Figure:
    """Two columns of the epochs by epoch: the first solid, the second dashed."""
    with style.applied():
        figure, ax = _place(ax, width)
        several = len(training.networks) > 1
        for index, network in enumerate(training.networks):
            rows = training.curve(network)
            color = _COLORS[index % len(_COLORS)]
            for name, dashes, what in zip(names, ("-", "--"), ("training", "test"), strict=True):
                values = rows[name].to_numpy(dtype=np.float64)
                if np.isfinite(values).any():
                    told = f"{network}, {what}" if several else what
                    drawn = _positive(values) if log else 100 * values
                    mark = "o" if len(rows) < 30 else ""
                    face = color if what == "training" else "white"
                    options: dict[str, Any] = {
                        "marker": mark,
                        "markersize": 2.5,
                        "markerfacecolor": face,
                        "markeredgewidth": 0.6,
                    }
                    ax.plot(rows["epoch"], drawn, color=color, linestyle=dashes, label=told, **options)
        rows = training.curve()
        stages = list(rows["stage"])
        for epoch, before, after in zip(rows["epoch"], stages, stages[1:], strict=False):
            if before != after:
                ax.axvline(epoch + 0.5, color=style.GREY, linewidth=0.5, linestyle=":")
        if log:
            ax.set_yscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        ax.set(xlabel="epoch", ylabel=label)
        ax.legend()
    return figure


def _table(training: Training, network: str) -> RenderableType:
    rows = [row for _, row in training.curve(network).iterrows()]
    left_out = len(rows) - _SHOWN
    if left_out > 0:
        rows = [*rows[: _SHOWN // 2], *rows[-_SHOWN // 2 :]]
    stages = len({row["stage"] for row in rows}) > 1

    def column(name: str, header: str, show: Any, priority: int, meaning: str = "") -> FittedColumn:
        return FittedColumn(header, [Text(show(row[name])) for row in rows], priority, meaning=meaning)

    columns = [
        FittedColumn("epoch", [Text(str(row["epoch"])) for row in rows], 100),
        FittedColumn("stage", [Text(str(row["stage"]) if stages else "") for row in rows], 60, names=True),
        column("loss", "loss", plain, 99, "mean cross entropy of the minibatches as trained on"),
        column("accuracy", "acc.", percent, 90),
        column("test_loss", "test loss", plain, 95),
        column("test_accuracy", "test acc.", percent, 92),
        column("lr", "lr", plain, 50),
        column("variance", "variance", scientific, 80, "of the quantized gradient"),
        column("snr", "SNR", plain, 75, QUANTITIES["snr"].brief),
        column("overhead", "overhead", lambda v: percent(v) if v > 0 else "", 70, "of measuring the variance"),
        column(
            "kept_bytes",
            "kept",
            lambda v: "" if pd.isna(v) else _bytes(int(v)),
            65,
            "activations, for the backward pass",
        ),
        column("seconds", "s", lambda v: f"{v:.2f}" if math.isfinite(v) else "", 40),
    ]
    seed = f"{training.label}, seed {training.seed}"
    title = f"training of {seed}" if network == MODEL else f"{network} of {seed}"
    title += f" ({left_out} epochs between the first and the last are not shown)" if left_out > 0 else ""
    return FittedTable(title, columns, total=False) if rows else Text(f"{title}: no epoch was finished", style="bold")


def _diagnosis(found: Mapping[str, Any]) -> Text:
    first = found.get("first")
    told = f"diverged at step {found['step']}, in epoch {found['epoch']}: {found['reason']}"
    if first is not None:
        told += (
            f"\nfirst in: {first['tensor']} of layer {first['layer']!r}, "
            f"{first['nonfinite']} NaN or Inf among {first['numel']} elements"
        )
    largest = "; ".join(f"{one['tensor']} of {one['layer']!r} {one['largest']:.3g}" for one in found["largest"])
    told += f"\nlargest magnitudes: {largest}"
    told += f"\nthe weights that are kept are those after {found['last_good_step']} steps"
    return Text(told, style="bold red")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
