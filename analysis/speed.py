"""Speed of the native kernels against named baselines: the bench table, with the machine that it was measured on.

``python -m analysis.speed`` runs ``fqtstats bench all --allocator both`` (some ten minutes) and writes
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
BASELINES = {
    "rand(out=r); mul(x, s, out=y).add_(b).add_(r).floor_().clamp_(0, 255); codes.copy_(y)": "torch expression",
    "the same in torch, with torch._int_mm": "the same in torch",
    "naive replicate (forward and backward)": "naive replicate",
    "F.conv2d float32, channels_last": "F.conv2d float32",
    "PyTorch float32 (default: NCHW)": "PyTorch float32",
}
"""Shorter names, for the figure."""

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
    return "\n".join([*lines, *_shares(content["rows"]), *_short(content["rows"])]) + "\n"


def _shares(rows: list[dict[str, Any]]) -> list[str]:
    """Of training steps, the share of our time by kind of work."""
    known = [row for row in rows if row.get("shares")]
    if not known:
        return []
    kinds = list(known[0]["shares"])
    about = (
        "By `torch.profiler`, with the library's own functions marked; recording slows small operations down. The pass "
        "that normalizes, pools and makes codes counts as quantizing."
    )
    lines = ["", "## Share of our time by kind of work", "", about, ""]
    lines += ["| " + " | ".join(["what", "threads", "memory", *kinds]) + " |", "|---" * (len(kinds) + 3) + "|"]
    for row in known:
        cells = [row["name"], str(row["threads"]), row["allocator"], *(f"{row['shares'][kind]:.0%}" for kind in kinds)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _short(rows: list[dict[str, Any]]) -> list[str]:
    """The rows that fall short, and what they would be at the bounding instruction's peak, all else for nothing."""
    missed = [row for row in rows if row["must"] is not None and row["ratio"] < row["must"]]
    if not missed:
        return ["", "Every must is met."]
    lines = ["", "## What falls short", ""]
    for row in missed:
        what = f"- {row['name']}, {row['shape']}, against {row['baseline']}, {row['allocator']} memory: "
        what += f"{row['ratio']:.2f}x of {row['must']:g}x"
        if row["of_peak"] is not None and row["peak"] != "copy":
            at_peak = row["ratio"] / row["of_peak"]
            verdict = "beyond this processor" if at_peak < row["must"] else "not beyond it"
            what += f"; at the measured peak of its bounding instruction {at_peak:.2f}x: {verdict}"
        lines.append(what)
    return lines


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Ratios of the rows that have a target beside must and aim, and what they would be at the machine's peak."""
    shown = [row for row in rows if row["must"] is not None and row["allocator"] == "default"]
    labels, heights = [], []
    height, last = 0.0, None
    for row in shown:
        height -= 1.0 if (row["name"], row["baseline"]) == last else 1.6
        last = (row["name"], row["baseline"])
        heights.append(height)
        labels.append(f"{row['name']}, {row['shape']}  vs  {BASELINES.get(row['baseline'], row['baseline'])}")
    with style.applied():
        drawn = style.new_figure(2.2 * style.COLUMN_WIDTH, 0.6 - 0.105 * height)
        axes = drawn.add_subplot()
        lows, highs = [r["ratio_low"] for r in shown], [r["ratio_high"] for r in shown]
        axes.hlines(heights, lows, highs, color="#0072B2", lw=1.6, zorder=2)
        axes.plot([r["ratio"] for r in shown], heights, "o", color="#0072B2", label="measured, quartiles", zorder=3)
        axes.plot([r["must"] for r in shown], heights, "|", color="#D55E00", ms=6, mew=1.4, label="must")
        aims = [(row["aim"], h) for row, h in zip(shown, heights, strict=True) if row["aim"] is not None]
        axes.plot(*zip(*aims, strict=True), "|", color="#009E73", ms=6, mew=1.0, label="aim")
        # Where an instruction is the bound; memory bandwidth is none in the cache.
        bounded = [(row, h) for row, h in zip(shown, heights, strict=True) if row["peak"] not in (None, "copy")]
        peaks = [(row["ratio"] / row["of_peak"], h) for row, h in bounded if row["of_peak"] is not None]
        ceiling = "at the peak rate of the bounding instruction"
        axes.plot(*zip(*peaks, strict=True), "o", color=style.GREY, mfc="none", mew=0.6, label=ceiling)
        axes.axvline(1, color=style.GREY, lw=0.5)
        axes.set_xscale("log")
        ticks = [1, 2, 3, 5, 10, 20, 30, 50]
        axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(heights, labels)
        axes.set_ylim(height - 1, 0)
        axes.tick_params(axis="y", labelsize=4.5, length=0)
        axes.grid(axis="x")
        axes.set_xlabel("times as fast as the baseline")
        drawn.legend(loc="outside upper right", ncols=4)
    return drawn


if __name__ == "__main__":
    main()
