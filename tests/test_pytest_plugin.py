"""The plugin for pytest: quantizers as tests, and one false-alarm rate for a session.

Checks that must pass do so on quantizers whose expectation is exact, at levels of at most 1e-3 for draws of a fixed
seed; the defects show without sampling.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# Imported here, because the sessions inside this one forget what they have imported, and torch cannot be imported anew.
import fqtstats.verdicts.claims

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
MODULE = "fqtstats.verdicts.pytest_plugin"
INSTALLED = any(e.value == MODULE for e in importlib.metadata.entry_points(group="pytest11"))
LOAD = () if INSTALLED else ("-p", MODULE)  # without its entry point the plugin must be named

HEAD = """
import pytest, torch, unittest
import fqtstats
from fqtstats.errors import BiasDetected

X = torch.linspace(-1, 1, 96).view(8, 12)
good = fqtstats.quantizer("psq", bits=4)

def biased(x, stream):
    return x.round()
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs one test module in a session of its own, in this process."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run(text: str, *options: str):
        pytester.makepyfile(test_it=HEAD + text)
        return pytester.runpytest_inprocess(*LOAD, "-p", "no:cacheprovider", "--strict-markers", *options)

    return run


@pytest.fixture
def levels(monkeypatch):
    """The false-alarm rates that checks were made at."""
    seen = []
    real = fqtstats.verdicts.unbiasedness.check_unbiased

    def spy(f, x, false_alarm, **options):
        seen.append(false_alarm)
        return real(f, x, false_alarm, **options)

    monkeypatch.setattr(fqtstats.verdicts.unbiasedness, "check_unbiased", spy)
    return seen


def test_fixture(session) -> None:
    result = session("""
def test_good(fqt_check):
    verdict = fqt_check(good, X)
    assert verdict.ok and verdict.seed == 0

def test_default_input(fqt_check):
    assert fqt_check(good, shape=(8, 16)).ok
    assert fqt_check(good, lambda: X).ok

def test_biased(fqt_check):
    fqt_check(biased, X)

def test_biased_is_an_exception(fqt_check):
    with pytest.raises(BiasDetected, match="BIASED") as caught:
        fqt_check(biased, X)
    assert not caught.value.verdict.ok
""")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       fqt_check(biased, X)",
            "E       fqtstats.errors.BiasDetected: BIASED (p = 0, 0 draws, deterministic): E is *",
            "*= unbiased quantizers =*",
            "check *verdict *p *smallest bias that its draws show",
            "test_it.py::test_good  * unbiased * steps (*)",
            "test_it.py::test_default_input  * unbiased * steps (*)",
            "test_it.py::test_default_input #2 * unbiased * steps (*)",
            "test_it.py::test_biased  * BIASED * 0 * -",
            "test_it.py::test_biased_is_an_exception * BIASED * 0 * -",
            "false-alarm rate 1e-06 for all together, 2.5e-07 for each of 4 tests; seed 0",
        ],
        consecutive=False,
    )
    assert "in __call__" not in result.stdout.str()  # the traceback is the user's
    assert result.stdout.str().count("test_it.py::test_good ") == 1  # although a test has several reports


def test_marker(session) -> None:
    result = session("""
@pytest.fixture
def bits():
    return 4

@pytest.mark.fqt_unbiased(shape=(8, 16))
@pytest.mark.parametrize("name", ["psq", "bhq"])
def test_good(name, bits):
    return fqtstats.quantizer(name, bits=bits)

@pytest.mark.fqt_unbiased(x=lambda: X, draws=16)
def test_biased():
    return biased

@pytest.mark.xfail(raises=BiasDetected, strict=True)
@pytest.mark.fqt_unbiased(x=X)
def test_negative_control():
    return biased

class TestMethods:
    @pytest.mark.fqt_unbiased(x=X)
    def test_method(self):
        return good
""")
    result.assert_outcomes(passed=3, failed=1, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "E   fqtstats.errors.BiasDetected: BIASED*",
            "test_it.py::test_good[[]psq] * unbiased *",
            "test_it.py::test_good[[]bhq] * unbiased *",
            "test_it.py::test_biased * BIASED *",
            "test_it.py::TestMethods::test_method * unbiased *",
            "false-alarm rate 1e-06 for all together, 2e-07 for each of 5 tests; seed 0",
        ]
    )


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            "@pytest.mark.fqt_unbiased(X)\ndef test_it():\n    return good",
            "takes the keywords *, got tensor",
        ),
        (
            "@pytest.mark.fqt_unbiased(y=1)\ndef test_it():\n    return good",
            "takes the keywords *, got y=",
        ),
        ("@pytest.mark.fqt_unbiased\ndef test_it():\n    good", "must return the quantizer*got None"),
        ("@pytest.mark.fqt_unbiased\ndef test_it():\n    return 3", "expected a quantizer*got int"),
        (
            "@pytest.mark.fqt_unbiased\nclass TestIt(unittest.TestCase):\n    def test_it(self):\n        pass",
            "no unittest.TestCase",
        ),
        ("def test_it(request):\n    request.getfixturevalue('fqt_check')", "must be an argument of the test"),
        ("def test_it(fqt_check):\n    fqt_check(good, X, shape=(2, 3))", "give either x or shape"),
        ("def test_it(fqt_check):\n    fqt_check(good, shape=(2,))", "two positive integers or more, got (2,)"),
        ("def test_it(fqt_check):\n    fqt_check(good, X.long())", "floating-point tensor"),
    ],
)
def test_misuse_is_an_error(session, test, message) -> None:
    result = session(test)
    outcomes = result.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) + outcomes.get("error", 0) == 1
    assert "passed" not in outcomes
    result.stdout.fnmatch_lines([f"E *InputError: *{message}*"])


def test_the_rate_is_split_over_tests_and_their_calls(session, levels) -> None:
    text = """
@pytest.fixture
def mine(fqt_check):
    return lambda: fqt_check(good, X)

def test_one(fqt_check):
    fqt_check(good, X)

def test_three(fqt_check):
    for _ in range(3):
        fqt_check(good, X)

def test_indirect(mine):
    mine()

@pytest.mark.fqt_unbiased(x=X)
def test_both(fqt_check):
    fqt_check(good, X)
    return good

def test_other():
    pass
"""
    session(text, "--fqt-alpha", "1e-3").assert_outcomes(passed=5)
    part = 1e-3 / 4
    assert levels == [part / 2, part / 2, part / 4, part / 8, part / 2, part / 2, part / 4]
    assert sum(levels) < 1e-3
    levels.clear()
    # What is deselected spends nothing.
    session(text, "--fqt-alpha", "1e-3", "-k", "one or other").assert_outcomes(passed=2, deselected=3)
    assert levels == [1e-3 / 2]


def test_the_part_of_a_test_that_runs_again_is_not_refilled(session, levels, pytester) -> None:
    pytester.makeconftest("""
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            item.ihook.pytest_runtest_logreport(report=report)
        item._initrequest()
    return True
""")
    result = session("@pytest.mark.fqt_unbiased(x=X)\ndef test_it():\n    return good")
    result.assert_outcomes(passed=2)
    assert levels == [1e-6 / 2, 1e-6 / 4]


def test_a_part_ends(session, levels, monkeypatch) -> None:
    stub = fqtstats.assert_unbiased(fqtstats.quantizer("psq"), fqtstats.verdicts.designs.natural((4, 8)))
    monkeypatch.setattr(fqtstats.verdicts.unbiasedness, "check_unbiased", lambda *_, **__: stub)
    result = session("def test_it(fqt_check):\n    for _ in range(1000):\n        fqt_check(good, X)")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *InputError: check 977 of this test has no false-alarm rate left*parametrize"])


def test_seed(session) -> None:
    result = session("def test_it(fqt_check):\n    assert fqt_check(good, X).seed == 5", "--fqt-seed", "5")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["false-alarm rate 1e-06 for all together; seed 5"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *[("--fqt-alpha", value, "a probability between 0 and 1") for value in ("0", "1", "-1", "2", "nan", "x", "")],
        *[("--fqt-seed", value, "an integer of at most 64 bits") for value in ("x", "1.5", str(2**63))],
    ],
)
def test_bad_options(session, option, value, message) -> None:
    result = session("def test_it():\n    pass", f"{option}={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*error: argument {option}: expected {message}, got {value!r}"])


def test_xdist(pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(
        test_it=HEAD
        + """
@pytest.mark.parametrize("i", range(3))
def test_level(fqt_check, i):
    assert fqt_check(good, X).false_alarm == 1e-3 / 4 / 2

@pytest.mark.fqt_unbiased(x=X)
def test_biased():
    return biased
"""
    )
    result = pytester.runpytest_subprocess(*LOAD, "-p", "no:cacheprovider", "-n", "1", "--fqt-alpha", "1e-3")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        [
            *[f"test_it.py::test_level[[]{i}] * unbiased *" for i in range(3)],
            "test_it.py::test_biased * BIASED *",
            "false-alarm rate 0.001 for all together, 0.00025 for each of 4 tests; seed 0",
        ]
    )


def test_other_sessions_do_not_import_torch(pytester) -> None:
    pytester.makepyfile("""
import sys

def test_it():
    assert "fqtstats.verdicts.pytest_plugin" in sys.modules
    assert not {"torch", "numpy", "scipy"} & set(sys.modules)
""")
    # Plugins of others may import what they like.
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-p", MODULE, "-p", "no:cacheprovider", "--fqt-alpha", "0.1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=pytester.path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unbiased quantizers" not in done.stdout


def test_marker_and_fixture_are_listed(session) -> None:
    session("", "--markers").stdout.fnmatch_lines(["@pytest.mark.fqt_unbiased(x=None, shape=(128, 1024), draws=64): *"])
    session("", "--fixtures").stdout.fnmatch_lines(["fqt_check*", "*Fail the test if a quantizer is biased*"])
    session("", "--help").stdout.fnmatch_lines(["*--fqt-alpha*RATE*", "*--fqt-seed*SEED*"])


def test_the_entry_point_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {"fqtstats": MODULE}
    if INSTALLED:
        (entry,) = importlib.metadata.entry_points(group="pytest11", name="fqtstats")
        assert entry.value == MODULE
