"""How many random bits does stochastic rounding need?

A number at the fraction f of a step is rounded up where r random bits are below ``floor(2^r f)``. Its expectation is
too low by ``f - floor(2^r f) / 2^r`` steps: by less than 2^-r, and by half of that on average where fractions are
uniform. All errors have the same sign, so that they add up in sums, where noise averages out.

* Exact: the bias of every element, from the law of the rounding (in float64); its largest and its mean, in steps; and
  the relative bias of sums over the samples (what a bias gradient is), ``||sum_n (E Q(x) - x)|| / ||sum_n x||``. The
  variance relative to the one with 24 random bits.
* Measured: the mean over elements and draws of what the codes are too low by, with its 95 % interval (Student t over
  the draws).
* Ladder: numbers at f = 2^-k. With r < k random bits they are never rounded up: the bias is all of f.
* Networks: the squared bias of the gradient of all parameters relative to its squared norm, estimated without bias from
  draws (:func:`fqtstats.measure`), with r random bits in all gradient quantizers, PSQ for the input gradients and PCQ
  at 8 bits for the weight gradients; and exact, of the last layer's weight, whose gradient has seen no other quantizer.

A bias of beta steps in decisions with a standard deviation of sigma steps is found with false-alarm rate alpha and
power p by a mean over ``((z_(1 - alpha/2) + z_p) sigma / beta)^2`` decisions. Sigma and beta are told as measured here.

Trained networks, one per seed; intervals are of the mean over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.stats
import torch
from matplotlib.figure import Figure

import fqtstats
from analysis import networks
from analysis.estimates import LEVEL, geometric_mean, mean_interval
from analysis.gradients import incoming, weight_products
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.quantizers import Quantized, quantizer
from fqtstats.random import stream
from fqtstats.report import style
from fqtstats.rounding import up_probability
from fqtstats.schema import Column

_CASE = (
    Column("seed", "int64", "1", "of network, minibatch and draws"),
    Column("layer", "str", "", "at which the gradient arrives"),
    Column("quantizer", "str", "", "of it"),
    Column("bits", "int64", "bit", "of the codes"),
    Column("random_bits", "int64", "bit", "of every decision"),
)
EXACT = (
    *_CASE,
    Column("largest", "float64", "step", "largest bias of an element, downwards"),
    Column("mean", "float64", "step", "mean bias of the elements, downwards"),
    Column("noise", "float64", "step", "root of the mean variance of the elements"),
    Column("sums", "float64", "1", "relative bias of sums over the samples"),
    Column("variance", "float64", "1", "variance over that with 24 random bits"),
    Column("elements", "int64", "1", "of the gradient"),
)
DRAWN = (
    *_CASE,
    Column("bias", "float64", "step", "mean over elements and draws, downwards"),
    Column("error", "float64", "step", "its standard error, from the draws"),
    Column("exact", "float64", "step", "the exact bias of the same"),
    Column("draws", "int64", "1", "of the gradient"),
)
LADDER = (
    Column("random_bits", "int64", "bit", "of every decision"),
    Column("k", "int64", "1", "the fraction is 2^-k"),
    Column("bias", "float64", "step", "exact, downwards"),
    Column("probed", "float64", "step", "the same, by probing the quantizer (fqtstats.exact_mean)"),
)
NETWORK = (
    Column("seed", "int64", "1", "of network, minibatch and draws"),
    Column("random_bits", "int64", "bit", "of every decision in every gradient quantizer"),
    Column("bias_sq", "float64", "1", "unbiased estimate of the squared bias, over the squared norm"),
    Column("variance", "float64", "1", "variance of a draw, over the squared norm"),
    Column("last", "float64", "1", "exact relative bias (not squared) of the last layer's weight gradient"),
)

ALPHA, POWER = 1e-6, 0.9
FULL = 24
RUNGS = 16


@dataclass(frozen=True)
class Settings:
    """Of the study; ``draws`` and ``drawn_bits`` are of single tensors, ``network_draws`` of whole gradients."""

    model: str = "preact_resnet20"
    layers: tuple[str, ...] = ("stages.1.1.conv1", "stages.2.2.conv2")
    quantizers: tuple[str, ...] = ("ptq", "psq", "bhq")
    bits: tuple[int, ...] = (2, 4, 8)
    random_bits: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 16, FULL)
    seeds: int = 3
    draws: int = 8
    network_random_bits: tuple[int, ...] = (1, 4, 8, FULL)
    network_bits: int = 4
    network_draws: int = 8


def measure(settings: Settings, parts: Parts) -> Tables:
    """The four tables."""
    seeds = [{"seed": seed} for seed in range(settings.seeds)]

    def gradients(seed: int) -> dict[str, torch.Tensor]:
        found = incoming(networks.trained(settings.model, seed))
        return {layer: found[layer] for layer in settings.layers}

    def exact(seed: int) -> Iterator[dict[str, object]]:
        for layer, g in gradients(seed).items():
            x = g.double()
            total = x.sum(0).norm()
            for name in settings.quantizers:
                for bits in settings.bits:
                    y = _coordinates(x, quantizer(name, bits=bits).encode(x, stream()))  # type: ignore[attr-defined]
                    variance = float(quantizer(name, bits=bits, random_bits=FULL).variance(x).sum())
                    for r in settings.random_bits:
                        q = quantizer(name, bits=bits, random_bits=r)
                        low, up = up_probability(y, r)
                        bias = y - low - up
                        yield {
                            "layer": layer,
                            "quantizer": name,
                            "bits": bits,
                            "random_bits": r,
                            "largest": float(bias.max()),
                            "mean": float(bias.mean()),
                            "noise": math.sqrt(float((up * (1 - up)).mean())),
                            "sums": float((q.mean(x) - x).sum(0).norm() / total),
                            "variance": float(q.variance(x).sum()) / variance,
                            "elements": x.numel(),
                        }

    def drawn(seed: int) -> Iterator[dict[str, object]]:
        for layer, g in gradients(seed).items():
            for bits in settings.bits:
                for r in settings.random_bits:
                    encoded = quantizer("psq", bits=bits, random_bits=r).encode_input(g)  # type: ignore[attr-defined]
                    found = [encoded(stream(seed, site="random_bits", draw=draw)) for draw in range(settings.draws)]
                    y = _coordinates(g, found[0])
                    means = [float((y - one.codes()).double().mean()) for one in found]
                    low, up = up_probability(y, r)
                    yield {
                        "layer": layer,
                        "quantizer": "psq",
                        "bits": bits,
                        "random_bits": r,
                        "bias": np.mean(means),
                        "error": np.std(means, ddof=1) / math.sqrt(len(means)),
                        "exact": float((y.double() - low - up).mean()),
                        "draws": settings.draws,
                    }

    def ladder(random_bits: int) -> Iterator[dict[str, object]]:
        q = quantizer("psq", bits=4, random_bits=random_bits)
        rungs = 1 + 2.0 ** -torch.arange(1, RUNGS + 1)
        x = torch.cat([torch.tensor([0.0, 15.0]), rungs]).view(1, -1)  # a step is 1
        mean, probed = q.mean(x), fqtstats.exact_mean(q, x)
        for k in range(1, RUNGS + 1):
            yield {"k": k, "bias": float(x[0, k + 1] - mean[0, k + 1]), "probed": float(x[0, k + 1] - probed[0, k + 1])}

    def of_network(seed: int, random_bits: int) -> dict[str, object]:
        network = networks.trained(settings.model, seed)
        policy = fqtstats.policies.get("statquant-psq", bits=settings.network_bits)
        policy = replace(
            policy,
            grad_input=quantizer("psq", bits=settings.network_bits, random_bits=random_bits),
            grad_weight=quantizer("pcq", bits=8, random_bits=random_bits),
        )
        total = fqtstats.measure(
            network.model, network.batch, network.loss, policy, settings.network_draws, seed, "native"
        ).total()
        last = next(iter(weight_products(network).values()))  # a backward pass meets the last layer first
        g, x = last.g.double(), last.x.double()
        error = quantizer("pcq", bits=8, random_bits=random_bits).mean(g) - g
        return {
            "bias_sq": total["bias_norm_sq"] / total["grad_norm_sq"],
            "variance": total["variance"] / total["grad_norm_sq"],
            "last": float((error.T @ x).norm() / (g.T @ x).norm()),
        }

    cases = [{**case, "random_bits": r} for case in seeds for r in settings.network_random_bits]
    return {
        "exact": parts.every("exact", seeds, exact),
        "drawn": parts.every("drawn", seeds, drawn),
        "ladder": parts.every("ladder", [{"random_bits": r} for r in settings.random_bits], ladder),
        "network": parts.every("networks", cases, of_network),
    }


def _coordinates(x: torch.Tensor, found: Quantized) -> torch.Tensor:
    """Where the numbers lie on their grids, in steps: ``[N, C, S]``, of the transformed rows where there are such."""
    view = x.reshape(found.frame.view)
    transform = found.frame.transform
    y = found.frame.grid.coordinates(view if transform is None else transform.forward(view))
    zero = found.frame.grid.zero
    return y if zero is None else y + zero


# --- what is said of it -----------------------------------------------------------------------------------------------


_BY = ["quantizer", "bits", "random_bits"]


def over_seeds(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over the seeds of the mean over the layers, and its interval."""
    found = []
    for keys, own in rows.groupby(_BY, sort=False):
        of_seed = own.groupby("seed")[column].mean()
        found.append((*keys, *mean_interval(of_seed)))
    return pd.DataFrame(found, columns=[*_BY, "mean", "low", "high"])


def needed(rows: pd.DataFrame) -> pd.Series:
    """Decisions to find the mean bias of each row by sampling."""
    z = scipy.stats.norm.ppf(1 - ALPHA / 2) + scipy.stats.norm.ppf(POWER)
    return (z * rows["noise"] / rows["mean"]) ** 2


def read(tables: Tables) -> pd.DataFrame:
    """A row per quantizer, bits and random bits; of the network beside the quantizer that its input gradients have."""
    rows, network, shown = tables["exact"], tables["network"], []
    parts = {name: over_seeds(rows, name).set_index(_BY) for name in ("mean", "sums", "variance")}
    decisions = rows.assign(needed=needed(rows)).groupby(_BY)["needed"].median()
    for key in parts["mean"].index:
        name, bits, r = key
        row = {"quantizer": name, "bits": str(bits), "random bits": str(r)}
        for column, told in (("mean", "bias, steps"), ("sums", "bias of sums"), ("variance", "variance ratio")):
            form = ".4f" if column == "variance" else ".2g"
            row[told] = with_interval(*parts[column].loc[key, ["mean", "low", "high"]], form)
        row["decisions"] = f"{decisions[key]:.1e}"
        own = network[(network["random_bits"] == r) & (name == "psq") & (bits == _middle(rows))]
        row["network: bias² / norm²"] = with_interval(*mean_interval(own["bias_sq"]), ".2g") if len(own) else ""
        row["variance / norm²"] = with_interval(*mean_interval(own["variance"]), ".2g") if len(own) else ""
        row["last layer: bias"] = with_interval(*geometric_mean(own["last"]), ".2g") if len(own) else ""
        shown.append(row)
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """The worst case, typical biases, what they do to sums and networks, and what it takes to see them."""
    rows, drawn, ladder, network = (tables[name] for name in ("exact", "drawn", "ladder", "network"))
    worst = rows["largest"] * 2.0 ** rows["random_bits"]
    typical = rows["mean"] * 2.0 ** rows["random_bits"]
    lost = ladder["k"] > ladder["random_bits"]
    expected = np.where(lost, 2.0 ** -ladder["k"], 0.0)
    apart = float((ladder["bias"] - ladder["probed"]).abs().max())
    told = [
        Claim(
            f"No element's bias reaches 2^-r steps: the largest of {len(rows)} cases falls short of that by a share of "
            f"{1 - worst.max():.1g}.",
            bool((worst < 1).all() and (rows["largest"] >= 0).all()),
        ),
        Claim(
            f"The mean bias is half of that where fractions are uniform: {typical.median():.3f} times 2^-r in the "
            f"median of the cases, from {typical.min():.3f} to {typical.max():.3f}."
        ),
        Claim(
            f"A fraction of 2^-k is lost with fewer than k random bits, and exact with k: all {len(ladder)} rungs; "
            f"probing the quantizer gives the same to {apart:.1g} steps.",
            bool(np.allclose(ladder["bias"], expected, rtol=0, atol=1e-12) and apart < 1e-9),
        ),
        _of_draws(drawn),
    ]
    told.append(_of_sums(rows))
    with_8 = rows[rows["random_bits"] == 8]
    if len(with_8):
        over = with_8[~with_8["variance"].between(0.99, 1.01)]
        told.append(
            Claim(
                f"With 8 random bits the variance is within 1 % of that with 24: from {with_8['variance'].min():.4f} "
                f"to {with_8['variance'].max():.4f} of it in {len(with_8)} cases"
                + (f"; {len(over)} are farther off ({_which(over)})." if len(over) else "."),
                over.empty,
                ""
                if over.empty
                else "a number closer than 2^-8 steps below a grid point goes up with probability 1 - 2^-8, not with "
                "nearly 1, and has the variance of that; on PTQ's coarse steps many numbers lie that close below 0",
            )
        )
    return [*told, _of_network(network), _of_sampling(rows)]


def _which(rows: pd.DataFrame) -> str:
    """Quantizers and their bits."""
    bits = {name: sorted(set(own["bits"])) for name, own in rows.groupby("quantizer", sort=False)}
    return "; ".join(f"{name} at {', '.join(map(str, known))} bits" for name, known in bits.items())


ENOUGH = 1e-3
"""Relative bias of sums that is called small."""


def _of_sums(rows: pd.DataFrame) -> Claim:
    """The least random bits from which on the interval of the bias is below ``ENOUGH``."""
    found = []
    for name, own in over_seeds(rows, "sums").groupby("quantizer", sort=False):
        least = []
        for bits, of_bits in own.groupby("bits"):
            too_many = of_bits.loc[of_bits["high"] >= ENOUGH, "random_bits"].max()
            enough = of_bits.loc[~(of_bits["random_bits"] <= too_many), "random_bits"]
            least.append(f"{enough.min() if len(enough) else 'none'} at {bits} bits")
        found.append(f"{name} {', '.join(least)}")
    chosen = over_seeds(rows[(rows["quantizer"] == "psq") & (rows["bits"] == _middle(rows))], "sums")
    cells = ", ".join(
        f"{with_interval(row.mean, row.low, row.high, '.2g')} with {row.random_bits}"
        for row in chosen[chosen["random_bits"].isin((1, 8, 16, FULL))].itertuples()
    )
    return Claim(
        f"The relative bias of sums over the samples is below {ENOUGH:.1%} with its whole interval from so many random "
        f"bits on, of those that were tried: {'; '.join(found)}. Of psq at {_middle(rows)} bits it is {cells} random "
        "bits; of the others: see the table."
    )


def _of_draws(drawn: pd.DataFrame) -> Claim:
    limit = scipy.stats.t.ppf(1 - (1 - LEVEL) / (2 * len(drawn)), drawn["draws"] - 1)
    far = (drawn["bias"] - drawn["exact"]).abs()
    apart = far / drawn["error"]
    return Claim(
        f"Measured and exact bias agree in {len(drawn)} cases: the largest difference is {far.max():.1e} steps, and "
        f"the largest t value {apart.max():.2f} (Bonferroni's limit at 5 % in all: {limit.max():.2f}).",
        bool((apart < limit).all()),
    )


def _of_network(network: pd.DataFrame) -> Claim:
    cells = [
        f"{with_interval(*mean_interval(own['bias_sq']), '.2g')} with {r} "
        f"({with_interval(*geometric_mean(own['last']), '.2g')})"
        for r, own in network.groupby("random_bits")
    ]
    full = mean_interval(network.loc[network["random_bits"] == FULL, "bias_sq"])
    limit = f" With {FULL} it is below {full[2]:.2g} (upper end), which does not show that there is no bias."
    return Claim(
        "Whole gradient of the network: squared bias / squared norm (in brackets the exact relative bias, not squared, "
        f"of the last layer's weight gradient) is {'; '.join(cells)} random bits.{limit if full[2] > 0 else ''}"
    )


def _of_sampling(rows: pd.DataFrame) -> Claim:
    found = rows.assign(needed=needed(rows)).groupby("random_bits")["needed"].median()
    cells = ", ".join(f"{found[r]:.1e} with {r}" for r in found.index if r in (1, 4, 8, 12, 16, FULL))
    return Claim(
        f"To find the bias by sampling (false alarms {ALPHA:g}, power {POWER:g}) takes ((z + z') σ / β)² decisions: "
        f"{cells} random bits (median of the cases)."
    )


def draw(tables: Tables) -> dict[str, Figure]:
    """Bias per step and of sums against the random bits; the ladder."""
    return {"bias": _bias(tables), "ladder": _ladder(tables["ladder"])}


def _bias(tables: Tables) -> Figure:
    rows, drawn, network = tables["exact"], tables["drawn"], tables["network"]
    figure = style.new_figure(style.COLUMN_WIDTH, 4.2)
    top, bottom = figure.subplots(2, 1, sharex=True)
    r = np.array(sorted(rows["random_bits"].unique()))
    top.plot(r, 2.0**-r, "--", color=style.GREY, label="worst case, $2^{-r}$")
    tones = dict(zip(dict.fromkeys(rows["bits"]), (style.SKY, style.BLUE, style.INK), strict=False))
    exact = over_seeds(rows[rows["quantizer"] == "psq"], "mean")
    for index, (bits, color) in enumerate(tones.items()):
        own = exact[exact["bits"] == bits].sort_values("random_bits")
        top.plot(own["random_bits"], own["mean"], "-", color=color, label=f"psq, {bits} bits, exact")
        seen = drawn[drawn["bits"] == bits].groupby("random_bits")[["bias", "error"]].agg(
            bias=("bias", "mean"), error=("error", lambda e: math.sqrt((e**2).sum()) / len(e))
        )  # fmt: skip
        seen = seen[seen["bias"] > 2 * seen["error"]]
        top.errorbar(
            seen.index + 0.25 * (index - 1), seen["bias"], 1.96 * seen["error"], fmt="o", color=color,
            markerfacecolor="white", elinewidth=0.8,
            label="measured, if above 2 standard errors" if index == len(tones) - 1 else None,
        )  # fmt: skip
    top.set(yscale="log", ylabel="bias (steps; bars: 95 %)")
    top.legend(loc="lower left")
    marks = style.marks(rows["quantizer"])
    for index, (name, mark) in enumerate(marks.items()):
        own = over_seeds(rows[(rows["quantizer"] == name) & (rows["bits"] == _middle(rows))], "sums")
        place = own["random_bits"] + 0.2 * (index - 1)
        bottom.errorbar(
            place, own["mean"], (own["mean"] - own["low"], own["high"] - own["mean"]), fmt=mark.marker,
            color=mark.color, linestyle="-", elinewidth=0.8, label=f"sums, {name}, {_middle(rows)} bits",
        )  # fmt: skip
    for index, (column, marker, label) in enumerate(
        (("bias_sq", "P", "whole gradient, from draws, if above 0"), ("last", "x", "last layer, exact"))
    ):
        cells = []
        for bits, own in network.groupby("random_bits"):
            values = (
                np.sqrt(np.clip(mean_interval(own[column]), 0, None))
                if column == "bias_sq"
                else geometric_mean(own[column])
            )
            cells.append((bits, *values))
        place, mean, low, high = np.array(cells).T
        shown = mean > 0 if column == "last" else low > 0
        mean, low, high, place = (v[shown] for v in (mean, low, high, place))
        bottom.errorbar(
            place + 0.3 * (index + 1), mean, (mean - low, high - mean), fmt=marker, color=style.WINE, elinewidth=0.8,
            label=label,
        )  # fmt: skip
    bottom.set(yscale="log", xlabel="random bits r", ylabel="relative bias (bars: 95 %)", xticks=r)
    bottom.legend(loc="lower left")
    for ax in (top, bottom):
        ax.grid(axis="y")
    return figure


def _middle(rows: pd.DataFrame) -> int:
    bits = sorted(rows["bits"].unique())
    return int(bits[len(bits) // 2])


def _ladder(rows: pd.DataFrame) -> Figure:
    figure = style.new_figure(style.COLUMN_WIDTH, 1.9)
    ax = figure.subplots()
    chosen = [r for r in dict.fromkeys(rows["random_bits"]) if r < RUNGS][::2]
    marks = style.marks([f"r = {r}" for r in chosen])
    for r, (label, mark) in zip(chosen, marks.items(), strict=True):
        own = rows[rows["random_bits"] == r]
        ax.plot(own["k"], own["bias"], mark.marker, linestyle="-", color=mark.color, linewidth=0.6, label=label)
    ax.set(yscale="symlog", xlabel="fraction $2^{-k}$ of a step: k", ylabel="bias (steps)", ylim=(-1e-6, 1))
    ax.set_yscale("symlog", linthresh=2.0**-RUNGS / 2)
    ax.set_yticks([0, 1e-4, 1e-2, 1], ["0", "$10^{-4}$", "$10^{-2}$", "1"])
    ax.minorticks_off()
    ax.grid(axis="y")
    ax.legend(loc="upper right", ncols=2)
    return figure


STUDY = Study(
    name="random_bits",
    question="How many random bits does stochastic rounding need?",
    full=Settings(),
    quick=Settings("mlp", ("3",), ("psq",), (4,), (1, 4, 8, FULL), 2, 8, (1, FULL)),
    columns={"exact": EXACT, "drawn": DRAWN, "ladder": LADDER, "network": NETWORK},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Exact bias per element, and relative bias of sums over the samples; variance over that with 24 random "
    "bits. Means over the seeds, 95 % intervals (Student t). Decisions: roundings to find the bias by sampling. "
    "Network: of the gradient of all parameters, with PSQ for the input gradients, from draws; last layer: exact "
    "relative bias (not squared) of its weight gradient.",
)

if __name__ == "__main__":
    main(STUDY)
