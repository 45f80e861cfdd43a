"""What the commands share that put a model, data and policies together and write a run."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from fqtstats.commands.console import check_counts, err, say_saved, separated
from fqtstats.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fqtstats.experiment import Experiment
    from fqtstats.measuring import Arrays
    from fqtstats.policy import Policy
    from fqtstats.quantizers import Quantizer
    from fqtstats.run_directory import RunDirectory

__all__ = [
    "AsJson",
    "Backend",
    "BatchSize",
    "Batches",
    "Bits",
    "Checkpoint",
    "Data",
    "DataRoot",
    "Device",
    "DirectoryStore",
    "GradWeight",
    "ImageSize",
    "MeasuringBar",
    "Model",
    "Output",
    "Quantizers",
    "Resume",
    "Seed",
    "Skip",
    "TrainingBar",
    "arguments_of",
    "check_arguments",
    "folder",
    "gradient_quantizer",
    "policies_of",
    "prepare",
    "say_what_is_kept",
    "say_where",
    "skipped",
    "width_of",
]

SAVE_SECONDS = 2.0
"""An unfinished run is saved at most this often."""

SAVE_SHARE = 0.05
"""Of the time, saving takes at most about this share: a large state is saved less often."""

Quantizers = Annotated[str, typer.Option(help="Input-gradient quantizers, separated by commas.")]
Bits = Annotated[str, typer.Option(help="Their bits, separated by commas.")]
GradWeight = Annotated[
    str | None, typer.Option(help="Weight-gradient quantizer as NAME:BITS.", show_default="the recipe's, 8 bits")
]
Model = Annotated[str, typer.Option(help="A built-in model or package.module:function.")]
Data = Annotated[str, typer.Option(help="Built-in data or package.module:function.")]
DataRoot = Annotated[str | None, typer.Option(help="Folder of data that are read from disk.", metavar="FOLDER")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels of images that are read from a folder.")]
BatchSize = Annotated[int, typer.Option(help="Samples in a minibatch.")]
Backend = Annotated[str, typer.Option(help="How the products are computed: simulated or native.")]
Batches = Annotated[int, typer.Option(help="Further minibatches, for the sampling variance; 0 for none.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Skip = Annotated[
    str | None, typer.Option(help="Layers to leave in full precision: name patterns, separated by commas.")
]
Checkpoint = Annotated[str | None, typer.Option(help="File with the model's state_dict.", metavar="FILE")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Output = Annotated[
    str | None, typer.Option("--out", help="Folder of the run.", metavar="FOLDER", show_default="a new one in runs/")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def arguments_of(context: typer.Context, leave_out: Sequence[str] = (), **changed: object) -> dict[str, Any]:
    """What defines a run: the command and its options, without those of where it goes and how it is shown.

    Args:
        context: of the command.
        leave_out: options that say what others say, too.
        changed: options whose value is not the one that was given.

    Raises:
        InputError: a run is to be resumed, and its folder is not given.
    """
    if context.params["resume"] and context.params["output"] is None:
        raise InputError("--resume needs the folder of the run, got none; add --out FOLDER")
    others = ("output", "resume", "as_json", *leave_out)
    given = {name: value for name, value in context.params.items() if name not in others}
    return {"command": context.info_name, **given, **changed}


def check_arguments(arguments: Mapping[str, Any], backends: Sequence[str]) -> None:
    """Raise InputError for what can be told to be wrong before a folder is made and before anything is trained."""
    from fqtstats import experiment
    from fqtstats.random import stream

    check_counts(batch_size=(arguments["batch_size"], 1), batches=(arguments.get("batches", 0), 0))
    if arguments["image_size"] is not None:
        check_counts(image_size=(arguments["image_size"], 1))
    stream(seed=arguments["seed"])
    experiment.device(arguments["device"])
    if arguments["backend"] not in backends:
        raise InputError(f"unknown backend {arguments['backend']!r}; known: {', '.join(backends)}")


def skipped(arguments: Mapping[str, Any]) -> list[str] | None:
    """The name patterns of ``--skip``."""
    return None if arguments["skip"] is None else [pattern.strip() for pattern in arguments["skip"].split(",")]


def prepare(arguments: Mapping[str, Any], policies: Mapping[str, Policy], backend: str, bars: Progress) -> Experiment:
    """Build, train or load what the arguments name; every policy is tried on the model first."""
    from fqtstats import experiment, layers

    def check(model: nn.Module) -> None:
        for policy in policies.values():
            with layers.quantized(model, policy, skipped(arguments), backend, arguments["seed"]):
                pass

    return experiment.prepare(
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
        progress=TrainingBar(bars, f"training {arguments['model']}"),
    )


def say_what_is_kept(
    runs: Sequence[RunDirectory], path: Path, error: BaseException, arguments: Sequence[str], done: str = "measured"
) -> None:
    """What became of unfinished runs in ``path``: kept to be resumed, or removed because they hold nothing.

    Args:
        runs: the runs.
        path: the folder of them all.
        error: what ended them.
        arguments: of the command line.
        done: what the command does, as a participle.
    """
    kept = [run for run in reversed(runs) if not run.discard()]  # the first one made the folder of them all
    if not kept:
        if isinstance(error, KeyboardInterrupt):
            err.print(f"fqtstats: interrupted before anything was {done}; nothing is kept", highlight=False)
        return
    if len(kept) == len(runs) and all(run.finished for run in kept):
        return
    command = ["fqtstats", *arguments]
    if not any(word == "--out" or word.startswith("--out=") for word in arguments):
        command += ["--out", str(path)]
    if "--resume" not in arguments:
        command += ["--resume"]
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
    told = f"fqtstats: {what}; what was {done} is in {path}, continue with: {shlex.join(command)}"
    err.print(told, highlight=False, markup=False, soft_wrap=True)


class DirectoryStore:
    """Keeps one unfinished measurement in its run directory.

    Args:
        run: the directory.
        key: of the measurement in it.
    """

    def __init__(self, run: RunDirectory, key: str) -> None:
        self._run, self._key, self._saved = run, key, time.monotonic()
        self._took = 0.0

    def load(self) -> Arrays | None:
        """The last saved state, or None."""
        state = self._run.load_state(self._key)
        return None if state is None else dict(state[0])

    def save(self, state: Callable[[], Arrays], *, force: bool = False) -> None:
        """Keep the state, at most every :data:`SAVE_SECONDS` and :data:`SAVE_SHARE` of the time unless ``force``."""
        began = time.monotonic()
        if not force and began - self._saved < max(SAVE_SECONDS, self._took / SAVE_SHARE):
            return
        self._run.save_state(self._key, state(), {})
        self._saved = time.monotonic()
        self._took = self._saved - began


class TrainingBar:
    """Progress of a training, shown from its first step on (a cached checkpoint has none)."""

    def __init__(self, bars: Progress, title: str) -> None:
        self._bars, self._title = bars, title
        self._task: Any = None

    def __call__(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        if self._task is None:
            self._task = self._bars.add_task(self._title, total=epochs * steps)
        description = f"{self._title}, epoch {epoch}, loss {loss:.3f}"
        self._bars.update(self._task, completed=(epoch - 1) * steps + step, description=description)


class MeasuringBar:
    """Progress of one configuration."""

    def __init__(self, bars: Progress, title: str) -> None:
        self._bars, self._task = bars, bars.add_task(title, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)


def policies_of(quantizers: str, bits: str, grad_weight: str | None) -> dict[str, Policy]:
    """``{"bhq@5": Policy, ...}``: every quantizer at every number of bits."""
    from fqtstats import policies

    weight = None
    if grad_weight is not None:
        name, colon, width = grad_weight.partition(":")
        if not colon:
            raise InputError(f"expected --grad-weight NAME:BITS, got {grad_weight!r}; for instance pcq:8")
        weight = gradient_quantizer(name, width_of(width, "--grad-weight"))
    chosen: dict[str, Policy] = {}
    widths = [width_of(text, "--bits") for text in separated(bits, "--bits")]
    for name in separated(quantizers, "--quantizer"):
        for b in widths:
            gradient_quantizer(name, b)
            chosen[f"{name}@{b}"] = policies.get(f"statquant-{name}", b, weight)
    return chosen


def gradient_quantizer(name: str, bits: int) -> Quantizer:
    """A gradient quantizer by name; InputError for any other."""
    from fqtstats.quantizers import QUANTIZERS, quantizer

    gradient = ", ".join(known for known, cls in QUANTIZERS.items() if cls.role == "gradient")
    if name not in QUANTIZERS:
        raise InputError(f"unknown gradient quantizer {name!r}; known: {gradient}")
    if QUANTIZERS[name].role != "gradient":
        raise InputError(f"{name!r} quantizes the forward pass only, expected a gradient quantizer: {gradient}")
    return quantizer(name, bits=bits)


def width_of(text: str, option: str) -> int:
    """The bits that an option names."""
    if not re.fullmatch("[1-8]", text):
        raise InputError(f"expected the bits in {option} to be integers from 1 to 8, got {text!r}; for instance 5")
    return int(text)


def folder(output: str | None, command: str, labels: Sequence[str]) -> Path:
    """The folder of a run: what ``--out`` says, or a new one in ``runs``."""
    if output is not None:
        if not output:
            raise InputError("expected --out FOLDER, got an empty name; leave it out for a new folder in runs/")
        return Path(output)
    stem = f"{command}-{labels[0]}" if len(labels) == 1 else f"{command}-{labels[0]}-and-{len(labels) - 1}-more"
    found = Path("runs") / stem
    number = 2
    while found.exists():
        found = Path("runs") / f"{stem}-{number}"
        number += 1
    return found


def say_where(path: Path, files: Sequence[str], console: Console) -> None:
    """Name the files of a run."""
    figures = sorted(f"figures/{figure.name}" for figure in (path / "figures").glob("*.png"))
    say_saved(path, [*files, *figures], console)
