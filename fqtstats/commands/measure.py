"""``fqtstats measure``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fqtstats.commands import experiments
from fqtstats.commands.console import check_counts, err, out, progress
from fqtstats.errors import InputError

if TYPE_CHECKING:
    from fqtstats.policy import Policy
    from fqtstats.results import Result
    from fqtstats.run_directory import RunDirectory

__all__ = ["measure"]


def measure(
    context: typer.Context,
    quantizer: experiments.Quantizers = "bhq",
    bits: experiments.Bits = "5",
    grad_weight: experiments.GradWeight = None,
    model: experiments.Model = "preact_resnet20",
    data: experiments.Data = "digits",
    data_root: experiments.DataRoot = None,
    image_size: experiments.ImageSize = None,
    batch_size: experiments.BatchSize = 128,
    batches: Annotated[
        int | None,
        typer.Option(
            help="Further minibatches, for the sampling variance; 0 for none.",
            show_default="8; 0 with --method exact",
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Draws of the quantized gradient.", show_default="64; 0 with --method exact")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="Where variances come from: exact (closed forms alone), montecarlo (draws), or both."),
    ] = "both",
    seed: experiments.Seed = 0,
    skip: experiments.Skip = None,
    checkpoint: experiments.Checkpoint = None,
    device: experiments.Device = "cpu",
    backend: Annotated[
        str, typer.Option(help="How the products are computed: simulated, native, or both: native, and compared.")
    ] = "simulated",
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Also bound every variance end to end; takes minutes.")
    ] = False,
    output: experiments.Output = None,
    resume: experiments.Resume = False,
    as_json: experiments.AsJson = False,
) -> None:
    """Measure how biased and how noisy the quantized gradient of a network is, per layer."""
    from fqtstats import results
    from fqtstats.layers import BACKENDS
    from fqtstats.measurement import METHODS
    from fqtstats.report import tables
    from fqtstats.run_directory import RunDirectory

    # Everything that can be told to be wrong is, before a folder is made and before anything is trained.
    policies = experiments.policies_of(quantizer, bits, grad_weight)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    drawn = method != "exact"
    if not drawn and draws:
        raise InputError(f"--method exact makes no draws, got --draws {draws}; leave it out or choose another --method")
    batches = (8 if drawn else 0) if batches is None else batches
    draws = (64 if drawn else 0) if draws is None else draws
    arguments = experiments.arguments_of(
        context,
        leave_out=["quantizer", "bits"] if bounds else ["quantizer", "bits", "bounds"],
        quantizers=list(policies),
        batches=batches,
        draws=draws,
    )
    check_counts(draws=(draws, 2 if drawn else 0))
    experiments.check_arguments(arguments, (*BACKENDS, "both"))
    path = experiments.folder(output, "measure", list(policies))
    with RunDirectory.create(path, arguments, resume) as run:
        try:
            result = results.load(path) if run.finished else _measure_all(run, policies, arguments)
        except BaseException as error:
            experiments.say_what_is_kept([run], path, error, context.obj)
            raise
    if as_json:
        print(json.dumps(tables.to_dict(result), indent=2, allow_nan=False))
    else:
        out.print(tables.summary(result))
    experiments.say_where(path, ["results.parquet", "run.json"], err if as_json else out)
    if not (tables.parity_ok(result) and tables.sound(result)):
        raise typer.Exit(1)


def _measure_all(run: RunDirectory, policies: dict[str, Policy], arguments: dict[str, Any]) -> Result:
    from fqtstats import backends, measurement, results

    both = arguments["backend"] == "both"
    backend = "native" if both else arguments["backend"]
    skip = experiments.skipped(arguments)
    with progress() as bars:
        setup = experiments.prepare(arguments, policies, backend, bars)
        parts = []
        for label, policy in policies.items():
            part = measurement.measure(
                setup.model,
                setup.batch,
                setup.loss,
                policy,
                draws=arguments["draws"],
                seed=arguments["seed"],
                backend=backend,
                batches=setup.further or None,
                skip=skip,
                method=arguments["method"],
                bounds=arguments.get("bounds", False),
                progress=experiments.MeasuringBar(bars, f"measuring {label}"),
                store=experiments.DirectoryStore(run, label),
            )
            if both:
                report = backends.parity(setup.model, setup.batch, setup.loss, policy, arguments["seed"], skip=skip)
                part.metadata["configurations"][0]["parity"] = report.as_rows()
            parts.append(part)
    merged = results.merge(parts)
    result = results.Result(merged.table, {"arguments": arguments, **setup.about, **merged.metadata})
    run.finish(result)
    return result
