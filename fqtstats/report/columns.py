"""What tables of results have in their columns: title, meaning, unit, and how a value is shown, once for every medium.

The terminal's tables (:mod:`fqtstats.report.tables`, :mod:`fqtstats.report.profile_tables`) and those of pages
(:mod:`fqtstats.report.html.tables`) are made of the lists :data:`LAYERS`, :data:`TOTALS` and :data:`SOURCES`. What a
column of the data itself means stands in its schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fqtstats import profiles
from fqtstats.report.numbers import percent, plain, ratio, relative_interval, scientific
from fqtstats.results import COLUMNS, TOTAL, Configuration

__all__ = [
    "LAYERS",
    "PROFILES",
    "QUANTITIES",
    "SITES",
    "SOURCES",
    "TOTALS",
    "Place",
    "Quantity",
    "configuration",
    "layer_name",
    "row_name",
]

SITES = {"grad_weight": "Q1", "grad_input": "Q2"}
"""Short names of a layer's two gradient quantizers."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A column of a table.

    Attributes:
        title: its header.
        meaning: what it holds, in one sentence.
        value: of a row of the data, to sort by; NaN where it has none.
        text: of that row, as it is shown; "" where there is nothing to show.
        unit: of the values; "" for a pure number.
        brief: the meaning in a few words for the legend below a terminal's table; "" where the title says it.
    """

    title: str
    meaning: str
    value: Callable[[pd.Series], float]
    text: Callable[[pd.Series], str]
    unit: str = ""
    brief: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A column's place in a table.

    Attributes:
        key: of the quantity in :data:`QUANTITIES`.
        priority: in a terminal, where the columns with the lowest are dropped first; None where it is not shown there.
        page: whether pages have it.
    """

    key: str
    priority: int | None
    page: bool = True


def layer_name(row: pd.Series) -> str:
    """A layer's qualified name, or what stands for the root module's empty one."""
    return str(row["layer"]) or "(model)"


def row_name(row: pd.Series, whole: str = TOTAL) -> str:
    """The qualified name of a row's parameter; ``whole`` for the row of the whole model."""
    if (row["layer"], row["parameter"]) == (TOTAL, ""):
        return whole
    return profiles.target_name(row["layer"], row["parameter"])


def configuration(row: pd.Series) -> str:
    """A row's quantizer and bits."""
    return str(Configuration(row["quantizer"], None if pd.isna(row["bits"]) else int(row["bits"])))


def _unit(text: str) -> str:
    return "" if text == "1" else text.replace("^2", "²")


_SCHEMA = {column.name: column for column in COLUMNS}


def _column(
    name: str, title: str, show: Callable[[float], str] = scientific, *, brief: str = "", meaning: str = ""
) -> Quantity:
    """A column of the data; its meaning is the schema's unless another is given."""
    own = _SCHEMA[name]

    def value(row: pd.Series) -> float:
        return float(row[name])

    return Quantity(title, meaning or own.meaning, value, lambda row: show(value(row)), _unit(own.unit), brief)


def _over(title: str, numerator: str, denominator: str, *, meaning: str, brief: str = "") -> Quantity:
    """A ratio of two columns."""

    def value(row: pd.Series) -> float:
        return ratio(float(row[numerator]), float(row[denominator]))

    return Quantity(title, meaning, value, lambda row: plain(value(row)), brief=brief)


def _relative_width(row: pd.Series) -> float:
    return ratio(float(row["variance_high"]) - float(row["variance_low"]), float(row["variance"]))


def _interval(row: pd.Series) -> str:
    return relative_interval(*(float(row[name]) for name in ("variance", "variance_low", "variance_high")))


def _weight_share(row: pd.Series) -> float:
    return ratio(float(row["variance_weight"]), float(row["variance_weight"] + row["variance_input"]))


def _shares(row: pd.Series) -> str:
    share = 100 * _weight_share(row)
    return "" if math.isnan(share) else f"{share:.0f}/{100 - share:.0f}"


def _source(name: str, title: str, show: Callable[[float], str], brief: str = "") -> Quantity:
    own = next(column for column in profiles.SOURCES if column.name == name)
    return Quantity(
        title, own.meaning, lambda row: float(row[name]), lambda row: show(float(row[name])), _unit(own.unit), brief
    )


def _relative_error(row: pd.Series) -> float:
    return ratio(float(row["standard_error"]), float(row["variance"]))


_INTERVAL: dict[str, Any] = {"value": _relative_width, "text": _interval, "brief": "interval relative to the variance"}
_OWN = "exact variance from the layer's own weight-gradient quantizer"
_OWN_OF_ALL = "exact variance from the layers' own weight-gradient quantizers"
_DRAWN = "squared error from that quantizer in the draws, over its exact mean there"

QUANTITIES: dict[str, Quantity] = {
    "numel": _column("numel", "numel", lambda value: f"{value:.0f}"),
    "grad_norm_sq": _column("grad_norm_sq", "‖g‖²"),
    "bias_p": _column("bias_p", "bias p", plain),
    "variance": _column("variance", "variance"),
    "interval": Quantity("95 %", "ends of the 95 % interval of the variance, relative to it", **_INTERVAL),
    "own": _column("variance_exact_own", "own Q1", brief=_OWN),
    "own_of_all": _column("variance_exact_own", "own Q1", brief=_OWN_OF_ALL),
    "own_ratio": _column("own_ratio", "drawn", plain, brief=_DRAWN),
    "shares": Quantity(
        "Q1/Q2",
        "% of the variance from the weight-gradient (Q1) and the input-gradient quantizers (Q2)",
        _weight_share,
        _shares,
        brief="% of the variance from the weight-gradient and the input-gradient quantizers",
    ),
    "input_bound": _over(
        "Q2/bound",
        "q_input_variance",
        "q_input_bound",
        meaning="exact variance of the layer's input-gradient quantizer over its bound",
        brief="the input-gradient quantizer's own variance over its bound",
    ),
    "weight_bound": _over(
        "Q1/bound",
        "q_weight_variance",
        "q_weight_bound",
        meaning="exact variance of the layer's weight-gradient quantizer over its bound",
        brief="the same of the weight-gradient quantizer",
    ),
    "bound_ratio": _column(
        "bound_ratio",
        "var/bound",
        plain,
        brief="variance over its end-to-end bound",
        meaning="variance over its end-to-end upper bound (Theorem 2 of arXiv 2010.14298)",
    ),
    "sampling": _column("sampling_variance", "sampling", brief="a minibatch's variance"),
    "sampling_ratio": _over(
        "/ sampling",
        "variance",
        "sampling_variance",
        meaning="variance over the sampling variance of one minibatch",
        brief="over a minibatch's variance",
    ),
    "snr": _column("snr", "SNR", plain, brief="‖g‖² / variance", meaning="‖g‖² / variance"),
    "margin": _column(
        "sqrt3_margin",
        "margin",
        plain,
        brief="‖g‖ / √(3 variance)",
        meaning="‖g‖ / √(3 variance); below 1 the noise dominates",
    ),
    "least_p": Quantity(
        "least p",
        "smallest bias p among all rows of the configuration",
        lambda row: float(row["least_p"]),
        lambda row: plain(float(row["least_p"])),
    ),
    "draws": _column("draws", "draws", lambda value: f"{value:.0f}"),
    "source_variance": _source("variance", "variance", scientific),
    "source_error": Quantity(
        "±",
        "standard error relative to the variance",
        _relative_error,
        lambda row: percent(_relative_error(row)),
        brief="standard error relative to the variance",
    ),
    "source_share": _source("share", "share", percent, "of the total variance"),
}
"""By a key of their own."""

LAYERS: tuple[Place, ...] = (
    Place("numel", 20),
    Place("grad_norm_sq", 50),
    Place("bias_p", 80),
    Place("variance", 95),
    Place("interval", 75),
    Place("own", 43),
    Place("own_ratio", 25),
    Place("shares", 45),
    Place("input_bound", 40),
    Place("weight_bound", 38),
    Place("bound_ratio", 77),
    Place("sampling", 72),
    Place("sampling_ratio", None),
    Place("snr", 70),
    Place("margin", 30),
)
"""Of a table with one row per parameter, after its names."""

TOTALS: tuple[Place, ...] = (
    Place("variance", 95),
    Place("interval", 75),
    Place("own_of_all", 50, page=False),
    Place("own_ratio", 45),
    Place("shares", None),
    Place("sampling", None),
    Place("sampling_ratio", 60),
    Place("bound_ratio", 67),
    Place("snr", 70),
    Place("margin", None),
    Place("bias_p", 80, page=False),
    Place("least_p", None),
    Place("draws", None),
)
"""Of a table with one row per configuration, after its names."""

SOURCES: tuple[Place, ...] = (
    Place("source_variance", 90),
    Place("source_error", 70),
    Place("source_share", 95),
)
"""Of a table with one row per gradient quantizer of a profile, after its names."""

PROFILES: tuple[Place, ...] = (
    Place("source_variance", 95),
    Place("source_error", 80),
    Place("sampling_ratio", 60),
)
"""Of a table with one row per profile, after its name."""
