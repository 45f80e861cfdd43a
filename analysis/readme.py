"""Makes what README.md shows: two saved runs, and the text between its markers.

``python -m analysis.readme`` measures anew (minutes) and writes the text; ``--render`` only writes the text from the
saved runs. A test checks that README.md is what ``--render`` gives.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

import fqtstats
from fqtstats.report import tables
from fqtstats.results import Configuration, Result

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RUNS = ROOT / "analysis" / "results"

COMMANDS = {
    "measure_bhq": "fqtstats measure --quantizer bhq",
    "compare": "fqtstats measure --quantizer ptq,psq,bhq --bits 8,7,6,5,4,3,2",
}
"""Run name to the command that makes it."""

WIDTH = 100
"""Columns of the terminal that the shown output was printed on."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="only write the text, from the saved runs")
    if not parser.parse_args().render:
        for name, command in COMMANDS.items():
            measure(name, command)
    README.write_text(render(README.read_text()))


def measure(name: str, command: str) -> None:
    """Run one command into ``analysis/results/<name>``, replacing what is there."""
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*shlex.split(command), "--out", str(folder)], check=True, stdout=sys.stderr)


def render(text: str) -> str:
    """README.md with everything between its markers written anew from the saved runs."""
    blocks = {"output": _output(), "numbers": _numbers()}
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: match[1] + block + match[2], text)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"expected the markers of {name!r} once in README.md, found them {found} times")
    return text


def _output() -> str:
    result = fqtstats.load(RUNS / "measure_bhq")
    screen = io.StringIO()
    Console(file=screen, width=WIDTH).print(tables.summary(result))
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    rows = [i for i, line in enumerate(lines) if re.match(r"(conv|stages|norm|head)\b", line)]
    shown = [i for i in rows if ".norm" not in lines[i] and "bias" not in lines[i]]
    # The convolutions of the first and of the last stage; the rest is only left out to save room.
    middle = [i for i in shown if lines[i].startswith("stages.1")]
    kept = [line for i, line in enumerate(lines) if i not in rows or (i in shown and i not in middle)]
    cut = next(i for i, line in enumerate(kept) if line.startswith("stages.2"))
    kept.insert(cut, f"... {len(rows) - len(shown) + len(middle)} more rows ...")
    return "```\n" + f"$ {COMMANDS['measure_bhq']}\n" + "\n".join(kept).rstrip() + "\n```\n"


def _numbers() -> str:
    result = fqtstats.load(RUNS / "compare")
    five = {name: _relative(result, name, 5) for name in ("ptq", "psq", "bhq")}
    return (
        "Relative to PTQ at 8 bits, the input-gradient quantizer at 5 bits has "
        f"{five['ptq']:.3g} times the variance with PTQ,\n{five['psq']:.3g} times with PSQ and {five['bhq']:.3g} times "
        "with BHQ (median over the layers of this network, exact variances).\n"
    )


def _relative(result: Result, quantizer: str, bits: int) -> float:
    return float(np.median(result.relative_input_variance(Configuration(quantizer, bits), Configuration("ptq", 8))))


if __name__ == "__main__":
    main()
