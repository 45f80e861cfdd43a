"""Benchmark rows as terminal tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fqtstats.benchmarks import Row

__all__ = ["show"]


def show(rows: Sequence[Row], console: Console) -> None:
    """One table per thing that is timed and baseline."""
    several = len({row.allocator for row in rows}) > 1
    columns = ("shape", "threads", *(["memory"] if several else []), "ratio", "must", "aim", "time", "of peak")
    for (name, baseline), group in groupby(rows, key=lambda row: (row.name, row.baseline)):
        console.print(Text(f"{name}, against {baseline}", style="bold"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in columns:
            table.add_column(column, justify="left" if column in ("shape", "memory") else "right")
        for row in group:
            table.add_row(
                row.shape,
                str(row.threads),
                *([row.allocator] if several else []),
                Text(f"{row.ratio:.2f}x [{row.ratio_low:.2f}, {row.ratio_high:.2f}]", "red" if row.missed else ""),
                "-" if row.must is None else f"{row.must:g}x",
                "-" if row.aim is None else f"{row.aim:g}x",
                _duration(row.seconds),
                "-" if row.of_peak is None else f"{row.of_peak:.0%}",
            )
        console.print(table)
        console.print()
    _show_shares([row for row in rows if row.shares is not None], console)
    told = "ratio: baseline's time over ours, median of interleaved pairs [quartiles]"
    console.print(told, highlight=False, markup=False)
    missed = sum(row.missed for row in rows)
    if missed:
        console.print(f"{missed} of {len(rows)} rows fall short of what they must reach", style="bold red")


def _show_shares(rows: Sequence[Row], console: Console) -> None:
    if not rows:
        return
    console.print(
        Text("Share of our time by kind of work (torch.profiler, the library's own functions marked)", "bold")
    )
    for row in rows:
        assert row.shares is not None
        largest = sorted(row.shares.items(), key=lambda item: -item[1])
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in largest if share >= 0.005)
        about = [str(row.threads), "thread" if row.threads == 1 else "threads"]
        console.print(Text(f"{row.name}, {' '.join([*about, row.allocator, 'memory'])}: {told}"))
    console.print()


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
