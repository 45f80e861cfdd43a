"""Expectations of estimates, judged by their intervals: inside of what was expected, outside of it, or open."""

from __future__ import annotations

from collections.abc import Mapping

from analysis.study import Claim

__all__ = ["judged", "place"]

Ends = tuple[float, float, float]
"""An estimate, and the ends of its interval."""


def place(ends: Ends, least: float, most: float) -> str:
    """Where an interval lies: ``inside``, ``outside``, or ``open`` if it holds an end of the range (or has no ends)."""
    _, low, high = ends
    if least <= low and high <= most:
        return "inside"
    return "outside" if low > most or high < least else "open"


def judged(text: str, estimates: Mapping[str, Ends], expected: tuple[float, float]) -> Claim:
    """A claim that tells where each interval lies. It holds if all are inside, and does not if one is outside.

    Args:
        text: with the estimates in it, without a full stop.
        estimates: by what they are of.
        expected: the range.
    """
    places: dict[str, list[str]] = {"inside": [], "open": [], "outside": []}
    for name, ends in estimates.items():
        places[place(ends, *expected)].append(name)
    titles = {"inside": "Inside", "open": "Open, as the interval holds an end of that", "outside": "Outside"}
    told = " ".join(f"{titles[where]}: {', '.join(names)}." for where, names in places.items() if names)
    holds = False if places["outside"] else None if places["open"] else True
    because = "not examined" if holds is False else ""
    return Claim(f"{text}. Expected: {expected[0]:g} to {expected[1]:g}. {told}", holds, because)
