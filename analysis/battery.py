"""Does the battery hold its size, does it find what it should, and do the usual tests not?

Size: null runs per quantizer family at levels .05, .01 and .001, judged as the package does
(:meth:`fqtstats.verdicts.battery.Battery.judge`), at 16, 32 and 64 draws. The level is divided among five looks, of
which these are three.

Sums: the same of the spread of row and column sums alone, at all of the level, on the ladders, too.

The usual tests: rejection rates of procedures that are often used, on the same null draws. Their p-values assume normal
errors, and those of stochastic rounding have two values.

All draws of all runs are fresh, and of one quantizer and input only: runs are independent and are counted together.

Power: planted defects at 128 x 1024 and a false-alarm rate of 1e-6, by the number of draws in which the battery finds
them; each is expected to be found in at least 80 % of the runs. Expectations are not probed here: what probing finds
needs no draws.

Intervals are Clopper-Pearson's, 95 % each; where a sentence is about several rates, they hold together with 95 %
(Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats

import fqtstats
from analysis.estimates import mean_interval
from analysis.known import Known
from analysis.nulls import (
    BITS,
    FALSE_ALARM,
    LEVELS,
    POWERFUL,
    QUANTIZERS,
    RATES,
    SHAPE,
    each_size,
    pooled_sizes,
    power_figure,
    streams,
)
from analysis.shares import at_least, at_most, bars, share, told
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.determinism import single_thread
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import LOOKS, TESTS, Battery, spread_p
from fqtstats.verdicts.decisions import Decisions, of_grid

SIZE = (
    Column("quantizer", "str", "", "sound quantizer"),
    Column("procedure", "str", "", "the battery, or a usual test"),
    *RATES,
)
SUMS = (Column("quantizer", "str", "", "sound quantizer"), Column("design", "str", "", "input"), *RATES)
_SPREAD = "mean over the runs of the variance of {} sums in 64 draws of the first design, over that of independent ones"
POWER = (
    Column("defect", "str", "", "of the decisions"),
    Column("runs", "int64", "1", "runs"),
    *(Column(f"found_{n}", "int64", "1", f"of them in which {n} draws of a design find it") for n in LOOKS),
    Column("design", "str", "", "inputs on which it is found first"),
    Column("tests", "str", "", "families of tests that find it first"),
    *(Column(f"{of}_spread{end}", "float64", "1", _SPREAD.format(of) + what)
      for of in ("row", "column")
      for end, what in (("", ""), ("_low", "; lower end of the 95 % interval"), ("_high", "; upper end"))),
    *(Column(f"{of}_needed", "float64", "1", f"the least {of}_spread that is refused, were it that of every sum")
      for of in ("row", "column")),
)  # fmt: skip

POWER_SHAPE = (128, 1024)
DRAWS = 64
ENDS = ("low", "high")
OURS = "the battery"
SHOWN = 0.01
"""Level at which the usual tests are looked at."""
SPREADS = 8
"""Runs of which the spread of sums is told."""


DEFECTS: Known[Callable[[torch.Tensor, fqtstats.Stream], torch.Tensor]] = Known(
    "defect",
    {
        "round to nearest": lambda p, s: p > 0.5,
        **{
            f"{r} random bits": lambda p, s, r=r: s.bits(p.shape, r, dtype=torch.int32) < torch.floor(p * 2**r)  # type: ignore[misc]
            for r in (2, 4, 8, 12)
        },
        "P(up) off by 1/256": lambda p, s: s.uniform(p.shape) < p + 1 / 256,
        "one row off by .1 step": lambda p, s: s.uniform(p.shape) < _plus(p, 3, slice(None)),
        "one element off by .1 step": lambda p, s: s.uniform(p.shape) < _plus(p, 3, 5),
        "one column scaled by 1.01": lambda p, s: s.uniform(p.shape) < _scaled(p),
        "noise shared by rows": lambda p, s: s.uniform((p.shape[0], 1)) < p,
        "noise shared by columns": lambda p, s: s.uniform((1, p.shape[1])) < p,
        "noise shared by blocks": lambda p, s: (
            s.uniform(p.shape)[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1) < p
        ),
        **{
            f"{percent} % of the numbers shared by {kind}": lambda p, s, share=percent / 100, axis=axis: (  # type: ignore[misc]
                _partly_shared(p, s, share, axis) < p
            )
            for percent, kind, axis in ((2, "rows", 1), (2, "columns", 0), (5, "columns", 0))
        },
        "half of the numbers shared by pairs in a row": lambda p, s: _paired(p, s) < p,
        "mirrored numbers in pairs in a row": lambda p, s: _paired(p, s, mirrored=True) < p,
    },
)
"""Wrong decisions, given the right probabilities."""


def _plus(p: torch.Tensor, row: int, column: int | slice) -> torch.Tensor:
    q = p.clone()
    q[row, column] += 0.1
    return q


def _scaled(p: torch.Tensor) -> torch.Tensor:
    q = p.clone()
    q[:, 0] *= 1.01
    q[:, 0] += 0.01 * 7  # of a code in the middle of the grid
    return q


def _partly_shared(p: torch.Tensor, s: fqtstats.Stream, share: float, axis: int) -> torch.Tensor:
    """A number for each element, but now and then the one of its row or column."""
    common = (p.shape[0], 1) if axis else (1, p.shape[1])
    own, every = s.uniform(p.shape), s.child("shared").uniform(common)
    return torch.where(s.child("which").uniform(p.shape) < share, every, own)


def _paired(p: torch.Tensor, s: fqtstats.Stream, mirrored: bool = False) -> torch.Tensor:
    """Half of the elements of a row are paired at random, for good; the second takes the first one's number."""
    order = fqtstats.stream(site="pairs").uniform(p.shape).argsort(1)
    quarter = p.shape[1] // 4
    first, second = order[:, :quarter], order[:, quarter : 2 * quarter]
    u = s.uniform(p.shape)
    taken = u.gather(1, first)
    return u.scatter(1, second, 1 - 2.0**-24 - taken if mirrored else taken)


@dataclass(frozen=True)
class Settings:
    """Of the study: null runs per quantizer (and input), and runs per defect."""

    quantizers: tuple[str, ...] = QUANTIZERS
    nulls: int = 500
    defects: tuple[str, ...] = tuple(DEFECTS)
    seeds: int = 32


def measure(settings: Settings, parts: Parts) -> Tables:
    """Rejections per quantizer, and findings per defect."""

    def size(quantizer: str) -> list[dict[str, object]]:
        with single_thread():
            return null_runs(quantizer, settings.nulls)

    def sums(quantizer: str, design: str) -> list[dict[str, object]]:
        with single_thread():
            return sums_size(quantizer, design, settings.nulls)

    def of_defect(defect: str) -> dict[str, object]:
        with single_thread():
            return power(defect, settings.seeds)

    names = [{"quantizer": name} for name in settings.quantizers]
    ladders = [{**name, "design": design} for name in names for design in _designs(name["quantizer"])]
    return {
        "size": parts.every("null runs", names, size),
        "sums": parts.every("sums", ladders, sums),
        "power": parts.every("defects", [{"defect": defect} for defect in settings.defects], of_defect),
    }


def null_runs(quantizer: str, runs: int) -> list[dict[str, object]]:
    """Rejections by the battery, and by the usual tests on the same draws."""
    q = fqtstats.quantizer(quantizer, bits=BITS)
    decisions = of_grid(q, designs.natural(SHAPE), 4 * q.format.levels * 2.0**-24)
    p_values: dict[str, list[float]] = {}
    for run in range(runs):
        ups = torch.stack([decisions.ups(s)[0] for s, _ in zip(streams(quantizer, run), range(DRAWS), strict=False)])
        battery = Battery(replace(decisions, ups=lambda s, ups=ups: (ups[s.draw], 0)), run)
        # At the smallest level all looks are taken, whose p-value is then good for the others.
        ours = battery.judge(streams(quantizer, run), DRAWS, min(LEVELS)).p_value
        errors = (ups.double() - decisions.p).view(DRAWS, -1).numpy()
        for procedure, p in {OURS: ours, **usual_tests(errors, decisions.p.view(-1).numpy())}.items():
            p_values.setdefault(procedure, []).append(p)
    return [{"procedure": name, **rate} for name, found in p_values.items() for rate in _rates(found)]


def _rates(p_values: list[float]) -> list[dict[str, object]]:
    """What is refused at each level."""
    return [{"level": level, "runs": len(p_values), "rejected": sum(p < level for p in p_values)} for level in LEVELS]


def _designs(quantizer: str) -> list[str]:
    """Inputs of :func:`sums_size`; BHQ's grid is not one of rows or columns, and has no ladders."""
    return ["natural"] if quantizer == "bhq" else ["natural", *(f"{end} ladder" for end in ENDS)]


def sums_size(quantizer: str, design: str, runs: int) -> list[dict[str, object]]:
    """Rejections by the spread of row and column sums alone, at its looks."""
    q = fqtstats.quantizer(quantizer, bits=BITS)
    natural = design == "natural"
    x = designs.natural(SHAPE) if natural else designs.ladder(SHAPE, q.format.levels, design == "high ladder")
    d = of_grid(q, x, 4 * q.format.levels * 2.0**-24)
    taken = [n for n in LOOKS if n <= DRAWS]
    found = []
    for run in range(runs):
        drawn = zip(streams(f"sums {quantizer} {design}", run), range(DRAWS), strict=False)
        ups = torch.stack([d.ups(s)[0] for s, _ in drawn]).float()
        sums = [ups.sum(axis + 1) for axis in (0, 1)]
        p = [spread_p(s[1:look:2] - s[0:look:2], d, axis)[0] for look in taken for axis, s in enumerate(sums)]
        found.append(min(p) * len(p))
    return _rates(found)


def usual_tests(e: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """p-values of what one would try first, on errors ``[n, P]`` with known probabilities ``[P]``."""
    n = len(e)
    v = p * (1 - p)
    moving = v > 1e-12
    mean, deviation = e.mean(0)[moving], e.std(0, ddof=1)[moving]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(deviation > 0, mean / (deviation / np.sqrt(n)), np.where(mean != 0, np.inf, 0.0))
    z = mean / np.sqrt(v[moving] / n)
    energy = float((n * mean**2 / v[moving]).sum())
    return {
        "t per element, Bonferroni": float(min(1.0, 2 * stats.t.sf(np.abs(t), n - 1).min() * moving.sum())),
        "z with the known variance, Bonferroni": float(min(1.0, 2 * stats.norm.sf(np.abs(z)).min() * moving.sum())),
        "energy against chi-square": float(stats.chi2.sf(energy, moving.sum())),
    }


def power(defect: str, seeds: int) -> dict[str, object]:
    """Draws until a defect is found, over the three designs, and how it widens the sums of rows and columns."""
    q = fqtstats.quantizer("psq", bits=BITS)
    inputs = {"natural": designs.natural(POWER_SHAPE)}
    for end in ENDS:
        inputs[f"{end} ladder"] = designs.ladder(designs.LADDER_SHAPE, q.format.levels, end == "high")
    right = {name: of_grid(q, x, 4 * q.format.levels * 2.0**-24) for name, x in inputs.items()}
    wrong = {name: replace(d, ups=lambda s, p=d.p: (DEFECTS[defect](p, s), 0)) for name, d in right.items()}
    found = [_draws_until(wrong, seed) for seed in range(seeds)]
    first = wrong["natural"]
    axes = {"row": 1, "column": 0}
    spreads: dict[str, list[float]] = {of: [] for of in axes}
    for seed in range(SPREADS):
        drawn = zip(streams("spread", seed), range(DRAWS), strict=False)
        ups = torch.stack([first.ups(s)[0] for s, _ in drawn]).float()
        for of, axis in axes.items():
            sums = ups.sum(axis + 1)
            spreads[of].append(spread_p(sums[1::2] - sums[::2], first, axis)[1])
    return {
        "runs": seeds,
        **{f"found_{draws}": sum(n <= draws for n, _, _ in found) for draws in LOOKS},
        "design": ", ".join(sorted({design for n, design, _ in found if n < np.inf})),
        "tests": ", ".join(sorted({family for n, _, family in found if n < np.inf})),
        **{
            f"{of}_spread{end}": value
            for of, values in spreads.items()
            for end, value in zip(("", "_low", "_high"), mean_interval(values), strict=True)
        },
        **{f"{of}_needed": spread_needed(first, axis, FALSE_ALARM / (len(wrong) * TESTS)) for of, axis in axes.items()},
    }


def spread_needed(d: Decisions, axis: int, level: float) -> float:
    """How many times as wide as of independent decisions the sums must be for 64 draws to show it, by bisection."""
    spread = (2 * d.variance.sum(axis)).sqrt().expand(DRAWS // 2, -1)
    low, high = 1.0, 9.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        # Rows and columns share the level.
        refused = 2 * spread_p(middle**0.5 * spread, d, axis)[0] < level
        low, high = (low, middle) if refused else (middle, high)
    return high


def _draws_until(wrong: dict[str, Decisions], seed: int) -> tuple[float, str, str]:
    """The fewest draws, the design, and the family of tests; of several designs, the first."""
    best: tuple[float, str, str] = (np.inf, "", "")
    for design, d in wrong.items():
        most = min(designs.DRAWS[design], best[0] - 1)
        if most < LOOKS[0]:
            break
        battery = Battery(d, seed)
        failure = battery.judge(streams(design, seed), int(most), FALSE_ALARM, len(wrong)).failure
        if failure is not None:
            best = (failure.draws, design, failure.family)
    return best


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per quantizer and procedure, and one per defect."""
    size, power = tables["size"], tables["power"]
    shown = [
        (f"{row.quantizer}: {row.procedure}", row.level, row.runs, told(row.rejected, row.runs), str(DRAWS))
        for row in size.itertuples()
    ]
    shown += [
        (row["defect"], FALSE_ALARM, row["runs"], told(row[f"found_{LOOKS[-1]}"], row["runs"]), str(_draws(row) or ""))
        for _, row in power.iterrows()
    ]
    return pd.DataFrame(
        [(what, f"{level:g}", str(runs), refused, draws) for what, level, runs, refused, draws in shown],
        columns=["null: tests, or defect", "level", "runs", "share refused", "n"],
    )


def _draws(row: pd.Series) -> int | None:
    """After how many a defect has been found in the share of the runs that is expected; None: it never has."""
    return next((n for n in LOOKS if row[f"found_{n}"] >= POWERFUL * row["runs"]), None)


def claims(tables: Tables) -> list[Claim]:
    """Sizes of the battery and of the usual tests; what is found, and what is not."""
    size, power = tables["size"], tables["power"]
    ours = size["procedure"] == OURS
    answer = [
        *pooled_sizes(size[ours], "the battery", "quantizers"),
        *pooled_sizes(tables["sums"], "the spread of sums", "quantizers and inputs"),
        each_size(size[ours], "The battery on quantizers", ["quantizer"]),
    ]
    usual = size[~ours & (size["level"] == SHOWN)]
    for procedure, own in usual.groupby("procedure", sort=False):
        n = len(own)
        worst = own.loc[(own["rejected"] / own["runs"]).idxmax()]
        held = [at_most(row.rejected, row.runs, SHOWN, n) for row in own.itertuples()]
        answer.append(
            Claim(
                f"{procedure}: refuses a share of up to {told(worst['rejected'], worst['runs'], n)} of "
                f"{worst['runs']} null runs at level {SHOWN:g} ({worst['quantizer']}); it does not hold its size for "
                f"{held.count(False)} of {n} quantizers (95 % together, Bonferroni).",
                True if False in held else False if all(held) else None,
                "its rates are below the level" if all(held) else "",
            )
        )
    n, last = len(power), f"found_{LOOKS[-1]}"
    held = [at_least(count, runs, POWERFUL, n) for count, runs in zip(power[last], power["runs"], strict=True)]
    found = power[[each is True for each in held]]
    text = (
        f"{len(found)} of {n} planted defects are found in at least {POWERFUL:.0%} of the runs at a false-alarm rate "
    )
    text += f"of {FALSE_ALARM:g}"
    if len(found):
        least = found.loc[(found[last] / found["runs"]).idxmin()]
        draws = [_draws(row) for _, row in found.iterrows()]
        text += f", {_counted(draws)}, each in a share of the {least['runs']} runs of at least "
        text += f"{share(least[last], least['runs'], n)[1]:.2g}"
    answer.append(Claim(f"{text} (95 % together, Bonferroni).", None if len(found) < n else True))
    for (_, row), each in zip(power.iterrows(), held, strict=True):
        if each is not True:
            spread = {
                of: with_interval(*(row[f"{of}_spread{end}"] for end in ("", "_low", "_high")))
                for of in ("row", "column")
            }
            answer.append(
                Claim(
                    f"{row['defect']}: found in a share of {told(row[last], row['runs'], n)} of {row['runs']} runs "
                    f"(expected: at least {POWERFUL:g}; 95 % for all {n} defects together, Bonferroni). Its sums over "
                    f"rows have {spread['row']} times the variance of independent ones, those over columns "
                    f"{spread['column']} times (95 % each).",
                    each,
                    f"{DRAWS} draws need {row['row_needed']:.3g} times over rows or {row['column_needed']:.3g} times "
                    "over columns for the test's bound to tell",
                )
            )
    return answer


def _counted(draws: list[int | None]) -> str:
    """How many defects need how many draws."""
    return ", ".join(f"{draws.count(n)} within {n} draws" for n in LOOKS if n in draws)


def draw(tables: Tables) -> dict[str, Figure]:
    """Rates of false alarms at level .01, ours and the usual ones; shares found of each defect."""
    return {"wrong": _wrong(tables["size"]), "power": power_figure(tables["power"], LOOKS[::2])}


def _wrong(table: pd.DataFrame) -> Figure:
    table = table[table["level"] == SHOWN]
    procedures, marks = list(dict.fromkeys(table["procedure"])), style.marks(table["quantizer"])
    figure = style.new_figure(style.COLUMN_WIDTH, 2.1)
    ax = figure.subplots()
    for (name, mark), shift in zip(marks.items(), np.linspace(-0.25, 0.25, len(marks)), strict=True):
        own = table[table["quantizer"] == name]
        places = own["procedure"].map(procedures.index) + shift
        bars(ax, list(places), list(own["rejected"]), list(own["runs"]), mark.color, mark.marker, name)
    ax.axvline(SHOWN, color=style.INK, linestyle="--", linewidth=0.8)
    ax.set_xscale("symlog", linthresh=1e-3)
    ax.set(xlim=(-2e-4, 1.3), xlabel=f"rate of false alarms at level {SHOWN:g} (95 % each)")
    ax.set_yticks(
        range(len(procedures)), [name.replace(", ", ",\n").replace("against", "\nagainst") for name in procedures]
    )
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


STUDY = Study(
    name="battery",
    question="Does the battery hold its size, does it find what it should, and do the usual tests not?",
    full=Settings(),
    quick=Settings(("ptq",), nulls=20, defects=("round to nearest", "2 random bits"), seeds=2),
    columns={"size": SIZE, "sums": SUMS, "power": POWER},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Shares of runs that are refused, with 95 % intervals, each (Clopper-Pearson). Above: null runs of sound "
    "quantizers after n draws. Below: planted defects, judged by the battery, and the n draws after which four fifths "
    "of the runs have found them.",
)

if __name__ == "__main__":
    main(STUDY)
