"""What terminal tables share: they drop columns until they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from fqtstats.report.columns import QUANTITIES, Place

__all__ = ["FittedColumn", "FittedTable", "fitted", "unquantized"]

_NAMED = 3
"""So many unquantized layers of one kind are named; the names of more are in the result's metadata."""


@dataclass(frozen=True, slots=True)
class FittedColumn:
    """A column of a terminal table.

    Attributes:
        header: its title.
        cells: one per row.
        priority: those with the lowest are dropped first where the terminal is narrow.
        names: it holds names: set to the left, and long ones are cut at their front where there is no room.
        meaning: what is in it, for the legend, where the header does not say.
    """

    header: str
    cells: Sequence[Text]
    priority: int
    names: bool = False
    meaning: str = ""

    @property
    def width(self) -> int:
        return max(cell_len(self.header), *(cell_len(cell.plain) for cell in self.cells))

    def cut(self, width: int) -> FittedColumn:
        """Names no longer than ``width``: their end is kept, because it is what tells layers apart."""
        if not self.names:
            return self
        cells = [
            cell if len(cell.plain) <= width else Text("…" + cell.plain[1 - width :], style=cell.style)
            for cell in self.cells
        ]
        return replace(self, cells=cells)


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table that drops columns until it fits; its last row is set apart if ``total``."""

    title: str
    columns: Sequence[FittedColumn]
    total: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        least = max(12, 3 * room // 10)
        kept = [column for column in self.columns if any(cell.plain for cell in column.cells)]

        def fits(gap: int, limit: int) -> bool:
            return sum(column.cut(limit).width + gap for column in kept) - gap <= room

        dropped = []
        while len(kept) > 1 and not fits(1, least):
            dropped.append(min(kept, key=lambda column: column.priority))
            kept.remove(dropped[-1])
        # The room that is left goes to the names.
        limit = next((limit for limit in range(room, least, -1) if fits(1, limit)), least)
        wide = fits(2, limit)
        kept = [column.cut(limit) for column in kept]
        # The box puts one space between columns; a second one is padding.
        table = Table(
            box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1 if wide else 0, 0, 0),
            title=Text(self.title, style="bold"), title_justify="left",
        )  # fmt: skip
        for column in kept:
            table.add_column(column.header, justify="left" if column.names else "right", no_wrap=True)
        rows = len(kept[0].cells)
        for index in range(rows):
            if self.total and index == rows - 1:
                table.add_section()
            table.add_row(*(column.cells[index] for column in kept))
        yield table
        meanings = [f"{column.header}: {column.meaning}" for column in kept if column.meaning]
        if meanings:
            yield Text("; ".join(meanings), style="dim")
        if dropped:
            hidden = ", ".join(column.header for column in self.columns if column in dropped)
            yield Text(f"no room for: {hidden} (widen the terminal, or use --json)", style="dim")


def fitted(places: Sequence[Place], rows: Sequence[pd.Series]) -> list[FittedColumn]:
    """The columns of those places that terminals have, one cell per row."""
    return [
        FittedColumn(known.title, [Text(known.text(row)) for row in rows], place.priority, meaning=known.brief)
        for place, known in ((place, QUANTITIES[place.key]) for place in places)
        if place.priority is not None
    ]


def unquantized(metadata: Mapping[str, Any]) -> list[Text]:
    """The layers that stayed as they were, counted by type and reason; few of a kind are named."""
    entries = metadata.get("unquantized")
    kinds: dict[tuple[str, str], list[str]] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            kinds.setdefault((str(entry.get("type")), str(entry.get("reason"))), []).append(str(entry.get("layer")))
    told = [
        f"{len(layers)} {kind} ({reason}{': ' + ', '.join(layers) if len(layers) <= _NAMED else ''})"
        for (kind, reason), layers in kinds.items()
    ]
    return [Text(f"not quantized: {'; '.join(told)}")] if told else []
