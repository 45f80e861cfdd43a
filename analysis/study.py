"""What studies share: a question, how it is measured, what is drawn and said of it, and how all of that is kept.

A module of this folder that answers a question has a :class:`Study` as its ``STUDY``, and is run by::

    python -m analysis.<name> [--quick] [--again] [--out FOLDER] [--<setting> VALUE ...]

or ``fqtstats study <name>`` with the same options. It writes to ``analysis/results/<name>``:

* ``<table>.parquet``: what was measured, one file per table;
* ``<figure>.png`` and ``<figure>.pdf``, for a column of a paper or the width of its page;
* ``table.md``: what is to be read of the tables;
* ``study.json``: settings, claims with their numbers, provenance, and the tables' SHA-256.

Measurements are made once: with the same settings they are read from there, and only figures, table and claims are made
anew; ``--again`` begins to measure again. A study in progress keeps every case that is done in ``runs/studies``, and
the same command without ``--again`` continues there after an interruption. ``--quick`` has small settings, says the
same things about less, and writes to ``runs/studies`` unless told otherwise. ``python -m analysis`` makes
``analysis/README.md`` of what was saved.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.parts import Parts, Row, commit, cpu_seconds
from fqtstats import ops
from fqtstats.errors import InputError
from fqtstats.files import read_bytes, reason, write_atomically
from fqtstats.provenance import provenance
from fqtstats.report import style
from fqtstats.schema import Column, normalised, parquet_bytes, read_parquet

__all__ = [
    "Claim",
    "Parts",
    "Row",
    "Saved",
    "Study",
    "Tables",
    "as_json",
    "command",
    "load",
    "main",
    "tables_of",
]

RESULTS = Path(__file__).parent / "results"
ABOUT = "study.json"
_GAP = 2
"""Blanks after the columns of a table on the terminal; one where it would be too wide."""

_MEASURED = ("cpu_seconds", "provenance")

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Claim:
    """One sentence of the answer, with its number and interval in it.

    Attributes:
        text: Markdown; every number comes from the tables.
        holds: whether what was expected is so; None where nothing was, or where the numbers leave it open.
        because: why it is not so, as far as that was examined.
    """

    text: str
    holds: bool | None = None
    because: str = ""


@dataclass(frozen=True)
class Study:
    """A question and how it is answered.

    Attributes:
        name: of the module.
        question: one line that ends with a question mark.
        full: a frozen dataclass of settings: numbers and strings, or tuples of them. They are options of the command.
        quick: of the same class; takes some seconds.
        columns: of each table, by its name; the first table is the main one.
        measure: from settings and :class:`Parts` to the tables.
        draw: from the tables to figures, by name; the first one is shown in the index.
        read: from the tables to what is to be read of them, as text.
        claims: from the tables to the answer.
        legend: what the columns of the table that is read are, where their names do not say.
        keeps_cases: whether the cases that are done stay in their files when the study is complete. Each must then be
            all that its rows depend on, for any settings take them: processes share the work if each measures some of
            the cases, with its own ``--out``, and the last all of them.
    """

    name: str
    question: str
    full: Any
    quick: Any
    columns: Mapping[str, Sequence[Column]]
    measure: Callable[[Any, Parts], Tables]
    draw: Callable[[Tables], Mapping[str, Figure]]
    read: Callable[[Tables], pd.DataFrame]
    claims: Callable[[Tables], Sequence[Claim]]
    legend: str = ""
    keeps_cases: bool = False


@dataclass(frozen=True)
class Saved:
    """A study's results as they were kept.

    Attributes:
        folder: where.
        tables: by name.
        about: what ``study.json`` holds.
    """

    folder: Path
    tables: dict[str, pd.DataFrame]
    about: dict[str, Any]

    @property
    def claims(self) -> list[Claim]:
        return [Claim(**claim) for claim in self.about["claims"]]


def load(study: Study, folder: Path) -> Saved:
    """What :func:`main` wrote.

    Raises:
        InputError: nothing is there, or what is there is not what was written.
    """
    if not (folder / ABOUT).is_file():
        raise InputError(f"no results of the study {study.name!r} in {folder}; run python -m analysis.{study.name}")
    about = _about(study, folder / ABOUT)
    tables = {}
    for name in study.columns:
        file = folder / f"{name}.parquet"
        content = read_bytes(file)
        if hashlib.sha256(content).hexdigest() != about["sha256"].get(name):
            raise InputError(f"{file} is not what the study {study.name!r} wrote; run it with --again")
        tables[name] = normalised(read_parquet(content, file, "table"), study.columns[name], f"table {name!r}")
    return Saved(folder, tables, about)


def _about(study: Study, file: Path) -> dict[str, Any]:
    """What is in ``study.json``."""
    try:
        about = json.loads(read_bytes(file))
        whole = about["study"] == study.name and {*_MEASURED, "settings", "claims", "figures", "sha256"} <= set(about)
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise InputError(f"{file} is not what the study {study.name!r} wrote; run it with --again")
    return dict(about)


def tables_of(study: Study, parts: Parts) -> dict[str, pd.DataFrame]:
    """The saved tables of another study, of which ``parts`` keeps record."""
    saved = load(study, RESULTS / study.name)
    parts.uses[study.name] = saved.about["sha256"]
    return saved.tables


# --- the command ------------------------------------------------------------------------------------------------------


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
    """Command line of one study; ends the process with status 2 and one line for what cannot be done."""
    try:
        command(study, arguments)
    except InputError as error:
        raise SystemExit(f"{study.name}: error: {error}") from None


def command(study: Study, arguments: Sequence[str] | None = None) -> Saved:
    """Measures or reuses, writes, and shows what is to be read.

    Args:
        study: what is run.
        arguments: as on the command line; None: of this process.

    Raises:
        InputError: a setting is not one; ``--out`` has results with other settings, or cannot be written.
    """
    parser = _Parser(prog=f"python -m analysis.{study.name}", description=study.question)
    parser.add_argument("--quick", action="store_true", help="small settings, some seconds")
    parser.add_argument("--again", action="store_true", help="begin to measure again, and replace what is there")
    parser.add_argument("--out", type=Path, help="folder of the results")
    for field in fields(study.full):
        _add_option(parser, field.name, getattr(study.full, field.name))
    given = vars(parser.parse_args(arguments))
    quick, again, out = (given.pop(name) for name in ("quick", "again", "out"))
    chosen = {name: value for name, value in given.items() if value is not None}
    start = study.quick if quick else study.full
    settings = replace(start, **chosen)
    _require_sizes(settings)
    runs = Path("runs") / "studies"
    folder: Path = out or (runs / f"{study.name}-quick" if quick else RESULTS / study.name)
    parts = runs / "parts" / f"{study.name}{'-quick' if quick else ''}"
    saved = produce(study, settings, folder, parts, again=again)
    show(study, saved)
    return saved


def _add_option(parser: argparse.ArgumentParser, name: str, value: Any) -> None:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        parser.add_argument(option, action=argparse.BooleanOptionalAction)
    elif isinstance(value, tuple):
        parser.add_argument(option, type=type(value[0]), nargs="+", help=f"instead of {' '.join(map(str, value))}")
    else:
        parser.add_argument(option, type=type(value), help=f"instead of {value}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help tells the options")


def _require_sizes(settings: Any) -> None:
    """Numbers are counts and positive, 0 only where that is the default; intervals over seeds need two of them."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 2 if field.name == "seeds" else 1 if isinstance(value, int) and field.default != 0 else 0
        if not (value >= least and (value > 0 or field.default == 0)):
            option = f"--{field.name.replace('_', '-')}"
            raise InputError(f"{option} must be {f'at least {least}' if least else 'positive'}, got {value}")


def produce(study: Study, settings: Any, folder: Path, parts: Path, *, again: bool = False) -> Saved:
    """The results in ``folder``: measured if they are not there, and drawn and told in any case.

    Args:
        study: what is asked.
        settings: of its class.
        folder: of the results.
        parts: of what is done while it is measured.
        again: begin to measure again, with no case done.

    Raises:
        InputError: ``folder`` has results with other settings.
    """
    wanted = as_json(settings)
    # Says which results are being replaced, until they are.
    replacing, what = parts / "again.json", json.dumps([str(folder.resolve()), wanted])
    if again:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_atomically(replacing, lambda opened: opened.write(what.encode()))
    again = replacing.is_file() and replacing.read_text() == what
    if (folder / ABOUT).is_file() and not again:
        saved = load(study, folder)
        if saved.about["settings"] != wanted:
            raise InputError(
                f"{folder} has results with the settings {saved.about['settings']}, not {wanted}; "
                "give another --out, or --again to replace them"
            )
        tables, measured = saved.tables, {key: saved.about[key] for key in _MEASURED}
    else:
        _require_writable(folder)
        started, done = cpu_seconds(), Parts(parts, {} if study.keeps_cases else wanted)
        made = study.measure(settings, done)
        if set(made) != set(study.columns):
            raise ValueError(f"{study.name} made the tables {sorted(made)}, not {sorted(study.columns)}")
        tables = {name: normalised(made[name], columns, f"table {name!r}") for name, columns in study.columns.items()}
        spent = cpu_seconds() - started + done.found_seconds
        where = {
            **provenance(ops.isa()),
            "commits": sorted({*done.commits, commit()} - {""}),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "uses": done.uses,
        }
        measured = {"cpu_seconds": None if math.isnan(spent) else round(spent, 1), "provenance": where}
    folder.mkdir(parents=True, exist_ok=True)
    content = {f"{name}.parquet": parquet_bytes(table, study.columns[name]) for name, table in tables.items()}
    about = {
        "study": study.name,
        "question": study.question,
        "settings": wanted,
        "claims": [asdict(claim) for claim in study.claims(tables)],
        "figures": [],
        "sha256": {name: hashlib.sha256(content[f"{name}.parquet"]).hexdigest() for name in tables},
        **measured,
    }
    with style.applied():
        for name, figure in study.draw(tables).items():
            about["figures"].append(name)
            content[f"{name}.png"], content[f"{name}.pdf"] = style.png(figure), style.pdf(figure)
    content["table.md"] = markdown(study, tables).encode()
    # What is told last makes the others valid.
    content[ABOUT] = (json.dumps(about, indent=2) + "\n").encode()
    for name, data in content.items():
        write_atomically(folder / name, lambda opened, data=data: opened.write(data))  # type: ignore[misc]
    replacing.unlink(missing_ok=True)
    if not study.keeps_cases:
        shutil.rmtree(parts, ignore_errors=True)
    return Saved(folder, dict(tables), about)


def _require_writable(folder: Path) -> None:
    """Before hours are spent on what cannot be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "writable", lambda _: None)
        (folder / "writable").unlink()
    except (OSError, InputError) as error:
        raise InputError(f"cannot write to {folder} ({reason(error)}); give another --out") from None


def as_json(settings: Any) -> dict[str, Any]:
    """Settings as ``study.json`` holds them."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


def markdown(study: Study, tables: Tables) -> str:
    """The table that is to be read, with what its columns are."""
    shown = study.read(tables)
    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.itertuples(index=False)]
    rows = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return f"{rows}\n{study.legend}\n" if study.legend else rows


def show(study: Study, saved: Saved) -> None:
    """On the terminal."""
    screen = Console()
    screen.print(study.question, style="bold")
    shown = study.read(saved.tables)
    parts = [("", shown)] if _least_width(shown) <= screen.width else _sections(shown)
    for heading, part in parts:
        if heading:
            screen.print(Text(heading, "italic"))
        # A table is cut where its console is narrower, and that is no wider than the terminal unless told.
        wide = Console(width=max(screen.width, _least_width(part)))
        wide.print(_as_table(part, screen.width), soft_wrap=wide.width > screen.width)
    for claim in saved.claims:
        mark = {True: "holds: ", False: "DOES NOT HOLD: ", None: ""}[claim.holds]
        why = f" Why: {claim.because}" if claim.because else ""
        screen.print(f"- {mark}{claim.text}{why}", markup=False, highlight=False)
    screen.print(f"saved in {saved.folder}", style="dim", highlight=False)


def _sections(shown: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A table that is too wide, in parts by the runs of equal cells in its first column, where those are long.

    What has the same cell in all rows of each part is told in the heading of the part, and not in a column.
    """
    cells = pd.DataFrame({place: _cells(shown.iloc[:, place]) for place in range(shown.shape[1])})
    run = (cells[0] != cells[0].shift()).cumsum()
    if 2 * run.nunique() > len(cells):
        run[:] = 1
    parts = list(cells.groupby(run).groups.values())
    if not parts:
        return [("", shown)]
    same = [place for place in cells if all(cells.loc[part, place].nunique() == 1 for part in parts)]
    same = same if len(same) < cells.shape[1] else same[:-1]
    kept = [place for place in cells if place not in same]
    return [
        (", ".join(f"{shown.columns[place]}: {cells.loc[part[0], place]}" for place in same),
         shown.iloc[part, kept])
        for part in parts
    ]  # fmt: skip


def _cells(column: pd.Series) -> list[str]:
    return ["" if pd.isna(cell) else str(cell) for cell in column]


def _longest_words(shown: pd.DataFrame) -> list[int]:
    texts = ((str(name), *_cells(column)) for name, column in shown.items())
    return [max((cell_len(word) for text in column for word in text.split()), default=0) for column in texts]


def _least_width(shown: pd.DataFrame, gap: int = _GAP) -> int:
    """Of :func:`_as_table`."""
    return sum(_longest_words(shown)) + gap * (shown.shape[1] - 1)


def _as_table(shown: pd.DataFrame, width: int) -> Table:
    """At most as wide as the terminal, where the longest words let it: lines are broken between words only."""
    gap = _GAP if _least_width(shown) <= width else 1
    widths = _longest_words(shown)
    whole = [max(map(cell_len, (str(name), *_cells(column)))) for name, column in shown.items()]
    # What is left is given out evenly among those that can use it. (A table that is to find its widths itself takes
    # from the widest columns, however long their words.)
    left = width - _least_width(shown, gap)
    while left > 0 and (wanting := [index for index, most in enumerate(whole) if widths[index] < most]):
        for index in wanting[:left]:
            widths[index] += 1
        left -= len(wanting)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for (name, column), taken in zip(shown.items(), widths, strict=True):
        numbers = pd.to_numeric(pd.Series(_cells(column)).str.split().str[0], errors="coerce").notna().all()
        table.add_column(Text(str(name)), justify="right" if numbers else "left", width=taken)
    for row in zip(*map(_cells, (shown[name] for name in shown)), strict=True):
        table.add_row(*map(Text, row))
    return table


# --- numbers as text --------------------------------------------------------------------------------------------------


def interval(low: float, high: float, form: str = ".3g") -> str:
    """``[low, high]``; "" where there is none."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{low:{form}}, {high:{form}}]"


def with_interval(value: float, low: float, high: float, form: str = ".3g") -> str:
    """``value [low, high]``."""
    return f"{value:{form}} {interval(low, high, form)}".rstrip()
