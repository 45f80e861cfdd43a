"""``fqtstats check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fqtstats.commands.console import check_writable, out, progress, separated
from fqtstats.errors import InputError

__all__ = ["check"]


def check(
    quantizer: Annotated[str | None, typer.Option(help="Registered ones, separated by commas, or all.")] = None,
    bits: Annotated[str, typer.Option(help="Their bits, separated by commas.")] = "8,4,2",
    module: Annotated[
        str | None, typer.Option(help="package.module:function that returns your own, called as f(x, stream).")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False-alarm rate of the whole check.")] = 1e-6,
    seed: Annotated[int, typer.Option(help="Gives the same verdicts again.")] = 0,
    json_file: Annotated[str | None, typer.Option("--json", help="Also write the verdicts to this file.")] = None,
    junit: Annotated[str | None, typer.Option(help="Also write JUnit XML to this file.")] = None,
) -> None:
    """Is each quantizer what it claims, unbiased or not? Exit status 1 if one is not."""
    from fqtstats import imports
    from fqtstats.quantizers import QUANTIZERS
    from fqtstats.report.verdicts import show
    from fqtstats.verdicts import claims

    if not 0 < alpha < 1:
        raise InputError(f"--alpha must be a probability between 0 and 1, got {alpha}")
    paths = [Path(name) for name in (json_file, junit) if name is not None]
    for path in paths:
        check_writable(path)
    widths = []
    for text in separated(bits, "--bits"):
        if not text.isdecimal():
            raise InputError(f"expected --bits as whole numbers separated by commas, got {bits!r}")
        widths.append(int(text))
    subjects = []
    if quantizer is not None or module is None:
        wanted = "all" if quantizer is None else quantizer
        names = list(QUANTIZERS) if wanted == "all" else separated(wanted, "--quantizer")
        subjects += claims.subjects(names, widths)
    if module is not None:
        subjects.append(claims.subject(module, imports.call(module)))
    with progress() as bars:
        task = bars.add_task("checking", total=len(subjects))
        checked = claims.check_all(
            subjects,
            alpha,
            seed=seed,
            report=lambda done, total, title: bars.update(task, completed=done, total=total, description=title),
        )
    show(checked, alpha, out)
    if json_file is not None:
        content = {"alpha": alpha, "seed": seed, "checked": [one.as_dict() for one in checked]}
        _write(json_file, json.dumps(content, indent=2) + "\n")
    if junit is not None:
        _write(junit, claims.as_junit(checked))
    if not all(one.holds for one in checked):
        raise typer.Exit(1)


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {name!r}: {error.strerror}; choose another place") from error
