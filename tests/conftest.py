"""What tests share: the fixtures `backend` and `analysis`, random numbers, and the examples of property tests.

These are the same in every run, so that a run that fails fails again: torch's generator starts every test anew, and
property tests try the same examples (`--hypothesis-profile default` tries others). The environment variable
FQTSTATS_TEST_EXAMPLES caps their number.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import fqtstats
from fqtstats.layers import BACKENDS

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

_SETTINGS = "_hypothesis_internal_use_settings"  # where the decorator leaves them; hypothesis has no public way


def pytest_collection_modifyitems(items):
    most = os.environ.get("FQTSTATS_TEST_EXAMPLES")
    if most is None:
        return
    for test in {item.obj for item in items if hasattr(getattr(item, "obj", None), _SETTINGS)}:
        own = getattr(test, _SETTINGS)
        setattr(test, _SETTINGS, settings(own, max_examples=min(own.max_examples, int(most))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)  # before any fixture, so that no test depends on those before it


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs a test on every backend: it is what models are prepared for."""
    for name in ("prepare_", "quantized"):
        monkeypatch.setattr(fqtstats, name, functools.partial(getattr(fqtstats, name), backend=request.param))
    return request.param


@pytest.fixture(scope="module")
def analysis():
    """Imports a script by name from analysis/, which stands in the repository and not in the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        yield lambda name: importlib.import_module(f"analysis.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "analysis"]:
        del sys.modules[name]
