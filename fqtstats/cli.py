"""The command line: ``fqtstats measure | bench | list``.

Exit status: 0; 2 for bad usage or input (one line that says what to do); 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fqtstats.errors import InputError

if TYPE_CHECKING:
    from fqtstats.measurement import Arrays
    from fqtstats.policy import Policy
    from fqtstats.results import Result, RunDirectory

# torch takes seconds to import: the commands import what they need, so that --help and mistakes in usage are immediate.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

SAVE_SECONDS = 2.0
"""An unfinished measurement is saved at most this often."""


@app.callback()
def _main() -> None:
    """Bias and variance of quantized gradients: a measuring instrument for fully quantized training."""


@app.command()
def measure(
    quantizer: Annotated[str, typer.Option(help="Input-gradient quantizers, separated by commas.")] = "bhq",
    bits: Annotated[str, typer.Option(help="Their bits, separated by commas.")] = "5",
    grad_weight: Annotated[
        str | None, typer.Option(help="Weight-gradient quantizer as NAME:BITS.", show_default="the recipe's, 8 bits")
    ] = None,
    model: Annotated[str, typer.Option(help="A built-in model or package.module:function.")] = "preact_resnet20",
    data: Annotated[str, typer.Option(help="Built-in data or package.module:function.")] = "digits",
    data_root: Annotated[str | None, typer.Option(help="Folder of data that are read from disk.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels of images that are read from a folder.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a minibatch.")] = 128,
    batches: Annotated[int, typer.Option(help="Further minibatches, for the sampling variance; 0 for none.")] = 8,
    draws: Annotated[int, typer.Option(help="Draws of the quantized gradient.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    skip: Annotated[str | None, typer.Option(help="Layers to leave in full precision: name patterns.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="File with the model's state_dict.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="How the products are computed.")] = "simulated",
    output: Annotated[
        str | None, typer.Option("--out", help="Folder of the run.", show_default="a new one in runs/")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure how biased and how noisy the quantized gradient of a network is, per layer."""
    from fqtstats import results
    from fqtstats.report import tables

    if resume and output is None:
        raise InputError("--resume needs the folder of the run: add --out FOLDER")
    policies = _policies(quantizer, bits, grad_weight)
    arguments: dict[str, object] = {
        "command": "measure",
        "quantizers": list(policies),
        "grad_weight": grad_weight,
        "model": model,
        "data": data,
        "data_root": data_root,
        "image_size": image_size,
        "batch_size": batch_size,
        "batches": batches,
        "draws": draws,
        "seed": seed,
        "skip": skip,
        "checkpoint": checkpoint,
        "device": device,
        "backend": backend,
    }
    _check_counts(batch_size=(batch_size, 1), batches=(batches, 0), draws=(draws, 2))
    _check_backend(backend)
    path = Path(output) if output is not None else _new_folder(list(policies))
    with results.RunDirectory.create(path, arguments, resume) as run:
        try:
            result = run.load() if run.finished else _measure_all(run, policies, arguments)
        except KeyboardInterrupt:
            err.print(f"interrupted; what was measured is in {path}: continue with the same command and", end=" ")
            err.print(f"--out {path} --resume", highlight=False)
            raise
    if as_json:
        print(json.dumps(tables.to_dict(result), indent=2, allow_nan=False))
    else:
        out.print(tables.summary(result))
        _say_where(path)


def _measure_all(run: RunDirectory, policies: dict[str, Policy], arguments: dict[str, Any]) -> Result:
    from fqtstats import experiment, measurement, models, results

    with _progress() as bars:
        setup = experiment.prepare(
            arguments["model"],
            arguments["data"],
            root=arguments["data_root"],
            image_size=arguments["image_size"],
            batch_size=arguments["batch_size"],
            further=arguments["batches"],
            seed=arguments["seed"],
            checkpoint=arguments["checkpoint"],
            device=arguments["device"],
            progress=_TrainingBar(bars, f"training {arguments['model']}"),
        )
        parts = []
        for label, policy in policies.items():
            task = bars.add_task(f"measuring {label}", total=None)
            parts.append(
                measurement.measure(
                    setup.model,
                    setup.batch,
                    models.loss,
                    policy,
                    draws=arguments["draws"],
                    seed=arguments["seed"],
                    backend=arguments["backend"],
                    batches=setup.further or None,
                    skip=None if arguments["skip"] is None else arguments["skip"].split(","),
                    progress=lambda done, total, task=task: bars.update(task, completed=done, total=total),  # type: ignore[misc]
                    store=_DirectoryStore(run, label),
                )
            )
    merged = results.merge(parts)
    result = results.Result(merged.table, {"arguments": arguments, **setup.about, **merged.metadata})
    run.finish(result)
    return result


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="quantizers, policies, models, data or kernels")] = "quantizers",
) -> None:
    """List what there is."""
    from fqtstats import data, models, ops, policies, quantizers

    table = Table(box=None, pad_edge=False, header_style="bold")
    if what == "quantizers":
        _columns(table, "name", "role", "claim", "options", "what it is")
        for name, cls in quantizers.QUANTIZERS.items():
            options = ", ".join(f"{option}={value!r}" for option, value in quantizers.options_of(cls).items())
            table.add_row(name, cls.role, cls().claim, options, _first_sentence(cls.__doc__))
    elif what == "policies":
        _columns(table, "name", "activation", "weight", "grad_input", "grad_weight")
        for name in policies.POLICIES:
            policy = policies.get(name)
            places = (policy.activation, policy.weight, policy.grad_input, policy.grad_weight)
            table.add_row(name, *("-" if q is None else f"{getattr(q, 'name', q)}:{getattr(q, 'bits', '')}" for q in places))
    elif what == "models":
        _columns(table, "name", "data", "what it is")
        for name, entry in models.MODELS.items():
            table.add_row(name, ", ".join(entry.kinds), entry.summary)
    elif what == "data":
        _columns(table, "name", "what it is")
        for name, source in data.SOURCES.items():
            table.add_row(name, source.summary)
    elif what == "kernels":
        _columns(table, "operation", "variant", "here")
        for kernel in ops.kernels():
            here = "in use" if kernel.selected else "available" if kernel.available else "not available"
            table.add_row(kernel.op, kernel.variant, here)
    else:
        raise InputError(f"unknown list {what!r}; known: quantizers, policies, models, data, kernels")
    out.print(table)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="measure")],
    json_file: Annotated[str | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per row.")] = 9,
) -> None:
    """Speed ratios against named baselines, measured side by side."""
    from fqtstats import benchmarks

    _check_counts(rounds=(rounds, 1))
    if what not in benchmarks.BENCHMARKS:
        raise InputError(f"unknown benchmark {what!r}; known: {', '.join(benchmarks.BENCHMARKS)}")
    if json_file is not None and not Path(json_file).resolve().parent.is_dir():
        raise InputError(f"cannot write {json_file!r}: its folder does not exist")
    with _progress() as bars:
        task = bars.add_task(f"benchmarking {what}", total=None)
        rows = benchmarks.BENCHMARKS[what](
            rounds, lambda done, total: bars.update(task, completed=done, total=total)
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    _columns(table, "name", "shape", "threads", "baseline", "ratio", "must", "ours", "baseline's")
    for row in rows:
        table.add_row(
            row.name,
            row.shape,
            str(row.threads),
            row.baseline,
            f"{row.ratio:.2f}x [{row.ratio_low:.2f}, {row.ratio_high:.2f}]",
            "-" if row.must is None else f"{row.must:.2f}x",
            f"{row.seconds * 1e3:.1f} ms",
            f"{row.baseline_seconds * 1e3:.1f} ms",
        )
    out.print(table)
    out.print("ratio = baseline's time / ours: median of interleaved pairs [quartiles]")
    if json_file is not None:
        Path(json_file).write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")


class _DirectoryStore:
    """Keeps one configuration's unfinished measurement in the run directory."""

    def __init__(self, run: RunDirectory, key: str) -> None:
        self._run, self._key, self._saved = run, key, time.monotonic()

    def load(self) -> Arrays | None:
        state = self._run.load_state(self._key)
        return None if state is None else dict(state[0])

    def save(self, arrays: Arrays, *, force: bool = False) -> None:
        if force or time.monotonic() - self._saved > SAVE_SECONDS:
            self._run.save_state(self._key, arrays, {})
            self._saved = time.monotonic()


class _TrainingBar:
    """Progress of a training, shown from its first step on (a cached checkpoint has none)."""

    def __init__(self, bars: Progress, title: str) -> None:
        self._bars, self._title = bars, title
        self._task: Any = None

    def __call__(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        if self._task is None:
            self._task = self._bars.add_task(self._title, total=epochs * steps)
        self._bars.update(
            self._task, completed=(epoch - 1) * steps + step, description=f"{self._title}, epoch {epoch}, loss {loss:.3f}"
        )


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bars:
        yield bars


def _policies(quantizers: str, bits: str, grad_weight: str | None) -> dict[str, Policy]:
    """``{"bhq@5": Policy, ...}``: every quantizer at every number of bits."""
    from fqtstats import policies
    from fqtstats.quantizers import QUANTIZERS, quantizer

    gradient = [name for name, cls in QUANTIZERS.items() if cls.role == "gradient"]
    weight = None
    if grad_weight is not None:
        name, colon, width = grad_weight.partition(":")
        if name not in gradient or not colon or not width.isdecimal():
            raise InputError(f"expected --grad-weight NAME:BITS, NAME one of {', '.join(gradient)}; got {grad_weight!r}")
        weight = quantizer(name, bits=int(width))
    chosen: dict[str, Policy] = {}
    for name in _separated(quantizers):
        if name not in gradient:
            raise InputError(f"unknown gradient quantizer {name!r}; known: {', '.join(gradient)}")
        for width in _separated(bits):
            if not width.isdecimal():
                raise InputError(f"expected --bits as integers from 1 to 8 separated by commas, got {bits!r}")
            chosen[f"{name}@{int(width)}"] = policies.get(f"statquant-{name}", int(width), weight)
    if not chosen:
        raise InputError("expected at least one quantizer and one number of bits, got none")
    return chosen


def _separated(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _check_counts(**limits: tuple[int, int]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def _check_backend(name: str) -> None:
    from fqtstats.layers import BACKENDS

    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")


def _new_folder(labels: list[str]) -> Path:
    stem = f"measure-{labels[0]}" if len(labels) == 1 else f"measure-{labels[0]}-and-{len(labels) - 1}-more"
    folder = Path("runs") / stem
    number = 2
    while folder.exists():
        folder = Path("runs") / f"{stem}-{number}"
        number += 1
    return folder


def _say_where(path: Path) -> None:
    figures = sorted(figure.name for figure in (path / "figures").glob("*.png"))
    out.print(f"saved in {path}: results.parquet, run.json, figures/{{{', '.join(figures)}}}", highlight=False, soft_wrap=True)


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, overflow="fold")


def _first_sentence(doc: str | None) -> str:
    text = " ".join((doc or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def main() -> None:
    """Entry point of the ``fqtstats`` command."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        err.print(f"fqtstats: error: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
