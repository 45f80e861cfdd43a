"""The plugin for pytest, loaded by it where fqtstats is installed: quantizers as tests, one false-alarm rate for all.

A fixture judges whatever it is given, and the test fails with :class:`fqtstats.errors.BiasDetected`::

    def test_mine(fqt_check):
        fqt_check(my_quantizer)                     # on heavy-tailed rows, as gradients are
        fqt_check(my_quantizer, torch.randn(8, 3))  # on an input of your own

A marker judges what the test returns, and goes well with parameters and fixtures::

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.fqt_unbiased(shape=(64, 256))
    def test_mine(bits):
        return my_quantizer(bits)

The marker takes the keywords of :class:`Check`, and no positional argument.

``--fqt-alpha`` is the false-alarm rate of the session: the probability at most that any of its checks fails a quantizer
that is unbiased. It is split evenly over the collected tests that have the fixture (themselves, or through another
fixture) or the marker, and the i-th check of a test gets ``2^-i`` of the test's part, also where the test is run again.

Nothing is imported but this module until the first check: other projects' sessions do not wait for torch.
"""

from __future__ import annotations

import argparse
import functools
import math
import unittest
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from fqtstats.errors import BiasDetected, InputError

if TYPE_CHECKING:
    import torch

    from fqtstats.verdicts.probe import StreamFunction
    from fqtstats.verdicts.unbiasedness import Verdict

__all__ = ["Check"]

_MARKER, _FIXTURE = "fqt_unbiased", "fqt_check"
_KEYWORDS = ("x", "shape", "draws")
_SHAPE = (128, 1024)
_SMALLEST_LEVEL = 1e-300  # below it the tests' own arithmetic underflows
_ON_REPORTS = "fqtstats_checks"  # reports travel from the workers of pytest-xdist with all their attributes


@dataclass(slots=True)
class _Part:
    """What one test may spend.

    Attributes:
        alpha: its false-alarm rate.
        tests: how many have such a part.
        calls: checks made so far, in all runs of the test.
        unreported: rows of the summary that no report has taken yet.
    """

    alpha: float
    tests: int
    calls: int = 0
    unreported: list[dict[str, Any]] = field(default_factory=list)

    def spend(self) -> float:
        """The level of the next check."""
        self.calls += 1
        level = math.ldexp(self.alpha, -self.calls)
        if level < _SMALLEST_LEVEL:
            raise InputError(
                f"check {self.calls} of this test has no false-alarm rate left; make it several tests, for instance "
                "with pytest.mark.parametrize"
            )
        return level


_PART = pytest.StashKey[_Part]()


class Check:
    """The fixture ``fqt_check``: :func:`fqtstats.assert_unbiased` at the level that is this test's.

    Call it with:

        f: a quantizer, or any callable ``f(x, stream)``.
        x: ``[N, ...]``, the input to judge it on, or a callable that makes it; by default heavy-tailed rows
            whose scales span three decades.
        shape: of the default input, ``(128, 1024)`` if not given; not together with ``x``.
        draws: the most draws on ``x``; by default 64.

    It returns the verdict, and raises:

        BiasDetected: (an AssertionError) with the verdict.
        InputError: an argument cannot be used, or ``f`` returns what it should not.
    """

    def __init__(self, item: pytest.Item, part: _Part) -> None:
        self._item, self._part = item, part

    def __call__(
        self,
        f: StreamFunction,
        x: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        *,
        shape: Sequence[int] | None = None,
        draws: int | None = None,
    ) -> Verdict:
        __tracebackhide__ = True
        if not callable(f):
            raise InputError(f"expected a quantizer, called as f(x, stream), got {type(f).__name__}")
        if x is not None and shape is not None:
            raise InputError("x has a shape of its own: give either x or shape")
        if shape is not None and (len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape)):
            raise InputError(f"shape must be two positive integers or more, got {shape!r}")

        from fqtstats.verdicts import designs
        from fqtstats.verdicts.unbiasedness import check_unbiased

        seed = self._item.config.getoption("fqt_seed")
        if x is None:
            x = designs.natural(_SHAPE if shape is None else shape, seed)
        elif callable(x):
            x = x()
        verdict = check_unbiased(f, x, self._part.spend(), seed=seed, draws=draws)
        self._record(verdict)
        if not verdict.ok:
            raise BiasDetected(str(verdict), verdict)
        return verdict

    def _record(self, verdict: Verdict) -> None:
        part = self._part
        failed = "NOT INDEPENDENT" if verdict.unbiased else "BIASED" if verdict.consistent else "INCONSISTENT"
        state = "unbiased" if verdict.ok else failed
        smallest = min(((size, where) for where, size in verdict.minimum_detectable_bias.items()), default=None)
        part.unreported.append(
            {
                "name": self._item.nodeid + (f" #{part.calls}" if part.calls > 1 else ""),
                "verdict": state,
                "ok": bool(verdict.ok),
                "p": f"{float(verdict.p_value):.2g}",
                "detectable": "-" if smallest is None else f"{smallest[0]:.2g} steps ({smallest[1]})",
                "tests": part.tests,
            }
        )


@pytest.fixture
def fqt_check(request: pytest.FixtureRequest) -> Check:
    """Fail the test if a quantizer is biased: ``fqt_check(f)``, or with x, shape or draws."""
    __tracebackhide__ = True
    part = request.node.stash.get(_PART, None)
    if part is None:
        raise InputError(
            f"{_FIXTURE} must be an argument of the test or of one of its fixtures, not of request.getfixturevalue: "
            "the false-alarm rate is split over the tests before the first one runs"
        )
    return Check(request.node, part)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two options, of this plugin's own prefix."""
    group = parser.getgroup("fqtstats", "unbiased quantizers (fqtstats)")
    group.addoption(
        "--fqt-alpha",
        type=_probability,
        default=1e-6,
        metavar="RATE",
        help="False-alarm rate of the session, split over its checks of quantizers (1e-6).",
    )
    group.addoption(
        "--fqt-seed", type=_seed, default=0, metavar="SEED", help="Gives the same verdicts on quantizers again (0)."
    )


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _SMALLEST_LEVEL < value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability between 0 and 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 2**63
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of at most 64 bits, got {text!r}")
    return value


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker is, which ``--strict-markers`` and ``--markers`` need."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(x=None, shape=(128, 1024), draws=64): the quantizer that the test returns must be unbiased",
    )
    config.pluginmanager.register(_Summary(), "fqtstats-summary")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Split the false-alarm rate over what deselection has left: the same list in every worker of pytest-xdist."""
    items = [i for i in session.items if _FIXTURE in getattr(i, "fixturenames", ()) or i.get_closest_marker(_MARKER)]
    for item in items:
        item.stash[_PART] = _Part(session.config.getoption("fqt_alpha") / len(items), len(items))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse what is marked wrongly, and what is never called through :func:`pytest_pyfunc_call`."""
    __tracebackhide__ = True
    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        return
    if not isinstance(item, pytest.Function) or (item.cls is not None and issubclass(item.cls, unittest.TestCase)):
        raise InputError(f"{_MARKER} marks functions and methods that return a quantizer, and no unittest.TestCase")
    unknown = sorted(set(marker.kwargs) - set(_KEYWORDS))
    if marker.args or unknown:
        got = ", ".join([*map(repr, marker.args), *(f"{name}=" for name in unknown)])
        raise InputError(f"{_MARKER} takes the keywords {', '.join(_KEYWORDS)}, got {got}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Check what a marked test returns, as part of its call."""
    __tracebackhide__ = True
    marker = pyfuncitem.get_closest_marker(_MARKER)
    if marker is None:
        return (yield)
    test = pyfuncitem.obj
    check = Check(pyfuncitem, pyfuncitem.stash[_PART])

    @functools.wraps(test)
    def checked(**arguments: object) -> None:
        __tracebackhide__ = True
        f = test(**arguments)
        if f is None:
            raise InputError(f"a test marked {_MARKER} must return the quantizer, called as f(x, stream); got None")
        check(f, **marker.kwargs)

    pyfuncitem.obj = checked
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send the verdicts along."""
    report = yield
    part = item.stash.get(_PART, None)
    if part is not None and part.unreported:
        setattr(report, _ON_REPORTS, part.unreported)
        part.unreported = []
    return report


class _Summary:
    """Prints the verdicts. With pytest-xdist the tests run in other processes: rows come with the reports alone."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._rows += getattr(report, _ON_REPORTS, [])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if not self._rows:
            return
        terminalreporter.section("unbiased quantizers")
        columns = {"name": "check", "verdict": "verdict", "p": "p", "detectable": "smallest bias that its draws show"}
        widths = {key: max(len(row[key]) for row in [columns, *self._rows]) for key in columns}
        for row in [columns, *self._rows]:
            line = "  ".join(row[key].ljust(widths[key]) for key in columns).rstrip()
            terminalreporter.write_line(line, red=row.get("ok") is False)
        alpha, tests = config.getoption("fqt_alpha"), self._rows[0]["tests"]
        each = f", {alpha / tests:.3g} for each of {tests} tests" if tests > 1 else ""
        terminalreporter.write_line(
            f"false-alarm rate {alpha:g} for all together{each}; seed {config.getoption('fqt_seed')}"
        )
