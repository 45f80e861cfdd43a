"""Speed of the native kernels against named baselines: the bench table, with the machine that it was measured on.

``python -m analysis.speed`` runs ``fqtstats bench all --allocator both`` (half an hour) and writes
``analysis/results/speed/{rows.json,table.md,figures/speed.png}``; ``--render`` only writes table and figure again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fqtstats.report import style

FOLDER = Path(__file__).parent / "results" / "speed"
COMMAND = ["fqtstats", "bench", "all", "--allocator", "both"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="only write table and figure, from the saved rows")
    FOLDER.joinpath("figures").mkdir(parents=True, exist_ok=True)
    rows_file = FOLDER / "rows.json"
    if not parser.parse_args().render:
        # Status 1 says that a row falls short; the table shows which.
        done = subprocess.run([*COMMAND, "--json", str(rows_file)], check=False, stdout=sys.stderr)
        if done.returncode not in (0, 1):
            sys.exit(done.returncode)
    content = json.loads(rows_file.read_text())
    (FOLDER / "table.md").write_text(table(content))
    (FOLDER / "figures" / "speed.png").write_bytes(style.png(figure(content["rows"])))


def table(content: dict[str, Any]) -> str:
    """The rows as Markdown."""
    machine = content["machine"]
    about = (
        f"`{' '.join(COMMAND)}` on {machine['processor']} ({machine['cores']} cores, {machine['isa']}; torch "
        f"{machine['torch']}, {machine['system']}). Ratio: the baseline's time over ours, median over "
        f"{content['rounds']} interleaved pairs [quartiles]; of peak: share of the rate that the bounding instruction "
        "(or `copy_` over 64 MB) reached in the same run. A **bold** ratio falls short of its must."
    )
    lines = [
        "# Speed of the native kernels",
        "",
        about,
        "",
        "| what | shape | threads | memory | against | ratio | must | aim | time | of peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        ratio = f"{row['ratio']:.2f}x"
        if row["must"] is not None and row["ratio"] < row["must"]:
            ratio = f"**{ratio}**"
        cells = (
            row["name"],
            row["shape"],
            row["threads"],
            row["allocator"],
            f"`{row['baseline']}`" if ";" in row["baseline"] else row["baseline"],
            f"{ratio} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            "" if row["must"] is None else f"{row['must']:g}x",
            "" if row["aim"] is None else f"{row['aim']:g}x",
            f"{row['seconds'] * 1e3:.3g} ms",
            "" if row["of_peak"] is None else f"{row['of_peak']:.0%} of {row['peak']}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Ratios of the rows that have a target, one thread or as the target says, beside must and aim."""
    shown = [row for row in rows if row["must"] is not None and row["allocator"] == "default"]
    with style.applied():
        drawn = style.new_figure(2 * style.COLUMN_WIDTH, 0.9 + 0.13 * len(shown))
        axes = drawn.add_subplot()
        heights = range(len(shown), 0, -1)
        axes.hlines(
            heights,
            [r["ratio_low"] for r in shown],
            [r["ratio_high"] for r in shown],
            color="#0072B2",
            lw=1.6,
            zorder=2,
        )
        axes.plot([r["ratio"] for r in shown], heights, "o", color="#0072B2", label="measured (quartiles)", zorder=3)
        axes.plot([r["must"] for r in shown], heights, "|", color="#D55E00", ms=7, mew=1.4, label="must")
        aims = [(r["aim"], h) for r, h in zip(shown, heights, strict=True) if r["aim"] is not None]
        axes.plot(*zip(*aims, strict=True), "|", color="#009E73", ms=7, mew=1.0, label="aim")
        axes.axvline(1, color=style.GREY, lw=0.5)
        axes.set_xscale("log")
        axes.set_yticks(list(heights), [f"{r['name']}, {r['shape']}\nvs {_short(r['baseline'])}" for r in shown])
        axes.tick_params(axis="y", labelsize=4.5)
        axes.grid(axis="x", which="both")
        axes.set_xlabel("times as fast as the baseline")
        axes.legend(loc="upper center", bbox_to_anchor=(0.3, 1.08), ncols=3)
    return drawn


def _short(text: str) -> str:
    return text if len(text) < 45 else "torch expression"


if __name__ == "__main__":
    main()
