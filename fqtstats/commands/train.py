"""``fqtstats train``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fqtstats.commands import experiments
from fqtstats.commands.console import check_counts, err, out, progress
from fqtstats.errors import InputError, RunDirectoryError, TrainingDiverged

if TYPE_CHECKING:
    from fqtstats.run_directory import RunDirectory
    from fqtstats.training.recipes import Recipe
    from fqtstats.trainings import Training

__all__ = ["train"]


def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Option(
            help="How to train; fqtstats list recipes has them all. RECIPE/RUN is one of its runs: that has a model, "
            "data and numbers of its own, for the options that are not given. RECIPE alone is its run on the data, "
            "digits or text."
        ),
    ] = "statquant-bhq",
    bits: Annotated[int | None, typer.Option(help="The recipe's bits.", show_default="the recipe's own")] = None,
    model: experiments.Model = "preact_resnet20",
    data: experiments.Data = "digits",
    data_root: experiments.DataRoot = None,
    image_size: experiments.ImageSize = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    batch_size: experiments.BatchSize = 128,
    lr: Annotated[float | None, typer.Option(help="First learning rate.", show_default="the recipe's")] = None,
    seed: experiments.Seed = 0,
    skip: experiments.Skip = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Trained full-precision weights to start from; {seed} stands for the seed. model.pt of a run is one.",
            metavar="FILE",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Weights of the teacher, of recipes with one; {seed} likewise.", metavar="FILE"),
    ] = None,
    augment: Annotated[bool, typer.Option(help="Change the training images at random.")] = False,
    variance_every: Annotated[
        int, typer.Option(help="Measure the gradient's variance at every so many steps; 0: never.")
    ] = 0,
    variance_draws: Annotated[int, typer.Option(help="Draws of the quantized gradient each time.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of torch; with several, bits depend on their number.")] = 1,
    device: experiments.Device = "cpu",
    backend: experiments.Backend = "simulated",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write events for TensorBoard into the run's folder.")
    ] = False,
    output: experiments.Output = None,
    resume: experiments.Resume = False,
    as_json: experiments.AsJson = False,
) -> None:
    """Train a network by a published recipe; exit status 1 if the training diverges."""
    from fqtstats.layers import BACKENDS
    from fqtstats.report import trainings
    from fqtstats.run_directory import RunDirectory
    from fqtstats.trainings import load_training

    # Everything that can be told to be wrong is, before a folder is made and before anything is trained.
    chosen, own = _recipe(recipe, data, bits, lr)
    if not _is_default(context, "data") and data != own.get("data"):
        own = {name: value for name, value in own.items() if name not in ("augment", "image_size")}
    defaults = {name: value for name, value in own.items() if _is_default(context, name)}
    arguments = experiments.arguments_of(context, leave_out=["tensorboard"], **defaults)
    check_counts(
        epochs=(arguments["epochs"], 1), variance_every=(variance_every, 0), variance_draws=(variance_draws, 2)
    )
    check_counts(threads=(threads, 1))
    experiments.check_arguments(arguments, BACKENDS)
    if tensorboard:
        from fqtstats.commands.tensorboard import writer_type

        writer_type()
    stem = recipe.replace("/", "-")
    label = stem if chosen.bits is None else f"{stem}@{chosen.bits}"
    path = experiments.folder(output, "train", [label])
    with RunDirectory.create(path, arguments, resume) as run:
        try:
            found = load_training(path) if run.finished else _train(run, chosen, arguments, path, tensorboard)
        except BaseException as error:
            experiments.say_what_is_kept([run], path, error, context.obj, "trained")
            raise
    if as_json:
        print(json.dumps(trainings.to_dict(found), indent=2, allow_nan=False))
    else:
        out.print(trainings.summary(found))
    weights = sorted(file.name for file in path.glob("*.pt"))
    experiments.say_where(path, ["epochs.parquet", "variance.parquet", *weights, "run.json"], err if as_json else out)
    if found.diverged:
        raise typer.Exit(1)


def _recipe(name: str, data: str, bits: int | None, lr: float | None) -> tuple[Recipe, dict[str, object]]:
    """The recipe, and the options that come with it from the run that is named, or that it has on embedded data."""
    from fqtstats.training import recipes, runs

    on_data = f"{name}/{data}"
    if on_data in runs.RUNS and not runs.run(on_data).published:
        name = on_data
    own: dict[str, object] = {}
    if "/" in name:
        run = runs.run(name, bits)
        found = run.recipe
        own = {option: getattr(run, option) for option in runs.OPTIONS}
    else:
        found = recipes.get(name, bits)
    return (found if lr is None else replace(found, optimizer=found.optimizer.with_lr(lr))), own


def _check_full_precision(file: str, recipe: Recipe) -> None:
    """Raise InputError if a training wrote the file, and ended with quantized layers in this network."""
    from fqtstats.trainings import load_training

    path = Path(file)
    try:
        found = load_training(path.parent)
    except RunDirectoryError:
        return  # weights from elsewhere
    if path.name in [f"{network}.pt" for network in found.metadata.get("quantized", [])]:
        raise InputError(
            f"recipe {recipe.name!r} starts from a network that was trained in full precision, but {file!r} was "
            f"trained by {found.label}; give a full-precision checkpoint, as of recipe 'exact'"
        )


def _is_default(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "DEFAULT"


def _train(run: RunDirectory, recipe: Recipe, arguments: Mapping[str, Any], path: Path, tensorboard: bool) -> Training:
    from fqtstats import experiment
    from fqtstats.commands.tensorboard import events
    from fqtstats.report.trainings import epoch_line
    from fqtstats.training import loop

    seed = arguments["seed"]
    files = {
        name: None if arguments[name] is None else arguments[name].replace("{seed}", str(seed))
        for name in ("checkpoint", "teacher")
    }
    if files["checkpoint"] is not None and recipe.starts_from == "full-precision":
        _check_full_precision(files["checkpoint"], recipe)

    def built(weights: str) -> experiment.Trainable:
        return experiment.trainable(
            arguments["model"],
            arguments["data"],
            root=arguments["data_root"],
            image_size=arguments["image_size"],
            seed=seed,
            checkpoint=files[weights],
            device_name=arguments["device"],
        )

    setup = built("checkpoint")
    teacher = None if arguments["teacher"] is None else built("teacher").model
    with ExitStack() as stack:
        write = stack.enter_context(events(path / "tensorboard")) if tensorboard else None
        bars = stack.enter_context(progress())

        def report(table: str, row: Mapping[str, Any]) -> None:
            if table == "epochs":
                line = epoch_line(row, arguments["epochs"])
                bars.console.print(line, highlight=False, markup=False, soft_wrap=True)
            if write is not None:
                write(table, row)

        try:
            with experiment.blaming(*setup.own):
                found = loop.train(
                    setup.model,
                    setup.data,
                    recipe,
                    epochs=arguments["epochs"],
                    batch_size=arguments["batch_size"],
                    seed=seed,
                    backend=arguments["backend"],
                    skip=experiments.skipped(arguments),
                    pretrained=arguments["checkpoint"] is not None,
                    teacher=teacher,
                    augment=arguments["augment"],
                    variance_every=arguments["variance_every"],
                    variance_draws=arguments["variance_draws"],
                    thread_count=arguments["threads"],
                    progress=experiments.TrainingBar(bars, f"training {arguments['model']}"),
                    report=report,
                    store=experiments.DirectoryStore(run, "checkpoint"),
                )
        except TrainingDiverged as error:
            err.print(f"fqtstats: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
            found = cast("Training", error.partial_result)
    found = replace(found, metadata={"arguments": run.arguments, **setup.about, **found.metadata})
    run.finish(found)
    return found
