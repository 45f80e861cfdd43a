"""What was found, in words: one finding per configuration and question, by the rules of the terminal tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from fqtstats.profiles import Profile
from fqtstats.report import tables
from fqtstats.report.columns import layer_name, row_name
from fqtstats.report.numbers import plain, ratio
from fqtstats.report.profile_tables import blame
from fqtstats.results import Configuration, Result

__all__ = ["RULES", "Finding", "detectable_ratio", "findings", "of_profile", "overall"]

_SYMBOLS = {"good": "✓", "bad": "✗", "caution": "!", "unknown": "?", "fact": "→"}
_WORST_FIRST = ("bad", "caution", "unknown", "good")
_POWER = 0.99
"""Probability with which a test finds what is called detectable."""

_TELLING = 2.0
"""A test that may miss a ratio of this size tells nothing."""

_NAMED = 4
"""At most so many configurations are named."""

RULES = (
    f"A configuration is called biased if any of its p-values is below {tables.FALSE_ALARM:g} divided by their number; "
    f"by chance, that happens to at most {100 * tables.FALSE_ALARM:g} % of unbiased ones. A bias that is too small for "
    f"the number of draws may be missed. Rounding is called dependent below {tables.DEPENDENT_ALARM:g} divided by the "
    "same number, and a variance above its end-to-end bound if its whole 95 % interval is. Noise dominates where the "
    "whole 95 % interval of ‖g‖ / √(3 variance) is below 1; the gradient is above its noise where none of it is."
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
    """Is the gradient unbiased, are variances within their bounds, are roundings dependent, and is it noisy?"""
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
    return row_name(row, "the whole model")


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
        short = f"{plain(float(worst['ratio']))} × bound"
        parts.append(
            f"A quantizer's exact variance is at most {plain(float(worst['ratio']))} of its bound "
            f"({worst['site']} of layer {layer_name(worst)})."
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
        return Finding("unknown", "dependence not tested", told)
    level = level * tables.DEPENDENT_ALARM / tables.FALSE_ALARM
    draws = int(total["draws"])
    least = tested.iloc[int(np.argmin(tested["own_ratio_p"]))]
    smallest = f"p = {plain(float(least['own_ratio_p']))}"
    parts = [f"The smallest of {len(tested)} p-values is {smallest} ({_name(least)}); the level is {plain(level)}."]
    low, value, high = (float(total[f"own_ratio{end}"]) for end in ("_low", "", "_high"))
    if math.isfinite(value):
        interval = f" (95 %: {plain(low)} to {plain(high)})" if math.isfinite(low) else ""
        parts.insert(0, f"Squared error from the layers' own Q1, drawn over exact: {plain(value)}{interval}.")
    if least["own_ratio_p"] < level:
        return Finding("bad", "dependent rounding", " ".join(parts), smallest)
    below, above = detectable_ratio(total, level)
    under = f"at most {plain(below)} or " if below > 0 else ""
    found = f"only a ratio of {under}at least {plain(above)} would" if above < math.inf else "no ratio would"
    parts.append(
        f"With {draws} draws and this level, {found} have been found for the whole model (probability {_POWER:g})."
    )
    if not above <= _TELLING:
        parts.append("That is too little to tell.")
        return Finding("unknown", "dependence open", " ".join(parts), smallest)
    parts.append("Less may be missed, and so may dependence that keeps the variance.")
    return Finding("good", "no dependence found", " ".join(parts), f"ratio below {plain(above)}")


def detectable_ratio(row: pd.Series, level: float) -> tuple[float, float]:
    """The ratios nearest to one of a drawn over an exact variance that a row's test would have found.

    The test is Student's t of the cube root of ``own_ratio`` (:func:`fqtstats.estimators.intervals.mean_ratio`); its
    standard error is read off the interval.

    Args:
        row: of the table; where it has no interval, the ratios are 0 and infinity.
        level: of its p-value.

    Returns:
        The largest below one and the smallest above one that have a p-value below ``level`` with probability 0.99.
    """
    freedom = int(row["draws"]) - 1
    value, low = float(row["own_ratio"]), float(row["own_ratio_low"])
    if freedom < 1 or not low > 0:
        return 0.0, math.inf
    # Relative to the root, whose estimate scatters by that much; so does, less, the standard error that divides it.
    error = ((value / low) ** (1 / 3) - 1) / float(stats.t.ppf(0.975, freedom))
    critical = float(stats.t.isf(level / 2, freedom))
    spread = float(stats.norm.ppf(_POWER)) * math.sqrt(1 + critical**2 / (2 * freedom))
    above = (1 + error * critical) / (1 - error * spread) if error * spread < 1 else math.inf
    return max(0.0, 1 - error * (critical + spread)) ** 3, above**3


def _signal(total: pd.Series) -> Finding:
    margin, snr = float(total["sqrt3_margin"]), float(total["snr"])
    if math.isnan(margin):
        return Finding("unknown", "signal not known", "Nothing was drawn.")
    ends = [float(total["variance_high"]), float(total["variance_low"])]
    told = f"‖g‖² is {plain(snr)} times the variance (SNR)"
    margins = f"‖g‖ / √(3 variance) is {plain(margin)}"
    if not all(map(math.isfinite, ends)):
        few = f"{told}; {margins}. Without an interval of the variance ({int(total['draws'])} draws) these have none."
        return Finding("unknown", "signal against noise open", few, f"SNR {plain(snr)}")
    # The norm of the gradient is computed, not estimated: the only interval is the variance's.
    norm_sq = float(total["grad_norm_sq"])
    low, high = (math.inf if end == 0 else ratio(norm_sq, end) for end in ends)
    least, most = math.sqrt(low / 3), math.sqrt(high / 3)
    told = f"{told}, 95 %: {plain(low)} to {plain(high)}; {margins}, 95 %: {plain(least)} to {plain(most)}"
    short = f"SNR {plain(low)} to {plain(high)}"
    if most < 1:
        return Finding("caution", "noise dominates", f"{told}, all below 1.", short)
    if least < 1:
        return Finding("unknown", "signal against noise open", f"{told}, on both sides of 1.", short)
    return Finding("good", "gradient above its noise", f"{told}, none below 1.", short)


def of_profile(profile: Profile) -> list[Finding]:
    """Where half of the variance comes from, and whether the precision that was asked for was reached."""
    named, part = blame(profile)
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
