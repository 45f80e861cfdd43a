"""``fqtstats plan``."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from fqtstats.commands import experiments
from fqtstats.commands.console import check_counts, err, out, progress, separated
from fqtstats.errors import InputError, UnreachableError

if TYPE_CHECKING:
    from fqtstats.plans import Plan
    from fqtstats.policy import Policy
    from fqtstats.run_directory import RunDirectory

__all__ = ["plan"]


def plan(
    context: typer.Context,
    budget: Annotated[
        float | None, typer.Option(help="Most variance with the noise, in minibatch sampling variances; above 1.")
    ] = None,
    mean_bits: Annotated[float | None, typer.Option(help="Most bits, as a mean over the gradient quantizers.")] = None,
    quantizer: Annotated[str, typer.Option(help="Input-gradient quantizer.")] = "bhq",
    grad_weight: Annotated[
        str | None, typer.Option(help="Weight-gradient quantizer.", show_default="the recipe's")
    ] = None,
    bits: Annotated[str, typer.Option(help="The bits to choose from, separated by commas.")] = "1,2,3,4,5,6,7,8",
    model: experiments.Model = "preact_resnet20",
    data: experiments.Data = "digits",
    data_root: experiments.DataRoot = None,
    image_size: experiments.ImageSize = None,
    batch_size: experiments.BatchSize = 128,
    batches: experiments.Batches = 8,
    precision: Annotated[
        float,
        typer.Option(help="Profile until the standard errors of the quantizers' variances are at most this share."),
    ] = 0.05,
    most_probes: Annotated[int, typer.Option(help="Most probes of a profile, even if the precision is not met.")] = 256,
    draws: Annotated[int, typer.Option(help="Draws of the quantized gradient, to verify the plan; 0 for none.")] = 64,
    seed: experiments.Seed = 0,
    skip: experiments.Skip = None,
    checkpoint: experiments.Checkpoint = None,
    device: experiments.Device = "cpu",
    backend: experiments.Backend = "simulated",
    output: experiments.Output = None,
    resume: experiments.Resume = False,
    as_json: experiments.AsJson = False,
) -> None:
    """Divide bits among the gradient quantizers: the fewest within a budget of variance, or the best of a mean."""
    from fqtstats.estimators.decomposition import FEWEST
    from fqtstats.layers import BACKENDS
    from fqtstats.plans import load_plan
    from fqtstats.report import plans
    from fqtstats.run_directory import RunDirectory

    # Everything that can be told to be wrong is, before a folder is made and before anything is trained.
    _check_target(budget, mean_bits, batches)
    policy = _policy(quantizer, grad_weight)
    widths = sorted({experiments.width_of(text, "--bits") for text in separated(bits, "--bits")})
    arguments = experiments.arguments_of(context, bits=widths)
    if not 0 < precision < 1:
        raise InputError(f"--precision must be a number between 0 and 1, got {precision}")
    if draws < 0 or draws == 1:
        raise InputError(f"--draws must be at least 2, or 0 for no measurement; got {draws}")
    check_counts(most_probes=(most_probes, FEWEST))
    experiments.check_arguments(arguments, BACKENDS)
    goal = f"{mean_bits:g}-bits" if budget is None else f"budget-{budget:g}"
    path = experiments.folder(output, "plan", [f"{quantizer}-{goal}"])
    with RunDirectory.create(path, arguments, resume) as run:
        try:
            found = load_plan(path) if run.finished else _plan(run, policy, arguments)
        except UnreachableError:
            run.discard(with_state=True)
            raise
        except BaseException as error:
            experiments.say_what_is_kept([run], path, error, context.obj)
            raise
    if as_json:
        print(json.dumps(plans.to_dict(found), indent=2, allow_nan=False))
    else:
        out.print(plans.summary(found))
    files = ["policy.py", "plan.parquet", "comparison.parquet", "the same as .csv", "run.json"]
    experiments.say_where(path, files, err if as_json else out)


def _check_target(budget: float | None, mean_bits: float | None, batches: int) -> None:
    if (budget is None) == (mean_bits is None):
        got = "neither" if budget is None else "both"
        raise InputError(f"expected either --budget or --mean-bits, got {got}; for instance --mean-bits 5")
    if budget is not None and not (1 < budget < math.inf):
        raise InputError(f"--budget must be above 1 (times the sampling variance), got {budget:g}; for instance 1.1")
    if mean_bits is not None and not (1 <= mean_bits <= 8):
        raise InputError(f"--mean-bits must be from 1 to 8, got {mean_bits:g}")
    if budget is not None and batches < 1:
        raise InputError("--budget is relative to the sampling variance; give --batches 1 or more")


def _policy(quantizer: str, grad_weight: str | None) -> Policy:
    from fqtstats import policies

    experiments.gradient_quantizer(quantizer, 5)
    weight = None if grad_weight is None else experiments.gradient_quantizer(grad_weight, 5)
    return policies.get(f"statquant-{quantizer}", 5, weight)


def _plan(run: RunDirectory, policy: Policy, arguments: dict[str, Any]) -> Plan:
    from fqtstats import planning
    from fqtstats.plans import Plan

    with progress() as bars:
        setup = experiments.prepare(arguments, {"plan": policy}, arguments["backend"], bars)
        found = planning.plan(
            setup.model,
            setup.batch,
            setup.loss,
            policy,
            budget=arguments["budget"],
            mean_bits=arguments["mean_bits"],
            batches=setup.further or None,
            bits=arguments["bits"],
            precision=arguments["precision"],
            seed=arguments["seed"],
            backend=arguments["backend"],
            draws=arguments["draws"],
            most_probes=arguments["most_probes"],
            skip=experiments.skipped(arguments),
            progress=_Bars(bars),
            store=partial(experiments.DirectoryStore, run),
        )
    about = {"arguments": run.arguments, **setup.about, **found.metadata}
    found = Plan(found.table, found.comparison, about, found.given)
    run.finish(found)
    return found


class _Bars:
    """A bar for each thing that is done."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._known: dict[str, experiments.MeasuringBar] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._known:
            self._known[what] = experiments.MeasuringBar(self._bars, what)
        self._known[what](done, total)
