"""Does the battery hold its size, does it find what it should, and do the usual tests not?

``python -m analysis.battery`` (some twenty minutes) writes to ``analysis/results/battery/``:

* ``size.csv``: null runs per quantizer family at levels .01 and .001. A run rejects where any finding of its looks at
  16, 32 and 64 draws falls below the level's share.
* ``sums.csv``: the same of the spread of row and column sums alone, at all of the level, on the ladders, too.
* ``power.csv``: planted defects at 128 x 1024 and a false-alarm rate of 1e-6, by the number of draws after which the
  battery finds them in at least 99 of 100 seeds. Expectations are not probed here: what probing finds needs no draws.
* ``wrong.csv`` and ``wrong.png``: rejection rates of procedures that are often used, on the same null draws at level
  .01. Their p-values assume normal errors, and those of stochastic rounding have two values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

import fqtstats
from fqtstats.commands.console import progress
from fqtstats.report import style
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import FAMILIES, LOOKS, Battery, spread_p
from fqtstats.verdicts.decisions import Decisions, of_grid

FOLDER = Path(__file__).parent / "results" / "battery"
QUANTIZERS = ("ptq", "psq", "pcq", "bhq")
BITS = 4
NULL_SHAPE, POWER_SHAPE = (16, 64), (128, 1024)
DRAWS = 64
ENDS = ("low", "high")
POOL = 8192
LEVELS = (0.01, 0.001)
FALSE_ALARM = 1e-6
PARTS = ["sums", "size", "power"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"which of {', '.join(PARTS)}; all of them")
    parser.add_argument("--nulls", type=int, default=2000, help="null runs per quantizer")
    parser.add_argument("--seeds", type=int, default=100, help="runs per defect")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if "sums" in given.parts:
        sums_size(given.nulls).to_csv(given.out / "sums.csv", index=False)
    if "size" in given.parts:
        size, wrong = null_runs(given.nulls)
        size.to_csv(given.out / "size.csv", index=False)
        wrong.to_csv(given.out / "wrong.csv", index=False)
        (given.out / "wrong.png").write_bytes(draw(size, wrong))
    if "power" in given.parts:
        power(given.seeds).to_csv(given.out / "power.csv", index=False)


def null_runs(runs: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rejection rates of the battery, and of the usual tests on the same draws."""
    size, wrong = [], []
    for name in QUANTIZERS:
        q = fqtstats.quantizer(name, bits=BITS)
        decisions = of_grid(q, designs.natural(NULL_SHAPE), 4 * q.format.levels * 2.0**-24)
        smallest, usual = [], []
        for seed in range(runs):
            errors: list[torch.Tensor] = []
            battery = Battery(_kept(decisions, errors), seed)
            found = [f.p_value for look in _looks(DRAWS) for f in _at(battery, look, seed)]
            smallest.append(min(found) * len(list(_looks(DRAWS))) * FAMILIES)
            usual.append(usual_tests(torch.stack(errors).view(DRAWS, -1).numpy(), decisions.p.view(-1).numpy()))
        for level in LEVELS:
            rejected = int(np.sum(np.array(smallest) < level))
            size.append(
                {"quantizer": name, "level": level, "runs": runs, "rejected": rejected, "rate": rejected / runs}
            )
        for procedure in usual[0]:
            rejected = int(sum(p[procedure] < LEVELS[0] for p in usual))
            wrong.append({"quantizer": name, "procedure": procedure, "runs": runs, "rate": rejected / runs})
        print(name, size[-2:], wrong[-3:], flush=True)
    return pd.DataFrame(size), pd.DataFrame(wrong)


def sums_size(runs: int) -> pd.DataFrame:
    """Rejection rates of the spread of row and column sums alone, at its looks, on every design.

    The runs' draws are taken from a pool. Runs of one round through it share none, and each round shuffles it anew.
    """
    rows = []
    for name in QUANTIZERS:
        q = fqtstats.quantizer(name, bits=BITS)
        inputs = {"natural": designs.natural(NULL_SHAPE)}
        if name != "bhq":
            inputs |= {f"{end} ladder": designs.ladder(NULL_SHAPE, q.format.levels, end == "high") for end in ENDS}
        for design, x in inputs.items():
            d = of_grid(q, x, 4 * q.format.levels * 2.0**-24)
            ups = torch.stack([d.ups(fqtstats.stream(draw=draw))[0] for draw in range(POOL)]).float()
            sums = [ups.sum(axis + 1) for axis in (0, 1)]
            found = []
            for run in range(runs):
                turn, place = divmod(run, POOL // DRAWS)
                order = torch.randperm(POOL, generator=torch.Generator().manual_seed(turn))[place * DRAWS :]
                p = [
                    spread_p(s[order[1:look:2]] - s[order[0:look:2]], d, axis)[0]
                    for look in _looks(DRAWS)
                    for axis, s in enumerate(sums)
                ]
                found.append(min(p) * len(p))
            for level in LEVELS:
                rejected = sum(p < level for p in found)
                rows.append({"quantizer": name, "design": design, "level": level, "runs": runs, "rejected": rejected})
    table = pd.DataFrame(rows)
    print(table.to_string(), flush=True)
    return table.assign(rate=table["rejected"] / table["runs"])


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


def power(seeds: int) -> pd.DataFrame:
    """Draws until each defect is found, over the three designs in turn."""
    q = fqtstats.quantizer("psq", bits=BITS)
    inputs = {"natural": designs.natural(POWER_SHAPE)}
    for high in (False, True):
        inputs["high ladder" if high else "low ladder"] = designs.ladder(designs.LADDER_SHAPE, q.format.levels, high)
    level = FALSE_ALARM / (len(inputs) * len(LOOKS) * FAMILIES)
    right = {name: of_grid(q, x, 4 * q.format.levels * 2.0**-24) for name, x in inputs.items()}
    rows = []
    with progress() as bars:
        task = bars.add_task("defects", total=len(DEFECTS) * seeds)
        for defect, decide in DEFECTS.items():
            found = []
            for seed in range(seeds):
                found.append(_draws_until(right, decide, level, seed))
                bars.advance(task)
            last = sorted(n for n, _, _ in found)[int(np.ceil(0.99 * seeds)) - 1]
            rows.append(
                {
                    "defect": defect,
                    "seeds": seeds,
                    "missed": sum(n == np.inf for n, _, _ in found),
                    "draws": last,
                    "design": ", ".join(sorted({design for _, design, _ in found})),
                    "tests": ", ".join(sorted({family for _, _, family in found})),
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


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


def draw(size: pd.DataFrame, wrong: pd.DataFrame) -> bytes:
    """Rejection rates at level .01, ours and the usual ones."""
    ours = size[size["level"] == LEVELS[0]].assign(procedure="the battery")
    rates = pd.concat([wrong, ours])
    order = ["the battery", *dict.fromkeys(wrong["procedure"])]
    with style.applied():
        figure = style.new_figure(style.COLUMN_WIDTH, 2.0)
        ax = figure.subplots()
        for y, procedure in enumerate(order):
            values = rates[rates["procedure"] == procedure]["rate"]
            ax.plot(values, [y] * len(values), "o", color="#009E73" if y == 0 else "#D55E00", alpha=0.7)
        ax.axvline(LEVELS[0], color="0.3", linestyle="--", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=1e-3)
        ax.set(xlim=(-2e-4, 1.3), xlabel="rate of false alarms at level .01", yticks=range(len(order)))
        ax.set_yticklabels(order)
        ax.invert_yaxis()
    return style.png(figure)


if __name__ == "__main__":
    main()
