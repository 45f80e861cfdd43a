"""``fqtstats list``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fqtstats.commands.console import out
from fqtstats.errors import InputError

if TYPE_CHECKING:
    from fqtstats.training.recipes import Definition

__all__ = ["list_"]


def list_(
    what: Annotated[str, typer.Argument(help="quantizers, policies, recipes, models, data or kernels")] = "quantizers",
) -> None:
    """List what there is."""
    from fqtstats import data, models, ops, policies, quantizers

    table = Table(box=None, pad_edge=False, header_style="bold")
    if what == "quantizers":
        _columns(table, "name", "role", "claim", "options", "what it is")
        for name, cls in quantizers.QUANTIZERS.items():
            options = ", ".join(f"{option}={value!r}" for option, value in quantizers.options_of(cls).items())
            _row(table, name, cls.role, cls().claim, options, _first_sentence(cls.__doc__))
    elif what == "policies":
        _columns(table, "name", "activation", "weight", "grad_input", "grad_weight")
        for name in policies.POLICIES:
            policy = policies.get(name)
            places = (policy.activation, policy.weight, policy.grad_input, policy.grad_weight)
            shown = ("-" if q is None else f"{getattr(q, 'name', q)}:{getattr(q, 'bits', '')}" for q in places)
            _row(table, name, *shown)
    elif what == "recipes":
        from fqtstats.training import recipes, runs

        _columns(table, "name", "bits", "what it is", "paper", "its own runs")
        for name, definition in recipes.RECIPES.items():
            own = (setting.name for setting in runs.SETTINGS if name in setting.recipes and setting.published)
            paper = definition.source.partition("(")[2].rstrip(")")
            _row(table, name, _bits(definition), definition.summary, paper, " ".join(own) or "-")
    elif what == "models":
        _columns(table, "name", "data", "what it is")
        for name, entry in models.MODELS.items():
            _row(table, name, ", ".join(entry.kinds), entry.summary)
    elif what == "data":
        _columns(table, "name", "what it is")
        for name, source in data.SOURCES.items():
            _row(table, name, source.summary)
    elif what == "kernels":
        _columns(table, "operation", "variant", "here")
        for kernel in ops.kernels():
            here = "in use" if kernel.selected else "available" if kernel.available else "not available"
            _row(table, kernel.op, kernel.variant, here)
    else:
        raise InputError(f"unknown list {what!r}; known: quantizers, policies, recipes, models, data, kernels")
    out.print(table)


def _bits(definition: Definition) -> str:
    """The bits that a recipe is defined for, and its default: ``"1-8 (5)"``."""
    known = definition.bits
    if not known:
        return "-"
    several = f"{known[0]}-{known[-1]}" if known == tuple(range(known[0], known[-1] + 1)) else ",".join(map(str, known))
    return f"{several} ({definition.default})"


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, overflow="fold")


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # a plain string is markup, which swallows what stands in brackets


def _first_sentence(doc: str | None) -> str:
    text = " ".join((doc or "").split("\n\n")[0].split()).replace("``", "")
    return re.split(r"\. |;", text)[0].rstrip(".")
