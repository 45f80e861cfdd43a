"""Which tests let the instruction set choose a kernel: a pytest plugin that lists them, or runs no others.

``--list-dispatched=FILE`` adds to a file the tests that call the extension without naming a variant, or start another
Python process, and what each calls. ``--only-dispatched=FILE`` runs the fewest of those that reach everything: of a
file of tests, those that call what the ones before them do not. A test that names a variant runs it whatever
``FQTSTATS_ISA`` is.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fqtstats import ops


class _Recorder:
    """Writes one line for each test, and for each file of tests that share what a call has made."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.test: set[str] = set()  # what it called
        self.fixture: set[str] = set()
        native = ops.native_module()
        variants = {kernel.variant for kernel in ops.kernels()}
        for name, function in list(vars(native).items()):
            if callable(function):
                setattr(native, name, self._noting(name, function, variants))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.fork" or (event == "subprocess.Popen" and sys.executable in map(str, arguments[1])):
            self._called("process")

    def _noting(self, name: str, function: Callable[..., Any], variants: set[str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noting(*arguments: Any, **named: Any) -> Any:
            values = (*arguments, *named.values())
            if not any(isinstance(value, str) and value in variants for value in values):
                self._called(name)
            return function(*arguments, **named)

        return noting

    def _called(self, name: str) -> None:
        self.test.add(name)
        self.fixture.add(name)

    def _write(self, name: str, called: set[str]) -> None:
        if called:
            with self.file.open("a") as out:
                out.write("\t".join([name, *sorted(called)]) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.test.clear()
        result = yield
        self._write(item.nodeid, self.test)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Iterator[None]:
        # What a fixture asks for has been set up before.
        self.fixture.clear()
        result = yield
        if fixturedef.scope != "function":
            self._write(_file_of(request.node.nodeid), self.fixture)
        return result


class _Selector:
    """Deselects the other tests."""

    def __init__(self, file: Path) -> None:
        lines = (line.split("\t") for line in file.read_text().splitlines())
        self.calls = {name: set(called) for name, *called in lines}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen, others = [], []
        covered: defaultdict[str, set[str]] = defaultdict(set)  # by file
        for item in items:
            names = (item.nodeid, _file_of(item.nodeid), "")  # the last one stands for the session
            calls = set().union(*(self.calls.get(name, ()) for name in names))
            before = covered[_file_of(item.nodeid)]
            (chosen if calls - before else others).append(item)
            before |= calls
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    parser.addoption("--list-dispatched", type=Path)
    parser.addoption("--only-dispatched", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """List or select."""
    if (file := config.getoption("list_dispatched")) is not None:
        config.pluginmanager.register(_Recorder(file))
    if (file := config.getoption("only_dispatched")) is not None:
        config.pluginmanager.register(_Selector(file))
