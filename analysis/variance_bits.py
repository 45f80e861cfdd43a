"""How does the gradient's variance depend on the bits of the input-gradient quantizer, for every quantizer?

Trained networks, one per seed, with a minibatch of each. The weight gradient has the recipe's 8 bits throughout: what
its quantizers (Q1) add does not depend on the bits on the axis, and is told apart from what the input-gradient
quantizers (Q2) add.

A stochastic grid of ``B = 2^b - 1`` steps over a range R has the variance ``f (1 - f) (R / B)^2`` per number. Where the
fractions f do not depend on b, the variance goes with (B^2)^-1: the exponent of B^2 is -1, the slope of the logarithm
of the variance in log(B^2). This is the law, a factor of 4 per bit at large b, 5.4 from 3 to 2 bits, 9 from 2 to 1.
Where numbers are much smaller than the step, f is their size over the step, and the variance goes with the step alone:
the exponent is -1/2. It is fitted for every seed by least squares, and its interval is of the mean over the seeds.

Bits for equal variance: those at which a quantizer's input-gradient variance, summed over the layers, comes down to
that of PTQ at 8 bits on the same gradients; between two numbers of bits the logarithm is interpolated. For PTQ they
are 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from matplotlib.figure import Figure

import fqtstats
from analysis import networks
from analysis.axes import beside, intervals
from analysis.estimates import crossing, geometric_mean, mean_interval
from analysis.known import with_bits
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.report import style
from fqtstats.schema import Column

_SQUARE = "(loss/parameter)^2"
COLUMNS = (
    Column("model", "str", "", "network"),
    Column("seed", "int64", "1", "of network and minibatch"),
    Column("quantizer", "str", "", "input-gradient quantizer"),
    Column("bits", "int64", "bit", "of it"),
    Column("total", "float64", _SQUARE, "variance of all parameters' gradients"),
    Column("input", "float64", _SQUARE, "part of it from the input-gradient quantizers (Q2)"),
    Column("weight", "float64", _SQUARE, "part of it from the weight-gradient quantizers (Q1)"),
    Column("quantized", "float64", "(loss/activation)^2", "exact variance of Q2 on the QAT gradients, over all layers"),
    Column("sampling", "float64", _SQUARE, "variance of one minibatch's gradient"),
    Column("norm_sq", "float64", _SQUARE, "squared norm of the QAT gradient"),
)

GRIDS = ("ptq", "psq", "bhq", "bhq-adaptive", "dorefa")
"""Quantizers with a grid of any number of bits."""

LAW = -1
"""Exponent of B^2."""

MORE = 4
"""Bits from which on the exponent is told alone, too."""

DEFAULT, SAVED = "preact_resnet20", 2.5
"""Network of ``fqtstats measure``, and the bits that BHQ was expected to save there."""

SEQUENCES = 32
"""In a minibatch of text, each of which has as many rows as characters."""


@dataclass(frozen=True)
class Settings:
    """Of the study; ``others`` are quantizers with few widths, ``name@bits``."""

    models: tuple[str, ...] = ("preact_resnet20", "transformer")
    quantizers: tuple[str, ...] = GRIDS
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    others: tuple[str, ...] = ("agp@2", "agp@4", "agp@8", "luq@4", "int4_sr@4")
    seeds: int = 5
    draws: int = 8
    batches: int = 8


def measure(settings: Settings, parts: Parts) -> Tables:
    """One row per network, seed, quantizer and bits."""
    pairs: list[tuple[str, int | None]] = [(name, bits) for name in settings.quantizers for bits in settings.bits]
    pairs += list(map(with_bits, settings.others))

    def of_network(model: str, seed: int) -> Iterator[dict[str, object]]:
        size = SEQUENCES if networks.DATA[model] == "text" else networks.BATCH
        network = networks.trained(model, seed, further=settings.batches, batch_size=size)
        sampling = None
        for quantizer, bits in pairs:
            policy = fqtstats.policies.get(f"statquant-{quantizer}", bits=bits)
            further = network.further if sampling is None else None
            found = fqtstats.measure(
                network.model, network.batch, network.loss, policy, settings.draws, seed, "native", further
            )
            total = found.total()
            sampling = sampling or total["sampling_variance"]
            yield {
                "quantizer": quantizer,
                "bits": bits,
                "total": total["variance"],
                "input": total["variance_input"],
                "weight": total["variance_weight"],
                "quantized": found.rows()["q_input_variance"].sum(),
                "sampling": sampling,
                "norm_sq": total["grad_norm_sq"],
            }

    cases = [{"model": model, "seed": seed} for model in settings.models for seed in range(settings.seeds)]
    return {"variance": parts.every("networks", cases, of_network)}


# --- what is said of it -----------------------------------------------------------------------------------------------


def exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """Fitted exponent of B^2 in the variance per network and quantizer, mean and interval over the seeds.

    ``quantized`` and ``input`` as in the table; ``coarse`` and ``fine`` are those of ``quantized`` between the two
    smallest and the two largest numbers of bits, ``more`` that from :data:`MORE` bits on.
    """
    found = []
    for (model, quantizer), own in rows[rows["quantizer"].isin(GRIDS)].groupby(["model", "quantizer"], sort=False):
        bits = sorted(own["bits"].unique())
        if len(bits) < 2:
            continue
        row: dict[str, object] = {"model": model, "quantizer": quantizer}
        for name, part, chosen in (
            ("quantized", "quantized", bits),
            ("input", "input", bits),
            ("coarse", "quantized", bits[:2]),
            ("fine", "quantized", bits[-2:]),
            ("more", "quantized", [b for b in bits if b >= MORE]),
        ):
            values = [
                _exponent(each["bits"], each[part])
                for _, each in own[own["bits"].isin(chosen)].groupby("seed")
                if len(chosen) > 1
            ]
            row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(values)
        found.append(row)
    return pd.DataFrame(found)


def _exponent(bits: pd.Series, variance: pd.Series) -> float:
    """Slope of log(variance) in log(B^2), by least squares."""
    fit = sm.OLS(np.log(variance), sm.add_constant(2 * np.log(2.0**bits - 1))).fit()
    return float(fit.params.iloc[1])


def equal_bits(rows: pd.DataFrame) -> pd.DataFrame:
    """Bits at which the input-gradient variance is that of PTQ at 8 bits: mean and interval over the seeds.

    A seed of which the variance is below that at all bits tried has none, and the number of such seeds is ``below``.
    """
    found = []
    for model, of_model in rows.groupby("model", sort=False):
        reference = of_model[(of_model["quantizer"] == "ptq") & (of_model["bits"] == 8)].set_index("seed")["quantized"]
        for quantizer, own in of_model[of_model["quantizer"].isin(GRIDS)].groupby("quantizer", sort=False):
            if quantizer == "ptq" or reference.empty:
                continue
            values = [
                crossing(each["bits"], each["quantized"], reference[seed])
                for seed, each in own.sort_values("bits").groupby("seed")
            ]
            known = [value for value in values if not np.isnan(value)]
            mean, low, high = mean_interval(known) if known else (np.nan,) * 3
            found.append(
                {
                    "model": model, "quantizer": quantizer, "seeds": len(values), "without": len(values) - len(known),
                    "bits": mean, "low": low, "high": high,
                }
            )  # fmt: skip
    return pd.DataFrame(found)


def read(tables: Tables) -> pd.DataFrame:
    """A row per network, quantizer and bits; geometric means over the seeds."""
    shown = []
    for (model, quantizer, bits), own in tables["variance"].groupby(["model", "quantizer", "bits"], sort=False):
        row = {"model": model, "quantizer": quantizer, "bits": str(bits)}
        for name, part in (("total", "total"), ("input part", "input"), ("weight part", "weight")):
            row[f"{name} / sampling"] = with_interval(*geometric_mean(own[part] / own["sampling"]), ".2g")
        shown.append(row)
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """The bits that the better quantizers save, and exponents."""
    rows, told = tables["variance"], []
    for row in equal_bits(rows).itertuples():
        saved = with_interval(8 - row.bits, 8 - row.high, 8 - row.low, ".2f")
        missing = f"; {row.without} seeds have less at all bits tried" if row.without else ""
        text = (
            f"{row.model}, {row.quantizer}: {with_interval(row.bits, row.low, row.high, '.2f')} bits have the "
            f"input-gradient variance of PTQ at 8 bits, {saved} fewer ({row.seeds} seeds{missing})"
        )
        holds, because = None, ""
        if row.quantizer == "bhq" and row.model == DEFAULT:
            text += f"; at least {SAVED} fewer were expected"
            holds = True if row.high <= 8 - SAVED else False if row.low > 8 - SAVED else None
            because = "not examined" if holds is False else ""
        elif row.quantizer == "bhq":
            kind = "less than" if row.low > 8 - SAVED else "more than" if row.high < 8 - SAVED else "not told from"
            text += f"; {kind} the {SAVED} that were expected of {DEFAULT} alone"
        told.append(Claim(f"{text}.", holds, because))
    found = exponents(rows)
    found["because"] = [_reason(row) for row in found.to_dict("records")]
    for (model, because), own in found.groupby(["model", "because"], sort=False):
        each = "; ".join(
            f"{row['quantizer']} {_exponent_told(row, 'quantized')}, {_exponent_told(row, 'input')}"
            + (f" ({_ends(row)})" if because else "")
            for row in own.to_dict("records")
        )
        told.append(
            Claim(
                f"{model}: the exponent of B² in the variance of the input-gradient quantizers (law: {LAW}), and in "
                f"what arrives in the parameters' gradients: {each}.",
                False if because else None,
                because,
            )
        )
    return told


def _exponent_told(row: dict[str, float], name: str) -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], ".3f")


def _ends(row: dict[str, float]) -> str:
    told = {"between the fewest bits": "coarse", "between the most": "fine", f"from {MORE} bits on": "more"}
    return ", ".join(
        f"{where} {_exponent_told(row, name)}" for where, name in told.items() if not math.isnan(row[name])
    )


def _reason(row: dict[str, float]) -> str:
    """Why an exponent is not that of the law, as far as the table shows it; "" for one that may be."""
    if row["quantized_low"] <= LAW <= row["quantized_high"]:
        return ""
    if row["more_low"] <= LAW <= row["more_high"]:
        return f"few bits, where the fractions depend on them; from {MORE} bits on it is that of the law"
    if row["quantized_low"] > LAW:
        return "most numbers are smaller than a step (study of codes), which takes the exponent towards -1/2"
    return "the law is the limit of bins so narrow that numbers spread evenly over each"


def draw(tables: Tables) -> dict[str, Figure]:
    """Total variance, and its two parts, against the bits; a panel per network."""
    rows = tables["variance"]
    models = list(dict.fromkeys(rows["model"]))
    return {
        "variance_bits": _panels(rows, models, "total", "variance of all gradients\n/ sampling variance"),
        "parts": _panels(rows, models, "input", "from Q2 (filled), Q1 (hollow)\n/ sampling variance"),
        "equal": _equal(rows),
    }


def _panels(rows: pd.DataFrame, models: list[str], part: str, label: str) -> Figure:
    label += "\n(geometric mean, 95 %)"
    figure = style.new_figure(style.COLUMN_WIDTH, 1.75 * len(models) + 0.5)
    panels = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    marks = style.marks(rows["quantizer"])
    for ax, model in zip(panels, models, strict=True):
        own = rows[rows["model"] == model]
        for index, (name, mark) in enumerate(marks.items()):
            each = own[own["quantizer"] == name]
            place = np.array(sorted(each["bits"].unique())) + beside(index, len(marks), 0.025)
            for column, face in ((part, mark.color), *([("weight", "white")] if part == "input" else [])):
                values = [geometric_mean(of["total" if column == "total" else column] / of["sampling"])
                          for _, of in each.groupby("bits")]  # fmt: skip
                intervals(
                    ax, place, tuple(np.array(values).T), fmt=mark.marker, color=mark.color, markerfacecolor=face,
                    linestyle="-" if len(place) > 1 and name in GRIDS else "", linewidth=0.6,
                    label=name if face == mark.color else None,
                )  # fmt: skip
        ax.axhline(1, color=style.GREY, linewidth=0.8)
        ax.set(yscale="log", ylabel=label, title=model)
        ax.grid(axis="y")
    panels[-1].set(xlabel="bits of the input-gradient quantizer", xticks=sorted(rows["bits"].unique()))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4)
    return figure


def _equal(rows: pd.DataFrame) -> Figure:
    found = equal_bits(rows)
    figure = style.new_figure(style.COLUMN_WIDTH, 1.8)
    ax = figure.subplots()
    marks = style.marks(rows["quantizer"])
    places = []
    for place, row in enumerate(found.itertuples()):
        mark = marks[row.quantizer]
        ax.errorbar(
            row.bits, place, xerr=[[row.bits - row.low], [row.high - row.bits]], fmt=mark.marker, color=mark.color
        )
        places.append(f"{row.model}, {row.quantizer}")
    for at, line, label in ((8, "-", "PTQ"), (8 - SAVED, ":", f"{SAVED} bits fewer,\nexpected of bhq,\n{DEFAULT}")):
        ax.axvline(at, color=style.GREY, linewidth=0.8, linestyle=line)
        ax.annotate(label, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                    fontsize=6, ha="center", va="bottom")  # fmt: skip
    ax.set(
        xlabel="bits for the input-gradient variance\nof PTQ at 8 bits (mean over seeds, 95 %)",
        yticks=range(len(places)),
    )
    ax.set_yticklabels(places)
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.grid(axis="x")
    return figure


STUDY = Study(
    name="variance_bits",
    question="How does the gradient's variance depend on the bits of the input-gradient quantizer?",
    full=Settings(),
    quick=Settings(("mlp",), ("ptq", "bhq"), (2, 8), ("luq@4",), seeds=2, draws=2, batches=2),
    columns={"variance": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Variances as multiples of one minibatch's sampling variance: geometric means over the seeds, 95 % "
    "intervals (Student t). Input and weight part: from the input- and the weight-gradient quantizers.",
)

if __name__ == "__main__":
    main(STUDY)
