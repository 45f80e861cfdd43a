"""How fast are the native kernels and what is made of them, against named baselines?

The cases of ``fqtstats bench``, each with both of glibc's ways of handing out memory. Ours and the baseline are timed
in interleaved pairs; the ratio is the median over the pairs of the baseline's time over ours, with quartiles: they tell
how much the machine wavered in this run, and are no confidence intervals. Beside it stands the share of the rate that
the bounding instruction (or ``copy_`` over 64 MB) reached in the same run.

Ratios mean something on a machine that does nothing else. The full form takes some thirteen minutes there, on two
cores: whole networks take seconds for each pair, so they are timed fewer times than kernels, and training steps with
tuned memory on two threads alone, where PyTorch gained most by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.study import Claim, Parts, Row, Study, Tables, main
from fqtstats import benchmarks
from fqtstats.benchmarks import machine, pairs
from fqtstats.errors import InputError
from fqtstats.report import style
from fqtstats.schema import Column

BASELINES = {
    "rand(out=r); mul(x, s, out=y).add_(b).add_(r).floor_().clamp_(0, 255); codes.copy_(y)": "torch expression",
    "log2, floor, exp2 give the octave n; z / 2^n + n + rand, floor, sign: into buffers": "torch expression",
    "the same in torch, with torch._int_mm": "the same in torch",
    "naive replicate (forward and backward)": "naive replicate",
    "PyTorch float32 (default: NCHW)": "PyTorch float32, NCHW",
}
"""Shorter names, for the figure and what is said."""

_CASE = (
    Column("benchmark", "str", "", "of fqtstats bench"),
    Column("name", "str", "", "what is timed"),
    Column("shape", "str", "", "problem size"),
    Column("threads", "int64", "1", "of the baseline, and of ours unless the name says otherwise"),
    Column("allocator", "str", "", "default, or tuned: freed memory is kept"),
    Column("baseline", "str", "", "what it is compared with"),
)
COLUMNS = (
    *_CASE,
    Column("ratio", "float64", "1", "baseline's time / ours, median over interleaved pairs"),
    Column("ratio_low", "float64", "1", "lower quartile"),
    Column("ratio_high", "float64", "1", "upper quartile"),
    Column("must", "float64", "1", "ratio to reach; NaN where the row only informs"),
    Column("aim", "float64", "1", "ratio hoped for, or NaN"),
    Column("seconds", "float64", "s", "our median time"),
    Column("baseline_seconds", "float64", "s", "the baseline's"),
    Column("rate", "float64", "1/s", "our operations or bytes per second, or NaN"),
    Column("peak", "str", "", "the machine's rate that is the bound, or empty"),
    Column("of_peak", "float64", "1", "rate over that rate times threads, both measured in this run, or NaN"),
)
SHARES = (
    *_CASE,
    Column("kind", "str", "", "of work"),
    Column("share", "float64", "1", "of our time, by torch.profiler"),
)
_NAMES = [column.name for column in _CASE]


NETWORKS = ("step", "measure")
"""Benchmarks of whole networks."""


@dataclass(frozen=True)
class Settings:
    """Of the study; ``shapes`` are the problem sizes that are timed, or ``all``; rounds are pairs of timings."""

    benchmarks: tuple[str, ...] = tuple(benchmarks.BENCHMARKS)
    allocators: tuple[str, ...] = machine.ALLOCATORS
    shapes: tuple[str, ...] = ("all",)
    rounds: int = 7
    network_rounds: int = 5


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per case and allocator, and one per kind of work in those that tell them apart."""
    listed = {
        (name, index): case
        for name in settings.benchmarks
        for index, case in enumerate(benchmarks.cases(name))
        if "all" in settings.shapes or case.shape in settings.shapes
    }

    def one(benchmark: str, index: int, allocator: str) -> Row:
        if allocator == "tuned":
            machine.tune_allocator()
        rounds = settings.network_rounds if benchmark in NETWORKS else settings.rounds
        row = pairs.run(listed[benchmark, index], rounds, lambda: None, allocator).as_dict()
        return {"shares": {}, **row}

    if not listed:
        raise InputError(
            f"no benchmark of {', '.join(settings.benchmarks)} has a shape of {', '.join(settings.shapes)}"
        )
    if other := sorted(set(settings.allocators) - set(machine.ALLOCATORS)):
        raise InputError(f"unknown allocator {other[0]!r}; known: {', '.join(machine.ALLOCATORS)}")
    # There is no way back from the tuned allocator: it comes last.
    order = sorted(settings.allocators, key=machine.ALLOCATORS.index)
    cases = [
        {"benchmark": name, "index": index, "allocator": each}
        for each in order
        for (name, index), case in listed.items()
        if timed(name, case.threads, each)
    ]
    return as_tables(parts.every("benchmarks", cases, one).to_dict("records"))


def timed(benchmark: str, threads: int, allocator: str) -> bool:
    """Whether a case is timed with this way of handing out memory."""
    return benchmark != "step" or allocator == "default" or threads == max(machine.thread_counts())


def as_tables(rows: Iterable[dict[str, Any]]) -> Tables:
    """The two tables, of rows as ``fqtstats bench --json`` writes them."""
    known = [{"benchmark": "", **row} for row in rows]
    found = pd.DataFrame(known).astype(dict.fromkeys(("must", "aim", "rate", "of_peak"), "float64"))
    shares = [
        {**{name: row[name] for name in _NAMES}, "kind": kind, "share": share}
        for row in known
        if isinstance(row.get("shares"), dict)
        for kind, share in row["shares"].items()
    ]
    speed = found.assign(peak=found["peak"].map(lambda kind: kind if isinstance(kind, str) else ""))
    return {
        "speed": speed[[column.name for column in COLUMNS]],
        "shares": pd.DataFrame(shares, columns=[column.name for column in SHARES]),
    }


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per case and allocator; a ratio in bold falls short of its must."""
    return pd.DataFrame(
        {
            "what": row.name,
            "shape": row.shape,
            "threads": str(row.threads),
            "memory": row.allocator,
            "against": f"`{row.baseline}`" if ";" in row.baseline else row.baseline,
            "ratio": f"{_bold(row)} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]",
            "must": "" if pd.isna(row.must) else f"{row.must:.3g}x",
            "aim": "" if pd.isna(row.aim) else f"{row.aim:g}x",
            "time": f"{row.seconds * 1e3:.3g} ms",
            "of peak": "" if pd.isna(row.of_peak) else f"{row.of_peak:.0%} of {row.peak}",
        }
        for row in tables["speed"].itertuples(index=False)
    )


def _bold(row: Any) -> str:
    return f"**{row.ratio:.2f}x**" if row.ratio < row.must else f"{row.ratio:.2f}x"


def claims(tables: Tables) -> list[Claim]:
    """Of what has a target: whether it is reached for all shapes and allocators; then where our time goes."""
    rows = tables["speed"]
    aimed, told = rows[rows["must"].notna()], []
    for (name, baseline), own in aimed.groupby(["name", "baseline"], sort=False):
        short = own[own["ratio"] < own["must"]]
        reached = False if (own["ratio_high"] < own["must"]).any() else None
        reached = True if (own["ratio_low"] >= own["must"]).all() else reached
        musts = sorted({f"{must:.3g}x" for must in own["must"]})
        told.append(
            Claim(
                f"{name}, against {BASELINES.get(baseline, baseline)}: {_least_most(own)} times as fast "
                f"(quartiles over pairs), for {len(own)} combinations of shape, threads and memory; must: "
                + " or ".join(musts)
                + (f". {len(short)} fall short." if len(short) else "."),
                reached,
                _bound(short) if reached is False else "",
            )
        )
    if aimed.empty:
        told.append(Claim(f"No row has a target; ratios are {_least_most(rows)} (quartiles over pairs)."))
    told += _steps(rows[rows["benchmark"] == "step"])
    shares = tables["shares"]
    for name, own in shares.groupby("name", sort=False):
        mean = own.groupby("kind", sort=False)["share"].agg(["mean", "min", "max"])
        parts = "; ".join(
            f"{kind} {row['mean']:.0%} [{row['min']:.0%}, {row['max']:.0%}]" for kind, row in mean.iterrows()
        )
        told.append(
            Claim(f"{name}: share of our time by kind of work, mean and range over threads and memory: {parts}.")
        )
    return told


def _steps(rows: pd.DataFrame) -> list[Claim]:
    """Of every training step: against all forms of float32, and against bfloat16, the hardest of them first."""
    told = []
    for name, own in rows.groupby("name", sort=False):
        float32 = own["baseline"].str.contains("float32")
        against = [
            f"{'float32' if plain else 'bfloat16 autocast'} {_least_most(each, baseline=True)}"
            for plain, each in own.groupby(float32.to_numpy(), sort=False)
        ]
        told.append(
            Claim(
                f"{name}, times as fast as PyTorch over all its memory layouts, threads and ways of handing out memory "
                f"that were timed: {'; '.join(against)} (quartiles over pairs)."
            )
        )
    return told


def _least_most(rows: pd.DataFrame, baseline: bool = False) -> str:
    """The smallest and the largest ratio, each with its quartiles, and where it was found."""
    ends = {int(rows["ratio"].argmin()): None, int(rows["ratio"].argmax()): None}

    def one(row: pd.Series) -> str:
        named = baseline and "float32" in row["baseline"]
        layout = [str(row["baseline"]).rsplit(" ", 1)[-1].strip("()")] if named else []
        place = [*layout, f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}", f"{row['allocator']} memory"]
        return f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] ({', '.join(place)})"

    return " to ".join(one(rows.iloc[index]) for index in ends)


def _bound(short: pd.DataFrame) -> str:
    """What rows that fall short would be at the peak of the instruction that bounds them, all else for nothing."""
    bounded = short[short["of_peak"].notna() & (short["peak"] != "copy")]
    if bounded.empty:
        return "no instruction bounds them"
    at_peak = bounded["ratio"] / bounded["of_peak"]
    beyond = int((at_peak < bounded["must"]).sum())
    return (
        f"at the measured peak of the bounding instruction they would be {at_peak.min():.2f} to {at_peak.max():.2f}, "
        f"for {beyond} of {len(bounded)} the target is beyond this processor"
    )


def draw(tables: Tables) -> dict[str, Figure]:
    """Ratios of what has a target beside must and aim, and what they would be at the machine's peak.

    Shapes of one kind stand below each other in one line.
    """
    rows = tables["speed"]
    shown = rows[rows["must"].notna() & (rows["allocator"] == "default")]
    shown = rows if shown.empty else shown
    kinds = list(dict.fromkeys(shown[["name", "baseline"]].itertuples(index=False, name=None)))
    figure = style.new_figure(2 * style.COLUMN_WIDTH, 0.8 + 0.2 * len(kinds))
    axes = figure.subplots()
    places = np.empty(len(shown))
    for index, (name, baseline) in enumerate(kinds):
        own = np.flatnonzero((shown["name"] == name) & (shown["baseline"] == baseline))
        places[own] = index + 0.16 * (np.arange(len(own)) - (len(own) - 1) / 2)
    axes.hlines(places, shown["ratio_low"], shown["ratio_high"], color=style.BLUE, lw=1.2, zorder=2)
    axes.plot(shown["ratio"], places, "o", ms=2, color=style.BLUE, label="measured, quartiles", zorder=3)
    axes.plot(shown["must"], places, "|", color=style.VERMILION, ms=3, mew=1.4, label="must")
    axes.plot(shown["aim"], places, "|", color=style.GREEN, ms=3, mew=1.0, label="aim")
    # Where an instruction is the bound; memory bandwidth is none in the cache.
    peaks = (shown["ratio"] / shown["of_peak"]).where(~shown["peak"].isin(["", "copy"]))
    ceiling = "at the peak rate of the bounding instruction"
    axes.plot(peaks, places, "o", ms=2, color=style.GREY, mfc="none", mew=0.6, label=ceiling)
    axes.axvline(1, color=style.GREY, lw=0.5)
    axes.set_xscale("log")
    ticks = [
        tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(kinds)), [f"{name} / {BASELINES.get(base, base)}" for name, base in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("times as fast as the baseline; a point per problem size")
    figure.legend(loc="outside upper right", ncols=4)
    return {"speed": figure}


STUDY = Study(
    name="speed",
    question="How fast are the native kernels, and what is made of them, against named baselines?",
    full=Settings(),
    quick=Settings(("quantize",), ("default",), ("128x1024",), rounds=2),
    columns={"speed": COLUMNS, "shares": SHARES},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Ratio: the baseline's time over ours, median over interleaved pairs [quartiles]; **bold**: falls short of "
    "its must. Of peak: share of the rate that the bounding instruction (or `copy_` over 64 MB) reached in the same "
    "run. Memory: glibc's default, or tuned so that freed memory is kept.",
)

if __name__ == "__main__":
    main(STUDY)
