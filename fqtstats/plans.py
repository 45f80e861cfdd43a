"""Plans of bits: how many bits each layer's gradient quantizers get.

On disk a :class:`Plan` is a run directory::

    plan.parquet, comparison.parquet    the tables; identical tables give identical bytes
    plan.csv, comparison.csv            the same numbers, for other tools
    policy.py                           Python that makes the planned policy, to be pasted
    run.json                            arguments, metadata, time stamps and the SHA-256 of each Parquet file
    figures/*.png                       drawn from the tables
"""

from __future__ import annotations

import dataclasses
import glob
import json
import keyword
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import pandas as pd

from fqtstats import run_directory
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.policy import PLACES, Policy, QuantizerLike
from fqtstats.profiles import SITES
from fqtstats.quantizers import options_of, quantizer, registered
from fqtstats.quantizers.base import StochasticQuantizer
from fqtstats.schema import Column, Json, json_dict, normalised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COMPARISON", "TABLE", "Plan", "assigned", "bits_are_free", "load_plan", "plain_policy", "uniform"]

_SQUARE = "(loss/parameter)^2"

TABLE: tuple[Column, ...] = (
    Column("layer", "str", "", "layer whose gradient quantizer it is"),
    Column("site", "str", "", 'which of its quantizers: "grad_weight" (Q1) or "grad_input" (Q2)'),
    Column("quantizer", "str", "", 'the quantizer, as "bhq"; "custom" for one without a name'),
    Column("bits", "Int64", "bit", "its bits; missing where it has no single number"),
    Column("fixed", "bool", "", "whether its bits were not the plan's to choose"),
    Column("variance", "float64", _SQUARE, "predicted variance that it puts into all gradients together"),
    Column("standard_error", "float64", _SQUARE, "standard error of variance"),
    Column("share", "float64", "1", "its share of the total variance"),
)
"""Schema of :attr:`Plan.table`: one row per gradient quantizer, in forward order of the layers."""

COMPARISON: tuple[Column, ...] = (
    Column("policy", "str", "", '"plan"; "uniform": the same bits everywhere; "by site": one width for Q1, one for Q2'),
    Column("q1_bits", "Int64", "bit", "bits of the weight-gradient quantizers, where all have the same"),
    Column("q2_bits", "Int64", "bit", "bits of the input-gradient quantizers, where all have the same"),
    Column("mean_bits", "float64", "bit", "mean over all gradient quantizers that have a number of bits"),
    Column("predicted", "float64", _SQUARE, "predicted variance of the quantized gradient"),
    Column("predicted_error", "float64", _SQUARE, "standard error of predicted"),
    Column("measured", "float64", _SQUARE, "variance as fqtstats.measure finds it; NaN where it was not asked"),
    Column("measured_low", "float64", _SQUARE, "lower end of the 95 % interval of measured"),
    Column("measured_high", "float64", _SQUARE, "upper end of the 95 % interval of measured"),
    Column("draws", "int64", "1", "quantized gradients drawn to measure it"),
    Column("sampling_variance", "float64", _SQUARE, "trace of the covariance of one minibatch's gradient"),
)
"""Schema of :attr:`Plan.comparison`: the plan, and simpler policies where there are any to compare with."""

_TABLES: run_directory.Tables = {
    "table": ("plan", TABLE),
    "comparison": ("comparison", COMPARISON),
}
"""Name of the file (without the suffix) and schema of each table."""


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """How many bits each layer's gradient quantizers get, and what variance the gradient then has.

    Attributes:
        table: one row per gradient quantizer, with the columns of :data:`TABLE`.
        comparison: the plan and simpler policies that meet the same target, with the columns of :data:`COMPARISON`.
        metadata: plain JSON, whatever it takes to repeat the plan. Keys with a meaning here: ``policy`` (the one that
            bits were planned for), ``target`` (``{"budget": 1.1}`` or ``{"mean_bits": 5}``), ``rounds`` and
            ``unquantized``.
        given: the policy that bits were planned for; by default the one in ``metadata``.

    Raises:
        InputError: a table does not follow its schema, or the metadata is not JSON.
    """

    table: pd.DataFrame
    comparison: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)
    given: Policy | None = None
    kind: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        for name, (file, columns) in _TABLES.items():
            object.__setattr__(self, name, normalised(getattr(self, name), columns, f"table {file!r} of a plan"))
        object.__setattr__(self, "metadata", json_dict(self.metadata, "metadata"))
        other = set(self.table["site"]) - set(SITES)
        if other:
            raise InputError(f"expected the sites of a plan to be {' or '.join(SITES)}, got {min(other)!r}")
        if self.table.duplicated(["layer", "site"]).any():
            raise InputError("expected one row per layer and site in a plan, got two")
        if not len(self.comparison) or self.comparison["policy"].iloc[0] != "plan":
            raise InputError('expected the first row of a plan\'s comparison to be of the policy "plan"')

    @property
    def total(self) -> pd.Series:
        """The comparison's row of the plan."""
        return self.comparison.iloc[0]

    def other(self, policy: str) -> pd.Series | None:
        """The comparison's row of a simpler policy, "uniform" or "by site", where there is one."""
        rows = self.comparison[self.comparison["policy"] == policy]
        return rows.iloc[0] if len(rows) else None

    @property
    def mean_bits(self) -> float:
        """Mean over all gradient quantizers that have a number of bits."""
        return float(self.total["mean_bits"])

    @property
    def policy(self) -> Policy:
        """The planned policy: an override for each layer.

        Raises:
            InputError: the plan was loaded and the policy has quantizers of the user's own; use :meth:`apply`.
        """
        return self.apply(_policy(self.metadata["policy"]) if self.given is None else self.given)

    def apply(self, policy: Policy) -> Policy:
        """``policy`` with the planned bits."""
        rows = self.table[~self.table["fixed"]]
        keys = rows[["layer", "site"]].itertuples(index=False, name=None)
        return assigned(policy, dict(zip(keys, rows["bits"].astype(int), strict=True)))

    @property
    def code(self) -> str:
        """Python that makes :attr:`policy`, to be pasted."""
        return _code(self.policy)

    def files(self) -> dict[str, bytes]:
        """What a run directory holds of it beside the figures: see :class:`fqtstats.run_directory.Recordable`."""
        return {**run_directory.files_of(_TABLES, self), "policy.py": self.code.encode()}

    def figures(self) -> dict[str, bytes]:
        """The figures, as PNG files by name."""
        from fqtstats.report import plans  # the report stage is above this one: it is loaded only when asked for

        return plans.render_all(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run directory at ``path``, which must be new or empty.

        Raises:
            RunDirectoryError: ``path`` is in use or cannot be written.
        """
        run_directory.save(self, path)

    def plot_bits(self, ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw the bits of each layer; see :func:`fqtstats.report.plans.plot_bits`."""
        from fqtstats.report import plans

        return plans.plot_bits(self, ax, width=width)

    def __repr__(self) -> str:
        total = self.total
        measured = "" if math.isnan(total["measured"]) else f", measured {total['measured']:.3g}"
        return (
            f"Plan({len(self.table)} quantizers, mean {self.mean_bits:.3g} bits, predicted variance "
            f"{total['predicted']:.3g} ± {total['predicted_error']:.2g}{measured})"
        )


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan from a finished run directory.

    Raises:
        RunDirectoryError: nothing there, not a run, a run of another kind, not finished, of a newer format, or damaged.
    """
    tables, metadata = run_directory.read_tables(path, Plan.kind, _TABLES)
    try:
        return Plan(tables["table"], tables["comparison"], metadata)
    except InputError as error:
        raise RunDirectoryError(f"{os.fspath(path)} holds no valid plan: {error}") from error


# --- policies ---------------------------------------------------------------------------------------------------------


def assigned(policy: Policy, bits: Mapping[tuple[str, str], int]) -> Policy:
    """``policy`` with other bits in some quantizers, by layer and site: an override for each of these layers."""
    overrides: dict[str, Policy] = {}
    for (layer, site), width in bits.items():
        pattern = glob.escape(layer)  # a name may hold what means something in a pattern
        own = overrides.get(pattern) or replace(policy.for_layer(layer), overrides={})
        overrides[pattern] = replace(own, **{site: replace(getattr(own, site), bits=width)})
    others = {pattern: own for pattern, own in policy.overrides.items() if pattern not in overrides}
    return replace(policy, overrides={**overrides, **others})


def bits_are_free(q: object) -> TypeGuard[StochasticQuantizer]:
    """Whether it is a stochastic quantizer of the package that has all of 1 to 8 bits."""
    if not isinstance(q, StochasticQuantizer):
        return False
    try:
        return all(replace(q, bits=width) is not None for width in (1, 8))
    except InputError:
        return False


def uniform(policy: Policy, bits: Mapping[str, int]) -> Policy:
    """``policy`` with the same bits in all quantizers of a site whose bits are free, by site."""

    def at(site: str) -> QuantizerLike | None:
        q = getattr(policy, site)
        return replace(q, bits=bits[site]) if bits_are_free(q) else q

    overrides = {pattern: uniform(own, bits) for pattern, own in policy.overrides.items()}
    return replace(policy, grad_weight=at("grad_weight"), grad_input=at("grad_input"), overrides=overrides)


def _options(q: Any, *, all_of_them: bool) -> dict[str, Any]:
    defaults = options_of(type(q))
    found = {f.name: getattr(q, f.name) for f in dataclasses.fields(q)}
    return {name: value for name, value in found.items() if all_of_them or name == "bits" or value != defaults[name]}


def plain_policy(policy: Policy) -> dict[str, Json]:
    """A policy as JSON; quantizers that are not the package's as their representation."""

    def plain(q: object) -> Json:
        if q is None:
            return None
        return {"name": q.name, "options": _options(q, all_of_them=True)} if registered(q) else {"custom": repr(q)}

    return {
        "name": policy.name,
        **{place: plain(getattr(policy, place)) for place in PLACES},
        "overrides": {pattern: plain_policy(own) for pattern, own in policy.overrides.items()},
    }


def _policy(plain: Mapping[str, Any]) -> Policy:
    """The inverse of :func:`plain_policy`."""

    def made(q: Mapping[str, Any] | None) -> QuantizerLike | None:
        if q is None:
            return None
        if "custom" in q:
            raise InputError(
                f"the policy has a quantizer that a run directory does not keep, {q['custom']}; use plan.apply(policy) "
                "with the policy that the plan was made for"
            )
        return quantizer(q["name"], **q["options"])

    overrides = {pattern: _policy(own) for pattern, own in plain["overrides"].items()}
    return Policy(**{place: made(plain[place]) for place in PLACES}, overrides=overrides, name=plain["name"])


def _code(policy: Policy) -> str:
    """Python that makes a policy."""
    yours: dict[str, None] = {}

    def told(q: object) -> str:
        if q is None or registered(q):
            options = () if q is None else _options(q, all_of_them=False).items()
            words = [_literal(getattr(q, "name", None)), *(f"{name}={_literal(value)}" for name, value in options)]
            return "None" if q is None else f"quantizer({', '.join(words)})"
        name = getattr(q, "__name__", type(q).__name__)
        name = name if name.isidentifier() and not keyword.iskeyword(name) else "your_quantizer"
        yours[name] = None
        return name

    base = {place: told(getattr(policy, place)) for place in PLACES}
    overrides = []
    for pattern, own in policy.overrides.items():
        places = {place: told(getattr(own, place)) for place in PLACES}
        changed = [f"{place}={text}" for place, text in places.items() if text != base[place]]
        changed += [f"name={_literal(own.name)}"] if own.name != policy.name else []
        made = f"replace(base, {', '.join(changed)})" if changed else "base"
        overrides.append(f"        {_literal(pattern)}: {made},\n")
    return (
        "from dataclasses import replace\n\nfrom fqtstats import Policy, quantizer\n\n"
        + "".join(f"# {name}: a quantizer of your own, import or define it here\n" for name in yours)
        + "base = Policy(\n"
        + "".join(f"    {place}={text},\n" for place, text in base.items() if text != "None")
        + f"    name={_literal(policy.name)},\n)\n"
        + f"policy = replace(\n    base,\n    overrides={{\n{''.join(overrides)}    }},\n)\n"
    )


def _literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
