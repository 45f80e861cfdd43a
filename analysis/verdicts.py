"""Does a verdict find what is wrong with a quantizer, and after how many draws?

``python -m analysis.verdicts`` (some minutes) judges the deliberately wrong quantizers of ``tests/controls.py`` with
``fqtstats.check_unbiased`` at its default false-alarm rate, on another input for every seed, and writes to
``analysis/results/verdicts/power.csv`` how many were found, and the most draws that it took. Draws are 0 where probing
alone finds the defect. ``none`` is a sound quantizer: what is found there are false alarms.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track

import fqtstats
from fqtstats.verdicts import designs
from tests import controls

FOLDER = Path(__file__).parent / "results" / "verdicts"
SHAPE = (32, 256)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="inputs per defect")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = power(given.seeds)
    found.to_csv(given.out / "power.csv", index=False)
    print(found.to_string())


def power(seeds: int) -> pd.DataFrame:
    """A row per defect."""
    rows = []
    for name, f in track({"none": controls.unbroken(), **controls.DEFECTS}.items(), "defects"):
        # A sound quantizer takes every draw there is.
        inputs = [designs.natural(SHAPE, seed) for seed in range(seeds)]
        verdicts = [fqtstats.check_unbiased(f, x, seed=seed) for seed, x in enumerate(inputs)]
        caught = [verdict for verdict in verdicts if not verdict.ok]
        rows.append(
            {
                "defect": name,
                "seeds": seeds,
                "found": len(caught),
                "most_draws": max((verdict.draws for verdict in caught), default=None),
                "evidence": caught[0].evidence if caught else "",
            }
        )
    return pd.DataFrame(rows).astype({"most_draws": "Int64"})


if __name__ == "__main__":
    main()
