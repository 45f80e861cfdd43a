"""Does a verdict find what is wrong with a quantizer, and after how many draws?

The deliberately wrong quantizers of ``tests/controls.py`` are judged with ``fqtstats.check_unbiased`` at its default
false-alarm rate of 1e-6, on another input for every seed, in three ways:

* by probing: as they are. Their expectation is computed, and no draws are needed.
* named grid: a coin decides from which of two streams a call takes its numbers, so that it cannot be probed, and the
  caller names the grid that a right quantizer would round to. A result that is no point of it is an error, which counts
  as found in the first 16 draws.
* draws alone: the same without a grid.

Up to 256 draws are made, with looks at 16, 32, 64, 128 and 256. ``none`` is a sound quantizer: what is found there are
false alarms. ``bias`` is the exact one, as the squared length of the mean error over the mean squared length of one
draw's error, over all inputs. A defect counts as found where it is found on at least 80 % of the inputs.

Intervals are Clopper-Pearson's, of shares of the inputs, 95 % each; where a sentence is about all defects, they hold
together with 95 % (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure

import fqtstats
from analysis.known import Known
from analysis.nulls import BITS, FALSE_ALARM
from analysis.shares import at_least, at_most, bars, share, told
from analysis.study import Claim, Parts, Study, Tables, main
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import LOOKS
from fqtstats.verdicts.expectation import law
from tests import controls

FOUND = [f"found_{n}" for n in (0, *LOOKS)]
COLUMNS = (
    Column("defect", "str", "", "of the quantizer; none: a sound one"),
    Column("way", "str", "", "in which it is judged"),
    Column("inputs", "int64", "1", "on which it was judged"),
    *(Column(name, "int64", "1", f"verdicts that refuse it after at most {name[6:]} draws") for name in FOUND),
    Column("off_grid", "int64", "1", "of these, on how many inputs a result was no point of the named grid"),
    Column("bias", "float64", "1", "squared mean error over the mean squared error of one draw"),
    Column("evidence", "str", "", "what the first refusal says"),
)

SOUND = "none"
SUBJECTS = Known("defect", {SOUND: controls.unbroken(), **controls.DEFECTS})
SHAPE = (32, 256)
PROBING, GRID, ALONE = "by probing", "named grid", "draws alone"
WAYS = (PROBING, GRID, ALONE)
POWERFUL = 0.8
"""Share of the inputs from which on a defect counts as found."""


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    defects: tuple[str, ...] = tuple(SUBJECTS)
    inputs: int = 40


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per defect and way."""
    cases = [{"defect": defect, "way": way} for way in WAYS for defect in settings.defects]

    def of_case(defect: str, way: str) -> dict[str, object]:
        with single_thread():
            return judged(SUBJECTS[defect], way, settings.inputs)

    return {"power": parts.every("defects", cases, of_case)}


Quantize = Callable[[torch.Tensor, fqtstats.Stream], torch.Tensor]


def by_coin(f: Quantize) -> Quantize:
    """The same law, with numbers from one of two streams: what depends on such a choice cannot be probed."""
    return lambda x, s: f(x, s.child("heads" if int(s.child("coin").bits(1, 1)) else "tails"))


def grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset of each row's grid, as a right quantizer has them."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (high - low) / (2**BITS - 1), low


def judged(f: Quantize, way: str, inputs: int) -> dict[str, object]:
    """What the verdicts on all inputs say."""
    draws: list[int] = []
    evidence, off_grid = "", 0
    squared_bias = variance = 0.0
    for seed in range(inputs):
        x = designs.natural(SHAPE, seed)
        exact = law(f, x)
        squared_bias += float((exact.mean - x).square().sum())
        variance += float(exact.variance.sum())
        try:
            verdict = fqtstats.check_unbiased(
                f if way == PROBING else by_coin(f), x, FALSE_ALARM, seed=seed, draws=LOOKS[-1],
                grid=grid(x) if way == GRID else None,
            )  # fmt: skip
        except InputError as error:  # of the grid: everything else about these callables is as it must be
            if not str(error).startswith("grid: "):
                raise
            off_grid += 1
            found, said = LOOKS[0], str(error)
        else:
            if verdict.ok:
                continue
            found, said = verdict.draws, verdict.evidence
        draws.append(found)
        evidence = evidence or said
    return {
        "inputs": inputs,
        **{name: sum(n <= int(name[6:]) for n in draws) for name in FOUND},
        "off_grid": off_grid,
        "bias": squared_bias / (squared_bias + variance),
        "evidence": evidence,
    }


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per defect and way."""
    table = tables["power"]
    return pd.DataFrame(
        {
            "defect": table["defect"],
            "way": table["way"],
            "inputs": table["inputs"].astype(str),
            "bias": [f"{bias:.2g}" for bias in table["bias"]],
            "draws": [_draws(row) for _, row in table.iterrows()],
            "share found": [told(row[FOUND[-1]], row["inputs"]) for _, row in table.iterrows()],
        }
    )


def _draws(row: pd.Series) -> str:
    """After which at least half of the inputs show it, and all that ever do."""
    half = next((name[6:] for name in FOUND if 2 * row[name] >= row["inputs"]), "")
    most = next(name[6:] for name in FOUND if row[name] == row[FOUND[-1]])
    if not row[FOUND[-1]]:
        return ""
    return most if half in ("", most) else f"{half} to {most}"


def claims(tables: Tables) -> list[Claim]:
    """What each way finds, after how many draws, and what is found where nothing is."""
    table = tables["power"]
    last = FOUND[-1]
    answer = []
    for way, own in table.groupby("way", sort=False):
        planted = own[own["defect"] != SOUND]
        n = len(planted)
        counts = []
        for name in FOUND:
            held = [at_least(row[name], row["inputs"], POWERFUL, n) for _, row in planted.iterrows()]
            if not counts or held.count(True) > counts[-1][1]:
                counts.append((int(name[6:]), held.count(True)))
        by_draws = ", ".join(f"{k} after {draws} draws" for draws, k in counts if k or len(counts) == 1)
        held = [at_least(row[last], row["inputs"], POWERFUL, n) for _, row in planted.iterrows()]
        missed = planted[[each is not True for each in held]]
        text = (
            f"{str(way).capitalize()}: {held.count(True)} of {n} defects are found on at least {POWERFUL:.0%} of the "
        )
        text += f"inputs ({by_draws})"
        found = planted[[each is True for each in held]]
        if len(found):
            least = found.loc[(found[last] / found["inputs"]).idxmin()]
            low = share(least[last], least["inputs"], n)[1]
            text += f", each of them on a share of at least {low:.2g}"
        off_grid = int((planted["off_grid"] == planted["inputs"]).sum())
        if off_grid:
            text += f"; {off_grid} of them by results that are no points of the grid"
        others = "; ".join(
            f"{row['defect']}, on a share of {told(row[last], row['inputs'], n)}" for _, row in missed.iterrows()
        )
        text += f"{'. Not shown: ' if others else ''}{others} (95 % together, Bonferroni)."
        holds = True if all(each is True for each in held) else False if False in held else None
        why = ""
        if holds is False:
            below, tested = missed["bias"], found[found["off_grid"] == 0]
            why = f"the squared bias of those is {below.min():.1g} to {below.max():.1g} of one draw's squared error"
            why += f", of those that tests find at least {tested['bias'].min():.1g}" if len(tested) else ""
        answer.append(Claim(text, holds, why))
    sound = table[table["defect"] == SOUND]
    if len(sound):
        refused, runs = int(sound[last].sum()), int(sound["inputs"].sum())
        answer.append(
            Claim(
                f"A sound quantizer is refused in {refused} of {runs} verdicts, a share of {told(refused, runs)}; the "
                f"verdicts' false-alarm rate is {FALSE_ALARM:g}, which so few cannot show.",
                at_most(refused, runs, FALSE_ALARM),
            )
        )
    return answer


def draw(tables: Tables) -> dict[str, Figure]:
    """Share found of each defect by the number of draws, in a panel per way."""
    table = tables["power"]
    defects = list(dict.fromkeys(table["defect"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.24 * len(defects) + 0.8)
    panels = figure.subplots(1, len(WAYS), sharey=True)
    shown = (("found_0", style.GREEN, "D"), ("found_16", style.PURPLE, "v"), ("found_64", style.SKY, "^"),
             ("found_256", style.BLUE, "o"))  # fmt: skip
    for ax, way in zip(panels, WAYS, strict=True):
        own = table[table["way"] == way]
        marks = shown[:1] if way == PROBING else shown[1:]
        for index, (name, color, marker) in enumerate(marks):
            shift = 0.24 * (index - (len(marks) - 1) / 2)
            places = [defects.index(defect) + shift for defect in own["defect"]]
            bars(ax, places, list(own[name]), list(own["inputs"]), color, marker, f"{name[6:]} draws")
        ax.set(xlim=(-0.08, 1.08), title=way)
        ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        ax.grid(True, axis="x")
    panels[0].set_yticks(range(len(defects)), defects)
    panels[0].invert_yaxis()
    figure.supxlabel("share of inputs on which it is found (95 % each)", fontsize=6.5)
    handles = [*panels[0].get_legend_handles_labels()[0], *panels[1].get_legend_handles_labels()[0]]
    figure.legend(handles, [handle.get_label() for handle in handles], loc="outside upper center", ncols=4)
    return {"power": figure}


STUDY = Study(
    name="verdicts",
    question="Does a verdict find what is wrong with a quantizer, and after how many draws?",
    full=Settings(),
    quick=Settings((SOUND, "nearest", "pruned"), inputs=2),
    columns={"power": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Bias: exact squared mean error over the mean squared error of one draw. Draws: within which half of the "
    "inputs show the defect, and all that ever do; 0: probing alone. Share of the inputs on which 256 draws find it, "
    "with 95 % intervals, each (Clopper-Pearson).",
)

if __name__ == "__main__":
    main(STUDY)
