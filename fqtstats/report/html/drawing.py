"""Figures of a report as SVG that can stand in an HTML page, with text as text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from fqtstats.profiles import Profile
from fqtstats.report import figures, overviews, style
from fqtstats.results import Configuration, Result

__all__ = ["Drawing", "bounds", "matrix", "shares", "variance", "widths"]

_MOST = 5
"""Configurations in one figure of layers."""

_NAMESPACE = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_PIXELS = 96
"""Per inch."""


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        svg: the element.
        width: in pixels, below which its text would be hard to read.
        alt: what is to be seen, for those who do not see it.
        caption: what it shows.
    """

    svg: Markup
    width: int
    alt: str
    caption: str


def _drawing(figure: Figure, name: str, alt: str, caption: str) -> Drawing:
    width, height = (round(_PIXELS * inches) for inches in figure.get_size_inches())
    return Drawing(_svg(figure, name, width, height, alt), width, alt, caption)


def _svg(figure: Figure, name: str, width: int, height: int, alt: str) -> Markup:
    """The figure as an element of HTML: without namespaces, a style sheet or metadata, with ids of its own.

    Args:
        figure: is drawn.
        name: begins every id, so that figures of one page do not share any.
        width: of the figure, in pixels.
        height: of it.
        alt: its text alternative.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings(), style.applied(), matplotlib.rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # the browser has others
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(_UNPRINTABLE.sub("�", buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    referred = {found for element in root.iter() for found in _references(element)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
        own = element.attrib.pop("id", None)
        if own in referred:
            element.set("id", f"{name}-{own}")
        link = element.attrib.pop(_LINK, None)
        if link is not None:
            element.set("href", f"#{name}-{link[1:]}" if link.startswith("#") else link)
        for key, value in element.attrib.items():
            element.set(key, re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", value))
    root.attrib.pop("version", None)
    root.attrib |= {"width": str(width), "height": str(height), "role": "img", "aria-label": alt}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree escapes what it writes


def _references(element: ElementTree.Element) -> list[str]:
    """The ids that an element refers to."""
    found = [match for value in element.attrib.values() for match in re.findall(r"url\(#([^)]*)\)", value)]
    return [*found, *([element.attrib[_LINK][1:]] if _LINK in element.attrib else [])]


def _groups(result: Result) -> list[list[Configuration]]:
    """The configurations by figure: all, or, of many, those of one number of bits."""
    every = list(result.configurations)
    if len(every) > _MOST and len({item.quantizer for item in every}) > 1:
        bits = list(dict.fromkeys(item.bits for item in every))
        groups = [[item for item in every if item.bits == own] for own in bits]
    else:
        groups = [every]
    return [group[start : start + _MOST] for group in groups for start in range(0, len(group), _MOST)]


def _listed(configurations: Sequence[Configuration]) -> str:
    return ", ".join(str(item) for item in configurations)


def variance(result: Result, name: str) -> list[Drawing]:
    """Variance by layer: one figure, or several where there are many configurations."""
    drawn = any(result.total(item)["draws"] > 0 for item in result.configurations)
    what = "variance of the gradient" if drawn else "exact variance from the layer's own quantizer"
    shown = (
        "Dots: variance with its 95 % interval; beside them the gradient's squared norm and the sampling variance of "
        "one minibatch. Bars: the parts of the weight-gradient (Q1) and the input-gradient quantizers (Q2)."
        if drawn
        else "Exact variance of the gradient from the layer's own weight-gradient quantizer (Q1), without draws."
    )
    return [
        _drawing(
            figures.plot_variance(result, configurations=group, width=4.6),
            f"{name}-{index}",
            f"Dot plot, one row per parameter: {what} of {_listed(group)}, on a logarithmic axis. "
            f"{_extremes(result, group)}",
            f"{_listed(group)}. {shown}",
        )
        for index, group in enumerate(_groups(result))
    ]


def _extremes(result: Result, group: Sequence[Configuration]) -> str:
    """Where the variance is largest."""
    told = []
    for item in group:
        rows = result.rows(item)
        rows = rows[rows["variance"] > 0]
        if len(rows):
            worst = rows.iloc[int(np.argmax(rows["variance"]))]
            part = f"{100 * worst['variance'] / result.total(item)['variance']:.0f} %"
            told.append(f"{item}: largest in {worst['layer']}.{worst['parameter']}, {part} of the total")
    return f"{'; '.join(told)}." if told else ""


def widths(result: Result, name: str) -> list[Drawing]:
    """Variance against the bits; nothing for a single number of them."""
    if len({item.bits for item in result.configurations if item.bits is not None}) < 2:
        return []
    totals = "; ".join(f"{item} {result.total(item)['variance']:.2e}" for item in result.configurations)
    drawn = any(result.total(item)["draws"] > 0 for item in result.configurations)
    above = (
        "Above, the whole model's variance with 95 % intervals, and the sampling variance of one minibatch; below, t"
    )
    return [
        _drawing(
            figures.plot_variance_vs_bits(result, width=4.6),
            name,
            f"Variance against the bits of the input-gradient quantizer, on logarithmic axes. Totals: {totals}."
            if drawn
            else "Exact variance of the input-gradient quantizers against their bits, on a logarithmic axis.",
            f"{above if drawn else 'T'}he exact variance of the input-gradient quantizers (Q2): median and quartiles "
            "of the layers.",
        )
    ]


def matrix(profile: Profile, name: str) -> Drawing:
    """Shares of the variance, by the layer that they come from and the layer that they reach."""
    return _drawing(
        overviews.plot_layers(profile),
        name,
        f"Heat map of {profile.label}: share of the total variance by source layer (rows) and target layer (columns).",
        f"{profile.label}. Each cell is the share of the total variance that the gradient quantizers of one layer "
        "(row) put into the gradient of another (column). Grey: nothing arrives there. The colours are logarithmic.",
    )


def shares(result: Result, name: str) -> list[Drawing]:
    """Shares of the variance by layer and configuration; nothing without draws."""
    if not (result.rows(result.configurations[0])["variance"] > 0).any():
        return []
    return [
        _drawing(
            overviews.plot_shares(result),
            name,
            "Heat map: share of the total variance by layer (rows) and configuration (columns).",
            "Share of each layer's gradient in the total variance. Which layer's quantizers it comes from is what "
            "fqtstats profile tells.",
        )
    ]


def bounds(result: Result, name: str) -> list[Drawing]:
    """Variance over bound per layer; nothing where none has a bound."""
    if not overviews.bounded(result):
        return []
    groups = [group for group in _groups(result) if overviews.bounded(result, group)]
    return [
        _drawing(
            overviews.plot_bounds(result, group),
            f"{name}-{index}",
            f"Dot plot, one row per layer: variance over its bound of {_listed(group)}, on logarithmic axes; the bound "
            "is at 1.",
            f"{_listed(group)}. Variance over its upper bound; right of the dashed line it would exceed it. Q1 and Q2: "
            "exact variance of the layer's own weight-gradient and input-gradient quantizer over that quantizer's "
            "bound; end to end: variance of the gradient over the bound from all quantizers (with --bounds).",
        )
        for index, group in enumerate(groups)
    ]
