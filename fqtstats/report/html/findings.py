"""What was found, in words: one finding per configuration and question, by the rules of the terminal tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fqtstats.profiles import Profile
from fqtstats.report import tables
from fqtstats.report.fitted import plain
from fqtstats.results import TOTAL, Configuration, Result

__all__ = ["RULES", "Finding", "findings", "of_profile", "overall"]

_SYMBOLS = {"good": "✓", "bad": "✗", "caution": "!", "unknown": "?", "fact": "→"}
_WORST_FIRST = ("bad", "caution", "unknown", "good")
_BLAMED = 5
"""At most so many sources are named."""

_NAMED = 4
"""At most so many configurations are named."""

RULES = (
    f"A configuration is called biased if any of its p-values is below {tables.FALSE_ALARM:g} divided by their number; "
    f"by chance, that happens to at most {100 * tables.FALSE_ALARM:g} % of unbiased ones. A bias that is too small for "
    f"the number of draws may be missed. Rounding is called dependent below {tables.DEPENDENT_ALARM:g} divided by the "
    "same number, and a variance above its end-to-end bound if its whole 95 % interval is."
)
"""How it is decided, with the rates of false alarms."""


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        state: "good", "bad", "caution", "unknown", or "fact" where there is nothing to judge.
        claim: the answer in a few words.
        detail: the numbers behind it.
        short: the one that decides.
    """

    state: str
    claim: str
    detail: str
    short: str = ""

    @property
    def symbol(self) -> str:
        """So that the colour is not needed."""
        return _SYMBOLS[self.state]


def findings(result: Result, configuration: Configuration) -> dict[str, Finding]:
    """Is the gradient unbiased, are variances within their bounds, are roundings independent, and is it noisy?"""
    frame, total = result.select(configuration), result.total(configuration)
    level = tables.bias_level(frame)
    words = {flag for index in range(len(frame)) for flag in tables.flags(frame.iloc[index], level)}
    return {
        "Bias": _bias(frame, level),
        "Variance and bounds": _bounds(result.rows(configuration), total, words),
        "Independence": _independence(frame, total, level),
        "Signal": _signal(total),
    }


def overall(result: Result) -> list[Finding]:
    """Every answer that there is, by question, with the configurations that it holds for; the worst first."""
    every = [findings(result, item) for item in result.configurations]
    count = len(every)
    told = []
    for question in every[0]:
        answers: dict[tuple[str, str], list[str]] = {}
        for item, one in zip(result.configurations, every, strict=True):
            answers.setdefault((one[question].state, one[question].claim), []).append(str(item))
        for state, claim in sorted(answers, key=lambda answer: _WORST_FIRST.index(answer[0])):
            names = answers[state, claim]
            every_one = "both" if count == 2 else f"all {count}"
            which = f"{every_one} configurations" if len(names) == count > 1 else _some(names)
            told.append(Finding(state, claim, which))
    return [*told, *_parity(result)]


def _parity(result: Result) -> list[Finding]:
    """Whether the native backend gave what the simulated one gives, where they were compared."""
    entries = result.metadata.get("configurations") or []
    compared = sum(len(entry.get("parity") or []) for entry in entries)
    if not compared:
        return []
    if tables.parity_ok(result):
        return [Finding("good", "backends agree", f"{compared} products computed natively and simulated")]
    return [Finding("bad", "backends disagree", f"in some of {compared} products, see fqtstats measure --backend both")]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _name(row: pd.Series) -> str:
    if (row["layer"], row["parameter"]) == (TOTAL, ""):
        return "the whole model"
    return f"{row['layer']}.{row['parameter']}".strip(".")


def _bias(frame: pd.DataFrame, level: float) -> Finding:
    tested = frame[frame["bias_p"].notna()]
    if tested.empty:
        return Finding("unknown", "bias not tested", "Nothing was drawn, so there is nothing to test.")
    count = len(tested)
    least = tested.iloc[int(np.argmin(tested["bias_p"]))]
    smallest = f"p = {plain(float(least['bias_p']))}"
    rest = f" ({_name(least)}); the level is {tables.FALSE_ALARM:g} / {count} = {plain(level)}."
    biased = tested[tested["bias_p"] < level]
    if len(biased):
        return Finding(
            "bad", "biased", f"{len(biased)} of {count} tests reject; the smallest {smallest}{rest}", smallest
        )
    return Finding("good", "no bias found", f"The smallest of {count} p-values is {smallest}{rest}", smallest)


def _bounds(rows: pd.DataFrame, total: pd.Series, words: set[tables.Flag]) -> Finding:
    parts: list[str] = []
    short = ""
    own = pd.concat(
        [
            pd.DataFrame({"layer": rows["layer"], "site": site, "ratio": rows[variance] / rows[bound]})
            for site, variance, bound in (
                ("Q1", "q_weight_variance", "q_weight_bound"),
                ("Q2", "q_input_variance", "q_input_bound"),
            )
        ]
    )
    own = own[own["ratio"].map(math.isfinite)]
    if len(own):
        worst = own.loc[own["ratio"] == own["ratio"].max()].iloc[0]
        layer = worst["layer"] or "(model)"
        short = f"{plain(float(worst['ratio']))} × bound"
        parts.append(
            f"A quantizer's exact variance is at most {plain(float(worst['ratio']))} of its bound "
            f"({worst['site']} of {layer})."
        )
    ends = rows[rows["bound_ratio"].notna()]
    if len(ends):
        worst = ends.iloc[int(np.argmax(ends["bound_ratio"]))]
        parts.append(
            f"End to end, a gradient's variance is at most {plain(float(worst['bound_ratio']))} of its bound "
            f"({_name(worst)}); the whole model's is {plain(float(total['bound_ratio']))} of it."
        )
    else:
        parts.append("End-to-end bounds were not computed (--bounds computes them).")
    broken = [flag for flag in (tables.ABOVE_BOUND, tables.ABOVE_END) if flag in words]
    if broken:
        parts += [f"{flag.meaning.capitalize()}." for flag in broken]
        return Finding("bad", "above a bound", " ".join(parts), short)
    if not len(own) and not len(ends):
        return Finding("unknown", "no bounds known", " ".join(parts))
    claim = "within all bounds" if len(ends) else "quantizers within their bounds"
    return Finding("good", claim, " ".join(parts), short)


def _independence(frame: pd.DataFrame, total: pd.Series, level: float) -> Finding:
    tested = frame[frame["own_ratio_p"].notna()]
    if tested.empty:
        told = "No layer has both draws and an exact variance of its own weight-gradient quantizer (--method both)."
        return Finding("unknown", "independence not tested", told)
    level = level * tables.DEPENDENT_ALARM / tables.FALSE_ALARM
    least = tested.iloc[int(np.argmin(tested["own_ratio_p"]))]
    smallest = f"p = {plain(float(least['own_ratio_p']))}"
    parts = [f"The smallest of {len(tested)} p-values is {smallest} ({_name(least)}); the level is {plain(level)}."]
    low, value, high = (float(total[f"own_ratio{end}"]) for end in ("_low", "", "_high"))
    if math.isfinite(value):
        interval = f" (95 %: {plain(low)} to {plain(high)})" if math.isfinite(low) else ""
        parts.insert(0, f"Squared error from the layers' own Q1, drawn over exact: {plain(value)}{interval}.")
    if least["own_ratio_p"] < level:
        return Finding("bad", "dependent rounding", " ".join(parts), smallest)
    return Finding("good", "independent rounding", " ".join(parts), smallest)


def _signal(total: pd.Series) -> Finding:
    margin, snr = float(total["sqrt3_margin"]), float(total["snr"])
    if math.isnan(margin):
        return Finding("unknown", "signal not known", "Nothing was drawn.")
    told = f"‖g‖² is {plain(snr)} times the variance (SNR); ‖g‖ / √(3 variance) is {plain(margin)}"
    if margin < 1:
        return Finding("caution", "noise dominates", f"{told}, below 1.", f"SNR {plain(snr)}")
    return Finding("good", "gradient above its noise", f"{told}, not below 1.", f"SNR {plain(snr)}")


def of_profile(profile: Profile) -> list[Finding]:
    """Where half of the variance comes from, and whether the precision that was asked for was reached."""
    named: list[str] = []
    part = 0.0
    for _, row in profile.sources.sort_values("share", ascending=False, kind="stable").iterrows():
        if len(named) == _BLAMED or part >= 0.5 or not row["share"] > 0:
            break
        site = "Q1" if row["site"] == "grad_weight" else "Q2"
        named.append(f"{site} of {row['layer'] or '(model)'} ({100 * row['share']:.1f} %)")
        part += float(row["share"])
    told = []
    if named:
        count = f"{len(named)} of {len(profile.sources)} quantizers make {100 * part:.0f} % of the variance"
        told.append(Finding("fact", count, f"{', '.join(named)}."))
    asked, reached = profile.metadata.get("precision"), profile.metadata.get("precision_reached")
    probes = f"{profile.metadata.get('probes')} probes" if profile.metadata.get("probes") is not None else ""
    if profile.metadata.get("converged") is False:
        short = f"{reached:.2g} instead of {asked}" if isinstance(reached, float) else f"{asked} was asked for"
        told.append(Finding("caution", "precision not reached", f"Relative standard error {short}, {probes}."))
    elif asked is not None:
        told.append(Finding("good", "precision reached", f"Relative standard error at most {asked}, {probes}."))
    return told
