"""Training runs: how loss, accuracy and gradient variance went.

On disk a :class:`Training` is a run directory::

    epochs.parquet, variance.parquet    the tables
    epochs.csv, variance.csv            the same numbers, for other tools
    model.pt                            the weights (``torch.save`` of a state_dict); other networks likewise
    run.json            arguments, metadata, time stamps and the SHA-256 of each Parquet file
    figures/*.png       drawn from the tables
    state/              only while the run is going: the last checkpoint, which ``--resume`` continues from
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from fqtstats import run_directory
from fqtstats.errors import InputError
from fqtstats.results import TOTAL
from fqtstats.schema import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["EPOCHS", "MODEL", "TIMES", "VARIANCE", "Training", "load_training"]

_SQUARE = "(loss/parameter)^2"

MODEL = "model"
"""Name of the network that is trained; where there are several, of the first student."""

EPOCHS: tuple[Column, ...] = (
    Column("epoch", "int64", "1", "passes over the training data, this one included"),
    Column("network", "str", "", '"model", or of those trained together one of "model", "student-2", ..., "teacher"'),
    Column("stage", "str", "", "stage of the recipe"),
    Column("steps", "int64", "1", "training steps so far"),
    Column("lr", "float64", "", "learning rate of the last step (of the first group of parameters)"),
    Column(
        "loss", "float64", "nat", "mean cross entropy of the minibatches as they were trained on, without smoothing"
    ),
    Column("accuracy", "float64", "1", "share of right predictions on these minibatches"),
    Column("test_loss", "float64", "nat", "mean cross entropy on the test data after the epoch; NaN without test data"),
    Column("test_accuracy", "float64", "1", "share of right predictions on the test data after the epoch"),
    Column("variance", "float64", _SQUARE, "mean of the measured variances of the quantized gradient"),
    Column("snr", "float64", "1", "mean squared gradient norm of the same steps over that"),
    Column("kept_bytes", "Int64", "byte", "most that quantized layers keep of the activations of a minibatch"),
    Column("kept_float32_bytes", "Int64", "byte", "the same in float32"),
    Column("seconds", "float64", "s", "wall time of the epoch"),
    Column("variance_seconds", "float64", "s", "part of it spent on measuring variances"),
    Column("overhead", "float64", "1", "variance_seconds as a share of the rest"),
)
"""Schema of :attr:`Training.epochs`: one row per epoch and network."""

VARIANCE: tuple[Column, ...] = (
    Column("step", "int64", "1", "training step, from 0"),
    Column("epoch", "int64", "1", "the epoch it is in, from 1"),
    Column("layer", "str", "", 'qualified name of the module that owns the parameter; "total" for the whole model'),
    Column("parameter", "str", "", 'name of the parameter within its layer; "" in the total row'),
    Column("numel", "int64", "1", "elements of the parameter"),
    Column("grad_norm_sq", "float64", _SQUARE, "squared norm of the gradient before gradient quantization (QAT)"),
    Column("variance", "float64", _SQUARE, "variance of the quantized gradient, summed over the elements"),
    Column("variance_low", "float64", _SQUARE, "lower end of the 95 % interval of variance"),
    Column("variance_high", "float64", _SQUARE, "upper end of the 95 % interval of variance"),
    Column("snr", "float64", "1", "grad_norm_sq / variance"),
    Column("draws", "int64", "1", "quantized gradients drawn"),
)
"""Schema of :attr:`Training.variance`: one row per measured step and parameter, and a total after each."""

TIMES = ("seconds", "variance_seconds", "overhead")
"""Columns of the epochs that differ between runs that are otherwise the same bit for bit."""

_TABLES: run_directory.Tables = {"epochs": ("epochs", EPOCHS), "variance": ("variance", VARIANCE)}
"""Name of the file (without the suffix) and schema of each table."""

_KEYS = {"epochs": ["epoch", "network"], "variance": ["step", "layer", "parameter"]}


@dataclass(frozen=True, eq=False, repr=False)
class Training:
    """A training run.

    Attributes:
        epochs: one row per epoch and network, with the columns of :data:`EPOCHS`.
        variance: one row per measured step and parameter, with the columns of :data:`VARIANCE`.
        metadata: plain JSON, whatever it takes to repeat the run. Keys with a meaning here: ``recipe``, ``settings``,
            ``seed``, ``diverged`` (None, or the diagnosis), ``hashes`` (of data and weights), ``arguments``,
            ``quantized`` (the networks with quantized layers at the end).
        weights: the state of each network at the end; of a run that diverged, at its last good checkpoint. None for a
            run that was loaded: ``torch.load`` reads its ``model.pt``.

    Raises:
        InputError: a table does not follow its schema, or the metadata is not JSON.
    """

    epochs: pd.DataFrame
    variance: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Tensor]] | None = None
    kind: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        run_directory.settle(self, _TABLES, _KEYS)

    @property
    def diverged(self) -> bool:
        """Whether the run ended because it diverged."""
        return self.metadata.get("diverged") is not None

    @property
    def networks(self) -> list[str]:
        """The networks that were trained."""
        return list(dict.fromkeys(self.epochs["network"]))

    @property
    def label(self) -> str:
        """The recipe with its bits, as "statquant-bhq@5"."""
        recipe = self.metadata.get("recipe", {})
        name, bits = str(recipe.get("name", "custom")), recipe.get("bits")
        return name if bits is None else f"{name}@{bits}"

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.metadata.get("seed", 0))

    def curve(self, network: str = MODEL) -> pd.DataFrame:
        """The epochs of one network."""
        return self.epochs[self.epochs["network"] == network]

    @property
    def totals(self) -> pd.DataFrame:
        """The measured variances of the whole gradient."""
        rows = self.variance
        return rows[(rows["layer"] == TOTAL) & (rows["parameter"] == "")]

    @property
    def final(self) -> pd.Series:
        """The model's row of the last epoch.

        Raises:
            InputError: the run diverged before the end of its first epoch.
        """
        rows = self.curve()
        if rows.empty:
            raise InputError("the training has no finished epoch")
        return rows.iloc[-1]

    def files(self) -> dict[str, bytes]:
        """What a run directory holds of it beside the figures: see :class:`fqtstats.run_directory.Recordable`."""
        return {**run_directory.files_of(_TABLES, self), **self._weight_files()}

    def _weight_files(self) -> dict[str, bytes]:
        import torch

        files = {}
        for name, state in (self.weights or {}).items():
            buffer = io.BytesIO()
            torch.save(dict(state), buffer)
            files[f"{name}.pt"] = buffer.getvalue()
        return files

    def figures(self) -> dict[str, bytes]:
        """The figures that suit it, as PNG files by name."""
        from fqtstats.report import trainings  # the report stage is above this one: it is loaded only when asked for

        return trainings.render_all(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run directory at ``path``, which must be new or empty.

        Raises:
            RunDirectoryError: ``path`` is in use or cannot be written.
        """
        run_directory.save(self, path)

    def plot_loss(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw the loss by epoch; see :func:`fqtstats.report.trainings.plot_loss`."""
        from fqtstats.report import trainings

        return trainings.plot_loss(self, ax, width=width)

    def plot_accuracy(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw the accuracy by epoch; see :func:`fqtstats.report.trainings.plot_accuracy`."""
        from fqtstats.report import trainings

        return trainings.plot_accuracy(self, ax, width=width)

    def plot_variance(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw the gradient's variance by step; see :func:`fqtstats.report.trainings.plot_variance`."""
        from fqtstats.report import trainings

        return trainings.plot_variance(self, ax, width=width)

    def __repr__(self) -> str:
        rows = self.curve()
        end = "diverged" if self.diverged else "finished"
        told = ""
        if len(rows):
            last = rows.iloc[-1]
            told = f", loss {last['loss']:.3g}"
            if not math.isnan(last["test_accuracy"]):
                told += f", test accuracy {last['test_accuracy']:.3g}"
        return f"Training({self.label}, seed {self.seed}: {end} after {len(rows)} epochs{told})"

    def _repr_html_(self) -> str:
        """The epochs for Jupyter, with three significant digits; every name is escaped."""
        html = self.epochs.to_html(
            index=False, escape=True, na_rep="", border=0, float_format="{:.3g}".format, justify="right"
        )
        return f'<div style="overflow-x: auto">{html}</div>'


def load_training(path: str | os.PathLike[str]) -> Training:
    """Read a training from a finished run directory; its weights stay on disk.

    Raises:
        RunDirectoryError: nothing there, not a run, a run of another kind, not finished, of a newer format, or damaged.
    """
    return run_directory.load(Training, path, Training.kind, _TABLES)
