"""What all tests share: FQTSTATS_TEST_EXAMPLES caps the examples of every property test, for slow builds."""

from __future__ import annotations

import os

from hypothesis import settings

_SETTINGS = "_hypothesis_internal_use_settings"  # where the decorator leaves them; hypothesis has no public way


def pytest_collection_modifyitems(items):
    most = os.environ.get("FQTSTATS_TEST_EXAMPLES")
    if most is None:
        return
    for test in {item.obj for item in items if hasattr(getattr(item, "obj", None), _SETTINGS)}:
        own = getattr(test, _SETTINGS)
        setattr(test, _SETTINGS, settings(own, max_examples=min(own.max_examples, int(most))))
