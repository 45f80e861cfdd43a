"""The cases of a study, measured once each: what survives an interruption."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import track

from fqtstats.files import write_atomically

__all__ = ["Parts", "Row", "commit", "cpu_seconds"]

Row = Mapping[str, object]


class Parts:
    """The cases of a study that are done, each in a file: an interrupted study continues with the others.

    Args:
        folder: of the files; belongs to one study and one choice of settings.
        settings: what they are made with; other settings are other cases. Empty if a case is all they depend on.

    Attributes:
        found_seconds: processor time of the cases that were found done, which other processes spent; NaN if one's is
            not known.
        commits: versions of the code that measured the cases: several after a change between two runs.
        uses: SHA-256 of the tables of other studies that were read, by study and table.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.found_seconds = 0.0
        self.commits: set[str] = set()
        self.uses: dict[str, dict[str, str]] = {}

    def every(
        self, what: str, cases: Iterable[Mapping[str, Any]], measure: Callable[..., Row | Iterable[Row]]
    ) -> pd.DataFrame:
        """A table with the rows of all cases, each led by what the case is; a progress bar shows how many are done.

        Args:
            what: name of the part; shown beside the bar.
            cases: arguments of ``measure``, plain JSON.
            measure: gives one row or several, of numbers, strings, booleans and None.
        """
        rows: list[dict[str, object]] = []
        known = list(cases)
        for case in track(known, what, console=Console(stderr=True), disable=len(known) < 2):
            rows += [{**case, **row} for row in self._once(what, case, measure)]
        return pd.DataFrame(rows)

    def _once(
        self, what: str, case: Mapping[str, Any], measure: Callable[..., Row | Iterable[Row]]
    ) -> list[dict[str, object]]:
        key = json.dumps([what, case, self.settings], sort_keys=True)
        file = self.folder / f"{what.replace(' ', '_')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if file.exists():
            found = json.loads(file.read_text())
            self.found_seconds += math.nan if found["cpu_seconds"] is None else found["cpu_seconds"]
            self.commits.add(found["commit"])
            return list(found["rows"])
        started = cpu_seconds()
        made = measure(**case)
        self.commits.add(commit())
        # NaN and infinity are written as the names that json knows and no other reader does: these files stay here.
        rows = [dict(made)] if isinstance(made, Mapping) else [dict(row) for row in made]
        about = {"cpu_seconds": cpu_seconds() - started, "commit": commit()}
        text = json.dumps({**about, "rows": rows}, default=_number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda opened: opened.write(text.encode()))
        return list(json.loads(text)["rows"])


def cpu_seconds() -> float:
    """Processor time of this process and of those that it waited for: other work on the machine does not count."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@cache
def commit() -> str:
    """The version of the code as the process found it, with ``+`` where sources were changed since; "" without git."""
    version = _git("rev-parse", "--short=12", "HEAD")
    return version + "+" * bool(version and _git("status", "--porcelain", "--", "*.py", "native", "pyproject.toml"))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _number(value: Any) -> Any:
    """Numpy's and torch's numbers as Python's."""
    if callable(item := getattr(value, "item", None)):
        return item()
    raise TypeError(f"a row of a study holds numbers and strings, not a {type(value).__name__}")
