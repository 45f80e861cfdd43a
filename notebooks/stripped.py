"""Notebooks are kept without what running them leaves: outputs, execution counts, the state of widgets.

    python notebooks/stripped.py [--fix] NOTEBOOK ...

names what is left in each, and exits with status 1 if anything is; --fix takes it away.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

__all__ = ["KERNEL", "left", "main", "strip"]

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
"""All the metadata that a notebook has."""

TAGS = "tags"
"""All the metadata that a cell may have."""


def left(notebook: nbformat.NotebookNode) -> list[str]:
    """What is left in a notebook, one line each; nothing where it is stripped."""
    found = [
        f"metadata: {key}"
        for key in sorted({*notebook.metadata, *METADATA})
        if notebook.metadata.get(key) != METADATA.get(key)
    ]
    for number, cell in enumerate(notebook.cells, 1):
        found += [f"cell {number}: metadata {key}" for key in cell.metadata if key != TAGS]
        if cell.cell_type == "code":
            found += [f"cell {number}: outputs"] * bool(cell.outputs)
            found += [f"cell {number}: execution count"] * (cell.execution_count is not None)
    return found


def strip(notebook: nbformat.NotebookNode) -> None:
    """Take away what :func:`left` finds."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == TAGS}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(description="Checks that notebooks have no outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--fix", action="store_true", help="strip them")
    given = parser.parse_args(arguments)
    status = 0
    for file in given.notebooks:
        notebook = nbformat.read(file, as_version=4)
        found = left(notebook)
        if found and given.fix:
            strip(notebook)
            nbformat.write(notebook, file)
        elif found:
            print(*(f"{file}: {what}" for what in found), sep="\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
