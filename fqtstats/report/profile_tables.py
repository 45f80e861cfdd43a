"""Terminal tables of variance profiles, and the same content as plain data for ``--json``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from fqtstats.profiles import Profile
from fqtstats.report.columns import PROFILES, QUANTITIES, SITES, SOURCES, configuration, layer_name
from fqtstats.report.fitted import FittedColumn, FittedTable, fitted, unquantized
from fqtstats.report.numbers import percent, plain_rows
from fqtstats.schema import Json

__all__ = ["blame", "comparison_table", "source_table", "summary", "to_dict"]

_BAR = 10
"""Characters of the longest bar."""

_BLAMED = 5
"""At most so many sources are named."""

_MEANING_SITE = (
    "Q1 quantizes the gradient for the layer's own weight and bias, Q2 the one that goes on to the layers before"
)
_MEANING_WEIGHT = "share of the weight-gradient quantizers"


def source_table(profile: Profile) -> RenderableType:
    """One row per source and the total; below it what most of the variance comes from."""
    sources = profile.sources
    total = pd.concat([profile.total, pd.Series({"share": math.nan})])
    rows = [*(sources.iloc[index] for index in range(len(sources))), total]
    shares = [float(value) for value in sources["share"]]
    longest = max((share for share in shares if math.isfinite(share)), default=0.0)
    columns = [
        FittedColumn("layer", [Text(layer_name(row)) for row in rows], 100, names=True),
        FittedColumn("site", [*(Text(SITES[site]) for site in sources["site"]), Text("")], 99, meaning=_MEANING_SITE),
        FittedColumn("quantizer", [*(Text(configuration(row)) for row in rows[:-1]), Text("")], 80),
        *fitted(SOURCES, rows),
        FittedColumn("", [*(Text(_bar(share, longest), "blue") for share in shares), Text("")], 60, names=True),
    ]
    count = profile.metadata.get("probes")
    title = f"{profile.label}: gradient variance by quantizer" + (f", {count} probes" if count is not None else "")
    return Group(FittedTable(title, columns, total=True), *_notes(profile))


def comparison_table(profiles: Sequence[Profile]) -> RenderableType:
    """One row per profile: the whole model's variance and what puts most into it."""
    totals = [profile.total for profile in profiles]
    weights = [_weight_share(profile) for profile in profiles]
    columns = [
        FittedColumn("quantizer", [Text(profile.label) for profile in profiles], 100, names=True),
        *fitted(PROFILES, totals),
        FittedColumn("Q1", [Text(percent(share)) for share in weights], 70, meaning=_MEANING_WEIGHT),
        FittedColumn("most from", [Text(next(iter(blame(profile)[0]), "")) for profile in profiles], 90),
    ]
    return FittedTable("gradient variance of the whole model", columns, total=False)


def summary(profiles: Sequence[Profile]) -> RenderableType:
    """What the command line prints: the sources of a single profile, or the comparison of several."""
    return source_table(profiles[0]) if len(profiles) == 1 else comparison_table(profiles)


def to_dict(profiles: Sequence[Profile]) -> dict[str, Json]:
    """The profiles as plain data for ``--json``: strict JSON, with null where a table has NaN."""
    found: list[Json] = [
        {
            "label": profile.label,
            "sources": plain_rows(profile.sources),
            "parameters": plain_rows(profile.parameters),
            "table": plain_rows(profile.table),
            "metadata": profile.metadata,
        }
        for profile in profiles
    ]
    return {"profiles": found}


def _notes(profile: Profile) -> list[Text]:
    total = profile.total
    told = []
    sampled = QUANTITIES["sampling_ratio"].text(total)
    if sampled:
        told.append(Text(f"total over a minibatch's sampling variance: {sampled}"))
    names, part = blame(profile)
    if names:
        count = f"{len(names)} of {len(profile.sources)} quantizers"
        told.append(Text(f"to blame for {100 * part:.0f} % of the variance, {count}: {', '.join(names)}", "bold"))
    reached = profile.metadata.get("precision_reached")
    if profile.metadata.get("converged") is False and isinstance(reached, float):
        asked = profile.metadata.get("precision")
        told.append(Text(f"precision {reached:.2g} instead of {asked}: raise --most-probes", "yellow"))
    return [*told, *unquantized(profile.metadata)]


def blame(profile: Profile) -> tuple[list[str], float]:
    """The sources that make half of the variance, the largest first (some of them, if they are many); their part."""
    names: list[str] = []
    part = 0.0
    for _, row in profile.sources.sort_values("share", ascending=False, kind="stable").iterrows():
        if len(names) == _BLAMED or part >= 0.5 or not row["share"] > 0:
            break
        names.append(f"{SITES[row['site']]} of layer {layer_name(row)} ({100 * row['share']:.1f} %)")
        part += row["share"]
    return names, part


def _bar(share: float, longest: float) -> str:
    """A bar in eighths of a character."""
    if not share > 0:
        return ""
    whole, eighths = divmod(max(1, round(8 * _BAR * share / longest)), 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[eighths].strip())


def _weight_share(profile: Profile) -> float:
    return float(profile.sources["share"][profile.sources["site"] == "grad_weight"].sum())
