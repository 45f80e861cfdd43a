"""``fqtstats profile``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fqtstats.commands import experiments
from fqtstats.commands.console import check_counts, err, out, progress
from fqtstats.errors import InputError, RunDirectoryError

if TYPE_CHECKING:
    from fqtstats.policy import Policy
    from fqtstats.run_directory import RunDirectory

__all__ = ["profile"]


def profile(
    context: typer.Context,
    quantizer: experiments.Quantizers = "bhq",
    bits: experiments.Bits = "5",
    grad_weight: experiments.GradWeight = None,
    model: experiments.Model = "preact_resnet20",
    data: experiments.Data = "digits",
    data_root: experiments.DataRoot = None,
    image_size: experiments.ImageSize = None,
    batch_size: experiments.BatchSize = 128,
    batches: experiments.Batches = 8,
    precision: Annotated[
        float, typer.Option(help="Relative standard error to reach for each quantizer's variance.")
    ] = 0.05,
    method: Annotated[
        str, typer.Option(help="probes, or one-at-a-time: much slower, takes reentrant checkpoints, too.")
    ] = "probes",
    most_probes: Annotated[int, typer.Option(help="Most probes, even if the precision is not met.")] = 256,
    seed: experiments.Seed = 0,
    skip: experiments.Skip = None,
    checkpoint: experiments.Checkpoint = None,
    device: experiments.Device = "cpu",
    backend: experiments.Backend = "simulated",
    output: experiments.Output = None,
    resume: experiments.Resume = False,
    as_json: experiments.AsJson = False,
) -> None:
    """Find out which layer's gradient quantizer puts how much variance into which parameter's gradient."""
    from fqtstats import profiling
    from fqtstats.estimators.decomposition import FEWEST
    from fqtstats.layers import BACKENDS
    from fqtstats.profiles import load_profile
    from fqtstats.report import profile_tables
    from fqtstats.run_directory import RunDirectory

    # Everything that can be told to be wrong is, before a folder is made and before anything is trained.
    policies = experiments.policies_of(quantizer, bits, grad_weight)
    arguments = experiments.arguments_of(context, leave_out=["quantizer", "bits"])
    if not 0 < precision < 1:
        raise InputError(f"--precision must be a number between 0 and 1, got {precision}")
    if method not in profiling.METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(profiling.METHODS)}")
    check_counts(most_probes=(most_probes, FEWEST))
    experiments.check_arguments(arguments, BACKENDS)
    path = experiments.folder(output, "profile", list(policies))
    paths = _paths(path, list(policies))
    with ExitStack() as stack:
        runs: dict[str, RunDirectory] = {}
        try:
            for label, place in paths.items():
                opened = RunDirectory.create(place, {**arguments, "quantizer": label}, resume)
                runs[label] = stack.enter_context(opened)
            if not all(run.finished for run in runs.values()):
                _profile_all(runs, policies, arguments)
        except BaseException as error:
            experiments.say_what_is_kept(list(runs.values()), path, error, context.obj)
            raise
    found = [load_profile(place) for place in paths.values()]
    if as_json:
        print(json.dumps(profile_tables.to_dict(found), indent=2, allow_nan=False))
    else:
        out.print(profile_tables.summary(found))
    files = [*(f"{name}.parquet" for name in ("profile", "sources", "parameters")), "the same as .csv", "run.json"]
    experiments.say_where(path, files if len(paths) == 1 else list(paths), err if as_json else out)


def _paths(path: Path, labels: list[str]) -> dict[str, Path]:
    """One run is the folder itself; several are folders in it, by label."""
    if len(labels) == 1:
        return {labels[0]: path}
    if (path / "run.json").exists():
        raise RunDirectoryError(f"{path} holds a single run, expected a folder for several; choose another --out")
    return {label: path / label for label in labels}


def _profile_all(runs: dict[str, RunDirectory], policies: dict[str, Policy], arguments: dict[str, Any]) -> None:
    """Profile what is not finished yet; each profile is written when it is done."""
    from fqtstats import profiling
    from fqtstats.profiles import Profile

    with progress() as bars:
        setup = experiments.prepare(arguments, policies, arguments["backend"], bars)
        for label, run in runs.items():
            if run.finished:
                continue
            found = profiling.profile(
                setup.model,
                setup.batch,
                setup.loss,
                policies[label],
                precision=arguments["precision"],
                seed=arguments["seed"],
                backend=arguments["backend"],
                batches=setup.further or None,
                method=arguments["method"],
                most_probes=arguments["most_probes"],
                skip=experiments.skipped(arguments),
                progress=experiments.MeasuringBar(bars, f"profiling {label}"),
                store=experiments.DirectoryStore(run, label),
            )
            about = {"arguments": run.arguments, **setup.about, **found.metadata}
            run.finish(Profile(found.table, found.sources, found.parameters, about))
