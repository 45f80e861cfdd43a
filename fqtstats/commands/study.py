"""``fqtstats study``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fqtstats.commands.console import out
from fqtstats.errors import InputError

__all__ = ["study"]

_MARK = Path("analysis") / "study.py"


def study(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Of the study; left out: list them.")] = None,
) -> None:
    """Run a study of the repository: its options are those of ``python -m analysis.NAME``, such as --quick."""
    root = _repository(Path.cwd())
    sys.path.insert(0, str(root))
    known = importlib.import_module("analysis").STUDIES
    if name is None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("name", no_wrap=True)
        table.add_column("question")
        for item in known:
            table.add_row(item, importlib.import_module(f"analysis.{item}").STUDY.question)
        out.print(table)
        return
    if name not in known:
        raise InputError(f"unknown study {name!r}; known: {', '.join(known)}")
    module = importlib.import_module(f"analysis.{name}")
    importlib.import_module("analysis.study").command(module.STUDY, context.args)


def _repository(start: Path) -> Path:
    """The clone that a folder is in."""
    for folder in (start, *start.parents):
        if (folder / _MARK).is_file():
            return folder
    raise InputError(f"the studies are in the repository of fqtstats, and {start} is not in a clone of it; go to one")
