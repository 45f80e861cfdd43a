"""Does a verdict find what is wrong with a quantizer, and after how many draws?

The deliberately wrong quantizers of ``tests/controls.py`` are judged with ``fqtstats.check_unbiased`` at its default
false-alarm rate of 1e-6, on another input for every seed. Draws are 0 where probing alone finds the defect. ``none`` is
a sound quantizer: what is found there are false alarms.

Intervals are Clopper-Pearson's, of shares of the inputs, 95 % each; where a sentence is about all defects, they hold
together with 95 % (Bonferroni).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure

import fqtstats
from analysis.shares import bars, share, told
from analysis.study import Claim, Parts, Study, Tables, main
from fqtstats.determinism import single_thread
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.verdicts import designs
from tests import controls

COLUMNS = (
    Column("defect", "str", "", "of the quantizer; none: a sound one"),
    Column("seeds", "int64", "1", "inputs that it was judged on"),
    Column("found", "int64", "1", "how many verdicts refuse it"),
    Column("most_draws", "Int64", "1", "most draws that these took; 0: by probing alone"),
    Column("evidence", "str", "", "what the first of them says"),
)

SOUND = "none"
SUBJECTS = {SOUND: controls.unbroken(), **controls.DEFECTS}
FALSE_ALARM = 1e-6
SHAPE = (32, 256)


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    defects: tuple[str, ...] = tuple(SUBJECTS)
    seeds: int = 100


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per defect."""

    def of_defect(defect: str) -> dict[str, object]:
        # A sound quantizer takes every draw there is.
        inputs: list[torch.Tensor] = [designs.natural(SHAPE, seed) for seed in range(settings.seeds)]
        with single_thread():
            verdicts = [
                fqtstats.check_unbiased(SUBJECTS[defect], x, seed=seed, false_alarm=FALSE_ALARM)
                for seed, x in enumerate(inputs)
            ]
        caught = [verdict for verdict in verdicts if not verdict.ok]
        return {
            "seeds": settings.seeds,
            "found": len(caught),
            "most_draws": max((verdict.draws for verdict in caught), default=None),
            "evidence": caught[0].evidence if caught else "",
        }

    return {"power": parts.every("defects", [{"defect": defect} for defect in settings.defects], of_defect)}


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per defect."""
    table = tables["power"]
    return pd.DataFrame(
        {
            "defect": table["defect"],
            "inputs": table["seeds"].astype(str),
            "share found": [told(row.found, row.seeds) for row in table.itertuples()],
            "most draws": ["" if pd.isna(most) else str(most) for most in table["most_draws"]],
        }
    )


def claims(tables: Tables) -> list[Claim]:
    """What is found, and what is found where nothing is."""
    table = tables["power"]
    planted, sound = table[table["defect"] != SOUND], table[table["defect"] == SOUND]
    always, others = planted[planted["found"] == planted["seeds"]], planted[planted["found"] < planted["seeds"]]
    text = f"{len(always)} of {len(planted)} defects are found on each of {planted['seeds'].min()} inputs"
    if len(always):
        least = share(always["found"].min(), always["seeds"].min(), len(always))[1]
        most = always["most_draws"].max()
        text += f", after at most {most} draws (0: by probing alone), each on a share of the inputs of at least "
        text += f"{least:.2g} (95 % for all of them together, Clopper-Pearson and Bonferroni)"
    missed = "; ".join(f"{row.defect}, on a share of {told(row.found, row.seeds)}" for row in others.itertuples())
    found = [Claim(f"{text}{'. Not so: ' if missed else ''}{missed}.", not missed)]
    for row in sound.itertuples():
        found.append(
            Claim(
                f"A sound quantizer is refused on {row.found} of {row.seeds} inputs, a share of "
                f"{told(row.found, row.seeds)}; the verdicts' false-alarm rate is {FALSE_ALARM:g}.",
                share(row.found, row.seeds)[1] <= FALSE_ALARM,
            )
        )
    return found


def draw(tables: Tables) -> dict[str, Figure]:
    """Share found of each defect, and the draws that it took."""
    table = tables["power"]
    figure = style.new_figure(style.COLUMN_WIDTH, 0.15 * len(table) + 0.6)
    ax = figure.subplots()
    for sound, color, marker, label in ((False, "#0072B2", "o", "planted defect"), (True, "#009E73", "D", "sound")):
        own = table[(table["defect"] == SOUND) == sound]
        bars(ax, list(own.index), list(own["found"]), list(own["seeds"]), color, marker, label)
    for row in table.itertuples():
        text = "not found" if not row.found else f"{row.most_draws} draws" if row.most_draws else "probing"
        ax.annotate(text, (1, row.Index), xytext=(6, 0), textcoords="offset points", va="center", annotation_clip=False)
    ax.set(xlim=(-0.03, 1.03), xlabel="share of inputs on which it is found (95 %)")
    ax.set_yticks(table.index, table["defect"])
    ax.invert_yaxis()
    ax.grid(True, axis="x")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return {"power": figure}


STUDY = Study(
    name="verdicts",
    question="Does a verdict find what is wrong with a quantizer, and after how many draws?",
    full=Settings(),
    quick=Settings((SOUND, "nearest", "pruned"), seeds=2),
    columns={"power": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Share of the inputs on which a verdict refuses the quantizer, with 95 % intervals (Clopper-Pearson), and "
    "the most draws that it took; 0: by probing alone.",
)

if __name__ == "__main__":
    main(STUDY)
