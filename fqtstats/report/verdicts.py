"""Verdicts as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fqtstats.verdicts.claims import Checked

__all__ = ["show"]


def show(checked: Sequence[Checked], alpha: float, console: Console) -> None:
    """One row each, and what the draws could have missed."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("quantizer", "claim", "", "p", "draws"):
        table.add_column(column, justify="right" if column in ("p", "draws") else "left", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for one in checked:
        verdict = one.verdict
        state = "ok" if one.holds else "FAILS"
        table.add_row(
            Text(one.name),
            one.claim,
            Text(state, "green" if one.holds else "bold red"),
            f"{verdict.p_value:.2g}",
            str(verdict.draws),
            Text(verdict.evidence),
        )
    console.print(table)
    smallest = next((one.verdict.minimum_detectable_bias for one in checked if one.verdict.ok), {})
    if smallest:
        parts = ", ".join(f"{shape} {size:.2g}" for shape, size in smallest.items())
        console.print(Text(f"smallest bias that the draws alone would show, in steps: {parts}", "dim"))
    failed = sum(not one.holds for one in checked)
    text = f"{len(checked) - failed} of {len(checked)} as claimed, at a false-alarm rate of {alpha:g} for all together"
    console.print(Text(text, "bold red" if failed else "bold"))
