"""No allocation per call in the steady state: a pytest plugin, run with ``allocations.cc`` preloaded.

Every call that a test makes of the extension is made twice, on the same arguments. In the second one, with the first
one's working memory and threads there, no kernel may allocate a byte on any thread, nor the binding 4 KiB; otherwise
the call raises. The session fails if there is a function that no test has called.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest

from fqtstats.ops import native_module

_counter = ctypes.PyDLL(None)  # keeps the interpreter's lock, as the extension's callers do
_counter.allocations_stop.restype = ctypes.c_long

_NO_KERNELS = {"isa", "kernels", "peak"}  # no operations on tensors
_called: set[str] = set()


def steady(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, failing where a second call allocates."""

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        function(*arguments, **named)
        _counter.allocations_start()
        try:
            result = function(*arguments, **named)
        finally:
            count = _counter.allocations_stop()
        _called.add(name)
        if count:
            raise AssertionError(f"{count} allocations in the steady state of {name}")
        return result

    return checked


def _functions() -> list[str]:
    return [name for name, f in vars(native_module()).items() if callable(f) and name not in _NO_KERNELS]


class _Union:
    """The functions that the workers have called, on the process that started them."""

    def pytest_testnodedown(self, node: Any) -> None:
        _called.update(node.workeroutput["steady"])


def pytest_configure(config: pytest.Config) -> None:
    """Wrap the extension's functions."""
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Union())
    native = native_module()
    for name in _functions():
        setattr(native, name, steady(name, getattr(native, name)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a function was not called."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["steady"] = sorted(_called)
    elif missing := sorted(set(_functions()) - _called):
        print(f"\nnever called: {', '.join(missing)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
