"""Tables of a report: cells with the text that is shown and the number in full precision that is sorted by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from fqtstats import profiles
from fqtstats.profiles import Profile
from fqtstats.report import tables
from fqtstats.report.columns import (
    LAYERS,
    QUANTITIES,
    SITES,
    SOURCES,
    TOTALS,
    Place,
    Quantity,
    configuration,
    layer_name,
    row_name,
)
from fqtstats.report.numbers import scientific
from fqtstats.results import COLUMNS, Configuration, Result

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
        hint: what is told of the cell where a pointer rests on it; "" for nothing.
    """

    text: str
    value: str = ""
    state: str = ""
    hint: str = ""


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


_Column = tuple[Head, Sequence[Cell]]


def _named(title: str, meaning: str, names: Sequence[str]) -> _Column:
    return Head(title, meaning, number=False), [Cell(name) for name in names]


def _cell(known: Quantity, row: pd.Series) -> Cell:
    value = known.value(row)
    return Cell(known.text(row), repr(value)) if math.isfinite(value) else Cell("")


def _columns(places: Sequence[Place], rows: Sequence[pd.Series]) -> dict[str, _Column]:
    """The columns of those places that pages have, by their keys."""
    chosen = {place.key: QUANTITIES[place.key] for place in places if place.page}
    found: dict[str, _Column] = {
        key: (Head(known.title, known.meaning, known.unit), [_cell(known, row) for row in rows])
        for key, known in chosen.items()
    }
    if "interval" in found:
        head, cells = found["interval"]
        found["interval"] = head, [replace(cell, hint=_ends(row)) for cell, row in zip(cells, rows, strict=True)]
    return found


def _ends(row: pd.Series) -> str:
    low, high = (scientific(float(row[name])) for name in ("variance_low", "variance_high"))
    return f"{low} to {high}" if low and high else ""


def _flags(found: Sequence[tuple[tables.Flag, ...]], about: str) -> _Column:
    meaning = about + "; ".join(f"{flag.word}: {flag.meaning}" for flag in tables.FLAGS)
    cells = [
        Cell(
            ", ".join(flag.word for flag in items),
            state="" if not items else "caution" if items == (tables.NOISY,) else "bad",
        )
        for items in found
    ]
    return Head("flags", meaning, number=False), cells


def _table(name: str, caption: str, columns: Sequence[_Column], *, total: bool = False) -> Table:
    """Columns without a single value are left out, but for the first."""
    kept = [(head, cells) for k, (head, cells) in enumerate(columns) if k == 0 or any(cell.text for cell in cells)]
    lines = [list(line) for line in zip(*(cells for _, cells in kept), strict=True)]
    heads = [head for head, _ in kept]
    return Table(name, caption, heads, lines[:-1] if total else lines, lines[-1] if total else ())


def layers(result: Result, configuration: Configuration, name: str) -> Table:
    """One row per parameter in network order, and the total."""
    frame, total = result.rows(configuration), result.total(configuration)
    rows = [*(frame.iloc[index] for index in range(len(frame))), total]
    level = tables.bias_level(result.select(configuration))
    found = _columns(LAYERS, rows)
    head, cells = found["bias_p"]
    found["bias_p"] = (
        head,
        [replace(cell, state="bad") if row["bias_p"] < level else cell for cell, row in zip(cells, rows, strict=True)],
    )
    columns = [
        _named("parameter", "its qualified name, in network order", [row_name(row) for row in rows]),
        _flags([tables.flags(row, level) for row in rows], "what a reader must see; "),
        *found.values(),
    ]
    draws = int(total["draws"])
    told = f"{draws} draws" if draws else "exact variances, no draws"
    return _table(name, f"{configuration}: {told}", columns, total=True)


def summary(result: Result, name: str) -> Table:
    """One row per configuration: the whole model."""
    every = result.configurations
    least = [float(result.select(item)["bias_p"].min()) for item in every]
    rows = [pd.concat([result.total(item), pd.Series({"least_p": p})]) for item, p in zip(every, least, strict=True)]
    (bits,) = (column for column in COLUMNS if column.name == "bits")
    widths = ["" if item.bits is None else str(item.bits) for item in every]
    columns = [
        _named("configuration", "input-gradient quantizer @ its bits", [str(item) for item in every]),
        _flags([tables.worst_flags(result, item) for item in every], "of any row of the configuration; "),
        (Head("bits", bits.meaning), [Cell(width, width) for width in widths]),
        *_columns(TOTALS, rows).values(),
    ]
    return _table(name, "Gradient of the whole model", columns)


def sources(profile: Profile, name: str) -> Table:
    """One row per gradient quantizer of a profile."""
    meanings = {column.name: column.meaning for column in profiles.SOURCES}
    rows = [profile.sources.iloc[index] for index in range(len(profile.sources))]
    columns = [
        _named("layer", meanings["layer"], [layer_name(row) for row in rows]),
        _named("site", meanings["site"], [SITES[row["site"]] for row in rows]),
        _named("quantizer", meanings["quantizer"], [configuration(row) for row in rows]),
        *_columns(SOURCES, rows).values(),
    ]
    return _table(name, f"{profile.label}: sources of the variance", columns)
