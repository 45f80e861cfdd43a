"""Which tests let the instruction set choose a kernel: a pytest plugin that lists them, or runs no others.

``--list-dispatched=FILE`` adds to a file the tests that call the extension without naming a variant, and what each
calls; calls in another process are not seen. ``--only-dispatched=FILE`` runs of those as many as it takes that
everything is called from five files of tests, which are asked in the order in which they are given: every further file
reaches the same kernels through the same layers and quantizers. A test that names a variant runs it whatever
``FQTSTATS_ISA`` is.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fqtstats import ops

_FILES = 5  # from how many everything is called


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

    def _noting(self, name: str, function: Callable[..., Any], variants: set[str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noting(*arguments: Any, **named: Any) -> Any:
            values = (*arguments, *named.values())
            if not any(isinstance(value, str) and value in variants for value in values):
                self.test.add(name)
                self.fixture.add(name)
            return function(*arguments, **named)

        return noting

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

    def _choose(self, tests: Iterable[str]) -> set[str]:
        chosen = set()
        called: defaultdict[str, set[str]] = defaultdict(set)  # by file
        files: Counter[str] = Counter()  # how many call it
        for test in tests:
            file = _file_of(test)
            names = (test, file, "")  # the last one stands for the session
            new = set().union(*(self.calls.get(name, ()) for name in names)) - called[file]
            if any(files[name] < _FILES for name in new):
                chosen.add(test)
                called[file] |= new
                files.update(new)
        return chosen

    def files(self, given: list[str]) -> list[str]:
        """Those of the files given that have such tests; the others need not be imported."""
        needed = set(map(_file_of, self._choose(sorted(self.calls, key=lambda test: _place(_file_of(test), given)))))
        return [file for file in given if file in needed] or given

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = self._choose(item.nodeid for item in items)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _place(file: str, given: list[str]) -> int:
    return given.index(file) if file in given else len(given)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    parser.addoption("--list-dispatched", type=Path)
    parser.addoption("--only-dispatched", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """List or select."""
    if (file := config.getoption("list_dispatched")) is not None:
        config.pluginmanager.register(_Recorder(file))
    if (file := config.getoption("only_dispatched")) is not None:
        selector = _Selector(file)
        config.pluginmanager.register(selector)
        config.args[:] = selector.files(config.args)
