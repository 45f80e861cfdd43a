"""JUnit XML, which CI systems read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

__all__ = ["Case", "junit"]


@dataclass(frozen=True, slots=True)
class Case:
    """One test case.

    Attributes:
        kind: what it belongs to, with dots.
        name: its own.
        failure: a few words; None where it passed.
        detail: what was found, where it failed.
    """

    kind: str
    name: str
    failure: str | None = None
    detail: str = ""


def junit(cases: Sequence[Case]) -> str:
    """The file's content."""
    failed = sum(case.failure is not None for case in cases)
    suite = ElementTree.Element("testsuite", name="fqtstats check", tests=str(len(cases)), failures=str(failed))
    for case in cases:
        element = ElementTree.SubElement(suite, "testcase", classname=f"fqtstats.check.{case.kind}", name=case.name)
        if case.failure is not None:
            ElementTree.SubElement(element, "failure", message=case.failure).text = case.detail
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
