"""Claims tested both ways: who says "unbiased" must pass, and who says "biased" must be found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fqtstats.errors import InputError
from fqtstats.quantizers import QUANTIZERS, quantizer
from fqtstats.quantizers.base import Claim
from fqtstats.verdicts import designs
from fqtstats.verdicts.junit import Case, junit
from fqtstats.verdicts.probe import StreamFunction
from fqtstats.verdicts.unbiasedness import Verdict, check_unbiased

__all__ = ["CHECKED_BITS", "Checked", "Subject", "as_junit", "check_all", "subject", "subjects"]

CHECKED_BITS = (8, 4, 2)
"""Bits at which quantizers are checked where none are named."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked, and what it claims.

    Attributes:
        name: for people.
        f: the quantizer or callable.
        claim: what it promises of its expectation.
    """

    name: str
    f: StreamFunction
    claim: Claim


@dataclass(frozen=True, slots=True)
class Checked:
    """A subject's verdict against its claim.

    Attributes:
        name: the subject's.
        claim: the subject's.
        verdict: on the natural design.
    """

    name: str
    claim: Claim
    verdict: Verdict

    @property
    def holds(self) -> bool:
        """What claims to be unbiased is ``ok``; what claims a bias has one."""
        return self.verdict.ok if self.claim == "unbiased" else not self.verdict.unbiased

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "claim": self.claim, "holds": self.holds, **asdict(self.verdict)}


def subjects(names: Sequence[str], bits: Sequence[int], *, suitable: bool = False) -> list[Subject]:
    """Registered quantizers at several bits; where an option excludes a width, that pair is left out.

    Args:
        names: of the registry.
        bits: widths.
        suitable: whether to leave out quantizers that none of the widths suits, as long as others stay.

    Raises:
        InputError: a name is unknown, or no width suits a quantizer.
    """
    found: list[Subject] = []
    refusal: InputError | None = None
    for name in names:
        if name not in QUANTIZERS:
            raise InputError(f"unknown quantizer {name!r}; known: {', '.join(QUANTIZERS)}, all")
        possible = []
        for b in bits:
            try:
                q = quantizer(name, bits=b)
            except InputError as error:
                refusal = error
                continue
            possible.append(Subject(f"{name} {b} bit{'s' * (b != 1)}", q, q.claim))
        if not possible and refusal is not None and not suitable:
            raise refusal
        found += possible
    if not found and refusal is not None:
        raise refusal
    return found


def subject(name: str, f: object) -> Subject:
    """The user's own quantizer; without a ``claim`` of its own it is held to be unbiased.

    Raises:
        InputError: it cannot be called.
    """
    if not callable(f):
        raise InputError(f"{name!r} gave a {type(f).__name__}, expected something called as f(x, stream)")
    return Subject(name, f, getattr(f, "claim", "unbiased"))


def check_all(
    subjects: Sequence[Subject],
    false_alarm: float,
    shape: tuple[int, int] = (128, 1024),
    seed: int = 0,
    report: Callable[[int, int, str], None] = lambda done, total, title: None,
) -> list[Checked]:
    """Judge them all on one natural design; ``false_alarm`` is split evenly over them.

    Args:
        subjects: at least one.
        false_alarm: probability at most that one that is unbiased is not found so.
        shape: of the design.
        seed: of the design and the streams.
        report: called with how many are done, how many there are, and the next one's name.
    """
    x = designs.natural(shape, seed)
    level = false_alarm / len(subjects)
    found = []
    for i, one in enumerate(subjects):
        report(i, len(subjects), one.name)
        found.append(Checked(one.name, one.claim, check_unbiased(one.f, x, level, seed=seed)))
    report(len(subjects), len(subjects), "done")
    return found


def as_junit(checked: Sequence[Checked]) -> str:
    """JUnit XML: one test case each."""
    return junit(
        [
            Case(one.claim, one.name, None if one.holds else f"claims to be {one.claim}", str(one.verdict))
            for one in checked
        ]
    )
