"""``fqtstats compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fqtstats.commands import experiments
from fqtstats.commands.console import err, out
from fqtstats.errors import InputError

__all__ = ["compare"]


def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders of trainings.", metavar="RUN...")],
    metric: Annotated[
        str, typer.Option(help="What to test: loss, test_loss, accuracy or test_accuracy of the last epoch.")
    ] = "loss",
    output: Annotated[
        str | None,
        typer.Option("--out", help="Folder of the comparison.", metavar="FOLDER", show_default="a new one in runs/"),
    ] = None,
    as_json: experiments.AsJson = False,
) -> None:
    """Compare trainings: means over the seeds, and tests between configurations over the seeds that they share."""
    from fqtstats import comparison
    from fqtstats.report import comparisons
    from fqtstats.trainings import load_training

    if metric not in comparison.METRICS:
        raise InputError(f"unknown metric {metric!r}; known: {', '.join(comparison.METRICS)}")
    places = list(dict.fromkeys(str(Path(run)) for run in runs))
    found = comparison.compare([load_training(place) for place in places], places)
    path = experiments.folder(output, "compare", [Path(place).name for place in places])
    found.save(path)
    if as_json:
        print(json.dumps(comparisons.to_dict(found), indent=2, allow_nan=False))
    else:
        out.print(comparisons.summary(found, metric))
    files = ["groups.parquet", "pairs.parquet", "curves.parquet", "the same as .csv", "run.json"]
    experiments.say_where(path, files, err if as_json else out)
