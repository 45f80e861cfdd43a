"""Verdicts as terminal tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fqtstats.verdicts.claims import Checked
from fqtstats.verdicts.products import ProductsReport

__all__ = ["show", "show_products"]


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


def show_products(reports: Mapping[str, ProductsReport], alpha: float, console: Console) -> None:
    """One row for each layer and product under each quantizer, and what was found where one failed."""
    for name, report in reports.items():
        table = Table(
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="bold",
            title=f"{name}: variance of the products over that of independent rounding, {report.rows[0].draws} draws",
            title_justify="left",
            title_style="",
        )
        table.add_column("layer", overflow="fold")
        for column in ("product", "ratio", "interval", "bias p", ""):
            table.add_column(column, justify="left" if column in ("product", "") else "right", no_wrap=True)
        several = any(row.call for row in report.rows)
        for row in report.rows:
            random = not math.isnan(row.ratio)
            table.add_row(
                Text(f"{row.layer or '(root)'}{f' call {row.call}' if several else ''}"),
                row.product,
                f"{row.ratio:.3f}" if random else "",
                f"{row.low:.3f} to {row.high:.3f}" if random else "nothing random",
                f"{row.bias_p:.2g}",
                Text(row.verdict, "green" if row.ok else "bold red"),
            )
        console.print(table)
    rows = [(name, row) for name, report in reports.items() for row in report.rows]
    for name, row in rows:
        if not row.ok:
            console.print(Text(f"{name}, {row.evidence}", "bold red"), soft_wrap=True)
    failed = sum(not row.ok for _, row in rows)
    text = f"{len(rows) - failed} of {len(rows)} products ok, at a false-alarm rate of {alpha:g} for all together"
    console.print(Text(text, "bold red" if failed else "bold"))
