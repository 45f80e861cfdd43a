"""Figures of a result, drawn from its table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from fqtstats.errors import InputError
from fqtstats.report import style
from fqtstats.results import Configuration, Result

__all__ = ["plot_variance", "plot_variance_vs_bits", "render_all"]

Floats = npt.NDArray[np.float64]

_MOST = 5
"""Configurations that one figure of layers can hold."""

_PITCH = 0.13
_LABEL_PITCH = 0.095
_TALLEST = 8.0
"""Heights in inches: of a row, of a row's label at least, and of all rows at most (a page)."""

_OWN_LABEL = "exact own Q1 variance (no draws)\n[(loss/parameter)$^2$]"
_VARIANCE_LABEL = "variance with 95 % interval\n[(loss/parameter)$^2$]"


def plot_variance(
    result: Result,
    ax: Axes | None = None,
    *,
    configurations: Sequence[Configuration] | None = None,
    width: float = style.COLUMN_WIDTH,
) -> Figure:
    """Each quantized parameter's gradient variance, from the first layer (top) to the last, and the total.

    Dots are ``variance`` with its 95 % interval, one colour per configuration; beside them the squared norm of the
    gradient and one minibatch's sampling variance. The bars on the right split the variance into what the
    weight-gradient quantizers (Q1) and the input-gradient quantizers (Q2) add in the draws; a tick is where the exact
    variance from the layer's own Q1 on its QAT gradient would put the border. Without draws, dots are that variance,
    and there are no bars.

    Args:
        result: what to draw.
        ax: draw the dots there, without the bars; by default a new figure.
        configurations: which ones; by default all, or, of more than five, those at one bit width.
        width: of a new figure, in inches.

    Raises:
        InputError: a configuration is not in the result.
    """
    chosen = tuple(configurations) if configurations is not None else _readable(result)
    if not chosen:
        raise InputError("plot_variance expects at least one configuration, but got none")
    rows = [_drawn_rows(result, item) for item in chosen]
    keys = list(dict.fromkeys(key for frame in rows for key in frame.index))
    rows = [frame.reindex(keys) for frame in rows]
    colors = _colors(chosen)
    with style.applied():
        if ax is None:
            pitch = min(_PITCH * (1 + 0.35 * (len(chosen) - 1)), _TALLEST / len(keys))
            figure = style.new_figure(width, 1.1 + pitch * len(keys))
            if _drawn(rows):
                dots, bars = figure.subplots(1, 2, sharey=True, width_ratios=[3.4, 1])
                handles = [*_draw_dots(dots, rows, chosen, colors), *_draw_shares(bars, rows, colors)]
            else:
                dots = figure.subplots()
                handles = _draw_dots(dots, rows, chosen, colors)
            figure.legend(handles=handles, loc="outside upper center", ncols=2)
        else:
            dots, figure = ax, root(ax)
            pitch = ax.get_window_extent().height / figure.dpi / len(keys)
            ax.legend(handles=_draw_dots(dots, rows, chosen, colors), frameon=False)
        _label_rows(dots, keys, every=math.ceil(_LABEL_PITCH / pitch))
    return figure


def plot_variance_vs_bits(result: Result, ax: Axes | None = None, *, width: float = style.COLUMN_WIDTH) -> Figure:
    """The whole model's variance against the bits, one line per quantizer, above what its layers' quantizers add.

    The upper panel has the total ``variance`` with its 95 % interval, and one minibatch's sampling variance as a line;
    the lower one the median over layers, with quartiles, of ``q_input_variance``: relative to PTQ at 8 bits where that
    was measured, else to the squared norm of the gradient that it quantizes. With one bit width the quantizers stand
    side by side. Without draws there is only the lower panel.

    Args:
        result: at least two configurations.
        ax: draw the upper panel there (without draws, the lower one), without the other; by default a new figure.
        width: of a new figure, in inches.

    Raises:
        InputError: there is only one configuration.
    """
    if len(result.configurations) < 2:
        raise InputError("plot_variance_vs_bits expects at least two configurations, but the result has one")
    drawn = _drawn([result.table])
    with style.applied():
        if ax is None and not drawn:
            figure = style.new_figure(width, 0.8 * width)
            lower = figure.subplots()
            handles = [*_names(result), *_draw_input_variance(lower, result)]
            _label_configurations(lower, result)
            figure.legend(handles=handles, loc="outside upper center", ncols=3)
        elif ax is None:
            figure = style.new_figure(width, 1.25 * width)
            upper, lower = figure.subplots(2, 1, sharex=True)
            handles = [*_draw_totals(upper, result), *_draw_input_variance(lower, result)]
            _label_configurations(lower, result)
            figure.legend(handles=handles, loc="outside upper center", ncols=3)
        else:
            figure = root(ax)
            handles = _draw_totals(ax, result) if drawn else [*_names(result), *_draw_input_variance(ax, result)]
            ax.legend(handles=handles, frameon=False)
            _label_configurations(ax, result)
    return figure


def render_all(result: Result) -> dict[str, bytes]:
    """The figures that suit the result, as PNG files by name (without the suffix)."""
    drawn = {"variance": style.png(plot_variance(result))}
    if len(result.configurations) > 1:
        drawn["variance_vs_bits"] = style.png(plot_variance_vs_bits(result))
    return drawn


def root(ax: Axes) -> Figure:
    """The figure that the axes are in.

    Raises:
        InputError: they are in none.
    """
    figure = ax.get_figure(root=True)
    if figure is None:
        raise InputError("the axes given as ax belong to no figure")
    return figure


def _positive(values: pd.Series) -> Floats:
    """The values as floats, with NaN for what a logarithmic axis cannot show."""
    numbers = values.to_numpy(dtype=np.float64)
    return np.where(np.isfinite(numbers) & (numbers > 0), numbers, np.nan)


# --- per layer -------------------------------------------------------------------------------------------------------


def _readable(result: Result) -> tuple[Configuration, ...]:
    """All configurations, or, of too many with several quantizers, those at the most common width."""
    everything = result.configurations
    widths = [item.bits for item in everything]
    if len(everything) > _MOST and len({item.quantizer for item in everything}) > 1:
        common = max(dict.fromkeys(widths), key=widths.count)
        everything = tuple(item for item in everything if item.bits == common)
    return everything[:_MOST]


def _colors(chosen: Sequence[Configuration]) -> list[tuple[style.Mark, tuple[float, float, float]]]:
    """Mark and colour of each: the quantizer's, fading with the bits where one quantizer has several widths."""
    known = style.marks(item.quantizer for item in chosen)
    found = []
    for item in chosen:
        same = sorted((other.bits or 0 for other in chosen if other.quantizer == item.quantizer), reverse=True)
        strength = 1.0 if len(same) == 1 else 0.4 + 0.6 * same.index(item.bits or 0) / (len(same) - 1)
        found.append((known[item.quantizer], style.tint(known[item.quantizer].color, strength)))
    return found


def _drawn_rows(result: Result, configuration: Configuration) -> pd.DataFrame:
    """The quantized parameters (all of them where none is) and the total, indexed by (layer, parameter)."""
    rows = result.rows(configuration)
    if rows["quantized"].any():
        rows = rows[rows["quantized"]]
    total = result.select(configuration).loc[[result.total(configuration).name]]
    return pd.concat([rows, total]).set_index(["layer", "parameter"])


def _offsets(count: int) -> Floats:
    """Where within a row each of ``count`` configurations stands, from the top."""
    return np.array([(index - (count - 1) / 2) * 0.72 / max(count, 3) for index in range(count)])


def _drawn(rows: Sequence[pd.DataFrame]) -> bool:
    """Whether there were draws."""
    return any(frame["draws"].max() > 0 for frame in rows)


def _draw_dots(
    ax: Axes,
    rows: Sequence[pd.DataFrame],
    chosen: Sequence[Configuration],
    colors: Sequence[tuple[style.Mark, tuple[float, float, float]]],
) -> list[Artist]:
    """The main panel; returns the handles of its legend."""
    y = np.arange(len(rows[0]), dtype=np.float64)
    drawn = _drawn(rows)
    intervals = ("variance", "variance_low", "variance_high") if drawn else ("variance_exact_own",) * 3
    columns = (*intervals, "grad_norm_sq", "sampling_variance")
    every = np.concatenate([_positive(frame[name]) for frame in rows for name in columns])
    shown = every[np.isfinite(every)]
    left, right = (shown.min() / 2, shown.max() * 2) if shown.size else (0.1, 10.0)
    ax.set_xscale("log")
    ax.set_xlim(left, right)
    decades(ax, "x")
    ax.grid(axis="both", which="major")

    what = "variance" if drawn else "exact own Q1 variance"
    variances: list[Artist] = []
    norm, sampling = (_first_finite([_positive(frame[name]) for frame in rows]) for name in columns[3:])
    ax.plot(norm, y, linestyle="", marker="x", markersize=3.6, markeredgewidth=0.9, color=style.INK)
    others: list[Artist] = [_handle("x", style.INK, r"gradient norm $\|g\|^2$")]
    if np.isfinite(sampling).any():
        ax.plot(sampling, y, linestyle="", marker="o", markersize=3.6, markerfacecolor="white", color=style.GREY)
        others.append(_handle("o", style.GREY, "minibatch sampling variance", hollow=True))
    for frame, item, offset, (mark, color) in zip(rows, chosen, _offsets(len(rows)), colors, strict=True):
        values, lower, high = (_positive(frame[name]) for name in intervals)
        low = np.where(frame[intervals[1]].to_numpy(dtype=np.float64) > 0, lower, left)
        known = np.isfinite(values) & np.isfinite(high) & frame[intervals[1]].notna().to_numpy()
        ax.hlines((y + offset)[known], low[known], high[known], color=color, linewidth=1.0)
        ax.plot(values, y + offset, linestyle="", marker=mark.marker, color=color, markersize=2.8, markeredgewidth=0)
        variances.append(_handle(mark.marker, color, style.literal(f"{what}, {item}")))
    ax.set_xlabel(_VARIANCE_LABEL if drawn else _OWN_LABEL)
    return [*variances, *others]


def _draw_shares(
    ax: Axes, rows: Sequence[pd.DataFrame], colors: Sequence[tuple[style.Mark, tuple[float, float, float]]]
) -> list[Artist]:
    """The bars that split the variance; returns the handles of their legend."""
    y = np.arange(len(rows[0]), dtype=np.float64)
    height = 0.72 / len(rows)
    ticks = False
    for index, (frame, (_, color)) in enumerate(zip(rows, colors, strict=True)):
        weight = frame["variance_weight"].to_numpy(dtype=np.float64)
        whole = weight + frame["variance_input"].to_numpy(dtype=np.float64)
        drawn = np.isfinite(whole) & (whole > 0)
        share = 100 * weight[drawn] / whole[drawn]
        place = y[drawn] + (index - (len(rows) - 1) / 2) * height
        ax.barh(place, share, height, color="white", edgecolor=color, linewidth=0.4)
        ax.barh(place, 100 - share, height, left=share, color=color, edgecolor=color, linewidth=0.4)
        exact = 100 * frame["variance_exact_own"].to_numpy(dtype=np.float64)[drawn] / whole[drawn]
        shown = np.isfinite(exact)
        ax.vlines(exact[shown], (place - 0.6 * height)[shown], (place + 0.6 * height)[shown], style.INK, linewidth=0.9)
        ticks |= bool(shown.any())
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 50, 100])
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("share of\nvariance (%)")
    sample = colors[0][1] if len(colors) == 1 else style.GREY
    return [
        Patch(facecolor="white", edgecolor=sample, linewidth=0.5, label="from weight-gradient quantizers (Q1)"),
        Patch(facecolor=sample, edgecolor=sample, linewidth=0.5, label="from input-gradient quantizers (Q2)"),
        *([_handle("|", style.INK, "exact own part of Q1", size=5)] if ticks else []),
    ]


def _label_rows(ax: Axes, keys: Sequence[tuple[str, str]], every: int) -> None:
    """Names on the left, thinned to one in ``every``; the total always has one, and a line above it."""
    layers = [layer for layer, _ in keys]
    names = [layer if layers.count(layer) == 1 and layer else f"{layer}.{name}".strip(".") for layer, name in keys]
    last = len(keys) - 1
    names[last] = "total (all parameters)"  # also those that have no row here, because they are not quantized
    labelled = [index for index in range(0, last, every) if last - index >= every] + [last]
    shown = [name if len(name) <= 24 else "…" + name[-23:] for name in (names[i] for i in labelled)]
    ax.set_yticks(labelled, [style.literal(name) for name in shown])
    ax.get_yticklabels()[-1].set_fontweight("bold")
    ax.set_ylim(last + 0.7, -0.7)
    ax.axhline(last - 0.5, color=style.GREY, linewidth=0.5)


def _first_finite(columns: Sequence[Floats]) -> Floats:
    """Per row the first value that is there: what does not depend on the quantizer is drawn once."""
    merged = columns[0].copy()
    for column in columns[1:]:
        merged = np.where(np.isfinite(merged), merged, column)
    return merged


def decades(ax: Axes, axis: str) -> None:
    """At most five labelled powers of ten; the decades between them as unlabelled ticks."""
    target = ax.xaxis if axis == "x" else ax.yaxis
    target.set_major_locator(LogLocator(base=10, numticks=5))
    target.set_minor_locator(LogLocator(base=10, subs=(1.0,), numticks=30))
    target.set_minor_formatter(NullFormatter())


def _handle(
    marker: str, color: str | tuple[float, float, float], label: str, *, hollow: bool = False, size: float = 3.6
) -> Line2D:
    face = "white" if hollow else color
    return Line2D([], [], linestyle="", marker=marker, markersize=size, color=color, markerfacecolor=face, label=label)


# --- against bits ----------------------------------------------------------------------------------------------------


def _has_widths(result: Result) -> bool:
    return len({item.bits for item in result.configurations if item.bits is not None}) > 1


def _lines(result: Result) -> list[tuple[str, style.Mark, list[Configuration], Floats]]:
    """What belongs together: name, mark, configurations and their places on the x axis.

    Lines of several quantizers are moved apart a little, so that their intervals do not hide each other. A
    configuration without a number of bits has no place on an axis of bits: NaN.
    """
    names = list(dict.fromkeys(item.quantizer for item in result.configurations))
    marks = style.marks(names)
    found = []
    for index, name in enumerate(names):
        items = [item for item in result.configurations if item.quantizer == name]
        if _has_widths(result):
            items.sort(key=lambda item: item.bits or 0)
            shift = 0.07 * (index - (len(names) - 1) / 2)
            places = [math.nan if item.bits is None else item.bits + shift for item in items]
        else:
            places = [float(result.configurations.index(item)) for item in items]
        found.append((name, marks[name], items, np.array(places)))
    return found


def _draw_series(ax: Axes, x: Floats, middle: Floats, low: Floats, high: Floats, mark: style.Mark, band: bool) -> None:
    """One line with its intervals, as bars or as a band; what has no place on x goes across as a dotted line."""
    placed = np.isfinite(x)
    usable = placed & np.isfinite(middle) & np.isfinite(low) & np.isfinite(high)
    floor = np.where(low > 0, low, middle * 1e-2)  # a logarithmic axis cannot reach zero
    if band:
        ax.fill_between(x[usable], floor[usable], high[usable], color=mark.color, alpha=0.15, linewidth=0)
    else:
        ax.vlines(x[usable], floor[usable], high[usable], color=mark.color, linewidth=1.2)
    ax.plot(x[placed], middle[placed], marker=mark.marker, color=mark.color, markersize=3.6, markeredgewidth=0)
    for index in np.flatnonzero(~placed & np.isfinite(middle)):
        ax.axhline(middle[index], color=mark.color, linestyle=":")
        if np.isfinite(low[index]) and np.isfinite(high[index]):
            ax.axhspan(floor[index], high[index], color=mark.color, alpha=0.15, linewidth=0)


def _names(result: Result) -> list[Artist]:
    """The quantizers' handles for a legend."""
    return [_handle(mark.marker, mark.color, style.literal(name)) for name, mark, _, _ in _lines(result)]


def _draw_totals(ax: Axes, result: Result) -> list[Artist]:
    """The upper panel; returns the handles of its legend."""
    ax.set_yscale("log")
    ax.grid(axis="y", which="major")
    handles = _names(result)
    for _, mark, items, places in _lines(result):
        totals = pd.DataFrame([result.total(item) for item in items])
        middle, high = _positive(totals["variance"]), _positive(totals["variance_high"])
        low = totals["variance_low"].to_numpy(dtype=np.float64)
        _draw_series(ax, places, middle, low, high, mark, band=False)
    sampling = [float(result.total(item)["sampling_variance"]) for item in result.configurations]
    known = [value for value in sampling if math.isfinite(value) and value > 0]
    if known:
        ax.axhline(known[0], color=style.GREY, linestyle="-.", linewidth=0.8)
        handles.append(Line2D([], [], color=style.GREY, linestyle="-.", linewidth=0.8, label="sampling variance"))
    ax.set_ylabel("total gradient variance\n(95 % interval)  [(loss/parameter)$^2$]")
    return handles


def _draw_input_variance(ax: Axes, result: Result) -> list[Artist]:
    """The lower panel; returns the handles that it adds to the legend."""
    standard = Configuration("ptq", 8)
    relative = standard in result.configurations
    ax.set_yscale("log")
    ax.grid(axis="y", which="major")
    for _, mark, items, places in _lines(result):
        quartiles = np.array([_quartiles(result, item, relative) for item in items])
        low, middle, high = quartiles.T
        _draw_series(ax, places, middle, low, high, mark, band=_has_widths(result))
    unit = "PTQ at 8 bits" if relative else r"$\|\partial L/\partial Y\|^2$"
    exact = "" if _drawn([result.table]) else "exact "
    ax.set_ylabel(f"{exact}Q2 variance / {unit}\n(median and quartiles of layers)")
    if not relative:
        return []
    ax.axhline(1, color=style.INK, linestyle="--", linewidth=0.7, zorder=1.5)
    return [Line2D([], [], color=style.INK, linestyle="--", linewidth=0.7, label="PTQ at 8 bits")]


def _quartiles(result: Result, configuration: Configuration, relative: bool) -> Floats:
    """Quartiles over layers of q_input_variance, relative to PTQ at 8 bits or to what it quantizes."""
    if relative:
        ratios = result.relative_input_variance(configuration, Configuration("ptq", 8))
    else:
        rows = result.rows(configuration)
        ratios = rows["q_input_variance"].to_numpy(dtype=np.float64) / _positive(rows["q_input_grad_norm_sq"])
    ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    return np.quantile(ratios, [0.25, 0.5, 0.75]) if ratios.size else np.full(3, np.nan)


def _label_configurations(ax: Axes, result: Result) -> None:
    """The x axis: bits, or the names of the configurations side by side."""
    if _has_widths(result):
        ax.set_xticks(sorted({item.bits for item in result.configurations if item.bits is not None}))
        ax.set_xlabel("bits of the input-gradient quantizer")
        return
    widths = {item.bits for item in result.configurations}
    names = [style.literal(item.quantizer if len(widths) == 1 else str(item)) for item in result.configurations]
    crowded = sum(len(name) for name in names) > 40
    ax.set_xticks(range(len(names)), names, rotation=40 if crowded else 0, ha="right" if crowded else "center")
    ax.set_xlim(-0.6, len(names) - 0.4)
    bits = next(iter(widths))
    ax.set_xlabel("quantizer" if len(widths) > 1 or bits is None else f"quantizer ({bits} bits)")
