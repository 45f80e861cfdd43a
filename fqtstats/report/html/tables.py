"""Tables of a report: cells with the text that is shown and the number in full precision that is sorted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from fqtstats.profiles import SOURCES, Profile
from fqtstats.report import tables
from fqtstats.report.fitted import plain, scientific
from fqtstats.results import COLUMNS, TOTAL, Configuration, Result

__all__ = ["Cell", "Head", "Table", "layers", "sources", "summary"]


@dataclass(frozen=True)
class Head:
    """A column.

    Attributes:
        title: its name.
        meaning: what it holds, in one sentence.
        unit: of its values; "" for a pure number or a name.
        number: whether it holds numbers.
    """

    title: str
    meaning: str
    unit: str = ""
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """A value.

    Attributes:
        text: what is shown.
        value: the number in full precision; "" where there is none.
        state: as of a finding, for its colour; "" for none.
    """

    text: str
    value: str = ""
    state: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted, and, apart from them, a last one.

    Attributes:
        name: for its id.
        caption: what it shows.
        heads: one per column; the first column has the rows' names.
        rows: cells.
        total: the last row; empty for none.
    """

    name: str
    caption: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()


_About = tuple[Head, Callable[[pd.Series], Cell]]


def _units(text: str) -> str:
    return "" if text == "1" else text.replace("^2", "²")


_SCHEMA = {column.name: column for column in COLUMNS}


def _head(name: str, title: str) -> Head:
    """A column of the result's table under a shorter title, with the same words where others name it by its key."""
    column = _SCHEMA[name]
    meaning = {"snr": "‖g‖² / variance", "sqrt3_margin": "‖g‖ / √(3 variance); below 1 the noise dominates"}
    return Head(title, meaning.get(name, column.meaning), _units(column.unit))


def _number(value: float, show: Callable[[float], str]) -> Cell:
    return Cell(show(value), repr(float(value))) if math.isfinite(value) else Cell("")


def _column(name: str, title: str, show: Callable[[float], str] = scientific) -> _About:
    return _head(name, title), lambda row: _number(float(row[name]), show)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _over(head: Head, numerator: str, denominator: str, show: Callable[[float], str] = plain) -> _About:
    return head, lambda row: _number(_ratio(float(row[numerator]), float(row[denominator])), show)


def _percent(value: float) -> str:
    return plain(100 * value)


def _share(title: str, own: str, meaning: str) -> _About:
    def cell(row: pd.Series) -> Cell:
        return _number(_ratio(float(row[own]), float(row["variance_weight"] + row["variance_input"])), _percent)

    return Head(title, meaning, "%"), cell


def _p(level: float) -> _About:
    def cell(row: pd.Series) -> Cell:
        found = _number(float(row["bias_p"]), plain)
        return Cell(found.text, found.value, "bad") if row["bias_p"] < level else found

    return _head("bias_p", "bias p"), cell


def _flags(level: float) -> _About:
    def cell(row: pd.Series) -> Cell:
        found = tables.flags(row, level)
        state = "" if not found else "caution" if found == (tables.NOISY,) else "bad"
        return Cell(", ".join(flag.word for flag in found), state=state)

    meaning = "; ".join(f"{flag.word}: {flag.meaning}" for flag in tables.FLAGS)
    return Head("flags", meaning, number=False), cell


_Q1 = _share("Q1", "variance_weight", "share of the variance from the weight-gradient quantizers (Q1)")
_Q2 = _share("Q2", "variance_input", "share of the variance from the input-gradient quantizers (Q2)")
_SAMPLING = _over(
    Head("/ sampling", "variance over the sampling variance of one minibatch"), "variance", "sampling_variance"
)


def _table(
    name: str, caption: str, names: Sequence[_About], about: Sequence[_About], rows: pd.DataFrame, total: bool
) -> Table:
    """Columns without a single value are left out."""
    series = [rows.iloc[index] for index in range(len(rows))]
    columns = [(head, [cell(row) for row in series]) for head, cell in (*names, *about)]
    kept = [(head, cells) for k, (head, cells) in enumerate(columns) if k == 0 or any(cell.text for cell in cells)]
    lines = [list(line) for line in zip(*(cells for _, cells in kept), strict=True)]
    heads = [head for head, _ in kept]
    return Table(name, caption, heads, lines[:-1] if total else lines, lines[-1] if total else ())


def _name(row: pd.Series) -> str:
    if (row["layer"], row["parameter"]) == (TOTAL, ""):
        return "total"
    return f"{row['layer']}.{row['parameter']}".strip(".")


def layers(result: Result, configuration: Configuration, name: str) -> Table:
    """One row per parameter in network order, and the total."""
    rows = pd.concat([result.rows(configuration), result.total(configuration).to_frame().T])
    level = tables.bias_level(result.select(configuration))
    draws = int(result.total(configuration)["draws"])
    names: list[_About] = [
        (
            Head("parameter", "its qualified name, in network order", number=False),
            lambda row: Cell(_name(row)),
        )
    ]
    about = [
        _column("numel", "elements", lambda value: f"{value:.0f}"),
        _column("variance", "variance"),
        _column("variance_low", "95 % low"),
        _column("variance_high", "95 % high"),
        _p(level),
        _column("grad_norm_sq", "‖g‖²"),
        _column("snr", "SNR", plain),
        _column("sqrt3_margin", "√3 margin", plain),
        _Q1,
        _Q2,
        _column("sampling_variance", "sampling"),
        _SAMPLING,
        _column("variance_exact_own", "own Q1"),
        _column("own_ratio", "drawn / exact", plain),
        _over(
            Head("Q1 / bound", "exact variance of the layer's weight-gradient quantizer over its bound"),
            "q_weight_variance",
            "q_weight_bound",
        ),
        _over(
            Head("Q2 / bound", "exact variance of the layer's input-gradient quantizer over its bound"),
            "q_input_variance",
            "q_input_bound",
        ),
        (
            Head("end-to-end / bound", "variance over its end-to-end upper bound (Theorem 2 of arXiv 2010.14298)"),
            lambda row: _number(float(row["bound_ratio"]), plain),
        ),
        _flags(level),
    ]
    told = f"{draws} draws" if draws else "exact variances, no draws"
    return _table(name, f"{configuration}: {told}", names, about, rows, total=True)


def summary(result: Result, name: str) -> Table:
    """One row per configuration: the whole model."""
    lines = [result.total(item) for item in result.configurations]
    frames = [result.select(item) for item in result.configurations]
    rows = pd.DataFrame(lines).reset_index(drop=True)
    rows["least_p"] = [float(frame["bias_p"].min()) for frame in frames]
    names: list[_About] = [
        (
            Head("configuration", "input-gradient quantizer @ its bits", number=False),
            lambda row: Cell(str(Configuration(row["quantizer"], None if pd.isna(row["bits"]) else int(row["bits"])))),
        )
    ]
    about = [
        (
            _head("bits", "bits"),
            lambda row: Cell("") if pd.isna(row["bits"]) else Cell(str(row["bits"]), str(row["bits"])),
        ),
        _column("variance", "variance"),
        _column("variance_low", "95 % low"),
        _column("variance_high", "95 % high"),
        _column("sampling_variance", "sampling"),
        _SAMPLING,
        _column("snr", "SNR", plain),
        _column("sqrt3_margin", "√3 margin", plain),
        _Q1,
        _Q2,
        (
            Head("smallest bias p", "smallest p-value of no bias among all rows of the configuration"),
            lambda row: _number(float(row["least_p"]), plain),
        ),
        _column("own_ratio", "drawn / exact", plain),
        (
            Head("end-to-end / bound", "variance over its end-to-end upper bound (Theorem 2 of arXiv 2010.14298)"),
            lambda row: _number(float(row["bound_ratio"]), plain),
        ),
        _column("draws", "draws", lambda value: f"{value:.0f}"),
    ]
    return _table(name, "Gradient of the whole model", names, about, rows, total=False)


def sources(profile: Profile, name: str) -> Table:
    """One row per gradient quantizer of a profile."""
    schema = {column.name: column for column in SOURCES}
    sites = {"grad_weight": "Q1", "grad_input": "Q2"}

    def head(key: str, title: str, number: bool = True) -> Head:
        return Head(title, schema[key].meaning, _units(schema[key].unit), number)

    names: list[_About] = [
        (head("layer", "layer", number=False), lambda row: Cell(str(row["layer"]) or "(model)")),
        (head("site", "site", number=False), lambda row: Cell(sites[row["site"]])),
        (
            head("quantizer", "quantizer", number=False),
            lambda row: Cell(str(Configuration(row["quantizer"], None if pd.isna(row["bits"]) else int(row["bits"])))),
        ),
    ]
    about: list[_About] = [
        (head("variance", "variance"), lambda row: _number(float(row["variance"]), scientific)),
        (head("standard_error", "standard error"), lambda row: _number(float(row["standard_error"]), scientific)),
        (
            Head("share", "its share of the total variance", "%"),
            lambda row: _number(float(row["share"]), _percent),
        ),
    ]
    return _table(name, f"{profile.label}: sources of the variance", names, about, profile.sources, total=False)
