"""What tests share: the fixture `backend`, and how many examples property tests try, and which.

These are the same in every run, so that a run that fails fails again; `--hypothesis-profile default` tries others. The
environment variable FQTSTATS_TEST_EXAMPLES caps their number.
"""

from __future__ import annotations

import functools
import os

import pytest
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


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs a test on every backend: it is what models are prepared for."""
    for name in ("prepare_", "quantized"):
        monkeypatch.setattr(fqtstats, name, functools.partial(getattr(fqtstats, name), backend=request.param))
    return request.param
