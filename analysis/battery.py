"""Does the battery hold its size, does it find what it should, and do the usual tests not?

Size: null runs per quantizer family at levels .01 and .001. A run rejects where any finding of its looks at 16, 32 and
64 draws falls below the level's share.

Sums: the same of the spread of row and column sums alone, at all of the level, on the ladders, too. The runs' draws are
taken from a pool: runs of one round through it share none, and each round shuffles it anew.

The usual tests: rejection rates of procedures that are often used, on the same null draws at level .01. Their p-values
assume normal errors, and those of stochastic rounding have two values.

Power: planted defects at 128 x 1024 and a false-alarm rate of 1e-6, by the number of draws after which the battery
finds them in at least 99 of 100 seeds. Expectations are not probed here: what probing finds needs no draws.

Intervals are Clopper-Pearson's, 95 % each; where a sentence is about several rates, they hold together with 95 %
(Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats

import fqtstats
from analysis.shares import bars, share, told
from analysis.study import Claim, Parts, Study, Tables, main
from fqtstats.determinism import single_thread
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import FAMILIES, LOOKS, Battery, spread_p
from fqtstats.verdicts.decisions import Decisions, of_grid

_RATES = (
    Column("level", "float64", "1", "nominal rate of false alarms"),
    Column("runs", "int64", "1", "null runs"),
    Column("rejected", "int64", "1", "of them"),
)
SIZE = (
    Column("quantizer", "str", "", "sound quantizer"),
    Column("procedure", "str", "", "the battery, or a usual test"),
    *_RATES,
)
SUMS = (Column("quantizer", "str", "", "sound quantizer"), Column("design", "str", "", "input"), *_RATES)
POWER = (
    Column("defect", "str", "", "of the decisions"),
    Column("seeds", "int64", "1", "runs"),
    Column("missed", "int64", "1", "of them in which it is not found"),
    Column("draws", "Int64", "1", "after which 99 % of the runs have found it; none: they never have"),
    Column("design", "str", "", "inputs on which it is found first"),
    Column("tests", "str", "", "families of tests that find it first"),
)

QUANTIZERS = ("ptq", "psq", "pcq", "bhq")
BITS = 4
NULL_SHAPE, POWER_SHAPE = (16, 64), (128, 1024)
DRAWS = 64
ENDS = ("low", "high")
LEVELS = (0.01, 0.001)
FALSE_ALARM = 1e-6
OURS = "the battery"


DEFECTS: dict[str, Callable[[torch.Tensor, fqtstats.Stream], torch.Tensor]] = {
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
}
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
    """Of the study: null runs per quantizer, draws in the pool of the sums, and runs per defect."""

    quantizers: tuple[str, ...] = QUANTIZERS
    nulls: int = 2000
    pool: int = 8192
    defects: tuple[str, ...] = tuple(DEFECTS)
    seeds: int = 100


def measure(settings: Settings, parts: Parts) -> Tables:
    """Rejections per quantizer, and findings per defect."""

    def size(quantizer: str) -> list[dict[str, object]]:
        with single_thread():
            return null_runs(quantizer, settings.nulls)

    def sums(quantizer: str, design: str) -> list[dict[str, object]]:
        with single_thread():
            return sums_size(quantizer, design, settings.nulls, settings.pool)

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
    decisions = of_grid(q, designs.natural(NULL_SHAPE), 4 * q.format.levels * 2.0**-24)
    smallest, usual = [], []
    for seed in range(runs):
        errors: list[torch.Tensor] = []
        battery = Battery(_kept(decisions, errors), seed)
        found = [f.p_value for look in _looks(DRAWS) for f in _at(battery, look, seed)]
        smallest.append(min(found) * len(list(_looks(DRAWS))) * FAMILIES)
        usual.append(usual_tests(torch.stack(errors).view(DRAWS, -1).numpy(), decisions.p.view(-1).numpy()))
    rows: list[dict[str, object]] = [
        {"procedure": OURS, "level": level, "runs": runs, "rejected": int(np.sum(np.array(smallest) < level))}
        for level in LEVELS
    ]
    for procedure in usual[0]:
        rejected = int(sum(p[procedure] < LEVELS[0] for p in usual))
        rows.append({"procedure": procedure, "level": LEVELS[0], "runs": runs, "rejected": rejected})
    return rows


def _designs(quantizer: str) -> list[str]:
    """Inputs of :func:`sums_size`; BHQ's grid is not one of rows or columns, and has no ladders."""
    return ["natural"] if quantizer == "bhq" else ["natural", *(f"{end} ladder" for end in ENDS)]


def sums_size(quantizer: str, design: str, runs: int, pool: int) -> list[dict[str, object]]:
    """Rejections by the spread of row and column sums alone, at its looks."""
    q = fqtstats.quantizer(quantizer, bits=BITS)
    natural = design == "natural"
    x = designs.natural(NULL_SHAPE) if natural else designs.ladder(NULL_SHAPE, q.format.levels, design == "high ladder")
    d = of_grid(q, x, 4 * q.format.levels * 2.0**-24)
    ups = torch.stack([d.ups(fqtstats.stream(draw=draw))[0] for draw in range(pool)]).float()
    sums = [ups.sum(axis + 1) for axis in (0, 1)]
    found = []
    for run in range(runs):
        turn, place = divmod(run, pool // DRAWS)
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(turn))[place * DRAWS :]
        p = [
            spread_p(s[order[1:look:2]] - s[order[0:look:2]], d, axis)[0]
            for look in _looks(DRAWS)
            for axis, s in enumerate(sums)
        ]
        found.append(min(p) * len(p))
    return [{"level": level, "runs": runs, "rejected": sum(p < level for p in found)} for level in LEVELS]


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
    """Draws until a defect is found, over the three designs in turn."""
    q = fqtstats.quantizer("psq", bits=BITS)
    inputs = {"natural": designs.natural(POWER_SHAPE)}
    for high in (False, True):
        inputs["high ladder" if high else "low ladder"] = designs.ladder(designs.LADDER_SHAPE, q.format.levels, high)
    level = FALSE_ALARM / (len(inputs) * len(LOOKS) * FAMILIES)
    right = {name: of_grid(q, x, 4 * q.format.levels * 2.0**-24) for name, x in inputs.items()}
    found = [_draws_until(right, DEFECTS[defect], level, seed) for seed in range(seeds)]
    last = sorted(n for n, _, _ in found)[int(np.ceil(0.99 * seeds)) - 1]
    return {
        "seeds": seeds,
        "missed": sum(n == np.inf for n, _, _ in found),
        "draws": None if last == np.inf else int(last),
        "design": ", ".join(sorted({design for _, design, _ in found})),
        "tests": ", ".join(sorted({family for _, _, family in found})),
    }


def _draws_until(
    right: dict[str, Decisions],
    decide: Callable[[torch.Tensor, fqtstats.Stream], torch.Tensor],
    level: float,
    seed: int,
) -> tuple[float, str, str]:
    """The fewest draws, the design, and the family of tests; of several, the first in the order of the battery."""
    best: tuple[float, str, str] = (np.inf, "none", "none")
    for design, d in right.items():
        wrong = Decisions(d.x, d.p, d.tolerance, d.coordinates, lambda s, p=d.p: (decide(p, s), 0))  # type: ignore[misc]
        battery = Battery(wrong)
        for look in _looks(designs.DRAWS[design]):
            if look >= best[0]:
                break
            families = [f.family for f in _at(battery, look, seed) if f.p_value < level]
            if families:
                best = (look, design, families[0])
                break
    return best


def _looks(most: int) -> Iterator[int]:
    return iter([n for n in LOOKS if n <= most])


def _at(battery: Battery, look: int, seed: int) -> Iterator:  # type: ignore[type-arg]
    while battery.draws < look:
        battery.draw(fqtstats.stream(seed=seed, draw=battery.draws))
    return battery.look()


def _kept(d: Decisions, errors: list[torch.Tensor]) -> Decisions:
    """The same decisions, whose errors are also kept."""

    def ups(s: fqtstats.Stream) -> tuple[torch.Tensor, int]:
        up, outside = d.ups(s)
        errors.append(up.double() - d.p)
        return up, outside

    return Decisions(d.x, d.p, d.tolerance, d.coordinates, ups)


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per quantizer and procedure, and one per defect."""
    size, power = tables["size"], tables["power"]
    shown = [
        (f"{row.quantizer}: {row.procedure}", row.level, told(row.rejected, row.runs), str(DRAWS))
        for row in size.itertuples()
    ]
    shown += [
        (row.defect, FALSE_ALARM, told(row.seeds - row.missed, row.seeds), "" if pd.isna(row.draws) else str(row.draws))
        for row in power.itertuples()
    ]
    return pd.DataFrame(
        [(what, f"{level:g}", refused, draws) for what, level, refused, draws in shown],
        columns=["null: tests, or defect", "level", "share refused", "n"],
    )


def claims(tables: Tables) -> list[Claim]:
    """Sizes of the battery and of the usual tests; what is found, and what is not."""
    size, answer = tables["size"], []
    ours = size["procedure"] == OURS
    for what, table, by in (("the battery", size[ours], ["quantizer"]),
                            ("the spread of sums", tables["sums"], ["quantizer", "design"])):  # fmt: skip
        for level, own in table.groupby("level", sort=False):
            n = len(own)
            worst = own.loc[(own["rejected"] / own["runs"]).idxmax()]
            within = all(share(row.rejected, row.runs, n)[1] <= level for row in own.itertuples())
            answer.append(
                Claim(
                    f"At level {level:g}, {what} refuses a share of at most "
                    f"{told(worst['rejected'], worst['runs'], n)} of {worst['runs']} null runs "
                    f"({', '.join(worst[by])}); {'no' if within else 'an'} interval of {n} lies above the level (95 % "
                    "together, Bonferroni).",
                    bool(within),
                )
            )
    for procedure, own in size[~ours].groupby("procedure", sort=False):
        n, level = len(own), own["level"].iloc[0]
        worst = own.loc[(own["rejected"] / own["runs"]).idxmax()]
        above = sum(share(row.rejected, row.runs, n)[1] > level for row in own.itertuples())
        answer.append(
            Claim(
                f"{procedure}: refuses a share of up to {told(worst['rejected'], worst['runs'], n)} of "
                f"{worst['runs']} null runs at level {level:g} ({worst['quantizer']}), and does not hold its "
                f"size for {above} of {n} quantizers (95 % together, Bonferroni).",
                bool(above > 0),
            )
        )
    power = tables["power"]
    enough = power["draws"].notna()
    found, seeds = power[enough], power["seeds"].iloc[0]
    text = f"{len(found)} of {len(power)} planted defects are found in at least 99 % of {seeds} runs at a false-alarm "
    text += f"rate of {FALSE_ALARM:g}"
    if len(found):
        least = share(seeds - found["missed"].max(), seeds, len(found))[1]
        text += (
            f", after {found['draws'].min()} to {found['draws'].max()} draws, each in a share of the runs of at least "
        )
        text += f"{least:.2g} (95 % together, Bonferroni)"
    others = "; ".join(
        f"{row.defect}, in a share of {told(row.seeds - row.missed, row.seeds)}" for row in power[~enough].itertuples()
    )
    answer.append(Claim(f"{text}{'. Not so: ' if others else ''}{others}.", not others))
    return answer


def draw(tables: Tables) -> dict[str, Figure]:
    """Rates of false alarms at level .01, ours and the usual ones; shares found of each defect."""
    return {"wrong": _wrong(tables["size"]), "power": _power(tables["power"])}


def _wrong(table: pd.DataFrame) -> Figure:
    table = table[table["level"] == LEVELS[0]]
    procedures, marks = list(dict.fromkeys(table["procedure"])), style.marks(table["quantizer"])
    figure = style.new_figure(style.COLUMN_WIDTH, 2.1)
    ax = figure.subplots()
    for (name, mark), shift in zip(marks.items(), np.linspace(-0.25, 0.25, len(marks)), strict=True):
        own = table[table["quantizer"] == name]
        places = own["procedure"].map(procedures.index) + shift
        bars(ax, list(places), list(own["rejected"]), list(own["runs"]), mark.color, mark.marker, name)
    ax.axvline(LEVELS[0], color=style.INK, linestyle="--", linewidth=0.8)
    ax.set_xscale("symlog", linthresh=1e-3)
    ax.set(xlim=(-2e-4, 1.3), xlabel=f"rate of false alarms at level {LEVELS[0]:g} (95 %)")
    ax.set_yticks(
        range(len(procedures)), [name.replace(", ", ",\n").replace("against", "\nagainst") for name in procedures]
    )
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _power(table: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 0.16 * len(table) + 0.5)
    ax = figure.subplots()
    bars(ax, list(table.index), list(table["seeds"] - table["missed"]), list(table["seeds"]), "#0072B2", "o", "")
    for row in table.itertuples():
        text = "" if pd.isna(row.draws) else f"{row.draws} draws"
        ax.annotate(text, (1, row.Index), xytext=(8, 0), textcoords="offset points", va="center", annotation_clip=False)
    ax.set(xlim=(-0.06, 1.06), xlabel="share of runs that find it (95 %)")
    ax.set_yticks(table.index, table["defect"])
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    return figure


STUDY = Study(
    name="battery",
    question="Does the battery hold its size, does it find what it should, and do the usual tests not?",
    full=Settings(),
    quick=Settings(("ptq",), nulls=40, pool=128, defects=("round to nearest", "2 random bits"), seeds=1),
    columns={"size": SIZE, "sums": SUMS, "power": POWER},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Shares of runs that are refused, with 95 % intervals (Clopper-Pearson). Above: null runs of sound "
    "quantizers after n draws. Below: planted defects, judged by the battery, and the n draws after which 99 % of "
    "the runs have found them.",
)

if __name__ == "__main__":
    main(STUDY)
