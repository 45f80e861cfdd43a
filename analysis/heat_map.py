"""Which layer's quantizer puts variance into which parameter?

By theorem 2 of arXiv 2010.14298 the variance of a parameter's gradient is a sum over the gradient quantizers: the
weight-gradient quantizer (Q1) of its own layer, and the input-gradient quantizers (Q2) of the layers behind it, whose
noise goes on down to it. :func:`fqtstats.profile` estimates every term, by an error with the covariance of the
quantizer's that is sent down from each layer. Trained networks, one per seed, with a minibatch of each.

Terms are told as shares of the network's total variance. They are summed over a layer's parameters; batch and layer
norms and embeddings are parameters of layers of their own, which have no quantizers. Distance: Q2 of the nearest layer
behind a parameter, in forward order and of those whose noise reaches it, is at distance 1.

Few probes are made of each network: the intervals are of the mean over the seeds, and what the probes leave open is in
them. As shares are between 0 and 1, they are made on the scale of the logit. Which source has the largest share is
found by looking at all, and its interval is that of this source alone: the largest of many is on average told as too
large.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import fqtstats
from analysis import networks
from analysis.axes import beside, intervals
from analysis.estimates import mean_share
from analysis.study import Claim, Parts, Study, Tables, main, with_interval
from fqtstats.report import style
from fqtstats.schema import Column

TERMS = (
    Column("model", "str", "", "network"),
    Column("seed", "int64", "1", "of network, minibatch and probes"),
    Column("quantizer", "str", "", "input-gradient quantizer; Q1 is the recipe's, of 8 bits"),
    Column("source", "str", "", "layer of the quantizer"),
    Column("place", "int64", "1", "of that layer among the quantized ones, in forward order from 0"),
    Column("site", "str", "", 'which quantizer: "grad_weight" (Q1) or "grad_input" (Q2)'),
    Column("layer", "str", "", "layer whose parameters' gradients it is in"),
    Column("distance", "int64", "1", "0: Q1 of the layer itself; else of the Q2 that reach the layer, the how manyth"),
    Column("share", "float64", "1", "part of the total variance"),
)

GROUPS = (
    (0, 0, "own Q1"),
    (1, 1, "next\nlayer"),
    (2, 3, "2 or 3\nlater"),
    (4, 7, "4 to 7\nlater"),
    (8, 10**6, "8 or\nmore"),
)
"""Distances: the first and the last of each group, and its name."""

_LOWEST, _HIGHEST = 1e-3, 20
"""Percent of the variance that have the first and the last colour."""

NEAREST = (1, 3, 5)
"""How many of the last layers are told of."""


@dataclass(frozen=True)
class Settings:
    """Of the study; ``sequences`` are those of a minibatch of text."""

    models: tuple[str, ...] = ("preact_resnet20", "transformer")
    quantizers: tuple[str, ...] = ("ptq", "psq", "bhq")
    bits: int = 5
    seeds: int = 5
    probes: int = 4
    sequences: int = 8


def measure(settings: Settings, parts: Parts) -> Tables:
    """All terms."""

    def of_network(model: str, seed: int, quantizer: str) -> Iterator[dict[str, object]]:
        size = settings.sequences if networks.DATA[model] == "text" else networks.BATCH
        network = networks.trained(model, seed, batch_size=size)
        policy = fqtstats.policies.get(f"statquant-{quantizer}", bits=settings.bits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the precision was not reached with so few probes
            found = fqtstats.profile(
                network.model, network.batch, network.loss, policy, seed=seed, most_probes=settings.probes
            )
        order = {name: place for place, name in enumerate(dict.fromkeys(found.sources["layer"]))}
        terms = (
            found.table.groupby(["layer", "source_layer", "source_site"], sort=False)["variance"].sum().reset_index()
        )
        terms["place"] = terms["source_layer"].map(order)
        for layer, own in terms.sort_values("place").groupby("layer", sort=False):
            reaching = 0
            for row in own.itertuples():
                reaching += row.source_site == "grad_input"
                yield {
                    "source": row.source_layer,
                    "place": row.place,
                    "site": row.source_site,
                    "layer": layer,
                    "distance": reaching if row.source_site == "grad_input" else 0,
                    "share": row.variance / found.total["variance"],
                }

    cases = [
        {"model": model, "seed": seed, "quantizer": quantizer}
        for model in settings.models
        for seed in range(settings.seeds)
        for quantizer in settings.quantizers
    ]
    return {"terms": parts.every("networks", cases, of_network)}


# --- what is said of it -----------------------------------------------------------------------------------------------


def layers(rows: pd.DataFrame) -> list[str]:
    """The quantized layers of one network, in forward order."""
    named = rows[["source", "place"]].drop_duplicates().sort_values("place")
    return [str(name) for name in named["source"]]


def by_distance(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of each group of distances: mean over the seeds, and interval."""
    found = []
    for (model, quantizer), own in rows.groupby(["model", "quantizer"], sort=False):
        for low, high, name in GROUPS:
            of_group = own["share"].where(own["distance"].between(low, high), 0.0)
            mean, *ends = mean_share(of_group.groupby(own["seed"]).sum())
            found.append((model, quantizer, name, mean, *ends))
    return pd.DataFrame(found, columns=["model", "quantizer", "group", "share", "low", "high"])


def nearest_the_loss(rows: pd.DataFrame) -> pd.DataFrame:
    """Share that stems from the quantizers of the last k layers: mean over the seeds, and interval."""
    found = []
    for (model, quantizer), own in rows.groupby(["model", "quantizer"], sort=False):
        count = own["place"].max() + 1
        for k in range(1, count + 1):
            of_last = own["share"].where(own["place"] >= count - k, 0.0)
            found.append((model, quantizer, k, *mean_share(of_last.groupby(own["seed"]).sum())))
    return pd.DataFrame(found, columns=["model", "quantizer", "k", "share", "low", "high"])


def to_blame(rows: pd.DataFrame) -> pd.DataFrame:
    """Sources by their share, per network and quantizer: mean over the seeds, interval, and in how many it is first."""
    found = []
    for (model, quantizer), own in rows.groupby(["model", "quantizer"], sort=False):
        shares = own.pivot_table(index=["source", "site"], columns="seed", values="share", aggfunc="sum")
        first = shares.idxmax()
        number = {name: index for index, name in enumerate(layers(own), 1)}
        for (source, site), values in shares.iterrows():
            told = f"{'Q1' if site == 'grad_weight' else 'Q2'} of {source} (layer {number[source]})"
            times = sum(each == (source, site) for each in first)
            found.append((model, quantizer, told, *mean_share(values), times, shares.shape[1]))
    columns = ["model", "quantizer", "source", "share", "low", "high", "first", "seeds"]
    return pd.DataFrame(found, columns=columns).sort_values("share", ascending=False, kind="stable")


def read(tables: Tables) -> pd.DataFrame:
    """The three sources with the largest shares, per network and quantizer."""
    blamed, shown = to_blame(tables["terms"]), []
    for (model, quantizer), _ in tables["terms"].groupby(["model", "quantizer"], sort=False):
        own = blamed[(blamed["model"] == model) & (blamed["quantizer"] == quantizer)].head(3)
        for rank, row in enumerate(own.itertuples(), 1):
            share = with_interval(100 * row.share, 100 * row.low, 100 * row.high)
            shown.append(
                {"model": model, "quantizer": quantizer, "rank": str(rank), "source": row.source, "share %": share,
                 "first in": f"{row.first} of {row.seeds}"}
            )  # fmt: skip
    return pd.DataFrame(shown)


def claims(tables: Tables) -> list[Claim]:
    """The form of the matrix, where variance comes from, and which layer is to blame."""
    rows = tables["terms"]
    before, many = 0, 0
    for _, own in rows.groupby("model", sort=False):
        order = {name: place for place, name in enumerate(layers(own))}
        target = own["layer"].map(order)  # norms and embeddings have no place
        wrong = (own["place"] < target) | ((own["site"] == "grad_weight") & (own["place"] != target) & target.notna())
        before, many = before + int(wrong.sum()), many + len(own)
    told = [
        Claim(
            f"The matrix is triangular: of {many} terms {before} stem from a layer before the one that they are in, "
            "and Q1 reaches no parameters but its layer's.",
            before == 0,
        )
    ]
    distance, nearest, blamed = by_distance(rows), nearest_the_loss(rows), to_blame(rows)
    for (model, quantizer), own in rows.groupby(["model", "quantizer"], sort=False):
        groups, last, sources = (
            table[(table["model"] == model) & (table["quantizer"] == quantizer)]
            for table in (distance, nearest, blamed)
        )
        cells = ", ".join(f"{_percent(row)} % {_told(row.group)}" for row in groups.itertuples() if row.share > 0)
        told.append(Claim(f"{model}, {quantizer}: of the variance stems {cells}."))
        count = own["place"].max() + 1
        ends = "; ".join(
            f"{'layer' if row.k == 1 else f'{row.k} layers'} {_percent(row)} %"
            for row in last[last["k"].isin(NEAREST) & (last["k"] < count)].itertuples()
        )
        told.append(Claim(f"{model}, {quantizer}: from the quantizers of the last {ends}; there are {count} layers."))
        worst = next(sources.itertuples())
        told.append(
            Claim(
                f"{model}, {quantizer}: the largest of {len(sources)} shares is that of {worst.source}, "
                f"{_percent(worst)} % (the interval is of this source alone, which was chosen by looking at all; first "
                f"in {worst.first} of {worst.seeds} networks)."
            )
        )
    return told


def _told(group: str) -> str:
    return {"own Q1": "from the layer's own Q1", "next\nlayer": "from Q2 of the next layer"}.get(
        group, f"from Q2 {' '.join(group.split())} layers later".replace("later layers later", "layers later")
    )


def _percent(row: object) -> str:
    share, low, high = (100 * getattr(row, name) for name in ("share", "low", "high"))
    return with_interval(share, low, high)


def draw(tables: Tables) -> dict[str, Figure]:
    """A heat map of all networks; where the variance comes from, by distance and from the last layers."""
    rows = tables["terms"]
    return {"heat_map": _heat_map(rows), "distance": _distance(rows), "nearest": _nearest(rows)}


def _heat_map(rows: pd.DataFrame) -> Figure:
    models, quantizers = (list(dict.fromkeys(rows[column])) for column in ("model", "quantizer"))
    figure = style.new_figure(style.COLUMN_WIDTH, 1.35 * len(models) + 0.5)
    panels = figure.subplots(len(models), len(quantizers), squeeze=False)
    for model, line in zip(models, panels, strict=True):
        own = rows[rows["model"] == model]
        place = {name: index for index, name in enumerate(layers(own))}
        shown = own[own["layer"].isin(list(place))]
        mean = 100 * shown.groupby(["quantizer", "source", "layer"])["share"].sum() / own["seed"].nunique()
        for quantizer, ax in zip(quantizers, line, strict=True):
            values = np.full((len(place), len(place)), np.nan)
            for (source, layer), share in mean.loc[quantizer].items():
                values[place[source], place[layer]] = share
            ax.set_facecolor(style.PALE)
            edges = (0.5, len(place) + 0.5)
            image = ax.imshow(
                np.ma.masked_invalid(np.maximum(values, _LOWEST)), norm=LogNorm(_LOWEST, _HIGHEST), cmap="viridis",
                interpolation="nearest", aspect="auto", extent=(*edges, *reversed(edges)),
            )  # fmt: skip
            ticks = [1, (len(place) + 1) // 2, len(place)]
            ax.set(title=quantizer if model == models[0] else "", xticks=ticks, yticks=ticks)
            if ax is not line[0]:
                ax.tick_params(labelleft=False)
        line[0].set_ylabel(f"{model}\nlayer of the quantizer")
    panels[-1][len(quantizers) // 2].set_xlabel("layer of the parameter (number, in forward order)")
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), pad=0.01, aspect=30, extend="both", extendfrac=0.03)
    bar.set_label("share of the variance (%)")
    bar.outline.set_visible(False)
    return figure


def _percents(own: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares and the ends of their intervals; where there are none, the share."""
    mean, low, high = (100 * own[column].fillna(own["share"]).to_numpy() for column in ("share", "low", "high"))
    return mean, low, high


def _distance(rows: pd.DataFrame) -> Figure:
    found = by_distance(rows)
    models = list(dict.fromkeys(rows["model"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 1.25 * len(models) + 0.6)
    panels = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    marks = style.marks(rows["quantizer"])
    for model, ax in zip(models, panels, strict=True):
        for index, (name, mark) in enumerate(marks.items()):
            own = found[(found["model"] == model) & (found["quantizer"] == name)]
            places = np.arange(len(own)) + beside(index, len(marks), 0.2)
            intervals(ax, places, _percents(own), fmt=mark.marker, color=mark.color, label=name)
        ax.set(title=model, ylabel="share of variance (%),\nmean over seeds, 95 %", ylim=(-2, None))
        ax.grid(axis="y")
    panels[-1].set_xticks(range(len(GROUPS)), [name for _, _, name in GROUPS])
    panels[-1].set_xlabel("Q1, or Q2 of a layer behind the parameter")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(marks))
    return figure


def _nearest(rows: pd.DataFrame) -> Figure:
    found = nearest_the_loss(rows)
    models = list(dict.fromkeys(rows["model"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 1.25 * len(models) + 0.6)
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    marks = style.marks(rows["quantizer"])
    for model, ax in zip(models, panels, strict=True):
        for index, (name, mark) in enumerate(marks.items()):
            own = found[(found["model"] == model) & (found["quantizer"] == name)]
            places = own["k"].to_numpy() + beside(index, len(marks), 0.12)
            intervals(
                ax, places, _percents(own), fmt=mark.marker, linestyle="-", color=mark.color, markersize=2,
                linewidth=0.6, elinewidth=0.6, label=name,
            )  # fmt: skip
        ax.set(title=model, ylabel="share of variance (%),\nmean over seeds, 95 %", ylim=(0, 105))
        ax.grid(axis="both")
        ax.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("from the quantizers of the last k layers: k")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(marks))
    return figure


STUDY = Study(
    name="heat_map",
    question="Which layer's quantizer puts variance into which parameter?",
    full=Settings(),
    quick=Settings(("mlp",), seeds=2),
    columns={"terms": TERMS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="The quantizers that put in most: share of the variance of all gradients, mean over the seeds, 95 % "
    "interval (Student t on the scale of the logit) of this source alone, though it was chosen as one of the largest; "
    "in how many networks it is the first.",
)

if __name__ == "__main__":
    main(STUDY)
