"""What do bits buy in speed and memory?

Nothing is measured here: the results of ``fqtstats bench`` (``analysis/results/speed``) and of the study of memory
(``analysis/results/memory``) are put together by the bits of the forward operands.

* Speed: PyTorch's float32 time over ours, of matrix products of integer codes, of convolutions with the quantization of
  their input, and of whole training steps, against every memory layout of float32 that was timed, on one and two
  threads, with both of glibc's ways of handing out memory. The least favourable of them is told first. Ratios carry the
  quartiles of interleaved pairs of timings, which are no 95 % intervals. A product that was not timed against float32
  itself is chained: its ratio to ``torch._int_mm``, over that of the u8 x s8 product, times the latter's to float32,
  with the quartiles that are furthest apart.
* Memory: bytes that a training step keeps in float32 over those that it keeps on the native backend: of the operands of
  the quantized layers, and of the whole graph. Bytes are counted, so there are no intervals. Below 1 more is kept than
  in float32.

One machine; see the results for which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import memory, speed
from analysis.axes import beside, intervals
from analysis.study import Claim, Parts, Study, Tables, main, tables_of, with_interval
from fqtstats.errors import InputError
from fqtstats.report import style
from fqtstats.schema import Column

SPEED = (
    Column("kind", "str", "", '"product", "convolution" or "step"'),
    Column("name", "str", "", "of what was timed"),
    Column("shape", "str", "", "of the problem"),
    Column("bits", "int64", "bit", "of the narrower operand of the forward product"),
    Column("threads", "int64", "1", "of both"),
    Column("allocator", "str", "", "default, or tuned: freed memory is kept"),
    Column("baseline", "str", "", "form of float32"),
    Column("chained", "bool", "", "whether float32 was timed against another product"),
    Column("ratio", "float64", "1", "float32's time over ours, median"),
    Column("low", "float64", "1", "lower quartile; if chained, with the quartiles furthest apart"),
    Column("high", "float64", "1", "upper quartile; likewise"),
)
MEMORY = (
    Column("model", "str", "", "network"),
    Column("recipe", "str", "", "of the training"),
    Column("backend", "str", "", '"native" or "native, fused"'),
    Column("bits", "int64", "bit", "of the forward operands"),
    Column("operands", "float64", "1", "float32 bytes over ours, operands of the quantized layers"),
    Column("graph", "float64", "1", "the same of everything that is kept for the backward pass"),
)

BITS = {
    "u8 x s8 product": 8,
    "int4 x int8 product": 4,
    "int4 x int4 product": 4,
    "4 x 1 bit product": 1,
    "2 x 1 bit product": 1,
    "1 x 1 bit product": 1,
    "int8 3x3 convolution, input quantized": 8,
    "1-bit 3x3 convolution, input quantized": 1,
    "VGG-16 training step, statquant-ptq 8 bits, native": 8,
    "VGG-16 training step, LUQ, native": 4,
    "VGG-16 training step, 1-bit FQT, AGP 4 bits, native": 1,
    "ResNet-18 training step, statquant-ptq 8 bits, native": 8,
    "ResNet-18 training step, 1-bit FQT, AGP 4 bits, native": 1,
}
"""Of the rows of ``fqtstats bench`` that are shown: bits of the narrower forward operand."""

RECIPES = {"statquant-psq 8": 8, "lsq 4": 4, "lsq 2": 2, "luq": 4, "1bit-agp 4": 1}
"""Bits of the recipes' forward operands."""

KINDS = ("product", "convolution", "step")

LINK, LINKED = "torch._int_mm", "u8 x s8 product"
"""What a product that float32 was not timed with was timed with, and the product that was timed with both."""


@dataclass(frozen=True)
class Settings:
    """Of the study: which of the saved rows."""

    threads: tuple[int, ...] = (1, 2)
    allocators: tuple[str, ...] = ("default", "tuned")


def measure(settings: Settings, parts: Parts) -> Tables:
    """The rows that are compared with float32."""
    rows, kept = tables_of(speed.STUDY, parts)["speed"], tables_of(memory.STUDY, parts)["memory"]
    rows = rows[rows["threads"].isin(settings.threads) & rows["allocator"].isin(settings.allocators)]
    if rows.empty:
        raise InputError(f"no speed was measured with threads {settings.threads} and allocators {settings.allocators}")
    kept = kept[kept["backend"] != "simulated"]
    kept = kept.assign(
        bits=kept["recipe"].map(RECIPES),
        operands=kept["operands_float32_MiB"] / kept["operands_MiB"],
        graph=kept["graph_float32_MiB"] / kept["graph_MiB"],
    )
    return {"speed": against_float32(rows), "memory": kept[[column.name for column in MEMORY]].reset_index(drop=True)}


def against_float32(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the known rows of the study of speed, their ratio to every form of float32: timed, or chained."""
    rows = rows[rows["name"].isin(BITS)]
    plain = rows["baseline"].str.contains("float32")
    place = ["shape", "threads", "allocator"]
    found = []
    for (name, *of), own in rows.groupby(["name", *place], sort=False):
        case = {
            "kind": next(word for word in KINDS if re.search(rf"\b{word}\b", str(name))),
            "name": name,
            **dict(zip(place, of, strict=True)),
            "bits": BITS[str(name)],
        }
        timed = own[plain[own.index]]
        for row in timed.to_dict("records"):
            ends = {"ratio": row["ratio"], "low": row["ratio_low"], "high": row["ratio_high"]}
            found.append({**case, "baseline": row["baseline"], "chained": False, **ends})
        if timed.empty:
            beside = rows[(rows["name"] == LINKED) & (rows[place] == of).all(axis=1)]
            first, second = (beside[mask[beside.index]] for mask in (plain, rows["baseline"] == LINK))
            third = own[own["baseline"] == LINK]
            if first.empty or second.empty or third.empty:
                continue
            (a, b, c) = (each.iloc[0] for each in (first, second, third))
            ends = {
                "ratio": a["ratio"] / b["ratio"] * c["ratio"],
                "low": a["ratio_low"] / b["ratio_high"] * c["ratio_low"],
                "high": a["ratio_high"] / b["ratio_low"] * c["ratio_high"],
            }
            found.append({**case, "baseline": a["baseline"], "chained": True, **ends})
    return pd.DataFrame(found)


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per kind of operation and bits, over the shapes; and per recipe, over the networks."""
    shown = [
        {"what": name, "bits": str(own["bits"].iloc[0]), "least favourable": _where(own.loc[own["ratio"].idxmin()]),
         "most favourable": _where(own.loc[own["ratio"].idxmax()]), "operands, factor": "", "graph, factor": ""}
        for name, own in tables["speed"].groupby("name", sort=False)
    ]  # fmt: skip
    shown += [
        {"what": f"{recipe}, {backend}", "bits": str(own["bits"].iloc[0]), "least favourable": "",
         "most favourable": "", "operands, factor": _span(own["operands"]), "graph, factor": _span(own["graph"])}
        for (recipe, backend), own in tables["memory"].groupby(["recipe", "backend"], sort=False)
    ]  # fmt: skip
    return pd.DataFrame(shown)


def _where(row: pd.Series) -> str:
    """A ratio with its quartiles, and where it was found."""
    form = "channels_last" if "channels_last" in row["baseline"] else "NCHW" if "NCHW" in row["baseline"] else ""
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    place = ", ".join(each for each in (row["shape"], form, threads, f"{row['allocator']} memory") if each)
    return f"{with_interval(row['ratio'], row['low'], row['high'])} ({place})"


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _kept(factors: pd.Series) -> str:
    """How much is kept of what float32 keeps: times less, or times as much where some is more."""
    return f"{_span(factors)} times less" if (factors >= 1).all() else f"{_span(1 / factors)} times as much"


def claims(tables: Tables) -> list[Claim]:
    """Speed and memory, by bits."""
    fast, kept = tables["speed"], tables["memory"]
    told = []
    for name, own in fast.groupby("name", sort=False):
        worst, best = (own.loc[index] for index in (own["ratio"].idxmin(), own["ratio"].idxmax()))
        chained = "; chained, with the quartiles furthest apart" if own["chained"].all() else "; quartiles over pairs"
        most = f", at most {_where(best)}" if len(own) > 1 else ""
        slower = bool((own["high"] < 1).any())
        told.append(
            Claim(
                f"{name}: at least {_where(worst)} times as fast as float32{most}{chained}.",
                False if slower else True if (own["low"] > 1).all() else None,
                "not examined" if slower else "",
            )
        )
    told += _eighth(fast)
    for recipe, own in kept.groupby("recipe", sort=False):
        native, fused = (own[own["backend"] == backend] for backend in ("native", "native, fused"))
        told.append(
            Claim(
                f"{recipe} ({own['bits'].iloc[0]} bits forward), memory beside float32's: operands "
                f"{_kept(native['operands'])} (fused: {_kept(fused['operands'])}), the whole graph "
                f"{_kept(native['graph'])} (fused: {_kept(fused['graph'])}); {native['model'].nunique()} networks, "
                "bytes counted."
            )
        )
    for model, own in kept.groupby("model", sort=False):
        native, fused = (own[own["backend"] == backend]["graph"] for backend in ("native", "native, fused"))
        changed = not np.allclose(native, fused, rtol=1e-3)  # pre-activation networks have no chain that could be fused
        told.append(
            Claim(
                f"{model}, whole graph of the fused network beside float32's: {_kept(fused)}, over the recipes"
                f"{'' if changed else '; nothing of it is fused'}.",
                bool((fused > 1).all()) if changed else None,
            )
        )
    return told


def _eighth(fast: pd.DataFrame) -> list[Claim]:
    """What 1 bit gains over 8 in a product, with the quartiles that are furthest apart."""
    place = ["shape", "threads", "allocator"]
    eight, one = (fast[fast["name"] == name].set_index(place) for name in (LINKED, "1 x 1 bit product"))
    ratio = one["ratio"] / eight["ratio"]
    low, high = one["low"] / eight["high"], one["high"] / eight["low"]
    if ratio.empty:
        return []
    ends = (with_interval(ratio[at], low[at], high[at]) for at in (ratio.idxmin(), ratio.idxmax()))
    return [
        Claim(
            f"An eighth of the bits makes a product {' to '.join(ends)} times as fast: 1 against 8 bits, over "
            f"{len(ratio)} combinations of shape, threads and memory (quartiles furthest apart)."
        )
    ]


def draw(tables: Tables) -> dict[str, Figure]:
    """Speed (left) and memory (right) against the bits of the forward operands."""
    figure = style.new_figure(style.COLUMN_WIDTH, 2.7)
    left, right = figure.subplots(1, 2)
    colors = {"product": style.BLUE, "convolution": style.VERMILION, "step": style.INK}
    fast = tables["speed"]
    hardest = fast.loc[fast.groupby(["name", "shape"], sort=False)["ratio"].idxmin()]
    for index, (kind, color) in enumerate(colors.items()):
        own = hardest[hardest["kind"] == kind]
        place = np.log2(own["bits"].to_numpy()) + beside(index, len(colors), 0.25)
        many = own.groupby("bits")["ratio"].transform("size").to_numpy()
        place = place + 0.2 * ((own.groupby("bits").cumcount().to_numpy() + 0.5) / many - 0.5)
        for chained, face in ((False, color), (True, "white")):
            which = (own["chained"] == chained).to_numpy()
            if which.any():
                found = tuple(own[column].to_numpy()[which] for column in ("ratio", "low", "high"))
                intervals(
                    left, place[which], found, fmt="o", color=color, markerfacecolor=face, markersize=2,
                    markeredgewidth=0.5, elinewidth=0.6, label=f"{kind}, chained" if chained else kind,
                )  # fmt: skip
    left.set_ylabel("times as fast as float32, the least\nfavourable (a point per shape; quartiles)")
    shown = (
        ("native", "operands", style.GREEN, "o", "operands"),
        ("native, fused", "operands", style.GREEN, "^", "operands, fused"),
        ("native", "graph", style.ORANGE, "o", "graph"),
        ("native, fused", "graph", style.ORANGE, "^", "graph, fused"),
    )
    for index, (backend, column, color, marker, label) in enumerate(shown):
        own = tables["memory"][tables["memory"]["backend"] == backend]
        place = np.log2(own["bits"].to_numpy()) + beside(index, len(shown), 0.14)
        right.plot(place, own[column], marker, color=color, markersize=2.4, markerfacecolor="white",
                   markeredgewidth=0.6, label=label)  # fmt: skip
    right.set_ylabel("float32's bytes over ours\n(a point per network; counted)")
    for ax in (left, right):
        _bits_axis(ax)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return {"speed_memory": figure}


def _bits_axis(ax: Axes) -> None:
    ax.set(yscale="log", xlabel="bits of forward operands", xticks=range(4), xlim=(-0.5, 3.5))
    ax.set_xticklabels(["1", "2", "4", "8"])
    ticks = [0.5, 1, 2, 4, 8, 16, 32]
    ax.axhline(1, color=style.GREY, linewidth=0.8)
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ticks if low <= tick <= high])
    ax.set_yticklabels([f"{tick:g}" for tick in ticks if low <= tick <= high])
    ax.minorticks_off()
    ax.grid(axis="y")


STUDY = Study(
    name="speed_memory",
    question="What do bits buy in speed and memory?",
    full=Settings(),
    quick=Settings(),
    columns={"speed": SPEED, "memory": MEMORY},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Times as fast as float32, median over interleaved pairs with quartiles, of the least and of the most "
    "favourable combination of shape, memory layout of float32, threads and way of handing out memory. Factor: bytes "
    "kept in float32 over ours, over the networks; below 1 more is kept than in float32. 1 of 4 x 1 and 2 x 1 bits is "
    "the narrower operand.",
)

if __name__ == "__main__":
    main(STUDY)
