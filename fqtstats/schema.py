"""Tables with a schema: columns with units and meanings, checked, and kept as Parquet files.

Results and profiles are made of them. Nothing but the table goes into a file, so identical tables give identical bytes.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.files import reason

__all__ = [
    "FORMAT_VERSION",
    "Column",
    "Json",
    "check_version",
    "json_dict",
    "normalised",
    "parquet_bytes",
    "read_parquet",
]

FORMAT_VERSION = 1
"""Version of the tables' schemas and of the run directory; readers refuse a newer one."""

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
    """``value`` as plain JSON.

    Raises:
        InputError: it holds something else; ``where`` is how the message calls it.
    """
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


def normalised(table: pd.DataFrame, columns: Sequence[Column], what: str) -> pd.DataFrame:
    """``table`` in the order and dtypes of ``columns``; further columns follow as float64.

    Raises:
        InputError: a column is missing, or holds what its dtype cannot; ``what`` is how the message calls the table.
    """
    names = [column.name for column in columns]
    absent = [column for column in columns if column.name not in table.columns]
    missing = [column.name for column in absent if not column.later]
    if missing:
        raise InputError(f"the {what} lacks the column(s) {', '.join(missing)}")
    table = table.assign(**{column.name: math.nan for column in absent})
    extra = [Column(str(name), "float64", "", "") for name in table.columns if name not in names]
    clean = pd.DataFrame({column.name: _cast(column, table[column.name]) for column in (*columns, *extra)})
    return clean.reset_index(drop=True)


def parquet_bytes(table: pd.DataFrame, columns: Sequence[Column]) -> bytes:
    """A table that :func:`normalised` gave, as a Parquet file; identical tables give identical bytes."""
    known = {column.name: column for column in columns}
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


def read_parquet(data: bytes, path: Path, what: str) -> pd.DataFrame:
    """The inverse of :func:`parquet_bytes`, not yet checked against a schema.

    Raises:
        RunDirectoryError: it is damaged, foreign or newer; the message names ``path`` and what was expected.
    """
    try:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise RunDirectoryError(f"{path} is corrupted or not a Parquet file: {reason(error)}") from error
    stored = (table.schema.metadata or {}).get(b"fqtstats.format")
    if stored is None or not stored.isdigit():
        raise RunDirectoryError(f"{path} is a Parquet file, but not a {what} of fqtstats")
    check_version(int(stored), path)
    frame: pd.DataFrame = table.to_pandas()
    return frame


def check_version(version: int, path: Path) -> None:
    """Raise RunDirectoryError where a file is of a newer format than this."""
    if version > FORMAT_VERSION:
        raise RunDirectoryError(
            f"{path} has format version {version}, but this fqtstats reads up to {FORMAT_VERSION}; install a newer one"
        )
