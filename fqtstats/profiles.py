"""Variance profiles: which layer's gradient quantizer puts how much variance into which parameter's gradient.

By theorem 2 of arXiv 2010.14298 the variance of the quantized gradient is a sum over the gradient quantizers, because
each draws from a stream of its own. A :class:`Profile` holds the terms of that sum. On disk it is a run directory::

    profile.parquet, sources.parquet, parameters.parquet    the tables; identical tables give identical bytes
    profile.csv, sources.csv, parameters.csv                the same numbers, for other tools
    run.json            arguments, metadata, time stamps and the SHA-256 of each Parquet file
    figures/*.png       drawn from the tables
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from fqtstats import run_directory
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.results import TOTAL, Configuration
from fqtstats.schema import Column, json_dict, normalised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PARAMETERS", "SITES", "SOURCES", "TABLE", "Profile", "load_profile"]

_SQUARE = "(loss/parameter)^2"

SITES = ("grad_weight", "grad_input")
"""Where a layer's gradient quantizers act: on dL/dY in the product that gives the weight gradient (Q1), and in the one
that gives the input gradient (Q2)."""

TABLE: tuple[Column, ...] = (
    Column("source_layer", "str", "", "layer whose gradient quantizer is the source"),
    Column("source_site", "str", "", 'which of its quantizers: "grad_weight" (Q1) or "grad_input" (Q2)'),
    Column("layer", "str", "", "qualified name of the module that owns the parameter"),
    Column("parameter", "str", "", "name of the parameter within its layer"),
    Column("variance", "float64", _SQUARE, "variance that the source puts into the gradient, summed over the elements"),
    Column("standard_error", "float64", _SQUARE, "standard error of variance; NaN where it is not known"),
)
"""Schema of :attr:`Profile.table`: one row per source and parameter that its noise reaches."""

SOURCES: tuple[Column, ...] = (
    Column("layer", "str", "", "layer whose gradient quantizer is the source"),
    Column("site", "str", "", 'which of its quantizers: "grad_weight" (Q1) or "grad_input" (Q2)'),
    Column("quantizer", "str", "", 'the quantizer, as "bhq"; "custom" for one without a name'),
    Column("bits", "Int64", "bit", "its bits; missing where it has no single number"),
    Column("variance", "float64", _SQUARE, "variance that it puts into all gradients together"),
    Column("standard_error", "float64", _SQUARE, "standard error of variance; NaN where it is not known"),
    Column("share", "float64", "1", "its share of the total variance"),
)
"""Schema of :attr:`Profile.sources`: one row per source, in forward order of the layers."""

PARAMETERS: tuple[Column, ...] = (
    Column("layer", "str", "", 'qualified name of the module that owns the parameter; "total" for the whole model'),
    Column("parameter", "str", "", 'name of the parameter within its layer; "" in the total row'),
    Column("numel", "int64", "1", "elements of the parameter"),
    Column("grad_norm_sq", "float64", _SQUARE, "squared norm of the gradient before gradient quantization (QAT)"),
    Column("variance", "float64", _SQUARE, "variance of the quantized gradient: the sum over the sources"),
    Column("standard_error", "float64", _SQUARE, "standard error of variance; NaN where it is not known"),
    Column("sampling_variance", "float64", _SQUARE, "trace of the covariance of one minibatch's gradient"),
)
"""Schema of :attr:`Profile.parameters`: one row per trainable parameter, and the total last."""

_TABLES: run_directory.Tables = {
    "table": ("profile", TABLE),
    "sources": ("sources", SOURCES),
    "parameters": ("parameters", PARAMETERS),
}
"""Name of the file (without the suffix) and schema of each table."""

_KEYS = {
    "table": ["source_layer", "source_site", "layer", "parameter"],
    "sources": ["layer", "site"],
    "parameters": ["layer", "parameter"],
}


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Which quantizer puts how much variance into which parameter's gradient (theorem 2).

    A *source* is a gradient quantizer of a layer, all its calls together; a *target* is a trainable parameter.

    Attributes:
        table: one row per source and target that its noise reaches, with the columns of :data:`TABLE`.
        sources: one row per source, with the columns of :data:`SOURCES`; in forward order of the layers, the
            weight-gradient quantizer (Q1) before the input-gradient one (Q2).
        parameters: one row per target and one total, last, with the columns of :data:`PARAMETERS`.
        metadata: plain JSON, whatever it takes to repeat the profile. Keys with a meaning here: ``method`` ("probes" or
            "one-at-a-time"), ``probes`` (how many), ``precision`` (the relative standard error asked for),
            ``converged`` (whether it was reached), ``policy`` (with its ``name``), ``arguments`` (of the run) and
            ``unquantized`` (list of ``{"layer", "type", "reason"}``).

    Raises:
        InputError: a table does not follow its schema, the tables do not belong together, or the metadata is not JSON.
    """

    table: pd.DataFrame
    sources: pd.DataFrame
    parameters: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "profile"

    def __post_init__(self) -> None:
        for name, (file, columns) in _TABLES.items():
            clean = normalised(getattr(self, name), columns, f"table {file!r} of a profile")
            repeated = clean[clean.duplicated(_KEYS[name])]
            if len(repeated):
                first = ", ".join(f"{key} {repeated.iloc[0][key]!r}" for key in _KEYS[name])
                raise InputError(f"expected one row each in the table {file!r} of a profile, got two for {first}")
            object.__setattr__(self, name, clean)
        object.__setattr__(self, "metadata", json_dict(self.metadata, "metadata"))
        _check_together(self.table, self.sources, self.parameters)

    @property
    def targets(self) -> pd.DataFrame:
        """The rows of the parameters, in network order, without the total."""
        return self.parameters.iloc[:-1]

    @property
    def total(self) -> pd.Series:
        """The row of the whole model."""
        return self.parameters.iloc[-1]

    @property
    def label(self) -> str:
        """What is profiled: the input-gradient quantizer as "bhq@5", or the policy's name where layers differ.

        Where none was used, as in a model whose first layer alone is quantized, it is what the command line asked for.
        """
        inputs = self.sources[self.sources["site"] == "grad_input"]
        kinds = list(inputs[["quantizer", "bits"]].drop_duplicates().itertuples(index=False))
        if len(kinds) == 1:
            name, bits = kinds[0]
            return str(Configuration(str(name), None if pd.isna(bits) else int(bits)))
        asked = self.metadata.get("arguments")
        if not kinds and isinstance(asked, dict) and "quantizer" in asked:
            return str(asked["quantizer"])  # only the first layer is quantized, whose input has no gradient
        policy = self.metadata.get("policy")
        return str(policy.get("name", "custom")) if isinstance(policy, dict) else str(policy or "custom")

    def matrix(self) -> pd.DataFrame:
        """Variance by source ("conv1 grad_input", rows) and target ("conv1.weight", columns), in network order.

        NaN where a source's noise does not reach a target.
        """
        sources = [source_name(*key) for key in _keys(self.sources, "sources")]
        targets = [target_name(*key) for key in _keys(self.targets, "parameters")]
        rows = {name: index for index, name in enumerate(sources)}
        columns = {name: index for index, name in enumerate(targets)}
        values = np.full((len(sources), len(targets)), math.nan)
        for key, variance in zip(_keys(self.table, "table"), self.table["variance"], strict=True):
            values[rows[source_name(*key[:2])], columns[target_name(*key[2:])]] = variance
        return pd.DataFrame(values, index=sources, columns=targets)

    def files(self) -> dict[str, bytes]:
        """What a run directory holds of it beside the figures: see :class:`fqtstats.run_directory.Recordable`."""
        return run_directory.files_of(_TABLES, self)

    def figures(self) -> dict[str, bytes]:
        """The figures, as PNG files by name."""
        from fqtstats.report import profiles  # the report stage is above this one: it is loaded only when asked for

        return profiles.render_all(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run directory at ``path``, which must be new or empty.

        Raises:
            RunDirectoryError: ``path`` is in use or cannot be written.
        """
        run_directory.save(self, path)

    def plot_matrix(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw the variance by source and target; see :func:`fqtstats.report.profiles.plot_matrix`."""
        from fqtstats.report import profiles

        return profiles.plot_matrix(self, ax, width=width)

    def plot_parameters(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw where each parameter's variance comes from; see :func:`fqtstats.report.profiles.plot_parameters`."""
        from fqtstats.report import profiles

        return profiles.plot_parameters(self, ax, width=width)

    def plot_sources(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw each source's variance; see :func:`fqtstats.report.profiles.plot_sources`."""
        from fqtstats.report import profiles

        return profiles.plot_sources(self, ax, width=width)

    def __repr__(self) -> str:
        total = self.total
        return (
            f"Profile({self.label}: {len(self.sources)} sources, {len(self.targets)} parameters, total variance "
            f"{total['variance']:.3g} ± {total['standard_error']:.2g})"
        )

    def _repr_html_(self) -> str:
        """The sources for Jupyter, with three significant digits; every name is escaped."""
        html = self.sources.to_html(
            index=False, escape=True, na_rep="", border=0, float_format="{:.3g}".format, justify="right"
        )
        return f'<div style="overflow-x: auto">{html}</div>'


def _keys(table: pd.DataFrame, name: str) -> list[tuple[str, ...]]:
    return list(table[_KEYS[name]].itertuples(index=False, name=None))


def source_name(layer: str, site: str) -> str:
    """How a source is called in one string."""
    return f"{layer} {site}".strip()


def target_name(layer: str, parameter: str) -> str:
    """A parameter's qualified name."""
    return f"{layer}.{parameter}".strip(".")


def _check_together(table: pd.DataFrame, sources: pd.DataFrame, parameters: pd.DataFrame) -> None:
    """Raise InputError where the tables do not name the same sources and parameters."""
    other = set(sources["site"]) - set(SITES)
    if other:
        raise InputError(f"expected the sites of a profile to be {' or '.join(SITES)}, got {min(other)!r}")
    totals = (parameters["layer"] == TOTAL) & (parameters["parameter"] == "")
    if totals.sum() != 1 or not totals.iloc[-1]:
        raise InputError('expected the last row of a profile\'s parameters to have layer "total" and parameter ""')
    known = set(_keys(sources, "sources"))
    targets = set(_keys(parameters.iloc[:-1], "parameters"))
    for key in _keys(table, "table"):
        if key[:2] not in known:
            raise InputError(f"the table of a profile has the source {source_name(*key[:2])!r}, its sources do not")
        if key[2:] not in targets:
            raise InputError(
                f"the table of a profile has the parameter {target_name(*key[2:])!r}, its parameters do not"
            )


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile from a finished run directory.

    Raises:
        RunDirectoryError: nothing there, not a run, a run of another kind, not finished, of a newer format, or damaged.
    """
    tables, metadata = run_directory.read_tables(path, Profile.kind, _TABLES)
    try:
        return Profile(**tables, metadata=metadata)
    except InputError as error:
        raise RunDirectoryError(f"{os.fspath(path)} holds no valid profile: {error}") from error
