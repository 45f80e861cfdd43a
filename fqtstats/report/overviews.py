"""Figures that show all layers at once: shares of the variance as heat maps, and variances against their bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from fqtstats.profiles import Profile
from fqtstats.report import style
from fqtstats.report.figures import decades
from fqtstats.report.profiles import label_axis
from fqtstats.results import Configuration, Result

__all__ = ["bounded", "plot_bounds", "plot_layers", "plot_shares"]

Floats = npt.NDArray[np.float64]

_PITCH = 0.13
_TALLEST = 8.0
_PAGE_WIDTH = 6.9
"""Sizes in inches: of a row, all rows at most, and a page."""

_DECADES = 4
"""The colours span at most so many powers of ten below the largest share."""

_FEW = 30
"""Ratio of the largest to the smallest share on a scale, below which it needs more labels than the powers of ten."""


_RATIOS = (
    ("Q1, its own", "q_weight_variance", "q_weight_bound"),
    ("Q2, its own", "q_input_variance", "q_input_bound"),
    ("gradient,\nend to end", "variance", "bound"),
)
"""What has a bound: its name, and the columns of the variance and of the bound."""


def plot_layers(profile: Profile) -> Figure:
    """Shares of the total variance by the layer whose quantizers are the source (rows) and the layer they reach.

    Both gradient quantizers of a layer count together: Q1 reaches its own layer only, Q2 the layers before. Grey:
    nothing arrives there.
    """
    sources = list(dict.fromkeys(profile.sources["layer"]))
    targets = list(dict.fromkeys(profile.targets["layer"]))
    values = np.full((len(sources), len(targets)), np.nan)
    whole = float(profile.total["variance"])
    columns = ["source_layer", "layer", "variance"]
    for source, target, variance in profile.table[columns].itertuples(index=False, name=None):
        place = sources.index(source), targets.index(target)
        values[place] = np.nansum([values[place], 100 * variance / whole]) if whole > 0 else np.nan
    names = [[layer or "(model)" for layer in layers] for layers in (sources, targets)]
    wide = min(max(2.4 + 0.14 * len(targets), style.COLUMN_WIDTH), _PAGE_WIDTH)
    return _heat_map(values, names[0], names[1], ("source of the noise", "layer whose gradient it reaches"), wide)


def plot_shares(result: Result) -> Figure:
    """Each layer's share of the total variance (rows) in every configuration (columns)."""
    layers = list(dict.fromkeys(result.rows(result.configurations[0])["layer"]))
    values = np.full((len(layers), len(result.configurations)), np.nan)
    for column, item in enumerate(result.configurations):
        rows = result.rows(item)
        rows = rows[rows["variance"].notna()]
        whole = float(result.total(item)["variance"])
        for layer, variance in rows.groupby("layer", sort=False)["variance"].sum().items():
            values[layers.index(str(layer)), column] = 100 * variance / whole if whole > 0 else np.nan
    kept = np.array([(row > 0).any() for row in values], dtype=bool)
    names = [layer or "(model)" for layer, there in zip(layers, kept, strict=True) if there]
    columns = [str(item) for item in result.configurations]
    wide = min(max(2.4 + 0.22 * len(columns), style.COLUMN_WIDTH), _PAGE_WIDTH)
    return _heat_map(values[kept], names, columns, ("layer", ""), wide)


def bounded(result: Result, configurations: Sequence[Configuration] | None = None) -> bool:
    """Whether any variance of these configurations (by default of all) has a bound."""
    chosen = tuple(configurations) if configurations is not None else result.configurations
    return any(np.isfinite(_ratio(result, item, ratio)).any() for item in chosen for ratio in _RATIOS)


def plot_bounds(result: Result, configurations: Sequence[Configuration] | None = None) -> Figure:
    """Variance over bound per layer: of its two gradient quantizers by themselves, and of the gradient end to end.

    Args:
        result: what to draw.
        configurations: which ones; by default all.
    """
    chosen = tuple(configurations) if configurations is not None else result.configurations
    known = style.marks(item.quantizer for item in chosen)
    frames = [result.rows(item) for item in chosen]
    keys = list(frames[0][["layer", "parameter"]].itertuples(index=False, name=None))
    panels = []
    for ratio in _RATIOS:
        values = np.array([_ratio(result, item, ratio) for item in chosen])
        if np.isfinite(values).any():
            panels.append((ratio[0], values))
    shown = np.isfinite(np.concatenate([values for _, values in panels])).any(axis=0)
    # A layer with one bounded parameter is called by its own name.
    layers = [layer for (layer, _), there in zip(keys, shown, strict=True) if there]
    names = [
        layer if layer and layers.count(layer) == 1 else f"{layer}.{parameter}".strip(".")
        for (layer, parameter), there in zip(keys, shown, strict=True)
        if there
    ]
    pitch = min(_PITCH * (1 + 0.25 * (len(chosen) - 1)), _TALLEST / len(names))
    y = np.arange(len(names), dtype=np.float64)
    offsets = [(index - (len(chosen) - 1) / 2) * 0.7 / max(len(chosen), 3) for index in range(len(chosen))]
    with style.applied():
        figure = style.new_figure(1.3 + 1.25 * len(panels), 1.1 + pitch * len(names))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (title, values) in zip(axes, panels, strict=True):
            ax.set_xscale("log")
            for item, offset, row in zip(chosen, offsets, values[:, shown], strict=True):
                mark = known[item.quantizer]
                color = style.tint(mark.color, _strength(item, chosen))
                ax.plot(
                    np.where(row > 0, row, np.nan), y + offset, linestyle="", marker=mark.marker, color=color,
                    markersize=2.8, markeredgewidth=0,
                )  # fmt: skip
            low, high = ax.get_xlim()
            low, high = min(low, 0.08), max(high, 2.0)
            ax.axvspan(1, high, color=style.VERMILION, alpha=0.12, linewidth=0)
            ax.axvline(1, color=style.INK, linestyle="--", linewidth=0.7)
            ax.set_xlim(low, high)
            decades(ax, "x")
            ax.grid(axis="both", which="major")
            ax.tick_params(axis="y", length=0)
            ax.set_title(title)
            ax.set_xlabel("variance / bound")
        label_axis(axes[0], "y", names, pitch)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        handles: list[Artist] = [
            Line2D([], [], linestyle="", marker=known[item.quantizer].marker, markersize=3.6,
                   color=style.tint(known[item.quantizer].color, _strength(item, chosen)),
                   label=style.literal(str(item)))
            for item in chosen
        ]  # fmt: skip
        handles.append(Line2D([], [], color=style.INK, linestyle="--", linewidth=0.7, label="bound"))
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _ratio(result: Result, item: Configuration, ratio: tuple[str, str, str]) -> Floats:
    _, variance, bound = ratio
    rows = result.rows(item)
    over = rows[bound].to_numpy(dtype=np.float64)
    found: Floats = rows[variance].to_numpy(dtype=np.float64) / np.where(over > 0, over, np.nan)
    return found


def _strength(item: Configuration, chosen: Sequence[Configuration]) -> float:
    """Colours fade with the bits where one quantizer has several widths."""
    same = sorted((other.bits or 0 for other in chosen if other.quantizer == item.quantizer), reverse=True)
    return 1.0 if len(same) == 1 else 0.4 + 0.6 * same.index(item.bits or 0) / (len(same) - 1)


def _between(value: float) -> str:
    """2 and 5 times a power of ten as a label; "" for any other number."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def _heat_map(
    values: Floats, rows: Sequence[str], columns: Sequence[str], labels: tuple[str, str], width: float
) -> Figure:
    """Percentages with colours on a logarithmic scale; what is not finite is grey."""
    with style.applied():
        height = min(max(_PITCH * len(rows), 1.2), _TALLEST)
        figure = style.new_figure(width, 1.6 + height)
        ax = figure.subplots()
        positive = values[values > 0]
        top = float(positive.max()) if positive.size else 1.0
        bottom = max(float(positive.min()), top / 10**_DECADES) if positive.size else 0.1
        bottom = bottom if bottom < top else top / 10
        ax.set_facecolor(style.PALE)
        # A share of zero has no logarithm: it takes the lowest colour. What is masked shows the background.
        mesh = ax.pcolormesh(
            np.ma.masked_invalid(np.where(values <= 0, bottom, values)),
            norm=LogNorm(bottom, top), cmap="viridis", edgecolors="white", linewidth=0.2,
        )  # fmt: skip
        ax.set_ylim(len(rows), 0)
        label_axis(ax, "y", rows, height / max(1, len(rows)), offset=0.5)
        label_axis(ax, "x", columns, (width - 2.0) / max(1, len(columns)), offset=0.5)
        ax.set_ylabel(labels[0])
        ax.set_xlabel(labels[1])
        below = "min" if (positive < bottom).any() else "neither"
        bar = figure.colorbar(mesh, ax=ax, pad=0.01, aspect=height / 0.12, extend=below, extendfrac=0.02)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        # Between powers of ten, 2 and 5 have labels where there is hardly a power of ten.
        close = top / bottom < _FEW
        bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _between(value) if close else ""))
        bar.set_label("share of the total variance (%)")
        bar.outline.set_visible(False)
    return figure
