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

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.files import read_bytes, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Column", "Configuration", "Result", "load", "merge"]

FORMAT_VERSION = 1
"""Version of the table's schema and of the run directory; readers refuse a newer one."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        name: the column's name.
        dtype: its pandas dtype; ``Int64`` is the nullable integer.
        unit: the unit of its values; "" for names, "1" for a pure number.
        meaning: what it holds, in one sentence.
        later: whether tables from before there was this column are read, with NaN in it.
    """

    name: str
    dtype: str
    unit: str
    meaning: str
    later: bool = False


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


def _plain_json(value: object, where: str) -> Json:
    """``value`` as plain JSON: numpy scalars become numbers, paths strings, non-finite numbers null."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where} must have strings as keys to be kept as JSON, but has {key!r}")
        return {key: _plain_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise InputError(f"{where} must be plain JSON (numbers, strings, lists, dicts), but is a {type(value).__name__}")


def json_dict(value: Mapping[str, object], where: str) -> dict[str, Json]:
    return {key: _plain_json(item, f"{where}[{key!r}]") for key, item in value.items()}


def _cast(column: Column, values: pd.Series) -> pd.Series:
    """One column in the schema's dtype; refuses what would be changed silently."""
    if column.dtype == "bool":
        if not values.isin([True, False]).all():
            raise InputError(f"column {column.name!r} must hold True or False")
        return values.astype(bool)
    if column.dtype == "str":
        if not values.map(lambda item: isinstance(item, str)).all():
            raise InputError(f"column {column.name!r} must hold strings")
        return values.astype("str")
    try:
        if column.dtype == "Int64":
            return values.astype("Int64")
        if column.dtype == "int64":
            return values.astype("Int64").astype("int64")
        return values.astype("float64")
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"column {column.name!r} must hold {column.dtype} values: {reason}") from error


def _normalised(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` in the schema's column order and dtypes, checked; further columns follow as float64."""
    names = [column.name for column in COLUMNS]
    absent = [column for column in COLUMNS if column.name not in table.columns]
    missing = [column.name for column in absent if not column.later]
    if missing:
        raise InputError(f"the results table lacks the column(s) {', '.join(missing)}")
    table = table.assign(**{column.name: math.nan for column in absent})
    extra = [Column(str(name), "float64", "", "") for name in table.columns if name not in names]
    clean = pd.DataFrame({column.name: _cast(column, table[column.name]) for column in (*COLUMNS, *extra)})
    clean = clean.reset_index(drop=True)
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

    def select(self, configuration: Configuration) -> pd.DataFrame:
        """All rows of one configuration, the total included.

        Raises:
            InputError: it was not measured.
        """
        bits = self.table["bits"]
        same_bits = bits.isna() if configuration.bits is None else (bits == configuration.bits).fillna(False)
        rows = self.table[(self.table["quantizer"] == configuration.quantizer) & same_bits.astype(bool)]
        if rows.empty:
            known = ", ".join(str(item) for item in self.configurations)
            raise InputError(f"no configuration {configuration} in this result; it has {known}")
        return rows

    def rows(self, configuration: Configuration) -> pd.DataFrame:
        """The rows of one configuration's parameters, in network order, without the total."""
        rows = self.select(configuration)
        return rows[(rows["layer"] != TOTAL) | (rows["parameter"] != "")]

    def total(self, configuration: Configuration) -> pd.Series:
        """The row of the whole model in one configuration."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run directory at ``path``, which must be new or empty.

        Raises:
            RunDirectoryError: ``path`` is in use or cannot be written.
        """
        from fqtstats.run_directory import RunDirectory  # which writes results, and so stands on this module

        arguments = self.metadata.get("arguments")
        with RunDirectory.create(path, arguments if isinstance(arguments, dict) else {}) as run:
            run.finish(self)

    def plot_variance(
        self, ax: Axes | None = None, *, configurations: Sequence[Configuration] | None = None, width: float = 3.3
    ) -> Figure:
        """Draw each layer's variance; see :func:`fqtstats.report.figures.plot_variance`."""
        from fqtstats.report import figures  # the report stage is above this one: it is loaded only when asked for

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


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """The table as a Parquet file. Nothing but the table goes in, so identical tables give identical bytes."""
    known = {column.name: column for column in COLUMNS}
    arrow = {"bool": pa.bool_(), "str": pa.string(), "Int64": pa.int64(), "int64": pa.int64(), "float64": pa.float64()}
    fields: list[pa.Field] = []
    arrays: list[pa.Array] = []
    for name in table.columns:
        column = known.get(name, Column(name, "float64", "", ""))
        values = table[name]
        if column.dtype == "float64":
            numbers = values.to_numpy(dtype=np.float64)
            # There are many bit patterns of NaN; one is written.
            arrays.append(pa.array(np.where(np.isnan(numbers), np.nan, numbers)))
        else:
            items = [None if pd.isna(item) else item for item in values]
            arrays.append(pa.array(items, type=arrow[column.dtype]))
        about = {"unit": column.unit, "meaning": column.meaning}
        fields.append(pa.field(name, arrow[column.dtype], metadata={key: text for key, text in about.items() if text}))
    schema = pa.schema(fields, metadata={"fqtstats.format": str(FORMAT_VERSION)})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer, write_page_checksum=True)
    return buffer.getvalue()


def _read_table(data: bytes, path: Path) -> pd.DataFrame:
    try:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise RunDirectoryError(f"{path} is corrupted or not a Parquet file: {reason(error)}") from error
    stored = (table.schema.metadata or {}).get(b"fqtstats.format")
    if stored is None or not stored.isdigit():
        raise RunDirectoryError(f"{path} is a Parquet file, but not a results table of fqtstats")
    _check_version(int(stored), path)
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _check_version(version: int, path: Path) -> None:
    if version > FORMAT_VERSION:
        raise RunDirectoryError(
            f"{path} has format version {version}, but this fqtstats reads up to {FORMAT_VERSION}; install a newer one"
        )


def read_document(directory: Path) -> dict[str, Json]:
    """``run.json``, checked as far as every reader needs it."""
    path = directory / "run.json"
    if not path.is_file():
        raise RunDirectoryError(f"{directory} is not a run directory: it has no run.json")
    try:
        document = json.loads(read_bytes(path))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is corrupted: {reason(error)}") from error
    if not isinstance(document, dict) or document.get("format") != "fqtstats-run":
        raise RunDirectoryError(f"{path} was not written by fqtstats")
    version = document.get("version")
    if not isinstance(version, int):
        raise RunDirectoryError(f"{path} is corrupted: it has no version")
    _check_version(version, path)
    if not isinstance(document.get("arguments"), dict) or not isinstance(document.get("finished"), bool):
        raise RunDirectoryError(f'{path} is corrupted: it lacks "arguments" or "finished"')
    return document


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
        if place.name != "results.parquet" or not (place.parent / "run.json").is_file():
            return _checked_result(_read_table(read_bytes(place), place), {}, place)
        place = place.parent
    document = read_document(place)
    if not document["finished"]:
        raise RunDirectoryError(f"the run in {place} is not finished; continue it with --resume")
    parquet = place / "results.parquet"
    data = read_bytes(parquet)
    if hashlib.sha256(data).hexdigest() != document.get("results_sha256"):
        raise RunDirectoryError(f"{parquet} is corrupted: its SHA-256 is not the one in run.json")
    metadata = document.get("metadata")
    return _checked_result(_read_table(data, parquet), metadata if isinstance(metadata, dict) else {}, parquet)


def _checked_result(table: pd.DataFrame, metadata: dict[str, Json], path: Path) -> Result:
    try:
        return Result(table, metadata)
    except InputError as error:
        raise RunDirectoryError(f"{path} is not a valid results table: {error}") from error
