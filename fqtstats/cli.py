"""The command line: ``fqtstats measure | check | bench | list``.

Exit status: 0; 1 if a claim fails, a benchmark misses its target or the backends disagree; 2 for bad usage or input
(one line that says what to do); 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress

from fqtstats import __version__
from fqtstats.commands.bench import bench
from fqtstats.commands.check import check
from fqtstats.commands.console import check_counts, err, out, progress, separated
from fqtstats.commands.listing import list_
from fqtstats.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fqtstats.measurement import Arrays
    from fqtstats.policy import Policy
    from fqtstats.quantizers import Quantizer
    from fqtstats.results import Result
    from fqtstats.run_directory import RunDirectory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SAVE_SECONDS = 2.0
"""An unfinished measurement is saved at most this often."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fqtstats {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Bias and variance of quantized gradients: a measuring instrument for fully quantized training."""


@app.command()
def measure(
    context: typer.Context,
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
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    skip: Annotated[str | None, typer.Option(help="Layers to leave in full precision: name patterns.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="File with the model's state_dict.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        str, typer.Option(help="How the products are computed: simulated, native, or both: native, and compared.")
    ] = "simulated",
    output: Annotated[
        str | None, typer.Option("--out", help="Folder of the run.", show_default="a new one in runs/")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure how biased and how noisy the quantized gradient of a network is, per layer."""
    from fqtstats import experiment
    from fqtstats.random import stream
    from fqtstats.report import tables
    from fqtstats.run_directory import RunDirectory

    # Everything that can be told to be wrong is, before a folder is made and before anything is trained.
    if resume and output is None:
        raise InputError("--resume needs the folder of the run, got none; add --out FOLDER")
    policies = _policies(quantizer, bits, grad_weight)
    drawn = _draws_with(method)
    if not drawn and draws:
        raise InputError(f"--method exact makes no draws, got --draws {draws}; leave it out or choose another --method")
    batches = (8 if drawn else 0) if batches is None else batches
    draws = (64 if drawn else 0) if draws is None else draws
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
        "method": method,
        "seed": seed,
        "skip": skip,
        "checkpoint": checkpoint,
        "device": device,
        "backend": backend,
    }
    check_counts(batch_size=(batch_size, 1), batches=(batches, 0), draws=(draws, 2 if drawn else 0))
    if image_size is not None:
        check_counts(image_size=(image_size, 1))
    stream(seed=seed)
    experiment.device(device)
    _check_backend(backend)
    path = _folder(output, list(policies))
    with RunDirectory.create(path, arguments, resume) as run:
        try:
            result = run.load() if run.finished else _measure_all(run, policies, arguments)
        except BaseException as error:
            _say_what_is_kept(run, error, context.obj)
            raise
    if as_json:
        print(json.dumps(tables.to_dict(result), indent=2, allow_nan=False))
    else:
        out.print(tables.summary(result))
    _say_where(path, err if as_json else out)
    if not tables.parity_ok(result):
        raise typer.Exit(1)


def _measure_all(run: RunDirectory, policies: dict[str, Policy], arguments: dict[str, Any]) -> Result:
    from fqtstats import backends, experiment, layers, measurement, results

    both = arguments["backend"] == "both"
    backend = "native" if both else arguments["backend"]
    skip = None if arguments["skip"] is None else [pattern.strip() for pattern in arguments["skip"].split(",")]

    def check(model: nn.Module) -> None:
        for policy in policies.values():
            with layers.quantized(model, policy, skip, backend, arguments["seed"]):
                pass

    with progress() as bars:
        setup = experiment.prepare(
            arguments["model"],
            arguments["data"],
            root=arguments["data_root"],
            image_size=arguments["image_size"],
            batch_size=arguments["batch_size"],
            further=arguments["batches"],
            seed=arguments["seed"],
            checkpoint=arguments["checkpoint"],
            device_name=arguments["device"],
            check=check,
            progress=_TrainingBar(bars, f"training {arguments['model']}"),
        )
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
                progress=_MeasuringBar(bars, f"measuring {label}"),
                store=_DirectoryStore(run, label),
                method=arguments["method"],
            )
            if both:
                report = backends.parity(setup.model, setup.batch, setup.loss, policy, arguments["seed"], skip=skip)
                part.metadata["configurations"][0]["parity"] = report.as_rows()
            parts.append(part)
    merged = results.merge(parts)
    result = results.Result(merged.table, {"arguments": arguments, **setup.about, **merged.metadata})
    run.finish(result)
    return result


def _say_what_is_kept(run: RunDirectory, error: BaseException, arguments: Sequence[str]) -> None:
    """What became of an unfinished run: kept to be resumed, or removed because it holds nothing."""
    if run.discard():
        if isinstance(error, KeyboardInterrupt):
            err.print("fqtstats: interrupted before anything was measured; nothing is kept", highlight=False)
        return
    if run.finished:
        return
    command = ["fqtstats", *arguments]
    if not any(word == "--out" or word.startswith("--out=") for word in arguments):
        command += ["--out", str(run.path)]
    if "--resume" not in arguments:
        command += ["--resume"]
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
    told = f"fqtstats: {what}; what was measured is in {run.path}, continue with: {shlex.join(command)}"
    err.print(told, highlight=False, markup=False, soft_wrap=True)


app.command(name="list")(list_)
app.command()(bench)
app.command()(check)


class _DirectoryStore:
    """Keeps one configuration's unfinished measurement in the run directory."""

    def __init__(self, run: RunDirectory, key: str) -> None:
        self._run, self._key, self._saved = run, key, time.monotonic()

    def load(self) -> Arrays | None:
        state = self._run.load_state(self._key)
        return None if state is None else dict(state[0])

    def save(self, state: Callable[[], Arrays], *, force: bool = False) -> None:
        if not force and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        arrays = state()
        if len(arrays["draws"]):  # nothing to keep before the first draw
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
        description = f"{self._title}, epoch {epoch}, loss {loss:.3f}"
        self._bars.update(self._task, completed=(epoch - 1) * steps + step, description=description)


class _MeasuringBar:
    """Progress of one configuration."""

    def __init__(self, bars: Progress, title: str) -> None:
        self._bars, self._task = bars, bars.add_task(title, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)


def _policies(quantizers: str, bits: str, grad_weight: str | None) -> dict[str, Policy]:
    """``{"bhq@5": Policy, ...}``: every quantizer at every number of bits."""
    from fqtstats import policies

    weight = None
    if grad_weight is not None:
        name, colon, width = grad_weight.partition(":")
        if not colon:
            raise InputError(f"expected --grad-weight NAME:BITS, got {grad_weight!r}; for instance pcq:8")
        weight = _gradient_quantizer(name, _width(width, "--grad-weight"))
    chosen: dict[str, Policy] = {}
    widths = [_width(text, "--bits") for text in separated(bits, "--bits")]
    for name in separated(quantizers, "--quantizer"):
        for b in widths:
            _gradient_quantizer(name, b)
            chosen[f"{name}@{b}"] = policies.get(f"statquant-{name}", b, weight)
    return chosen


def _gradient_quantizer(name: str, bits: int) -> Quantizer:
    from fqtstats.quantizers import QUANTIZERS, quantizer

    gradient = ", ".join(known for known, cls in QUANTIZERS.items() if cls.role == "gradient")
    if name not in QUANTIZERS:
        raise InputError(f"unknown gradient quantizer {name!r}; known: {gradient}")
    if QUANTIZERS[name].role != "gradient":
        raise InputError(f"{name!r} quantizes the forward pass only, expected a gradient quantizer: {gradient}")
    return quantizer(name, bits=bits)


def _width(text: str, option: str) -> int:
    if not re.fullmatch("[1-8]", text):
        raise InputError(f"expected the bits in {option} to be integers from 1 to 8, got {text!r}; for instance 5")
    return int(text)


def _draws_with(method: str) -> bool:
    from fqtstats.measurement import METHODS

    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return method != "exact"


def _check_backend(name: str) -> None:
    from fqtstats.layers import BACKENDS

    if name not in (*BACKENDS, "both"):
        raise InputError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}, both")


def _folder(output: str | None, labels: list[str]) -> Path:
    if output is not None:
        if not output:
            raise InputError("expected --out FOLDER, got an empty name; leave it out for a new folder in runs/")
        return Path(output)
    stem = f"measure-{labels[0]}" if len(labels) == 1 else f"measure-{labels[0]}-and-{len(labels) - 1}-more"
    folder = Path("runs") / stem
    number = 2
    while folder.exists():
        folder = Path("runs") / f"{stem}-{number}"
        number += 1
    return folder


def _say_where(path: Path, console: Console) -> None:
    figures = ", ".join(sorted(f"figures/{figure.name}" for figure in (path / "figures").glob("*.png")))
    told = f"saved in {path}: results.parquet, run.json, {figures}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    told = f"fqtstats: warning: {_one_line(message)}"
    err.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _fail(message: object) -> int:
    told = f"fqtstats: error: {_one_line(message)}"
    err.print(told, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return 2


# What the parser raises, by way of a class that typer exports in every version.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status. A mistake in what was asked for is one line on stderr and status 2; anything else that is
        raised is a defect, and is not caught.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        given = list(arguments)
        try:
            status = app(given or ["--help"], prog_name="fqtstats", standalone_mode=False, obj=given)
        except InputError as error:
            return _fail(error)
        except _UsageError as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "fqtstats")
            options = getattr(getattr(error, "param", None), "opts", ())
            got = [f", got {value!r}" for option, value in pairwise(given) if option in options]
            return _fail(f"{error.format_message().rstrip('.')}{''.join(got[-1:])}; see {command} --help")
        except RuntimeError as error:
            torch = sys.modules.get("torch")  # not imported for this: --help should be immediate
            if torch is None or not isinstance(error, torch.OutOfMemoryError):
                raise
            return _fail(f"the device is out of memory ({str(error).split('. ')[0]}); lower --batch-size")
        except (KeyboardInterrupt, typer.Abort):
            return 130
    return status if isinstance(status, int) else 0


def main() -> None:
    """Entry point of the ``fqtstats`` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
