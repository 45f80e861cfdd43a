"""What a reader must know about end-to-end bounds: violations with their causes, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from fqtstats.results import Configuration, Result

__all__ = ["notes"]

_SHOWN = 8
"""So many lines of one kind are shown; all are in the result's metadata."""


def notes(result: Result) -> list[Text]:
    """Lines below a table; none where no bounds were computed and nothing is wrong."""
    lines: list[Text] = []
    several = len(result.configurations) > 1
    for entry in result.metadata.get("configurations") or []:
        about = entry.get("bounds") if isinstance(entry, dict) else None
        if isinstance(about, dict):
            label = f"{Configuration(str(entry.get('quantizer')), entry.get('bits'))}: " if several else ""
            lines += _lines(label, about)
    return lines


def _lines(label: str, about: Mapping[str, Any]) -> list[Text]:
    violations = [
        f"{'.'.join(part for part in (found['layer'], found['parameter']) if part)} has a variance of at least "
        f"{_times(found['ratio'])} its end-to-end bound; {'; '.join(found['causes'])}"
        for found in about["violations"]
    ]
    lines = _some(f"ERROR: {label}", violations, "bold red")
    lines += _some(f"ERROR: {label}", about["exceeded"], "bold red")
    lines += _some(f"{label}no end-to-end bound, not known: the bound of ", about["unknown"], "yellow")
    lines += _some(f"{label}operator norm that has not converged: ", about["unconverged"], "yellow")
    return lines


def _times(ratio: float | None) -> str:
    return "infinitely many times" if ratio is None else f"{ratio:.3g} times"  # JSON has no infinity


def _some(start: str, found: list[str], style: str) -> list[Text]:
    lines = [Text(f"{start}{text}", style=style) for text in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(Text(f"{start}{len(found) - _SHOWN} more, see run.json", style=style))
    return lines
