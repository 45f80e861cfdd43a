"""``fqtstats bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fqtstats.commands.console import check_counts, check_writable, out, progress, separated
from fqtstats.errors import InputError

__all__ = ["bench"]


def bench(
    what: Annotated[
        str, typer.Argument(help="quantize, gemm, conv, step, measure, several with commas, or all")
    ] = "all",
    json_file: Annotated[str | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per row.")] = 9,
    allocator: Annotated[
        str, typer.Option(help="default, tuned (freed memory is kept: no page faults for large tensors) or both")
    ] = "default",
) -> None:
    """Speed ratios against named baselines, measured side by side; exit status 1 if one misses what it must reach."""
    from fqtstats import benchmarks
    from fqtstats.benchmarks import machine
    from fqtstats.report.benchmarks import show

    check_counts(rounds=(rounds, 1))
    names = list(benchmarks.BENCHMARKS) if what == "all" else separated(what, "the benchmark")
    for name in names:
        if name not in benchmarks.BENCHMARKS:
            raise InputError(f"unknown benchmark {name!r}; known: {', '.join(benchmarks.BENCHMARKS)}, all")
    if allocator not in (*machine.ALLOCATORS, "both"):
        raise InputError(f"expected --allocator {', '.join(machine.ALLOCATORS)} or both, got {allocator!r}")
    if json_file is not None:
        check_writable(Path(json_file))
    settings = machine.ALLOCATORS if allocator == "both" else (allocator,)
    with progress() as bars:
        task = bars.add_task("benchmarking", total=None)
        rows = benchmarks.run_all(
            names,
            rounds,
            settings,
            lambda done, total, title: bars.update(task, completed=done, total=total, description=title),
        )
    show(rows, out)
    if json_file is not None:
        content = {"machine": machine.describe(), "rounds": rounds, "rows": [row.as_dict() for row in rows]}
        try:
            Path(json_file).write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {json_file!r}: {error.strerror}; choose another place") from error
    if any(row.missed for row in rows):
        raise typer.Exit(1)
