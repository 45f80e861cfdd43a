"""Which codes and which bin sizes do the quantizers use?

Trained networks, one per seed, with a minibatch of N = 128 samples. The gradient that arrives at some layers is
quantized once by each quantizer, and its codes are counted.

* Entropy: of the histogram of all codes of a layer, in bits per code; at most the bits of the quantizer. It is what an
  ideal code with one table for the layer would need.
* Ends: share of the codes 0 and 2^b - 1. A grid of a row's own has its minimum and maximum there.
* Zero: share of codes that stand for the grid point nearest to zero. PTQ has a point at zero itself.
* Bin size, or step: the distance of two neighbouring grid points. PTQ has one, PSQ one for every row (sample). BHQ has
  one for every row after its transform T; a row i before it has an error of root-mean-square size
  ``sqrt(sum_j (T^-1)_ij^2 step_j^2)`` where every transformed row is off by its step, which is told as its *decoded*
  step. Rows without a range, if any, have none.

Steps are told as shares of PTQ's step on the same gradient, at the same bits. Intervals are of the mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import networks
from analysis.estimates import geometric_mean, mean_interval, mean_share
from analysis.gradients import incoming
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.quantizers import Quantized, quantizer
from fqtstats.random import stream
from fqtstats.report import style
from fqtstats.schema import Column

_CASE = (
    Column("model", "str", "", "network"),
    Column("seed", "int64", "1", "of network, minibatch and rounding"),
    Column("layer", "str", "", "at which the gradient arrives"),
    Column("quantizer", "str", "", "of it"),
    Column("bits", "int64", "bit", "of the codes"),
)
CODES = (
    *_CASE,
    Column("entropy", "float64", "bit", "of the codes"),
    Column("ends", "float64", "1", "share of the lowest and the highest code"),
    Column("zero", "float64", "1", "share of codes of the grid point nearest to zero"),
    Column("unused", "float64", "1", "share of the codes that do not occur"),
)
HISTOGRAM = (
    *_CASE,
    Column("code", "int64", "1", "0 to 2^bits - 1"),
    Column("count", "int64", "1", "how often it occurs"),
)
STEPS = (
    *_CASE[:-1],
    Column("level", "float64", "1", "quantile over the rows: 0 of the smallest step, 1 of the largest; not of PTQ"),
    Column("step", "float64", "1", "quantile of the steps of the rows that are rounded, over PTQ's step"),
    Column("decoded", "float64", "1", "quantile of the decoded steps, over PTQ's step"),
)

LEVELS = np.linspace(0, 1, 33)
"""Of the quantiles that are kept of the steps."""


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    model: str = "preact_resnet20"
    layers: tuple[str, ...] = ("stages.0.0.conv2", "stages.1.1.conv1", "stages.2.2.conv2")
    quantizers: tuple[str, ...] = ("ptq", "psq", "bhq")
    bits: tuple[int, ...] = (4, 8)
    seeds: int = 5


def measure(settings: Settings, parts: Parts) -> Tables:
    """Codes and steps of every network's gradients."""
    cases = [{"model": settings.model, "seed": seed} for seed in range(settings.seeds)]
    pairs = [(name, bits) for name in settings.quantizers for bits in settings.bits]

    def of_codes(model: str, seed: int) -> Iterator[dict[str, object]]:
        for layer, g in _gradients(settings, model, seed):
            for name, bits in pairs:
                found = _encoded(name, bits, g, seed)
                counts = np.bincount(found.codes().flatten().numpy(), minlength=2**bits)
                share = counts / counts.sum()
                case = {"layer": layer, "quantizer": name, "bits": bits}
                yield {
                    **case,
                    "counts": counts.tolist(),
                    "entropy": float(-(share[share > 0] * np.log2(share[share > 0])).sum()),
                    "ends": share[0] + share[-1],
                    "zero": _nearest_to_zero(found),
                    "unused": float((counts == 0).mean()),
                }

    def of_steps(model: str, seed: int) -> Iterator[dict[str, object]]:
        for layer, g in _gradients(settings, model, seed):
            unit = float(_encoded("ptq", settings.bits[0], g, seed).frame.grid.step.double())
            for name in settings.quantizers:
                if name == "ptq":
                    continue
                found = _steps(_encoded(name, settings.bits[0], g, seed))
                rounded, decoded = (np.quantile(steps / unit, LEVELS) for steps in found)
                for level, step, own in zip(LEVELS, rounded, decoded, strict=True):
                    yield {"layer": layer, "quantizer": name, "level": level, "step": step, "decoded": own}

    codes = parts.every("codes", cases, of_codes)
    histogram = codes[[column.name for column in _CASE]].assign(count=codes["counts"]).explode("count")
    histogram["code"] = histogram.groupby(level=0).cumcount()
    return {
        "codes": codes.drop(columns="counts"),
        "histogram": histogram.astype({"count": "int64"}).reset_index(drop=True),
        "steps": parts.every("steps", cases, of_steps),
    }


def _gradients(settings: Settings, model: str, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    found = incoming(networks.trained(model, seed))
    for layer in settings.layers:
        yield layer, found[layer]


def _encoded(name: str, bits: int, g: torch.Tensor, seed: int) -> Quantized:
    found: Quantized = quantizer(name, bits=bits).encode(g, stream(seed, site="grad_input"))  # type: ignore[attr-defined]
    return found


def _nearest_to_zero(found: Quantized) -> float:
    """Share of codes whose number is less than half a step away from zero, as the rows are when they are rounded."""
    grid = found.frame.grid
    near = grid.decode(found.codes().double()).abs() <= grid.step.double() / 2
    return float(near.double().mean())


def _steps(found: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the rows that are rounded, and of the rows as they are decoded; those that there are."""
    step = found.frame.grid.step.double()
    transform = found.frame.transform
    decoded = step if transform is None else transform.inverse_squared(step.square()).sqrt()
    rounded, own = (t.flatten().numpy() for t in (step, decoded))
    return rounded[rounded > 0], own[own > 0]


# --- what is said of it -----------------------------------------------------------------------------------------------


def spreads(steps: pd.DataFrame) -> pd.DataFrame:
    """Largest over smallest step, the largest and the median, per seed, layer and quantizer; rounded and decoded.

    The latter two also over those of PSQ: the largest step, and the median of both kinds.
    """
    found = []
    for keys, own in steps.groupby(["seed", "layer", "quantizer"], sort=False):
        row = dict(zip(("seed", "layer", "quantizer"), keys, strict=True))
        for kind in ("step", "decoded"):
            row[f"{kind}_spread"] = own[kind].max() / own[kind].min()
            row[f"{kind}_largest"], row[f"{kind}_median"] = own[kind].max(), own[kind].median()
        found.append(row)
    table = pd.DataFrame(found)
    psq = table[table["quantizer"] == "psq"].set_index(["seed", "layer"])
    beside = psq.reindex(pd.MultiIndex.from_frame(table[["seed", "layer"]]))
    for kind in ("step", "decoded"):
        for which in ("largest", "median"):
            table[f"{kind}_{which}_of_psq"] = table[f"{kind}_{which}"] / beside[f"step_{which}"].to_numpy()
    return table


def read(tables: Tables) -> pd.DataFrame:
    """A row per layer, quantizer and bits."""
    steps, shown = spreads(tables["steps"]), []
    for (layer, name, bits), own in tables["codes"].groupby(["layer", "quantizer", "bits"], sort=False):
        sizes = steps[(steps["layer"] == layer) & (steps["quantizer"] == name)]
        row = {"layer": layer, "quantizer": name, "bits": str(bits)}
        row["entropy"] = with_interval(*mean_interval(own["entropy"]), ".2f")
        for column in ("ends", "zero", "unused"):
            row[f"{column} %"] = _percent(own[column], ".3g")
        for kind, told in (("step", "step"), ("decoded", "decoded step")):
            row[f"{told}, max / min"] = "" if name == "ptq" else with_interval(*geometric_mean(sizes[f"{kind}_spread"]))
        for which in ("largest", "median"):
            other = name not in ("ptq", "psq")
            value = with_interval(*geometric_mean(sizes[f"decoded_{which}_of_psq"]), ".2g") if other else ""
            row[f"{which} decoded / PSQ's"] = value
        shown.append(row)
    return pd.DataFrame(shown)


def _percent(shares: pd.Series, form: str) -> str:
    mean, low, high = (100 * value for value in mean_share(shares))
    return with_interval(mean, low, high, form)


def claims(tables: Tables) -> list[Claim]:
    """Entropies, what the codes at zero and at the ends take, and the spread of the steps."""
    codes, told = tables["codes"], []
    mean = codes.groupby(["quantizer", "bits", "seed"])[["entropy", "ends", "zero"]].mean()
    names = list(dict.fromkeys(codes["quantizer"]))
    for bits in dict.fromkeys(codes["bits"]):
        parts = []
        for name in names:
            own = mean.loc[name, bits]
            parts.append(
                f"{name.upper()} {with_interval(*mean_interval(own['entropy']), '.2f')} bits, "
                f"{_percent(own['zero'], '.2g')} % of the codes at zero and {_percent(own['ends'], '.2g')} % at the "
                "ends"
            )
        told.append(Claim(f"Entropy of {bits}-bit codes, mean over the layers: {'; '.join(parts)}."))
        for name in names[1:]:
            saved, low, high = mean_interval(mean.loc[name, bits]["entropy"] - mean.loc["ptq", bits]["entropy"])
            told.append(
                Claim(
                    f"At {bits} bits {name.upper()}'s codes have {with_interval(saved, low, high, '.2f')} bits of "
                    "entropy more than PTQ's: rows with grids of their own fill them; PTQ leaves most of its codes to "
                    "few large rows.",
                    bool(low > 0),
                )
            )
    return told + _of_steps(tables["steps"])


def _of_steps(steps: pd.DataFrame) -> list[Claim]:
    """How far the steps of the rows are apart, what BHQ makes of the largest one, and at what price."""
    found = spreads(steps)

    def over_layers(name: str, column: str) -> tuple[float, float, float]:
        logs = np.log(found[found["quantizer"] == name].pivot(index="seed", columns="layer", values=column))
        return geometric_mean(np.exp(logs.mean(axis=1)))

    def of_psq(which: str) -> str:
        own = found[found["quantizer"] == "bhq"].groupby("layer")[which]
        layers = own.apply(lambda values: geometric_mean(values)[0])
        span = f", {layers.min():.2g} to {layers.max():.2g} by layer" if len(layers) > 1 else ""
        return f"{with_interval(*over_layers('bhq', which), '.2g')} times PSQ's{span}"

    rounded, decoded = "step_largest_of_psq", "decoded_largest_of_psq"
    below = [over_layers("bhq", column)[2] < 1 for column in (rounded, decoded)]
    return [
        Claim(
            f"PSQ's largest step is {with_interval(*over_layers('psq', 'step_spread'))} times its smallest, BHQ's "
            f"{with_interval(*over_layers('bhq', 'step_spread'), '.2g')} times after the transform and "
            f"{with_interval(*over_layers('bhq', 'decoded_spread'), '.2g')} times decoded (geometric means over the "
            "layers; the table has each)."
        ),
        Claim(
            "BHQ's largest step is smaller, as large rows are spread over others: after the transform "
            f"{of_psq(rounded)}; decoded {of_psq(decoded)}.",
            True if all(below) else None,
        ),
        Claim(f"The others pay for it: BHQ's median decoded step is {of_psq('decoded_median_of_psq')}."),
    ]


def draw(tables: Tables) -> dict[str, Figure]:
    """Histograms of the codes in the middle one of the layers, and the steps of all rows in the first and the last."""
    codes = tables["histogram"]
    layers = list(dict.fromkeys(codes["layer"]))
    figures = {"codes": _histograms(codes[codes["layer"] == layers[len(layers) // 2]])}
    return {**figures, "steps": _sizes(tables["steps"], list(dict.fromkeys((layers[0], layers[-1]))))}


def _histograms(codes: pd.DataFrame) -> Figure:
    names, widths = (list(dict.fromkeys(codes[column])) for column in ("quantizer", "bits"))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.85 * len(names) + 0.45)
    panels = figure.subplots(len(names), len(widths), sharex="col", sharey="col", squeeze=False)
    marks = style.marks(names)
    for name, line in zip(names, panels, strict=True):
        for bits, ax in zip(widths, line, strict=True):
            own = codes[(codes["quantizer"] == name) & (codes["bits"] == bits)]
            counts = own.pivot(index="code", columns="seed", values="count").to_numpy()
            if name == "ptq":
                counts = np.array([_centred(each) for each in counts.T]).T
            together = _together(bits)
            shares = counts.reshape(-1, together, counts.shape[1]).sum(axis=1) / counts.sum(axis=0)
            mean, low, high = 100 * np.array([mean_share(row) for row in shares]).T
            edges = np.arange(0, 2**bits + 1, together) - 0.5
            color = marks[name].color
            ax.stairs(mean, edges, color=color, linewidth=0.7)
            floor = 1e-3
            ax.stairs(
                np.maximum(high, floor), edges, baseline=np.clip(low, floor, None), fill=True, alpha=0.3, color=color,
                linewidth=0,
            )  # fmt: skip
            ax.set(yscale="log", ylim=(floor, 100))
            ax.grid(axis="y")
            if bits == widths[0]:
                ax.set_ylabel(f"{name}\nshare (%)")
    for bits, top, ax in zip(widths, panels[0], panels[-1], strict=True):
        top.set_title(f"{bits} bits" + (f", {_together(bits)} codes a bar" if _together(bits) > 1 else ""))
        ax.set_xlabel("code")
        ax.set_xticks(np.linspace(0, 2**bits - 1, 4 if bits % 4 == 0 else 2).round())
    figure.align_ylabels(panels[:, 0])
    figure.suptitle(
        f"{codes['layer'].iloc[0]}: share of the codes in a bar, mean over seeds\nand 95 % interval (band); ptq's zero "
        "is in the middle", fontsize=7,
    )  # fmt: skip
    return figure


def _together(bits: int) -> int:
    """Codes in a bar: as few as can be seen."""
    return max(1, 2**bits // 64)


def _centred(counts: np.ndarray) -> np.ndarray:
    """PTQ's counts with the code of zero, the most frequent, in the middle: it is another one in every network."""
    shift = len(counts) // 2 - int(counts.argmax())
    moved = np.roll(counts, shift)
    moved[: max(shift, 0)] = 0  # what came in at the other end
    moved[len(moved) + min(shift, 0) :] = 0
    return moved


def _sizes(steps: pd.DataFrame, layers: list[str]) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 1.2 * len(layers) + 0.5)
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    marks = style.marks(steps["quantizer"])
    for layer, ax in zip(layers, panels, strict=True):
        ax.axhline(1, color=style.marks(["ptq"])["ptq"].color, label="ptq")
        for name, mark in marks.items():
            own = steps[(steps["layer"] == layer) & (steps["quantizer"] == name)]
            _band(ax, own, "step", mark.color, name if name == "psq" else f"{name}, transformed rows", "-")
            if name != "psq":
                _band(ax, own, "decoded", mark.color, f"{name}, decoded", "--")
        ax.set(yscale="log", title=layer, ylabel="step / PTQ's step")
        ax.grid(axis="y")
    panels[-1].set_xlabel("row, by its step (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _band(ax: Axes, own: pd.DataFrame, kind: str, color: str, label: str, line: str) -> None:
    table = own.pivot(index="level", columns="seed", values=kind)
    mean, low, high = np.array([geometric_mean(row) for row in table.to_numpy()]).T
    place = 100 * table.index.to_numpy()
    ax.plot(place, mean, line, color=color, label=label, linewidth=0.9)
    ax.fill_between(place, low, high, color=color, alpha=0.25, linewidth=0)


STUDY = Study(
    name="codes",
    question="Which codes and which bin sizes do the quantizers use?",
    full=Settings(),
    quick=Settings("mlp", ("3",), seeds=2),
    columns={"codes": CODES, "histogram": HISTOGRAM, "steps": STEPS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Entropy of the codes in bits; ends: share of the codes 0 and 2^b - 1, zero: of the grid point nearest to "
    "zero, unused: of codes that do not occur; step: bin size per row, of the smaller number of bits; decoded: of the "
    "rows after BHQ's transform is undone. Means over the seeds (of ratios: geometric), 95 % intervals (Student "
    "t; of shares on the scale of their logits).",
)

if __name__ == "__main__":
    main(STUDY)
