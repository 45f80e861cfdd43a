"""``fqtstats report``."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fqtstats.commands.console import check_writable, out, say_saved
from fqtstats.errors import InputError

__all__ = ["report"]

_NAME = "report.html"


def report(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of finished runs of measure and profile.", metavar="RUN...")
    ],
    html: Annotated[
        bool, typer.Option("--html", help="As one HTML file that needs nothing beside it: the only format.")
    ] = True,
    output: Annotated[
        str | None,
        typer.Option("--out", help="The file.", metavar="FILE", show_default=f"{_NAME} in the folder of the first run"),
    ] = None,
) -> None:
    """Write what runs found as a page to read, print or send: verdicts, tables, figures and provenance."""
    from fqtstats.report import html as pages

    assert html  # there is no way to say that it is not wanted
    if output == "":
        raise InputError("expected --out FILE, got an empty name; leave it out for a file in the folder of the run")
    found = pages.read(runs)
    path = Path(runs[0]) / _NAME if output is None else Path(output)
    check_writable(path)
    _check_replaceable(path, pages.is_report)
    _write(path, pages.render(found))
    say_saved(path, (), out)


def _check_replaceable(path: Path, is_report: Callable[[bytes], bool]) -> None:
    """Raise InputError where there is a file that is not a report."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}; choose another --out") from error
    if not is_report(start):
        raise InputError(f"{str(path)!r} is there and is not a report of fqtstats; choose another --out")


def _write(path: Path, data: bytes) -> None:
    """The new file or, on any failure, the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}; choose another --out") from error
