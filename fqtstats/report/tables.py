"""Terminal tables of a result, and the same content as plain data for ``--json``.

A renderable decides at print time how many columns fit: it drops those of lowest priority first, never a flag.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from fqtstats.report.bounds import notes as bound_notes
from fqtstats.report.columns import LAYERS, QUANTITIES, TOTALS, Place, layer_name
from fqtstats.report.fitted import FittedColumn, FittedTable, fitted, unquantized
from fqtstats.report.numbers import plain, ratio
from fqtstats.results import NORM_TOLERANCE, Configuration, Result
from fqtstats.schema import Json

__all__ = [
    "Flag",
    "bias_level",
    "comparison_table",
    "flags",
    "layer_table",
    "parity_ok",
    "parity_table",
    "sound",
    "summary",
    "to_dict",
    "worst_flags",
]

FALSE_ALARM = 0.01
"""Chance that any row of one configuration is flagged as biased although none is."""

DEPENDENT_ALARM = 1e-6
"""Chance that any row of one configuration is reported as an error of independent roundings."""

_ROUNDING = 1e-9
"""A variance may meet its bound; the two are summed in different orders."""


@dataclass(frozen=True, slots=True)
class Flag:
    """Something in a row that a reader must see.

    Attributes:
        word: what is printed; a colour is only added to it.
        style: the Rich style of the word.
        meaning: one sentence for the legend.
    """

    word: str
    style: str
    meaning: str


# For the legend below a table.
_MEANING_ERROR = "largest difference over its bound"
_MEANING_ULPS = "largest difference in ulps of the largest element"
_MEANING_MEDIAN = "median over layers of the input-gradient quantizer's own variance"

BIASED = Flag("BIASED", "bold red", "bias p below 0.01 / number of rows tested")
ABOVE_BOUND = Flag("ABOVE BOUND", "bold white on red", "a quantizer's variance exceeds its bound")
ABOVE_END = Flag(
    "ABOVE END-TO-END BOUND", "bold white on red", "an error: the variance's whole interval is above its bound"
)
DEPENDENT = Flag(
    "DEPENDENT",
    "bold white on red",
    "error: dependent rounding, the weight-gradient quantizer's draws are not those of independent roundings "
    "(p below 1e-6 / number of rows tested)",
)
NOISY = Flag("NOISY", "yellow", "noise-dominated: √3 margin below 1, that is ‖g‖² < 3 × variance")

FLAGS = (BIASED, ABOVE_BOUND, ABOVE_END, DEPENDENT, NOISY)


def bias_level(rows: pd.DataFrame) -> float:
    """The level for ``bias_p`` in the rows of one configuration: :data:`FALSE_ALARM` over the rows that have one."""
    return FALSE_ALARM / max(1, int(rows["bias_p"].notna().sum()))


def flags(row: pd.Series, level: float) -> tuple[Flag, ...]:
    """The flags of one row of the table; ``level`` is :func:`bias_level`. A value that is NaN raises none."""
    found = []
    if row["bias_p"] < level:
        found.append(BIASED)
    pairs = (("q_input_variance", "q_input_bound"), ("q_weight_variance", "q_weight_bound"))
    if any(row[variance] > row[bound] * (1 + _ROUNDING) for variance, bound in pairs):
        found.append(ABOVE_BOUND)
    if row["variance_low"] > row["bound"] * (1 + NORM_TOLERANCE):
        found.append(ABOVE_END)
    if row["own_ratio_p"] < level * DEPENDENT_ALARM / FALSE_ALARM:
        found.append(DEPENDENT)
    if row["sqrt3_margin"] < 1:
        found.append(NOISY)
    return tuple(found)


# --- cells -----------------------------------------------------------------------------------------------------------


def _flag_cells(found: Sequence[tuple[Flag, ...]]) -> list[Text]:
    return [Text(" ").join(Text(flag.word, style=flag.style) for flag in items) for items in found]


def _legend(found: Iterable[tuple[Flag, ...]]) -> list[Text]:
    present = {flag for items in found for flag in items}
    return [Text.assemble((flag.word, flag.style), f": {flag.meaning}") for flag in FLAGS if flag in present]


def _entries(result: Result) -> list[dict[str, Any]]:
    """What the metadata hold of each configuration that was measured natively."""
    entries = result.metadata.get("configurations") if result.metadata.get("backend") == "native" else None
    return [entry for entry in entries or [] if isinstance(entry, dict) and {"arithmetic", "kept"} <= entry.keys()]


def _label(entry: Mapping[str, Any]) -> str:
    return str(Configuration(str(entry["quantizer"]), entry["bits"]))


def _native(result: Result) -> list[Text]:
    """How the native backend computed, and what it kept for the backward pass; one line each if all agree."""
    told: dict[str, list[str]] = {}
    for entry in _entries(result):
        for line in (_arithmetic_line(entry["arithmetic"]), _kept_line(entry["kept"])):
            told.setdefault(line, []).append(_label(entry))
    whole = len(_entries(result))
    return [
        Text(line if len(labels) == whole else f"{', '.join(labels)}: {line}") for line, labels in sorted(told.items())
    ]


def _arithmetic_line(arithmetic: Mapping[str, Mapping[str, str]]) -> str:
    kinds = Counter((product, how) for products in arithmetic.values() for product, how in products.items())
    told = [f"{count} {product} {how}" for (product, how), count in sorted(kinds.items())]
    return f"products: {'; '.join(told)}"


def _kept_line(kept: Mapping[str, Any]) -> str:
    codes, numbers = int(kept["activation"]), int(kept["activation_float32"])
    ratio = f", {numbers / codes:.2f} times less" if codes else ""
    return f"kept for the backward pass: {codes / 1e6:.3g} MB of activations ({numbers / 1e6:.3g} MB in float32{ratio})"


def _parity(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = entry.get("parity")
    return rows if isinstance(rows, list) else []


def parity_ok(result: Result) -> bool:
    """Whether every comparison of the backends that the result holds is as it must be."""
    return all(row["ok"] for entry in _entries(result) for row in _parity(entry))


def parity_table(result: Result) -> RenderableType:
    """One row per configuration, layer and product that were computed on both backends."""
    rows = [(_label(entry), row) for entry in _entries(result) for row in _parity(entry)]
    several = len({label for label, _ in rows}) > 1
    columns = [
        FittedColumn("quantizer", [Text(label if several else "") for label, _ in rows], 60, names=True),
        FittedColumn("layer", [Text(str(row["layer"]) or "(model)") for _, row in rows], 100, names=True),
        FittedColumn("product", [Text(row["product"]) for _, row in rows], 95, names=True),
        FittedColumn("arithmetic", [Text(row["arithmetic"]) for _, row in rows], 40, names=True),
        FittedColumn("codes", [Text(str(row["codes"])) for _, row in rows], 50, meaning="codes compared"),
        FittedColumn("differing", [Text(str(row["differing"])) for _, row in rows], 80),
        FittedColumn("error", [Text(plain(_number(row["error"]))) for _, row in rows], 90, meaning=_MEANING_ERROR),
        FittedColumn("ulps", [Text(plain(_number(row["ulps"]))) for _, row in rows], 70, meaning=_MEANING_ULPS),
        FittedColumn("", [Text("") if row["ok"] else Text("DIFFERENT", style="bold red") for _, row in rows], 99),
    ]
    return FittedTable("native against simulated", columns, total=False)


def _number(value: float | None) -> float:
    return math.inf if value is None else float(value)  # JSON has no infinity


def _shown(frame: pd.DataFrame) -> Sequence[Place]:
    """The columns of a table of layers: Q1 over its bound stands beside end-to-end bounds only, else flags tell."""
    unbounded = bool(frame["bound"].isna().all())
    return [place for place in LAYERS if not (unbounded and place.key == "weight_bound")]


def _fitted(places: Sequence[Place], rows: Sequence[pd.Series], levels: Sequence[float]) -> list[FittedColumn]:
    """The columns, with p-values in the flag's colour where they are below the level of their configuration."""
    columns = fitted(places, rows)
    styles = [BIASED.style if row["bias_p"] < level else "" for row, level in zip(rows, levels, strict=True)]
    title = QUANTITIES["bias_p"].title
    return [
        replace(column, cells=[Text(cell.plain, own) for cell, own in zip(column.cells, styles, strict=True)])
        if column.header == title
        else column
        for column in columns
    ]


def layer_table(result: Result, configuration: Configuration | None = None) -> RenderableType:
    """One row per parameter and the total, of one configuration (the first by default).

    Variances and norms are in (loss/parameter)^2. "95 %" is the interval's ends relative to the variance; "Q1/Q2" the
    percentages of the variance that stem from the weight-gradient and the input-gradient quantizers; "own Q1" the exact
    variance from the layer's own weight-gradient quantizer, and "drawn" the draws' over it; "Q2/bound"
    the exact variance of the layer's input-gradient quantizer over its bound; "margin" is the √3 margin.

    Raises:
        InputError: the result has no such configuration.
    """
    chosen = configuration or result.configurations[0]
    total = result.total(chosen)
    frame = result.rows(chosen)
    level = bias_level(result.select(chosen))
    rows = [*(frame.iloc[index] for index in range(len(frame))), total]
    found = [flags(row, level) for row in rows]
    columns = [
        FittedColumn("layer", [Text(layer_name(row)) for row in rows], 100, names=True),
        FittedColumn("param", [Text(str(row["parameter"])) for row in rows], 90, names=True),
        *_fitted(_shown(frame), rows, [level] * len(rows)),
        FittedColumn("", _flag_cells(found), 99),
    ]
    title = f"{chosen}: gradient bias and variance per layer, {total['draws']} draws"
    if not total["draws"]:
        title = f"{chosen}: exact variances per layer, no draws"
    table = FittedTable(title, columns, total=True)
    return Group(table, *_legend(found), *_own(total), *unquantized(result.metadata), *_native(result))


def _own(total: pd.Series) -> list[Text]:
    """How well closed form and draws agree on what the layers' own Q1 add, and what that is worth."""
    if math.isnan(total["own_ratio_low"]):
        return []
    low, value, high = (plain(float(total[f"own_ratio{end}"])) for end in ("_low", "", "_high"))
    told = f"squared error from the layers' own Q1, drawn over exact: {value} (95 %: {low} to {high})"
    gain = float(total["variance_gain"])
    worth = f"; with the exact part, a draw is worth {gain:.2g} of plain Monte Carlo" if math.isfinite(gain) else ""
    return [Text(told + worth)]


def comparison_table(result: Result) -> RenderableType:
    """One row per configuration: the whole model's variance, bias and signal-to-noise ratio.

    "/ sampling" is the variance over one minibatch's sampling variance; the column named after a configuration is the
    median over layers of the input-gradient quantizer's exact variance relative to that configuration.
    """
    rows = [result.total(item) for item in result.configurations]
    found = [worst_flags(result, item) for item in result.configurations]
    levels = [bias_level(result.select(item)) for item in result.configurations]
    medians = [Text(plain(_median_input_ratio(result, item))) for item in result.configurations]
    columns = [
        FittedColumn("quantizer", [Text(item.quantizer) for item in result.configurations], 100, names=True),
        FittedColumn(
            "bits", [Text("" if item.bits is None else str(item.bits)) for item in result.configurations], 100
        ),
        *_fitted(TOTALS, rows, levels),
        FittedColumn("", _flag_cells(found), 99),
    ]
    before = QUANTITIES["sampling_ratio"].title
    place = 1 + next(index for index, column in enumerate(columns) if column.header == before)
    columns.insert(place, FittedColumn(f"Q2 var / {result.reference}", medians, 65, meaning=_MEANING_MEDIAN))
    notes = [Text("flags hold for any row of the configuration")] if any(found) else []
    table = FittedTable("gradient variance of the whole model", columns, total=False)
    return Group(table, *_legend(found), *notes, *unquantized(result.metadata), *_native(result))


def summary(result: Result) -> RenderableType:
    """What the command line prints: the layers of a single configuration, or the comparison of several; and parity."""
    table = layer_table(result) if len(result.configurations) == 1 else comparison_table(result)
    compared = any(_parity(entry) for entry in _entries(result))
    parts = [table, *bound_notes(result)]
    return Group(*parts, Text(""), parity_table(result)) if compared else Group(*parts)


def sound(result: Result) -> bool:
    """Whether no variance exceeds its bound, a quantizer's own or a gradient's, and no rounding is dependent."""
    broken = {ABOVE_BOUND, ABOVE_END, DEPENDENT}
    return not any(broken & set(worst_flags(result, item)) for item in result.configurations)


def _median_input_ratio(result: Result, configuration: Configuration) -> float:
    ratios = result.relative_input_variance(configuration)
    return float(np.median(ratios)) if len(ratios) else math.nan


def worst_flags(result: Result, configuration: Configuration) -> tuple[Flag, ...]:
    """Bias, bound and dependence flags of any row; noise as the total has it (single layers are often noisy)."""
    total = result.total(configuration)
    frame = result.select(configuration)
    level = bias_level(frame)
    of_any = {flag for index in range(len(frame)) for flag in flags(frame.iloc[index], level)}
    of_total = flags(total, level)
    return tuple(flag for flag in FLAGS if flag in (of_total if flag is NOISY else of_any))


def _plain_row(row: pd.Series, level: float) -> dict[str, Json]:
    """A row as JSON with missing values as null, and its flags."""
    values: dict[str, Json] = {}
    for name, value in row.items():
        missing = pd.isna(value) or (isinstance(value, float) and not math.isfinite(value))
        values[str(name)] = None if missing else value.item() if isinstance(value, np.generic) else value
    values["flags"] = [flag.word for flag in flags(row, level)]
    return values


def to_dict(result: Result) -> dict[str, Json]:
    """The result as plain data for ``--json``: strict JSON, with null where the table has NaN."""
    configurations: list[Json] = []
    for item in result.configurations:
        frame, total = result.rows(item), result.total(item)
        level = bias_level(result.select(item))
        median = _median_input_ratio(result, item)
        sampling = ratio(float(total["variance"]), float(total["sampling_variance"]))
        configurations.append(
            {
                "quantizer": item.quantizer,
                "bits": item.bits,
                "bias_level": level,
                "variance_over_sampling": None if math.isnan(sampling) else sampling,
                "input_variance_over_reference": None if math.isnan(median) else median,
                "flags": [flag.word for flag in worst_flags(result, item)],
                "total": _plain_row(total, level),
                "rows": [_plain_row(frame.iloc[index], level) for index in range(len(frame))],
            }
        )
    return {"reference": str(result.reference), "configurations": configurations, "metadata": result.metadata}
