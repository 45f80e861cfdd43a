"""Results: the table of a measurement, its metadata, and how both are kept on disk.

A :class:`Result` is the end of the measuring flow and the only thing that tables, figures and reports read. On disk it
is a run directory::

    results.parquet    the table; identical tables give identical bytes
    run.json           arguments, metadata, time stamps and the table's SHA-256; ``"finished": true`` is written last
    figures/*.png      drawn from the table
    state/             only while the run is going: what ``--resume`` continues from

Every file appears under its name only when it is complete (written beside it, synchronised, renamed), so a process
killed at any moment leaves the previous version intact.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fqtstats.errors import InputError, RunDirectoryError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Column", "Configuration", "Result", "RunDirectory", "load", "merge", "provenance"]

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
    """

    name: str
    dtype: str
    unit: str
    meaning: str


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


def _json_dict(value: Mapping[str, object], where: str) -> dict[str, Json]:
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
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(f"the results table lacks the column(s) {', '.join(missing)}")
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
        object.__setattr__(self, "metadata", _json_dict(self.metadata, "metadata"))

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


# --- files -----------------------------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    """An error's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _synchronise_directory(path: Path) -> None:
    """Make a rename in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot synchronise a directory
            raise
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill ``path``: afterwards the file is the new one, or, on any failure, still the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _synchronise_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunDirectoryError(
                f"cannot write {path}: {_reason(error)}; what was saved before is intact, so make room or repair the "
                "disk and continue with --resume"
            ) from error
        raise


def _parquet_bytes(table: pd.DataFrame) -> bytes:
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
        raise RunDirectoryError(f"{path} is corrupted or not a Parquet file: {_reason(error)}") from error
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {_reason(error)}") from error


def _read_document(directory: Path) -> dict[str, Json]:
    """``run.json``, checked as far as every reader needs it."""
    path = directory / "run.json"
    if not path.is_file():
        raise RunDirectoryError(f"{directory} is not a run directory: it has no run.json")
    try:
        document = json.loads(_read_bytes(path))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is corrupted: {_reason(error)}") from error
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
            return _checked_result(_read_table(_read_bytes(place), place), {}, place)
        place = place.parent
    document = _read_document(place)
    if not document["finished"]:
        raise RunDirectoryError(f"the run in {place} is not finished; continue it with --resume")
    parquet = place / "results.parquet"
    data = _read_bytes(parquet)
    if hashlib.sha256(data).hexdigest() != document.get("results_sha256"):
        raise RunDirectoryError(f"{parquet} is corrupted: its SHA-256 is not the one in run.json")
    metadata = document.get("metadata")
    return _checked_result(_read_table(data, parquet), metadata if isinstance(metadata, dict) else {}, parquet)


def _checked_result(table: pd.DataFrame, metadata: dict[str, Json], path: Path) -> Result:
    try:
        return Result(table, metadata)
    except InputError as error:
        raise RunDirectoryError(f"{path} is not a valid results table: {error}") from error


# --- state -----------------------------------------------------------------------------------------------------------

_STATE_MAGIC = b"fqtstats-state-1\n"
_DIGEST_SIZE = hashlib.sha256().digest_size


class _HashingWriter:
    """Passes bytes on to a file and hashes them, so that a large state is not copied in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._hash.digest()


def _write_state(
    file: BinaryIO, key: str, arrays: Mapping[str, npt.NDArray[np.generic]], info: dict[str, Json]
) -> None:
    """Magic, one line of JSON, the arrays as consecutive .npy blocks, and the SHA-256 of all that."""
    writer = _HashingWriter(file)
    writer.write(_STATE_MAGIC)
    writer.write(json.dumps({"key": key, "info": info, "arrays": list(arrays)}).encode() + b"\n")
    for array in arrays.values():
        np.lib.format.write_array(writer, np.asarray(array), allow_pickle=False)
    file.write(writer.digest())


def _parse_state(data: bytes, key: str) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Json]]:
    """The inverse of :func:`_write_state`; ValueError on anything that is not exactly such a file."""
    body, digest = data[:-_DIGEST_SIZE], data[-_DIGEST_SIZE:]
    if not body.startswith(_STATE_MAGIC):
        raise ValueError("it is not a state file of this version")
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum does not match")
    stream = io.BytesIO(body)
    stream.seek(len(_STATE_MAGIC))
    header = json.loads(stream.readline())
    if header["key"] != key:
        raise ValueError(f"it belongs to {header['key']!r}")
    return {name: np.lib.format.read_array(stream, allow_pickle=False) for name in header["arrays"]}, header["info"]


# --- run directory ---------------------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """A run on disk while it is written; make it with :meth:`create` and use it in a ``with`` statement.

    One process at a time holds it, through an advisory lock that the system drops when the process ends, however it
    ends. Concurrent threads may save states under different keys only.

    Attributes:
        path: the directory.
        arguments: the run's arguments, as plain JSON.
        finished: whether the result is there, from this process or from the one that is resumed.
    """

    def __init__(self, path: Path, arguments: dict[str, Json], finished: bool, created: str, lock: int) -> None:
        self.path = path
        self.arguments = arguments
        self.finished = finished
        self._created = created
        self._lock: int | None = lock
        self._began = time.monotonic()
        self._made: list[Path] = []

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], arguments: Mapping[str, object], resume: bool = False
    ) -> RunDirectory:
        """Open ``path`` for a run: a new or empty directory, or, with ``resume``, one that holds the same run.

        Args:
            path: the directory; it and its parents are made.
            arguments: what defines the run, as JSON; a resumed run must have the same ones.
            resume: continue a run that is there. Without one there, a new run starts.

        Raises:
            RunDirectoryError: the place cannot be written, is a file, holds something else or a run (without
                ``resume``), holds a run with other arguments, or is being written by another process.
            InputError: the arguments are not JSON.
        """
        place = Path(path)
        plain = _json_dict(arguments, "arguments")
        made = [folder for folder in (place, *place.parents) if not os.path.lexists(folder)]
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(
                f"cannot make the run directory {place}: a file is in the way; choose another --out"
            ) from error
        except OSError as error:
            raise RunDirectoryError(
                f"cannot make the run directory {place}: {_reason(error)}; choose another --out"
            ) from error
        cls._stored(place, plain, resume)  # before the lock file is made: nothing is put into a directory in use
        lock = cls._acquire(place)
        try:
            document = cls._stored(place, plain, resume)
            run = cls(place, plain, bool(document["finished"]), str(document.get("created")), lock)
            run._made = made
            if not run.finished:
                run._make(place / "state")
                run._write_document(finished=False)
            else:
                run._remove_state()
        except BaseException:
            os.close(lock)
            raise
        return run

    @staticmethod
    def _stored(place: Path, arguments: dict[str, Json], resume: bool) -> dict[str, Json]:
        """The run that is in ``place``, or a new one, if these arguments may go there."""
        try:
            entries = {entry.name for entry in place.iterdir()}
        except OSError as error:
            raise RunDirectoryError(f"cannot read {place}: {_reason(error)}") from error
        if "run.json" not in entries:
            # What a process killed right at the start may leave behind is not a run.
            if entries - {".lock", "run.json.tmp", "state"}:
                raise RunDirectoryError(f"{place} is not empty and not a run; choose another directory (--out)")
            return {"finished": False, "created": _now()}
        if not resume:
            raise RunDirectoryError(
                f"{place} already holds a run; choose another directory (--out) or continue this one with --resume"
            )
        document = _read_document(place)
        stored = document["arguments"]
        assert isinstance(stored, dict)  # _read_document has checked it
        names = sorted(
            name for name in stored.keys() | arguments.keys() if stored.get(name, ...) != arguments.get(name, ...)
        )
        if names:
            differences = ", ".join(
                f"{name} was {_shown(stored, name)} and is now {_shown(arguments, name)}" for name in names
            )
            raise RunDirectoryError(
                f"{place} holds a run with other arguments ({differences}); give the same ones or choose another --out"
            )
        return document

    @staticmethod
    def _acquire(place: Path) -> int:
        """The file descriptor that holds the lock. The file stays: the lock is on it, not in it."""
        try:
            descriptor = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunDirectoryError(f"cannot write in {place}: {_reason(error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RunDirectoryError(
                f"another process is writing the run in {place}; wait for it or choose another directory (--out)"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise RunDirectoryError(
                f"cannot lock {place}: {_reason(error)}; choose a directory on a local disk (--out)"
            ) from error
        return descriptor

    def close(self) -> None:
        """Give the lock back; the run can be resumed. A second call does nothing."""
        if self._lock is not None:
            if self.finished:
                with suppress(OSError):
                    (self.path / ".lock").unlink()
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def save_state(self, key: str, arrays: Mapping[str, npt.NDArray[np.generic]], info: Mapping[str, object]) -> None:
        """Keep ``arrays`` and ``info`` under ``key``, replacing the previous ones in one step.

        Args:
            key: any name, for instance ``"bhq@5"``.
            arrays: numeric arrays; dtype, shape and bits come back unchanged.
            info: JSON, for instance the number of draws done.

        Raises:
            RunDirectoryError: the disk is full or cannot be written; the previous state is intact.
            InputError: ``info`` is not JSON or an array holds Python objects.
        """
        self._require_open()
        plain = _json_dict(info, "info")
        objects = [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]
        if objects:
            raise InputError(f"a state holds numeric arrays only, but {', '.join(objects)} hold Python objects")
        _write_atomically(self._state_path(key), lambda file: _write_state(file, key, arrays, plain))

    def load_state(self, key: str) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Json]] | None:
        """What was last saved under ``key``; None if nothing was.

        A file that is not exactly what was written is not trusted: a RuntimeWarning says so and the answer is None.

        Raises:
            RunDirectoryError: the file is there but cannot be read.
        """
        path = self._state_path(key)
        if not path.exists():
            return None
        data = _read_bytes(path)
        try:
            return _parse_state(data, key)
        except ValueError as error:
            warnings.warn(f"ignoring the state {path}: {_reason(error)}; its part starts over", RuntimeWarning, 2)
            return None

    def finish(self, result: Result) -> None:
        """Write the table and the figures, then mark the run as finished and drop its state.

        Raises:
            RunDirectoryError: something cannot be written; the run stays unfinished and can be resumed.
        """
        self._require_open()
        from fqtstats.report import figures  # the report stage is above this one: it is loaded only when needed

        data = _parquet_bytes(result.table)
        _write_atomically(self.path / "results.parquet", lambda file: file.write(data))
        self._make(self.path / "figures")
        for name, png in figures.render_all(result).items():
            _write_atomically(self.path / "figures" / f"{name}.png", lambda file, png=png: file.write(png))  # type: ignore[misc]
        self._write_document(
            finished=True,
            finished_at=_now(),
            wall_seconds=round(time.monotonic() - self._began, 3),
            results_sha256=hashlib.sha256(data).hexdigest(),
            metadata=result.metadata,
        )
        self.finished = True
        self._remove_state()

    def discard(self) -> bool:
        """Remove an unfinished run that holds no state, so that its place is free again; call it when the run failed.

        Directories are removed only if :meth:`create` made them and nothing else is in them.

        Returns:
            Whether it was such a run.
        """
        state = self.path / "state"
        if self.finished or any(state.glob("*.state")):
            return False
        with suppress(OSError):  # what cannot be removed does no harm
            shutil.rmtree(state, ignore_errors=True)
            for name in ("run.json", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
        return True

    def load(self) -> Result:
        """The result of the finished run; see :func:`load`."""
        return load(self.path)

    def _require_open(self) -> None:
        if self._lock is None:
            raise RunDirectoryError(f"the run in {self.path} was closed; open it again with resume=True")

    def _state_path(self, key: str) -> Path:
        return self.path / "state" / f"{quote(key, safe='')}.state"

    @staticmethod
    def _make(path: Path) -> None:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"cannot write {path}: {_reason(error)}") from error

    def _remove_state(self) -> None:
        state = self.path / "state"
        if state.exists():
            try:
                shutil.rmtree(state)
            except OSError as error:
                raise RunDirectoryError(f"the run is done, but {state} cannot be removed: {_reason(error)}") from error

    def _write_document(self, *, finished: bool, **more: Json) -> None:
        document: dict[str, Json] = {
            "format": "fqtstats-run",
            "version": FORMAT_VERSION,
            "finished": finished,
            "created": self._created,
            "arguments": self.arguments,
            **more,
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        _write_atomically(self.path / "run.json", lambda file: file.write(text.encode()))


def _shown(arguments: Mapping[str, Json], name: str) -> str:
    return repr(arguments[name]) if name in arguments else "not given"


# --- provenance ------------------------------------------------------------------------------------------------------

_PACKAGES = ("fqtstats", "torch", "numpy", "scipy", "pandas", "pyarrow", "scikit-learn", "matplotlib")


def _cpu_model() -> str:
    """The processor's name as the system gives it; "" where it gives none."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def provenance(isa: str | None = None) -> dict[str, Json]:
    """Where a number was made: versions (None for a package that is not installed), system and processor.

    Args:
        isa: the instruction set that the kernels used, for instance ``"avx2"``; None where none was used.
    """
    versions: dict[str, Json] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "platform": f"{platform.system()}, {' '.join(platform.libc_ver()).strip() or 'libc unknown'}",
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "isa": isa,
    }
