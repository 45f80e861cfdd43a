"""How many bits match 8-bit PTQ over the epochs?

A network is trained in full precision; after some of its epochs the QAT gradients of one minibatch that arrive at its
layers are quantized with a grid per row (PSQ) and by block Householder quantization, with its own and with adaptive
groups (BHQ, bhq-adaptive). Bits for equal variance: those at which a quantizer's exact variance comes down to that of
one grid per tensor (PTQ) at 8 bits on the same gradients; between two numbers of bits the logarithm is interpolated.
For the network variances are summed over the layers; "layers" is the median over the layers of what each has on its
own. A layer with less variance than that at 1 bit already counts with 1 bit, one with more at 8 bits with 8; how many
do is told.

The schedule of the learning rate spans all epochs. The default configuration of ``fqtstats measure`` trains for fewer
(5): its network at the end of training is measured, too, as "default". Intervals are of the mean over the seeds.
Expectations (7.2 to 7.5 bits with PSQ and 7.1 to 7.4 with BHQ at initialization, 5.1 to 6.4 and 3.8 to 5.0 from epoch
5) come from a comparable network; an interval is inside of them, outside, or, if it holds an end, open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import networks
from analysis.estimates import crossing, mean_interval
from analysis.expected import judged, place
from analysis.gradients import incoming
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.experiment import Experiment
from fqtstats.quantizers import quantizer
from fqtstats.report import style
from fqtstats.results import TOTAL
from fqtstats.schema import Column

Vector = npt.NDArray[np.float64]

_MEASURED = (
    Column("quantizer", "str", "", "that is compared with PTQ at 8 bits"),
    Column("layer", "str", "", f'at which the gradients arrive; "{TOTAL}": all layers, variances summed'),
    Column("bits", "float64", "bit", "for equal variance, 1 to 8"),
    Column("outside", "bool", "", "whether no bits tried give equal variance; bits is then the nearest"),
)
_CASE = (Column("model", "str", "", "network"), Column("seed", "int64", "1", "of network and minibatch"))
EPOCHS = (*_CASE, Column("epoch", "int64", "1", "after which the network is; 0: as initialized"), *_MEASURED)
DEFAULT = (*_CASE, *_MEASURED)

FEWER = 2.5
"""Bits that BHQ is expected to save."""
EXPECTED = {
    ("psq", "at initialization"): (7.2, 7.5),
    ("bhq", "at initialization"): (7.1, 7.4),
    ("psq", "from epoch 5"): (5.1, 6.4),
    ("bhq", "from epoch 5"): (3.8, 5.0),
}
"""Bits for equal variance in a comparable network."""


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    model: str = "preact_resnet20"
    quantizers: tuple[str, ...] = ("psq", "bhq", "bhq-adaptive")
    bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    epochs: tuple[int, ...] = (0, 1, 2, 3, 5, 7, 10)
    seeds: int = 5


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row per seed, epoch, quantizer and layer."""

    def of_network(network: Experiment) -> Iterator[dict[str, object]]:
        gradients = incoming(network)
        reference = quantizer("ptq", bits=8)
        # Of each layer and, last, of all of them together.
        wanted = _with_sum([float(reference.variance(g).sum()) for g in gradients.values()])
        for name in settings.quantizers:
            grids = [quantizer(name, bits=bits) for bits in settings.bits]
            found = np.array([_with_sum([float(q.variance(g).sum()) for g in gradients.values()]) for q in grids])
            for layer, variances, level in zip((*gradients, TOTAL), found.T, wanted, strict=True):
                yield {"quantizer": name, "layer": layer, **equal_bits(settings.bits, variances, level)}

    def of_seed(model: str, seed: int) -> Iterator[dict[str, object]]:
        for epoch, network in networks.snapshots(model, seed, settings.epochs):
            for row in of_network(network):
                yield {"epoch": epoch, **row}

    def of_default(model: str, seed: int) -> Iterator[dict[str, object]]:
        return of_network(networks.trained(model, seed))

    cases = [{"model": settings.model, "seed": seed} for seed in range(settings.seeds)]
    return {
        "epochs": parts.every("epochs", cases, of_seed),
        "default": parts.every("default networks", cases, of_default),
    }


def _with_sum(values: list[float]) -> Vector:
    return np.array([*values, sum(values)])


def equal_bits(bits: tuple[int, ...], variances: Vector, level: float) -> dict[str, object]:
    """Where the variances, which fall with the bits, come down to ``level``."""
    if variances[0] <= level:
        return {"bits": float(bits[0]), "outside": True}
    if variances[-1] > level:
        return {"bits": float(bits[-1]), "outside": True}
    return {"bits": crossing(bits, variances, level), "outside": False}


# --- what is said of it -----------------------------------------------------------------------------------------------


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """By epoch (or "default") and quantizer: bits of the network, of the median layer, and rows outside."""
    found = []
    by = [*(["epoch"] if "epoch" in rows else []), "quantizer"]
    for key, own in rows.groupby(by, sort=False):
        total, layers = own[own["layer"] == TOTAL], own[own["layer"] != TOTAL]
        found.append(
            {
                **dict(zip(by, key, strict=True)),
                "network": mean_interval(total["bits"]),
                "layers": mean_interval(layers.groupby("seed")["bits"].median()),
                "outside": int(layers["outside"].sum()),
                "of": len(layers),
            }
        )
    return pd.DataFrame(found)


def read(tables: Tables) -> pd.DataFrame:
    """A row per epoch and quantizer."""
    rows = pd.concat([summary(tables["epochs"]), summary(tables["default"]).assign(epoch="default")])
    return pd.DataFrame(
        {
            "epoch": rows["epoch"].astype(str),
            "quantizer": rows["quantizer"],
            "network": [with_interval(*values) for values in rows["network"]],
            "median layer": [with_interval(*values) for values in rows["layers"]],
            "layers outside 1-8": [f"{row.outside} of {row.of}" for row in rows.itertuples()],
        }
    )


def claims(tables: Tables) -> list[Claim]:
    """Bits that are saved at first and later, and at the end of the default training."""
    rows, seeds = summary(tables["epochs"]), tables["epochs"]["seed"].nunique()
    comparable = tables["epochs"]["model"].iloc[0] == "preact_resnet20"
    told = []
    for (name, when), (low, high) in EXPECTED.items():
        chosen = rows["epoch"] == 0 if when == "at initialization" else rows["epoch"] >= 5
        own = rows[chosen & (rows["quantizer"] == name)]
        if own.empty:
            continue
        estimates = {f"epoch {row.epoch}": row.network for row in own.itertuples()}
        numbers = "; ".join(
            f"epoch {row.epoch}: {with_interval(*row.network)} bits, median layer {with_interval(*row.layers)}"
            for row in own.itertuples()
        )
        text = f"{name}, {when}, has the variance of PTQ at 8 bits at so many bits: {numbers} ({seeds} seeds)"
        told.append(judged(text, estimates, (low, high)) if comparable else Claim(f"{text}."))
    for row in summary(tables["default"]).itertuples():
        saved = tuple(8 - row.network[index] for index in (0, 2, 1))
        text = (
            f"{row.quantizer}, default network at the end of its training: {with_interval(*row.network)} bits, "
            f"{with_interval(*saved)} fewer than PTQ"
        )
        if row.quantizer == "bhq" and comparable and seeds > 1:
            where = place(saved, FEWER, math.inf)
            told.append(
                Claim(
                    f"{text}. Expected: at least {FEWER:g}, with the whole interval: {where}.",
                    {"inside": True, "outside": False, "open": None}[where],
                    "not examined" if where == "outside" else "",
                )
            )
        else:
            told.append(Claim(f"{text}."))
    return told


def draw(tables: Tables) -> dict[str, Figure]:
    """Bits over the epochs, of the network and of the median layer."""
    rows, default = summary(tables["epochs"]), summary(tables["default"])
    epochs = sorted(rows["epoch"].unique())
    figure = style.new_figure(style.COLUMN_WIDTH, 3.9)
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    end = epochs[-1] * 1.12
    for ax, part, title in zip(panels, ("network", "layers"), ("summed over the layers", "median layer"), strict=True):
        for index, (name, mark) in enumerate(style.marks(rows["quantizer"].unique()).items()):
            shift = 0.012 * epochs[-1] * (index - 1)
            own = rows[rows["quantizer"] == name]
            _points(ax, own["epoch"] + shift, own[part], mark, "-", name)
            _points(ax, [end + 2 * shift], default.loc[default["quantizer"] == name, part], mark, "", None)
        ax.axhline(8, color=style.GREY, linewidth=0.8)
        ax.axhline(8 - FEWER, color=style.GREY, linewidth=0.8, linestyle=":")
        ax.set(ylabel="bits with the variance\nof PTQ at 8 bits", title=title)
        ax.grid(axis="y")
    for bits, name in ((8.0, "PTQ"), (8 - FEWER, f"{FEWER:g} bits fewer")):
        panels[0].annotate(name, (0.99, bits), (0, 2 if bits < 8 else -7), xycoords=("axes fraction", "data"),
                           textcoords="offset points", ha="right", fontsize=6)  # fmt: skip
    panels[-1].set_xticks([*epochs, end], [*map(str, epochs), "default"])
    panels[-1].set_xlabel("epoch")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, title="means over the seeds with 95 % intervals",
                  title_fontsize=6)  # fmt: skip
    return {"bits_over_epochs": figure}


def _points(ax: Axes, places: object, values: pd.Series, mark: style.Mark, line: str, name: str | None) -> None:
    mean, low, high = np.array(values.to_list()).T
    ax.errorbar(
        places, mean, (mean - low, high - mean), marker=mark.marker, color=mark.color, linestyle=line, elinewidth=0.8,
        label=name,
    )  # fmt: skip


STUDY = Study(
    name="bits_over_epochs",
    question="How many bits match 8-bit PTQ over the epochs?",
    full=Settings(),
    quick=Settings("mlp", ("psq", "bhq"), (1, 3, 5, 8), epochs=(0, 2), seeds=2),
    columns={"epochs": EPOCHS, "default": DEFAULT},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Bits with the variance of PTQ at 8 bits on the same gradients: summed over the layers of the network, and "
    "the median over the layers; means over the seeds, 95 % intervals (Student t). Default: the network of "
    "`fqtstats measure` at the end of its training. Outside: layers of all seeds that count with 1 or 8 bits.",
)

if __name__ == "__main__":
    main(STUDY)
