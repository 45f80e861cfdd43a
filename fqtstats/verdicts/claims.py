"""Claims tested both ways: who says "unbiased" must pass, and who says "biased" must be found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.quantizers import QUANTIZERS, quantizer, registered
from fqtstats.quantizers.base import Claim
from fqtstats.verdicts import designs
from fqtstats.verdicts.junit import Case, junit
from fqtstats.verdicts.probe import StreamFunction
from fqtstats.verdicts.unbiasedness import Verdict, check_unbiased

__all__ = ["CHECKED_BITS", "Checked", "Subject", "as_junit", "check_all", "subject", "subjects"]

CHECKED_BITS = (8, 4, 2)
"""Bits at which quantizers are checked where none are named."""

_WORKERS = 2


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


def subjects(names: Sequence[str], bits: Sequence[int], *, any_width: bool = False) -> list[Subject]:
    """Registered quantizers at several bits; where a quantizer does not come in a width, that pair is left out.

    Args:
        names: of the registry.
        bits: widths.
        any_width: whether a quantizer that comes in none of them is taken in those that it has.

    Raises:
        InputError: a name is unknown, or a quantizer comes in none of the widths.
    """
    found = []
    for name in names:
        if name not in QUANTIZERS:
            raise InputError(f"unknown quantizer {name!r}; known: {', '.join(QUANTIZERS)}, all")
        possible, refusal = [], None
        own = QUANTIZERS[name].widths
        for b in own if any_width and not set(own) & set(bits) else bits:
            try:
                q = quantizer(name, bits=b)
            except InputError as error:
                refusal = error
                continue
            possible.append(Subject(f"{name} {b} bit{'s' * (b != 1)}", q, q.claim))
        if not possible and refusal is not None:
            raise refusal
        found += possible
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
    done = 0

    def judge(one: Subject) -> Checked:
        nonlocal done
        report(done, len(subjects), one.name)
        verdict = check_unbiased(one.f, x, level, seed=seed)
        done += 1
        return Checked(one.name, one.claim, verdict)

    # Registered quantizers share nothing. Others may: with each other, or the global random state, which is watched.
    ours = [registered(one.f) for one in subjects]
    with single_thread(), ThreadPoolExecutor(_WORKERS) as pool:
        begun = [pool.submit(judge, one) if own else None for one, own in zip(subjects, ours, strict=True)]
        try:
            found = [None if one is None else one.result() for one in begun]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    checked = [judge(one) if known is None else known for one, known in zip(subjects, found, strict=True)]
    report(len(subjects), len(subjects), "done")
    return checked


def as_junit(checked: Sequence[Checked]) -> str:
    """JUnit XML: one test case each."""
    return junit(
        [
            Case(one.claim, one.name, None if one.holds else f"claims to be {one.claim}", str(one.verdict))
            for one in checked
        ]
    )
