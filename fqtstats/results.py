"""Results: the table of a measurement, its metadata, and how both are kept on disk.

A :class:`Result` is the end of the measuring flow and the only thing that tables, figures and reports read. On disk it
is a run directory::

    results.parquet    the table; identical tables give identical bytes
    run.json           arguments, metadata, time stamps and the table's SHA-256; ``"finished": true`` is written last
    figures/*.png      drawn from the table
    state/             only while the run is going: what ``--resume`` continues from

:mod:`fqtstats.run_directory` writes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from fqtstats import run_directory
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.files import read_bytes
from fqtstats.schema import Column, Json, json_dict, normalised, parquet_bytes, read_parquet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Column", "Configuration", "Result", "load", "merge"]

NORM_TOLERANCE = 1e-3
"""Relative tolerance of the operator norms (squared) in end-to-end bounds: a variance may lie that much above one."""

_SQUARE = "(loss/parameter)^2"
_INPUT_SQUARE = "(loss/activation)^2"

COLUMNS: tuple[Column, ...] = (
    Column("quantizer", "str", "", 'quantizer of the input gradient, as "bhq"; "custom" for a hand-made policy'),
    Column("bits", "Int64", "bit", "bits of that quantizer; missing where a policy has no single number"),
    Column("layer", "str", "", 'qualified name of the module that owns the parameter; "total" for the whole model'),
    Column("parameter", "str", "", 'name of the parameter within its layer; "" in the total row'),
    Column("quantized", "bool", "", "whether the layer was swapped for a quantized one"),
    Column("numel", "int64", "1", "elements of the parameter"),
    Column("grad_norm_sq", "float64", _SQUARE, "squared norm of the gradient before gradient quantization (QAT)"),
    Column("bias_norm_sq", "float64", _SQUARE, "unbiased estimate of the squared bias; below zero by chance"),
    Column("bias_p", "float64", "1", "p-value of no bias, corrected for the families of tests but not for the rows"),
    Column("bias_p_directed", "float64", "1", "p-value of the t tests on fixed directions"),
    Column("bias_p_cross_fit", "float64", "1", "p-value of the t test of half the draws on the other half's mean"),
    Column("bias_p_sign_flip", "float64", "1", "p-value of the squared bias against random sign flips"),
    Column("variance", "float64", _SQUARE, "variance of the quantized gradient, summed over the elements"),
    Column("variance_low", "float64", _SQUARE, "lower end of the 95 % interval of variance"),
    Column("variance_high", "float64", _SQUARE, "upper end of the 95 % interval of variance"),
    Column("variance_weight", "float64", _SQUARE, "mean squared error from the weight-gradient quantizers (Q1)"),
    Column("variance_input", "float64", _SQUARE, "mean squared error from the input-gradient quantizers (Q2)"),
    Column("variance_gain", "float64", "1", "draws of plain Monte Carlo that one is worth; NaN: it is plain", True),
    Column(
        "variance_exact_own", "float64", _SQUARE, "exact variance from the layer's own Q1 on its QAT gradient", True
    ),
    Column("own_ratio", "float64", "1", "drawn squared error from the layer's own Q1 over its exact mean", True),
    Column("own_ratio_low", "float64", "1", "lower end of the 95 % interval of own_ratio", True),
    Column("own_ratio_high", "float64", "1", "upper end of the 95 % interval of own_ratio", True),
    Column("own_ratio_p", "float64", "1", "p-value of a true own_ratio of 1; NaN: Q1 does not claim that", True),
    Column("q_input_variance", "float64", _INPUT_SQUARE, "exact variance of the layer's Q2 on its QAT gradient"),
    Column("q_input_bound", "float64", _INPUT_SQUARE, "upper bound of q_input_variance"),
    Column("q_weight_variance", "float64", _INPUT_SQUARE, "exact variance of the layer's Q1 on its QAT gradient"),
    Column("q_weight_bound", "float64", _INPUT_SQUARE, "upper bound of q_weight_variance"),
    Column("q_input_grad_norm_sq", "float64", _INPUT_SQUARE, "squared norm of the QAT gradient that Q2 quantizes"),
    Column("sampling_variance", "float64", _SQUARE, "trace of the covariance of one minibatch's gradient"),
    Column("snr", "float64", "1", "grad_norm_sq / variance"),
    Column("sqrt3_margin", "float64", "1", "||g|| / sqrt(3 variance); below 1 the noise dominates"),
    Column("draws", "int64", "1", "quantized gradients drawn"),
    Column("bound", "float64", _SQUARE, "end-to-end upper bound of variance (Theorem 2 of arXiv 2010.14298)", True),
    Column("bound_ratio", "float64", "1", "variance / bound", True),
)
"""The table's schema, in order. One row per trainable parameter and configuration, and one total per configuration;
NaN where a row has no value. Later stages may append further float64 columns."""

TOTAL = "total"
"""Value of ``layer`` in the row of the whole model (with ``parameter == ""``)."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What was measured: a quantizer and its number of bits (None where a policy has no single one)."""

    quantizer: str
    bits: int | None

    def __str__(self) -> str:
        return self.quantizer if self.bits is None else f"{self.quantizer}@{self.bits}"


_KEYS = ["quantizer", "bits", "layer", "parameter"]
_FILE = "results.parquet"
_WHAT = "results table"


def _normalised(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` in the schema's column order and dtypes, checked; further columns follow as float64."""
    clean = normalised(table, COLUMNS, _WHAT)
    repeated = clean[clean.duplicated(_KEYS)]
    if len(repeated):
        first = repeated.iloc[0]
        raise InputError(
            f"two rows for quantizer {first['quantizer']!r}, bits {first['bits']}, layer {first['layer']!r}, parameter "
            f"{first['parameter']!r}; give one configuration another name in the column 'quantizer'"
        )
    totals = clean[(clean["layer"] == TOTAL) & (clean["parameter"] == "")]
    without = clean[_KEYS[:2]].drop_duplicates().shape[0] - len(totals)
    if without or clean.empty:
        raise InputError('the results table must have one row with layer "total" and parameter "" per configuration')
    return clean


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A measurement: one or several configurations on the same model and data.

    Attributes:
        table: the numbers, with the columns of :data:`COLUMNS`; rows in network order, the total last.
        metadata: plain JSON, whatever it takes to repeat the measurement. Keys with a meaning here: ``arguments`` (of
            the run), what :func:`provenance` gives, ``hashes`` (of model and data), ``unquantized`` (list of
            ``{"layer", "type", "reason"}``) and ``configurations`` (a list with the settings of each configuration).

    Raises:
        InputError: the table does not follow the schema, or the metadata is not JSON.
    """

    table: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "measurement"

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", _normalised(self.table))
        object.__setattr__(self, "metadata", json_dict(self.metadata, "metadata"))

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """The configurations in the order in which the table has them."""
        pairs = self.table[["quantizer", "bits"]].drop_duplicates().itertuples(index=False)
        return tuple(Configuration(str(name), None if pd.isna(bits) else int(bits)) for name, bits in pairs)

    @property
    def reference(self) -> Configuration:
        """What others are compared with: ``ptq`` at 8 bits when it was measured, else the first configuration."""
        standard = Configuration("ptq", 8)
        return standard if standard in self.configurations else self.configurations[0]

    def select(self, configuration: Configuration | None = None) -> pd.DataFrame:
        """All rows of one configuration, the total included.

        Args:
            configuration: may be left out where there is one only.

        Raises:
            InputError: it was not measured, or left out where there are several.
        """
        if configuration is None:
            configuration, *further = self.configurations
            if further:
                known = ", ".join(str(item) for item in self.configurations)
                raise InputError(f"this result has several configurations, {known}; name one of .configurations")
        bits = self.table["bits"]
        same_bits = bits.isna() if configuration.bits is None else (bits == configuration.bits).fillna(False)
        rows = self.table[(self.table["quantizer"] == configuration.quantizer) & same_bits.astype(bool)]
        if rows.empty:
            known = ", ".join(str(item) for item in self.configurations)
            raise InputError(f"no configuration {configuration} in this result; it has {known}")
        return rows

    def rows(self, configuration: Configuration | None = None) -> pd.DataFrame:
        """The rows of one configuration's parameters, in network order, without the total."""
        rows = self.select(configuration)
        return rows[(rows["layer"] != TOTAL) | (rows["parameter"] != "")]

    def total(self, configuration: Configuration | None = None) -> pd.Series:
        """The row of the whole model in one configuration; as :meth:`select`."""
        rows = self.select(configuration)
        return rows[(rows["layer"] == TOTAL) & (rows["parameter"] == "")].iloc[0]

    def relative_input_variance(
        self, configuration: Configuration, reference: Configuration | None = None
    ) -> npt.NDArray[np.float64]:
        """Per layer, ``q_input_variance`` as a multiple of the one in ``reference`` (default: :attr:`reference`).

        Layers that have none in either configuration, or none above zero in the reference, are left out.
        """
        keys = ["layer", "parameter"]
        column = [*keys, "q_input_variance"]
        other = self.rows(reference or self.reference)[column]
        pairs = self.rows(configuration)[column].merge(other, on=keys, suffixes=("", "_reference"))
        ours = pairs["q_input_variance"].to_numpy(dtype=np.float64)
        theirs = pairs["q_input_variance_reference"].to_numpy(dtype=np.float64)
        usable = np.isfinite(ours) & np.isfinite(theirs) & (theirs > 0)
        ratios: npt.NDArray[np.float64] = ours[usable] / theirs[usable]
        return ratios

    def files(self) -> dict[str, bytes]:
        """What a run directory holds of it beside the figures: see :class:`fqtstats.run_directory.Recordable`."""
        return {_FILE: parquet_bytes(self.table, COLUMNS)}

    def figures(self) -> dict[str, bytes]:
        """The figures that suit it, as PNG files by name."""
        from fqtstats.report import figures  # the report stage is above this one: it is loaded only when asked for

        return figures.render_all(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run directory at ``path``, which must be new or empty.

        Raises:
            RunDirectoryError: ``path`` is in use or cannot be written.
        """
        run_directory.save(self, path)

    def plot_variance(
        self, ax: Axes | None = None, *, configurations: Sequence[Configuration] | None = None, width: float = 3.3
    ) -> Figure:
        """Draw each layer's variance; see :func:`fqtstats.report.figures.plot_variance`."""
        from fqtstats.report import figures

        return figures.plot_variance(self, ax, configurations=configurations, width=width)

    def plot_variance_vs_bits(self, ax: Axes | None = None, *, width: float = 3.3) -> Figure:
        """Draw the variance against the bits; see :func:`fqtstats.report.figures.plot_variance_vs_bits`."""
        from fqtstats.report import figures

        return figures.plot_variance_vs_bits(self, ax, width=width)

    def __repr__(self) -> str:
        totals = "; ".join(
            f"{configuration}: total variance {total['variance']:.3g} "
            f"[{total['variance_low']:.3g}, {total['variance_high']:.3g}], {total['draws']} draws"
            for configuration, total in ((item, self.total(item)) for item in self.configurations)
        )
        return f"Result({len(self.rows(self.configurations[0]))} parameters; {totals})"

    def _repr_html_(self) -> str:
        """The whole table for Jupyter, with three significant digits; every name is escaped."""
        html = self.table.to_html(
            index=False, escape=True, na_rep="", border=0, float_format="{:.3g}".format, justify="right"
        )
        return f'<div style="overflow-x: auto">{html}</div>'


def merge(results: Iterable[Result]) -> Result:
    """One result with the configurations of all, in order.

    Metadata on which all agree stays where it is, ``unquantized`` is joined, and what differs moves into
    ``configurations``: one entry per configuration, with its quantizer and bits.

    Raises:
        InputError: nothing to merge, the same configuration twice, or measurements of different models or data.
    """
    parts = list(results)
    if not parts:
        raise InputError("merge expects at least one result, but got none")
    hashes = [part.metadata["hashes"] for part in parts if "hashes" in part.metadata]
    if any(item != hashes[0] for item in hashes):
        raise InputError("cannot merge results of different models or data: their hashes differ")
    joined = ("configurations", "unquantized")
    names = [key for key in dict.fromkeys(key for part in parts for key in part.metadata) if key not in joined]
    first = parts[0].metadata
    shared = [key for key in names if all(key in part.metadata and part.metadata[key] == first[key] for part in parts)]
    metadata: dict[str, Any] = {key: first[key] for key in shared}
    metadata["unquantized"] = []
    metadata["configurations"] = []
    for part in parts:
        own = {key: value for key, value in part.metadata.items() if key not in joined and key not in shared}
        known = part.metadata.get("configurations") or [
            {"quantizer": item.quantizer, "bits": item.bits} for item in part.configurations
        ]
        metadata["configurations"] += [{**entry, **own} for entry in known]
        metadata["unquantized"] += [
            entry for entry in part.metadata.get("unquantized", []) if entry not in metadata["unquantized"]
        ]
    return Result(pd.concat([part.table for part in parts], ignore_index=True), metadata)


def load(path: str | os.PathLike[str]) -> Result:
    """Read a result from a finished run directory, or from a Parquet file that was taken out of one.

    A Parquet file alone has no metadata; beside its ``run.json`` it is read as the run that it belongs to.

    Raises:
        RunDirectoryError: nothing there, not a run, not finished, of a newer format, or corrupted.
    """
    place = Path(path)
    if not place.exists():
        raise RunDirectoryError(f"no run directory or Parquet file at {place}")
    if place.is_file():
        if place.name != _FILE or not (place.parent / "run.json").is_file():
            return _checked_result(read_parquet(read_bytes(place), place, _WHAT), {}, place)
        place = place.parent
    files, metadata = run_directory.read_finished(place, Result.kind, [_FILE])
    return _checked_result(read_parquet(files[_FILE], place / _FILE, _WHAT), metadata, place / _FILE)


def _checked_result(table: pd.DataFrame, metadata: dict[str, Json], path: Path) -> Result:
    try:
        return Result(table, metadata)
    except InputError as error:
        raise RunDirectoryError(f"{path} is not a valid {_WHAT}: {error}") from error
