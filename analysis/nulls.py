"""Null runs: how often tests refuse what is unbiased, at several levels, and what of that can be said.

Every run has draws of its own, so that runs are independent, and subjects have streams of their own, so that their runs
can be counted together. Levels are side by side because the procedure is the same at all of them: how large a rate may
be is shown where the number of runs suffices, and left open elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure

import fqtstats
from analysis.shares import at_most, bars, told
from analysis.study import Claim
from fqtstats.report import style
from fqtstats.schema import Column

__all__ = [
    "BITS",
    "FALSE_ALARM",
    "LEVELS",
    "POWERFUL",
    "QUANTIZERS",
    "RATES",
    "SHAPE",
    "each_size",
    "pooled",
    "pooled_sizes",
    "power_figure",
    "streams",
]

QUANTIZERS = ("ptq", "psq", "pcq", "bhq")
BITS = 4
SHAPE = (16, 64)
"""Of the inputs of null runs."""

LEVELS = (0.05, 0.01, 0.001)
FALSE_ALARM = 1e-6
"""Of verdicts on defects."""

POWERFUL = 0.8
"""Share of the runs in which a defect is expected to be found."""

RATES = (
    Column("level", "float64", "1", "nominal rate of false alarms"),
    Column("runs", "int64", "1", "null runs"),
    Column("rejected", "int64", "1", "of them"),
)


def streams(subject: str, run: int) -> Iterator[fqtstats.Stream]:
    """Of one run's draws: no other run, and no other subject's, has any of them."""
    draw = 0
    while True:
        yield fqtstats.stream(seed=run, site=f"null {subject}", draw=draw)
        draw += 1


def pooled(rows: pd.DataFrame) -> tuple[int, int]:
    """Refused and all runs of several subjects."""
    return int(rows["rejected"].sum()), int(rows["runs"].sum())


def pooled_sizes(table: pd.DataFrame, who: str, subjects: str, by: str | None = None) -> list[Claim]:
    """A claim per level on the runs of all subjects together, judged by the upper end of the interval.

    Args:
        table: with the columns :data:`RATES`, a row per subject and level.
        who: refuses them.
        subjects: what a row is of, in the plural.
        by: a column whose values are rates of their own; their intervals hold together (Bonferroni).
    """
    found = []
    for level, own in table.groupby("level", sort=False):
        parts = [("", own)] if by is None else list(own.groupby(by, sort=False))
        counts = [(name, *pooled(rows), len(rows)) for name, rows in parts]
        held = [at_most(rejected, runs, level, len(counts)) for _, rejected, runs, _ in counts]
        rates = "; ".join(
            f"{name} {told(rejected, runs, len(counts))} of {runs} runs of {n} {subjects}".lstrip()
            for name, rejected, runs, n in counts
        )
        together = "95 %" if by is None else "95 % together, Bonferroni"
        holds = False if False in held else None if None in held else True
        said = {True: "below the level", False: "above the level", None: "the level is open"}[holds]
        if by is not None and holds is not True:
            states = {True: "below", False: "above", None: "open"}
            said = ", ".join(f"{name} {states[each]}" for (name, *_), each in zip(counts, held, strict=True))
        found.append(Claim(f"Null runs at level {level:g}, {who}: a share of {rates} ({together}); {said}.", holds))
    return found


def each_size(table: pd.DataFrame, who: str, by: Sequence[str]) -> Claim:
    """A claim on every row alone; all intervals of a level hold together.

    It is judged at the largest level, for which the runs of one subject suffice; an interval above any contradicts.

    Args:
        table: as for :func:`pooled_sizes`.
        who: refuses.
        by: columns that name a row.
    """
    counts = []
    above = False
    for level, own in table.groupby("level", sort=False):
        held = [at_most(row.rejected, row.runs, level, len(own)) for row in own.itertuples()]
        counts.append(f"{held.count(True)} of {len(own)} below {level:g} and {held.count(False)} above it")
        above |= False in held
    largest = table[table["level"] == table["level"].max()]
    n, level = len(largest), largest["level"].iloc[0]
    worst = largest.loc[(largest["rejected"] / largest["runs"]).idxmax()]
    shown = all(at_most(row.rejected, row.runs, level, n) for row in largest.itertuples())
    return Claim(
        f"{who}, each alone: at level {level:g} at most {told(worst['rejected'], worst['runs'], n)} of {worst['runs']} "
        f"runs ({', '.join(worst[list(by)])}). Intervals: {'; '.join(counts)}; the others hold the level "
        "(95 % for all of a level together, Bonferroni).",
        False if above else True if shown else None,
    )


def power_figure(table: pd.DataFrame, looks: Sequence[int]) -> Figure:
    """The share of the runs that find each defect, after three numbers of draws.

    Args:
        table: a row per ``defect``, of its ``runs`` and how many have ``found_<draws>``.
        looks: the numbers of draws.
    """
    figure = style.new_figure(style.COLUMN_WIDTH, 0.2 * len(table) + 0.8)
    ax = figure.subplots()
    marks = zip(looks, (-0.22, 0.0, 0.22), (style.PURPLE, style.SKY, style.BLUE), ("v", "^", "o"), strict=True)
    for draws, shift, color, marker in marks:
        places = [place + shift for place in range(len(table))]
        bars(ax, places, list(table[f"found_{draws}"]), list(table["runs"]), color, marker, f"{draws} draws")
    ax.axvline(POWERFUL, color=style.GREY, linestyle="--", linewidth=0.8)
    ax.set(xlim=(-0.06, 1.06), xlabel=f"share of runs that find it\n(95 % each; dashed: {POWERFUL:g})")
    ax.set_yticks(range(len(table)), table["defect"])
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
