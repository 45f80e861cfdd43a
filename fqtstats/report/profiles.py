"""Figures and terminal tables of a variance profile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fqtstats.profiles import Profile, target_name
from fqtstats.report import style
from fqtstats.report.figures import decades, root

__all__ = ["label_axis", "plot_matrix", "plot_parameters", "plot_sources", "render_all"]

Floats = npt.NDArray[np.float64]

_PAGE_WIDTH = 6.9
_TALLEST = 8.0
_PITCH = 0.13
_LABEL_PITCH = 0.095
"""Sizes in inches: of a page, all rows at most, a row, and a row's label at least."""

_DECADES = 6
"""The colours span at most so many powers of ten below the largest variance."""


_DISTANCES = (
    (1, "next layer"),
    (3, "2 or 3 layers later"),
    (7, "4 to 7 layers later"),
    (math.inf, "8 or more layers later"),
)
"""How the layers behind a parameter are grouped: the last of each group, counted from the parameter, and its name."""


def plot_matrix(profile: Profile, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """The variance that each source puts into each parameter's gradient, as a heat map.

    The first row has the layers' own weight-gradient quantizers (Q1), which reach no parameters but their layer's; the
    others are the input-gradient quantizers (Q2), from the first layer (top) to the last. Grey: nothing arrives there.

    Args:
        profile: what to draw.
        ax: draw there; by default a new figure.
        width: of a new figure, in inches.
    """
    values, names = _rows(profile)
    targets = [target_name(*key) for key in _target_keys(profile)]
    with style.applied():
        if ax is None:
            height = min(max(_PITCH * len(names), 1.5), _TALLEST)
            wide = min(max(2.5 + 0.25 * len(targets), style.COLUMN_WIDTH), _PAGE_WIDTH) if width is None else width
            figure = style.new_figure(wide, 1.7 + height)
            ax = figure.subplots()
            across = wide - 2.4
        else:
            figure = root(ax)
            extent = ax.get_window_extent()
            across, height = extent.width / figure.dpi, extent.height / figure.dpi
        positive = values[values > 0]
        top = float(positive.max()) if positive.size else 1.0
        bottom = max(float(positive.min()), top / 10**_DECADES) if positive.size else 0.1
        bottom = bottom if bottom < top else top / 10
        ax.set_facecolor(style.PALE)
        # A variance of zero has no logarithm: it takes the lowest colour. What is masked shows the background.
        shown = np.ma.masked_invalid(np.where(values <= 0, bottom, values))
        image = ax.imshow(
            shown, norm=LogNorm(bottom, top), cmap="viridis", aspect="auto", interpolation="nearest", origin="upper"
        )
        ax.axhline(0.5, color="white", linewidth=1.5)
        label_axis(ax, "y", names, height / len(names))
        label_axis(ax, "x", targets, across / len(targets))
        ax.set_xlabel("gradient that the noise reaches")
        ax.set_ylabel("source of the noise")
        below = "min" if (positive < bottom).any() else "neither"
        bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=height / 0.12, extend=below, extendfrac=0.02)
        bar.set_label("variance\n[(loss/parameter)$^2$]")
        bar.outline.set_visible(False)
    return figure


def plot_parameters(profile: Profile, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """Where each parameter's variance comes from, and how large it is.

    Bars split the variance into the layer's own weight-gradient quantizer (Q1) and the input-gradient quantizers (Q2)
    of the layers behind it, by how many layers later they stand; beside them the variance with its standard error, and
    one minibatch's sampling variance.

    Args:
        profile: what to draw.
        ax: draw the bars there, without the variances; by default a new figure.
        width: of a new figure, in inches.
    """
    names = [*(target_name(*key) for key in _target_keys(profile)), "total"]
    shares = _shares(profile)
    with style.applied():
        if ax is None:
            pitch = min(_PITCH, _TALLEST / len(names))
            figure = style.new_figure(1.5 * style.COLUMN_WIDTH if width is None else width, 1.2 + pitch * len(names))
            bars, dots = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
            handles = [*_draw_shares(bars, shares), *_draw_variances(dots, profile)]
            figure.legend(handles=handles, loc="outside upper center", ncols=3)
        else:
            bars, figure = ax, root(ax)
            pitch = ax.get_window_extent().height / figure.dpi / len(names)
            ax.legend(handles=_draw_shares(bars, shares))
        label_axis(bars, "y", names, pitch)
        bars.get_yticklabels()[-1].set_fontweight("bold")
        for panel in [bars] if ax is not None else figure.axes:
            panel.axhline(len(names) - 1.5, color=style.GREY, linewidth=0.5)
        bars.set_ylim(len(names) - 0.4, -0.6)
    return figure


def plot_sources(profile: Profile, ax: Axes | None = None, *, width: float | None = None) -> Figure:
    """The share of the total variance that comes from each layer's gradient quantizers, with standard errors.

    Args:
        profile: what to draw.
        ax: draw there; by default a new figure.
        width: of a new figure, in inches.
    """
    sources = profile.sources
    layers = list(dict.fromkeys(sources["layer"]))
    whole = float(profile.total["variance"])
    own = ax is None
    with style.applied():
        if ax is None:
            pitch = min(1.4 * _PITCH, _TALLEST / max(1, len(layers)))
            figure = style.new_figure(style.COLUMN_WIDTH if width is None else width, 0.9 + pitch * len(layers))
            ax = figure.subplots()
        else:
            figure = root(ax)
            pitch = ax.get_window_extent().height / figure.dpi / max(1, len(layers))
        handles: list[Artist] = []
        for site, color, offset, told in (
            ("grad_weight", style.ORANGE, -0.2, "weight-gradient quantizer (Q1)"),
            ("grad_input", style.BLUE, 0.2, "input-gradient quantizer (Q2)"),
        ):
            rows = sources[sources["site"] == site]
            y = np.array([layers.index(layer) for layer in rows["layer"]], dtype=np.float64) + offset
            share = 100 * rows["share"].to_numpy(dtype=np.float64)
            error = 100 * rows["standard_error"].to_numpy(dtype=np.float64) / whole if whole > 0 else 0 * share
            ax.barh(y, share, 0.4, color=color)
            drawn = np.isfinite(share) & np.isfinite(error) & (error > 0)
            ax.hlines(y[drawn], (share - error)[drawn], (share + error)[drawn], color=style.INK, linewidth=0.6)
            handles.append(Patch(color=color, label=told))
        ax.grid(axis="x")
        ax.set_xlim(left=0)
        ax.set_xlabel("share of the total variance, with standard error (%)")
        ax.set_ylabel("layer")
        label_axis(ax, "y", [layer or "(model)" for layer in layers], pitch)
        ax.set_ylim(len(layers) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        if own:
            figure.legend(handles=handles, loc="outside upper center", ncols=2)
        else:
            ax.legend(handles=handles)
    return figure


def render_all(profile: Profile) -> dict[str, bytes]:
    """All figures, as PNG files by name (without the suffix)."""
    drawn = {"matrix": plot_matrix, "parameters": plot_parameters, "sources": plot_sources}
    return {name: style.png(plot(profile)) for name, plot in drawn.items()}


def _target_keys(profile: Profile) -> list[tuple[str, str]]:
    return list(profile.targets[["layer", "parameter"]].itertuples(index=False, name=None))


def _split(profile: Profile) -> tuple[Floats, Floats]:
    """The matrix's rows of weight-gradient quantizers (Q1), and those of input-gradient quantizers (Q2)."""
    values = profile.matrix().to_numpy(dtype=np.float64)
    weight = (profile.sources["site"] == "grad_weight").to_numpy()
    return values[weight], values[~weight]


def _sum(values: Floats) -> Floats:
    """Sums over the rows; NaN where no row has a value."""
    return np.where(np.isfinite(values).any(axis=0), np.nansum(values, axis=0), np.nan)


def _rows(profile: Profile) -> tuple[Floats, list[str]]:
    """The heat map's rows and their names; layers whose input-gradient quantizer reaches nothing are left out."""
    weight, passed = _split(profile)
    layers = profile.sources["layer"][profile.sources["site"] == "grad_input"]
    reaching = np.flatnonzero(np.isfinite(passed).any(axis=1))
    names = [f"Q2 of {layer or '(model)'}" for layer in layers.iloc[reaching]]
    return np.vstack([_sum(weight), passed[reaching]]), ["Q1 of the parameter's own layer", *names]


def _shares(profile: Profile) -> Floats:
    """Percentages of each target's variance and of the total's, from Q1 and from Q2 by distance.

    Shape ``[1 + groups, targets + 1]``.
    """
    weight, passed = _split(profile)
    rank = np.cumsum(np.isfinite(passed), axis=0)  # of a layer among those behind a parameter, the nearest first
    lows = [0.0, *(last for last, _ in _DISTANCES[:-1])]
    groups = [
        np.nansum(np.where((rank > low) & (rank <= last), passed, 0.0), axis=0)
        for low, (last, _) in zip(lows, _DISTANCES, strict=True)
    ]
    parts = np.vstack([np.nansum(weight, axis=0), *groups])
    parts = np.hstack([parts, parts.sum(axis=1, keepdims=True)])
    whole = parts.sum(axis=0)
    shares: Floats = 100 * np.divide(parts, whole, out=np.zeros_like(parts), where=whole > 0)
    return shares


def _draw_shares(ax: Axes, shares: Floats) -> list[Artist]:
    """Stacked bars; returns the handles of their legend, which names what there is."""
    strengths = np.linspace(1.0, 0.25, len(_DISTANCES))
    colors = [style.tint(style.ORANGE, 1.0), *(style.tint(style.BLUE, strength) for strength in strengths)]
    labels = ["Q1, its own layer", *(f"Q2, {name}" for _, name in _DISTANCES)]
    y = np.arange(shares.shape[1], dtype=np.float64)
    left = np.zeros_like(y)
    handles: list[Artist] = []
    for row, color, label in zip(shares, colors, labels, strict=True):
        ax.barh(y, row, 0.8, left=left, color=color)
        left = left + row
        if row.any():
            handles.append(Patch(color=color, label=label))
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of the variance (%)")
    ax.tick_params(axis="y", length=0)
    return handles


def _draw_variances(ax: Axes, profile: Profile) -> list[Artist]:
    """Dots on a logarithmic axis; returns the handles of their legend."""
    rows = profile.parameters
    y = np.arange(len(rows), dtype=np.float64)
    variance, error, sampling = (
        rows[name].to_numpy(dtype=np.float64) for name in ("variance", "standard_error", "sampling_variance")
    )
    positive = variance > 0
    handles: list[Artist] = []
    ax.set_xscale("log")
    if (sampling > 0).any():
        handles += ax.plot(
            np.where(sampling > 0, sampling, np.nan), y, linestyle="", marker="o", markersize=3.2,
            markerfacecolor="white", color=style.GREY, label="minibatch sampling variance",
        )  # fmt: skip
    known = positive & np.isfinite(error)
    low = np.maximum(variance - error, variance / 10)  # a logarithmic axis cannot reach zero
    ax.hlines(y[known], low[known], (variance + error)[known], color=style.INK, linewidth=0.8)
    handles += ax.plot(
        np.where(positive, variance, np.nan), y, linestyle="", marker="D", markersize=2.6, markeredgewidth=0,
        color=style.INK, label="variance with standard error",
    )  # fmt: skip
    decades(ax, "x")
    ax.grid(axis="both", which="major")
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.set_xlabel("variance\n[(loss/parameter)$^2$]")
    return handles


def label_axis(ax: Axes, axis: str, names: Sequence[str], pitch: float, offset: float = 0.0) -> None:
    """Names along an axis, thinned where they would stand closer than they are high; the last always has one.

    Args:
        ax: where they stand.
        axis: "x" or "y".
        names: one per place.
        pitch: between two places, in inches.
        offset: of the first place from zero.
    """
    every = math.ceil(_LABEL_PITCH / pitch)
    last = len(names) - 1
    places = [*(index for index in range(0, last, every) if last - index >= every), last] if names else []
    told = [style.literal(names[i] if len(names[i]) <= 32 else "…" + names[i][-31:]) for i in places]
    ticks = [place + offset for place in places]
    if axis == "y":
        ax.set_yticks(ticks, told)
    else:
        ax.set_xticks(ticks, told, rotation=90)
