"""Numbers as text, the same in terminals, in pages and in the documentation; and tables as plain data."""

from __future__ import annotations

import math

import pandas as pd

from fqtstats.schema import Json, json_dict

__all__ = ["percent", "plain", "plain_rows", "ratio", "relative_interval", "scientific"]

_ROUNDING = 1e-9
"""Relative width of an interval below which a number is exact."""


def scientific(value: float) -> str:
    """Three significant digits, always eight characters wide for a positive number within 1e±99."""
    return "" if math.isnan(value) else f"{value:.2e}"


def plain(value: float) -> str:
    """Three significant digits for a ratio of order one; the exponent only where it is needed."""
    if math.isnan(value):
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:#.3g}".removesuffix(".")
    return f"{value:.2e}"


def percent(share: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * share:.1f}%" if math.isfinite(share) else ""


def ratio(numerator: float, denominator: float) -> float:
    """NaN unless the denominator is above zero."""
    return numerator / denominator if denominator > 0 else math.nan


def relative_interval(value: float, low: float, high: float) -> str:
    """The ends of an interval relative to its value, in percent; "" where there is none."""
    if not (value > 0 and math.isfinite(low) and math.isfinite(high)):
        return ""
    if high - low <= _ROUNDING * value:
        return "exact"
    return f"{(low / value - 1) * 100:+.0f}/{(high / value - 1) * 100:+.0f}%"


def plain_rows(table: pd.DataFrame) -> list[Json]:
    """A table as JSON, one dictionary per row, with null where it has NaN."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [json_dict({str(name): value for name, value in row.items()}, "row") for row in rows]
