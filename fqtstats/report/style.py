"""One look for all figures: colours, markers, sizes and fonts.

Colours are those of M. Okabe and K. Ito, "Color Universal Design" (2008), which stay apart for colour-blind readers; a
quantizer has the same colour and marker in every figure, so that neither is needed alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "OLIVE",
    "ORANGE",
    "PALE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "WINE",
    "Mark",
    "applied",
    "literal",
    "marks",
    "new_figure",
    "pdf",
    "png",
    "tint",
]

COLUMN_WIDTH = 3.3
"""Width in inches of one column in a two-column paper."""

INK = "#222222"
GREY = "#8a8a8a"
PALE = "#ececec"
"""Of areas where there is nothing."""

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
WINE = "#882255"
OLIVE = "#999933"


@dataclass(frozen=True, slots=True)
class Mark:
    """How one quantizer is drawn."""

    color: str
    marker: str


_FIXED: dict[str, Mark] = {
    "ptq": Mark(VERMILION, "s"),
    "pcq": Mark(ORANGE, "^"),
    "psq": Mark(BLUE, "o"),
    "bhq": Mark(GREEN, "D"),
    "luq": Mark(PURPLE, "v"),
    "custom": Mark(INK, "X"),
}
_SPARE = (Mark(SKY, "p"), Mark(WINE, "<"), Mark(OLIVE, ">"), Mark("#555555", "h"), Mark("#B8A200", "*"))


def marks(names: Iterable[str]) -> dict[str, Mark]:
    """A mark for each quantizer: the fixed one, or the next spare one (they repeat after the fifth)."""
    unique = list(dict.fromkeys(names))
    others = [name for name in unique if name not in _FIXED]
    spare = {name: _SPARE[index % len(_SPARE)] for index, name in enumerate(others)}
    return {name: _FIXED.get(name) or spare[name] for name in unique}


def tint(color: str, strength: float) -> tuple[float, float, float]:
    """``color`` mixed with white; strength 1 is the colour itself, 0 is white."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(color))
    return red, green, blue


def literal(name: str) -> str:
    """``name`` as matplotlib shows it unchanged: a dollar sign in it begins no formula."""
    return name.replace("$", r"\$")


_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same look everywhere
    "font.size": 6.5,
    "axes.titlesize": 7,
    "axes.labelsize": 6.5,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.minor.width": 0.3,
    "ytick.minor.width": 0.3,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 0.9,
    "lines.markersize": 3.0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.4,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.4,
    "figure.facecolor": "white",
    "savefig.dpi": 300,
    "figure.dpi": 200,
    "pdf.fonttype": 42,  # text stays text in vector files
    "ps.fonttype": 42,
    "svg.fonttype": "none",
}


def applied() -> AbstractContextManager[None]:
    """The style, for the duration of a ``with`` statement."""
    return rc_context(_RC)


class _NotebookFigure(Figure):
    """A figure that Jupyter shows although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        return png(self)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, outside pyplot's global state."""
    figure = _NotebookFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG at 300 dots per inch."""
    buffer = io.BytesIO()
    with applied():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def pdf(figure: Figure) -> bytes:
    """The figure as a PDF without a date: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with applied():
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()
