"""What do bits buy in speed and memory?

Nothing is measured here: the results of ``fqtstats bench`` (``analysis/results/speed``) and of the study of memory
(``analysis/results/memory``) are put together by the bits of the forward operands.

* Speed: PyTorch's float32 time over ours, on one thread, of matrix products of integer codes, of convolutions with the
  quantization of their input, and of a whole training step. The rows carry the quartiles of interleaved pairs of
  timings, not 95 % intervals; ratios of medians, where a product was not timed against float32 itself, carry none.
* Memory: bytes that a training step keeps in float32 over those that it keeps on the native backend: of the operands of
  the quantized layers, and of the whole graph. Bytes are counted, so there are no intervals.

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
from analysis.study import RESULTS, Claim, Parts, Study, Tables, load, main
from fqtstats.report import style
from fqtstats.schema import Column

SPEED = (
    Column("kind", "str", "", '"product", "convolution" or "step"'),
    Column("name", "str", "", "of what was timed"),
    Column("shape", "str", "", "of the problem"),
    Column("bits", "int64", "bit", "of the narrower operand of the forward product"),
    Column("ratio", "float64", "1", "float32's time over ours, median"),
    Column("low", "float64", "1", "lower quartile; NaN where float32 was timed in another row"),
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

BITS = {"u8 x s8 product": 8, "int4 x int8 product": 4, "int4 x int4 product": 4, "4 x 1 bit product": 1,
        "2 x 1 bit product": 1, "1 x 1 bit product": 1, "int8 3x3 convolution, input quantized": 8,
        "1-bit 3x3 convolution, input quantized": 1,
        "VGG-16 training step, statquant-ptq 8 bits, native": 8}  # fmt: skip
"""Of the rows of ``fqtstats bench`` that are shown."""

RECIPES = {"statquant-psq 8": 8, "lsq 4": 4, "lsq 2": 2, "luq": 4, "1bit-agp 4": 1}
"""Bits of the recipes' forward operands."""

FLOAT32 = {"product": "torch.mm float32", "convolution": "F.conv2d float32, channels_last",
           "step": "PyTorch float32 (default: NCHW)"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of the study: which of the saved rows."""

    threads: int = 1
    allocator: str = "default"


def saved() -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the studies of speed and memory have saved."""
    rows = load(speed.STUDY, RESULTS / speed.STUDY.name).tables["speed"]
    return rows, load(memory.STUDY, RESULTS / memory.STUDY.name).tables["memory"]


def measure(settings: Settings, parts: Parts) -> Tables:
    """The rows that are compared with float32."""
    rows, kept = saved()
    chosen = (rows["threads"] == settings.threads) & (rows["allocator"] == settings.allocator)
    rows = rows[chosen & rows["name"].isin(BITS)]
    found = []
    for (name, shape), own in rows.groupby(["name", "shape"], sort=False):
        kind = next(word for word in FLOAT32 if re.search(rf"\b{word}\b", str(name)))
        plain = rows[(rows["baseline"] == FLOAT32[kind]) & (rows["shape"] == shape)]
        direct = plain[plain["name"] == name]
        case = {"kind": kind, "name": name, "shape": shape, "bits": BITS[str(name)]}
        if len(direct):
            row = direct.iloc[0]
            found.append({**case, "ratio": row["ratio"], "low": row["ratio_low"], "high": row["ratio_high"]})
        else:
            ratio = plain["baseline_seconds"].median() / own["seconds"].median()
            found.append({**case, "ratio": ratio, "low": np.nan, "high": np.nan})
    kept = kept[kept["backend"] != "simulated"]
    kept = kept.assign(
        bits=kept["recipe"].map(RECIPES),
        operands=kept["operands_float32_MiB"] / kept["operands_MiB"],
        graph=kept["graph_float32_MiB"] / kept["graph_MiB"],
    )
    return {"speed": pd.DataFrame(found), "memory": kept[[column.name for column in MEMORY]].reset_index(drop=True)}


# --- what is said of it -----------------------------------------------------------------------------------------------


def read(tables: Tables) -> pd.DataFrame:
    """A row per kind of operation and bits, over the shapes; and per recipe, over the networks."""
    shown = [
        {"what": name, "bits": str(own["bits"].iloc[0]), "times faster": _span(own["ratio"]),
         "operands, times less": "", "graph, times less": ""}
        for name, own in tables["speed"].groupby("name", sort=False)
    ]  # fmt: skip
    shown += [
        {"what": f"{recipe}, {backend}", "bits": str(own["bits"].iloc[0]), "times faster": "",
         "operands, times less": _span(own["operands"]), "graph, times less": _span(own["graph"])}
        for (recipe, backend), own in tables["memory"].groupby(["recipe", "backend"], sort=False)
    ]  # fmt: skip
    return pd.DataFrame(shown)


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"


def claims(tables: Tables) -> list[Claim]:
    """Speed and memory, by bits."""
    fast, kept = tables["speed"], tables["memory"]
    told = []
    for name, own in fast.groupby("name", sort=False):
        lower, upper = own["low"].min(), own["high"].max()
        quartiles = (
            f"quartiles from {lower:.3g} to {upper:.3g}"
            if own["low"].notna().all()
            else "no quartiles: ratio of medians"
        )
        count = f"{len(own)} shapes; " if len(own) > 1 else ""
        told.append(
            Claim(
                f"{name}: {_span(own['ratio'])} times as fast as float32 ({count}{quartiles}).",
                bool(lower > 1) if own["low"].notna().all() else None,
            )
        )
    products = fast[fast["name"].isin(("u8 x s8 product", "1 x 1 bit product"))].pivot(
        index="shape", columns="name", values="ratio"
    )
    gain = products["1 x 1 bit product"] / products["u8 x s8 product"]
    told.append(Claim(f"An eighth of the bits makes a product {_span(gain)} times as fast: 1 against 8 bits."))
    for recipe, own in kept.groupby("recipe", sort=False):
        native, fused = (own[own["backend"] == backend] for backend in ("native", "native, fused"))
        told.append(
            Claim(
                f"{recipe} ({own['bits'].iloc[0]} bits forward): operands take {_span(native['operands'])} times less "
                f"than in float32 ({_span(fused['operands'])} fused), the whole graph {_span(native['graph'])} "
                f"({_span(fused['graph'])} fused; {native['model'].nunique()} networks, bytes counted)."
            )
        )
    for model, own in kept.groupby("model", sort=False):
        native, fused = (own[own["backend"] == backend]["graph"] for backend in ("native", "native, fused"))
        changed = not np.allclose(native, fused, rtol=1e-3)  # pre-activation networks have no chain that could be fused
        told.append(
            Claim(
                f"{model}: the whole graph of the fused network takes {_span(fused)} times less than in float32, over "
                f"the recipes{'' if changed else '; nothing of it is fused'}.",
                bool((fused > 1).all()) if changed else None,
            )
        )
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Speed (left) and memory (right) against the bits of the forward operands."""
    figure = style.new_figure(style.COLUMN_WIDTH, 2.5)
    left, right = figure.subplots(1, 2)
    colors = {"product": "#0072B2", "convolution": "#D55E00", "step": "#222222"}
    for index, (kind, color) in enumerate(colors.items()):
        own = tables["speed"][tables["speed"]["kind"] == kind]
        place = np.log2(own["bits"].to_numpy()) + 0.22 * (index - 1) + _apart(own)
        sure = own["low"].notna().to_numpy()
        ratio, low, high = (own[column].to_numpy() for column in ("ratio", "low", "high"))
        left.errorbar(
            place[sure], ratio[sure], (np.abs(ratio - low)[sure], np.abs(high - ratio)[sure]), fmt="o", color=color,
            markersize=2.2, elinewidth=0.8, label=kind,
        )  # fmt: skip
        if not sure.all():
            left.plot(place[~sure], ratio[~sure], "o", color=color, markersize=2.2, markerfacecolor="white",
                      markeredgewidth=0.6, label=f"{kind}, no quartiles")  # fmt: skip
    left.set_ylabel("times as fast as float32")
    shown = (
        ("native", "operands", "#009E73", "o", "operands"),
        ("native, fused", "operands", "#009E73", "^", "operands, fused"),
        ("native", "graph", "#E69F00", "o", "graph"),
        ("native, fused", "graph", "#E69F00", "^", "graph, fused"),
    )
    for index, (backend, column, color, marker, label) in enumerate(shown):
        own = tables["memory"][tables["memory"]["backend"] == backend]
        place = np.log2(own["bits"].to_numpy()) + 0.14 * (index - 1.5)
        right.plot(place, own[column], marker, color=color, markersize=2.4, markerfacecolor="white",
                   markeredgewidth=0.6, label=label)  # fmt: skip
    right.set_ylabel("times less memory than float32")
    for ax in (left, right):
        _bits_axis(ax)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return {"speed_memory": figure}


def _apart(own: pd.DataFrame) -> np.ndarray:
    """Shapes of the same name beside each other."""
    return 0.05 * (own.groupby("name").cumcount().to_numpy() - 1.0)


def _bits_axis(ax: Axes) -> None:
    ax.set(yscale="log", xlabel="bits of forward operands", xticks=range(4), xlim=(-0.4, 3.4))
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
    legend="Ranges over the shapes or networks of the medians; one thread. 1 of 4 x 1 and 2 x 1 bits is the narrower "
    "operand.",
)

if __name__ == "__main__":
    main(STUDY)
