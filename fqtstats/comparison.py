"""Trainings compared: the runs of each configuration over its seeds, and configurations over the seeds they share.

On disk a :class:`Comparison` is a run directory with ``groups``, ``pairs`` and ``curves`` as Parquet and as CSV, and a
figure.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
from statsmodels.stats.multitest import multipletests

from fqtstats import run_directory
from fqtstats.errors import InputError
from fqtstats.schema import Column
from fqtstats.trainings import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CURVES", "GROUPS", "METRICS", "PAIRS", "Comparison", "compare", "load_comparison"]

METRICS = ("loss", "test_loss", "accuracy", "test_accuracy")
"""Columns of a training's epochs that runs are compared by."""

CONFIDENCE = 0.95

GROUPS: tuple[Column, ...] = (
    Column("group", "str", "", "what the runs of the group share and others do not"),
    Column("metric", "str", "", "which column of the last epoch"),
    Column("runs", "int64", "1", "runs that came to their end"),
    Column("diverged", "int64", "1", "runs that did not, and are left out"),
    Column("mean", "float64", "", "mean over the runs"),
    Column("low", "float64", "", "lower end of the 95 % interval of the mean (Student t); NaN for a single run"),
    Column("high", "float64", "", "upper end of it"),
    Column("deviation", "float64", "", "standard deviation over the runs"),
)
"""Schema of :attr:`Comparison.groups`: one row per group and metric."""

PAIRS: tuple[Column, ...] = (
    Column("first", "str", "", "a group"),
    Column("second", "str", "", "another one"),
    Column("metric", "str", "", "which column of the last epoch"),
    Column("seeds", "int64", "1", "seeds that both have"),
    Column("difference", "float64", "", "mean over these seeds of second - first"),
    Column("low", "float64", "", "lower end of the 95 % interval of the difference (paired Student t)"),
    Column("high", "float64", "", "upper end of it"),
    Column("p", "float64", "1", "p-value of no difference (paired t test); NaN with less than two seeds"),
    Column("p_holm", "float64", "1", "the same, corrected for all pairs of the metric (Holm)"),
)
"""Schema of :attr:`Comparison.pairs`: one row per pair of groups and metric."""

CURVES: tuple[Column, ...] = (
    Column("group", "str", "", "a group"),
    Column("seed", "int64", "1", "seed of the run"),
    Column("epoch", "int64", "1", "passes over the training data"),
    *(Column(metric, "float64", "", "as in the training's epochs") for metric in METRICS),
)
"""Schema of :attr:`Comparison.curves`: one row per run and epoch."""

_TABLES: run_directory.Tables = {
    "groups": ("groups", GROUPS),
    "pairs": ("pairs", PAIRS),
    "curves": ("curves", CURVES),
}

_WITHOUT_EFFECT = ("seed", "variance_every", "variance_draws", "command", "data_root", "device")
"""Arguments of a training that change nothing in it, or what the groups are formed over."""

_TOLD = ("recipe", "bits", "lr", "data", "image_size", "epochs", "batch_size", "skip", "augment", "backend")
"""Arguments that show in the recipe, the settings or the data as what came of them: a default may be typed or not."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Trainings, grouped by everything but the seed.

    Attributes:
        groups: one row per group and metric, with the columns of :data:`GROUPS`.
        pairs: one row per pair of groups and metric, with the columns of :data:`PAIRS`.
        curves: one row per run and epoch, with the columns of :data:`CURVES`.
        metadata: plain JSON: ``groups``, the configuration of each by name, and ``runs``, where they are.

    Raises:
        InputError: a table does not follow its schema, or the metadata is not JSON.
    """

    groups: pd.DataFrame
    pairs: pd.DataFrame
    curves: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "comparison"

    def __post_init__(self) -> None:
        run_directory.settle(self, _TABLES)

    def files(self) -> dict[str, bytes]:
        """What a run directory holds of it beside the figures: see :class:`fqtstats.run_directory.Recordable`."""
        return run_directory.files_of(_TABLES, self)

    def figures(self) -> dict[str, bytes]:
        """The figures, as PNG files by name."""
        from fqtstats.report import comparisons  # the report stage is above this one: it is loaded when asked for

        return comparisons.render_all(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run directory at ``path``, which must be new or empty.

        Raises:
            RunDirectoryError: ``path`` is in use or cannot be written.
        """
        run_directory.save(self, path)

    def plot(self, metric: str = "loss", ax: Axes | None = None, *, width: float | None = None) -> Figure:
        """Draw a metric by epoch; see :func:`fqtstats.report.comparisons.plot_curves`."""
        from fqtstats.report import comparisons

        return comparisons.plot_curves(self, metric, ax, width=width)

    def __repr__(self) -> str:
        rows = self.groups[self.groups["metric"] == METRICS[0]]
        told = "; ".join(f"{row.group}: loss {row.mean:.3g} over {row.runs} runs" for row in rows.itertuples())
        return f"Comparison({told})"


def compare(trainings: Sequence[Training], places: Sequence[str] | None = None) -> Comparison:
    """Group trainings by everything but the seed, and test the groups against each other over the seeds they share.

    The p-values are those of two-sided t tests on the differences of runs with equal seeds, whose first weights and
    batches are the same; those that are corrected by Holm's method keep the probability of any false one among the
    pairs of a metric at the level.

    Args:
        trainings: the runs.
        places: what to call them in messages and metadata.

    Raises:
        InputError: there is none, or two are of one configuration and seed.
    """
    if not trainings:
        raise InputError("expected at least one training to compare, got none")
    names = [f"run {index}" for index in range(len(trainings))] if places is None else list(places)
    keys = [_configuration(training) for training in trainings]
    labels = _labels(trainings, keys)
    runs: dict[str, dict[int, Training]] = {}
    where: dict[tuple[str, int], str] = {}
    for training, name, label in zip(trainings, names, labels, strict=True):
        before = where.setdefault((label, training.seed), name)
        if before != name:
            raise InputError(
                f"{before} and {name} are both runs of {label} with seed {training.seed}; compare runs of other seeds"
            )
        runs.setdefault(label, {})[training.seed] = training
    groups, pairs = [], []
    for metric in METRICS:
        values = {label: _finals(own, metric) for label, own in runs.items()}
        groups += [
            {
                "group": label,
                "metric": metric,
                "diverged": sum(one.diverged for one in runs[label].values()),
                **_mean(own),
            }
            for label, own in values.items()
        ]
        pairs += _pairs(values, metric)
    curves = [
        training.curve()[["epoch", *METRICS]].assign(group=label, seed=seed)
        for label, own in runs.items()
        for seed, training in own.items()
    ]
    metadata = {
        "groups": {label: json.loads(key) for label, key in zip(labels, keys, strict=True)},
        "runs": {label: {str(seed): where[label, seed] for seed in own} for label, own in runs.items()},
    }
    return Comparison(
        pd.DataFrame(groups),
        pd.DataFrame(pairs, columns=[column.name for column in PAIRS]),
        pd.concat(curves, ignore_index=True),
        metadata,
    )


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Read a comparison from a finished run directory.

    Raises:
        RunDirectoryError: nothing there, not a run, a run of another kind, not finished, of a newer format, or damaged.
    """
    return run_directory.load(Comparison, path, Comparison.kind, _TABLES)


def _configuration(training: Training) -> str:
    """Everything that the training was done with but the seed, as one string."""
    own = {
        "recipe": training.metadata.get("recipe", {}),
        "settings": training.metadata.get("settings", {}),
        "data": training.metadata.get("data", {}),
        "arguments": {name: value for name, value in _arguments(training).items() if name not in _TOLD},
    }
    return json.dumps(own, sort_keys=True)


def _arguments(training: Training) -> dict[str, Any]:
    """What was asked for."""
    arguments = training.metadata.get("arguments", {})
    return {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}


def _labels(trainings: Sequence[Training], keys: Sequence[str]) -> list[str]:
    """A name for each configuration: the recipe's, and what tells it from others of the same recipe."""
    alike: dict[str, dict[str, list[Training]]] = {}
    for training, key in zip(trainings, keys, strict=True):
        alike.setdefault(training.label, {}).setdefault(key, []).append(training)
    named: dict[str, str] = {}
    for label, runs in alike.items():
        # What was asked for says it in fewer words than what came of it, where all runs of a configuration agree on it.
        asked = {key: _common([_flat(_arguments(training)) for training in own]) for key, own in runs.items()}
        brief = {key: _flat(json.loads(key)["settings"]) | asked[key] for key in runs}
        told = _told(label, brief)
        if len(set(told.values())) < len(told):
            told = _told(label, {key: _flat(json.loads(key)) | brief[key] for key in runs})
        named |= told
    if len(set(named.values())) < len(named):
        named = {key: f"{name} ({index})" for index, (key, name) in enumerate(named.items(), start=1)}
    return [named[key] for key in keys]


def _told(label: str, options: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """By configuration, its label with those options of all that differ; the last part of a name is the option's."""
    names = sorted(set.intersection(*(set(own) for own in options.values())))
    differing = [name for name in names if len({own[name] for own in options.values()}) > 1]
    return {
        key: " ".join([label, *(f"{option}={value}" for option, value in told.items())])
        for key, own in options.items()
        for told in [{name.rpartition(".")[2]: own[name] for name in differing}]
    }


def _common(options: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The options that all have with the same value."""
    first, *others = options
    return {name: value for name, value in first.items() if all(own.get(name) == value for own in others)}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {key: text for own, item in value.items() for key, text in _flat(item, f"{name}.{own}").items()}
    return {name: str(value)}


def _finals(runs: Mapping[int, Training], metric: str) -> dict[int, float]:
    """The last epoch's value by seed, of the runs that came to their end."""
    return {seed: float(run.final[metric]) for seed, run in runs.items() if not run.diverged}


def _mean(values: Mapping[int, float]) -> dict[str, float]:
    numbers = np.array(list(values.values()), dtype=np.float64)
    mean = float(numbers.mean()) if len(numbers) else math.nan
    half = _half_width(numbers)
    deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
    return {"runs": len(numbers), "mean": mean, "low": mean - half, "high": mean + half, "deviation": deviation}


def _half_width(numbers: npt.NDArray[np.float64]) -> float:
    """Of the interval of the mean; NaN for less than two numbers."""
    n = len(numbers)
    if n < 2:
        return math.nan
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n))


def _pairs(values: Mapping[str, Mapping[int, float]], metric: str) -> list[dict[str, object]]:
    rows: list[dict[str, Any]] = []
    for first, second in combinations(values, 2):
        seeds = [seed for seed in values[first] if seed in values[second]]
        differences = np.array([values[second][seed] - values[first][seed] for seed in seeds], dtype=np.float64)
        mean = float(differences.mean()) if seeds else math.nan
        half = _half_width(differences)
        rows.append(
            {
                "first": first,
                "second": second,
                "metric": metric,
                "seeds": len(seeds),
                "difference": mean,
                "low": mean - half,
                "high": mean + half,
                "p": _p_value(differences),
            }
        )
    known = [row for row in rows if math.isfinite(row["p"])]
    corrected = multipletests([row["p"] for row in known], method="holm")[1] if known else []
    for row, p in zip(known, corrected, strict=True):
        row["p_holm"] = float(p)
    return [{"p_holm": math.nan, **row} for row in rows]


def _p_value(differences: npt.NDArray[np.float64]) -> float:
    """Of mean zero; equal differences have no spread to compare them with."""
    if len(differences) < 2 or not np.isfinite(differences).all():
        return math.nan
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)
