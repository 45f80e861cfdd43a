"""Compiled and data-parallel models are refused."""

from __future__ import annotations

import pytest
import torch
from layer_cases import FQT, filled, gaussian
from torch import nn

import fqtstats
from fqtstats.errors import UnsupportedError
from fqtstats.layers import QuantLinear

pytestmark = pytest.mark.usefixtures("backend")

COMPILE_ERRORS = (UnsupportedError, torch._dynamo.exc.Unsupported)
"""Under ``fullgraph=True`` the compiler wraps our error in its own, message included."""


def small():
    return nn.Sequential(filled(nn.Linear(3, 3)), nn.ReLU(), filled(nn.Linear(3, 2)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", None], ids=["eager", "default"])
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "graph breaks"])
@pytest.mark.parametrize("when", ["before", "before, already run", "after", "in place", "layer in place", "function"])
def test_compiled_models_fail_at_every_call_and_eager_ones_still_work(when, fullgraph, backend):
    torch._dynamo.reset()
    options = {"fullgraph": fullgraph} if backend is None else {"fullgraph": fullgraph, "backend": backend}
    model, x = small(), gaussian(4, 3)
    run = None
    if when.startswith("before"):
        run = torch.compile(model, **options)
        if "run" in when and backend == "eager":  # the default one would run a C++ compiler
            run(x)
    handle = fqtstats.prepare_(model, FQT)
    eager = model.forward
    if when == "after":
        run = torch.compile(model, **options)
    elif when == "in place":
        model.compile(**options)
        run = model
    elif when == "layer in place":
        model[0].compile(**options)
        run = model
    elif when == "function":
        run = torch.compile(lambda x: model(x).sum(), **options)
    for attempt in range(3):
        with pytest.raises(COMPILE_ERRORS, match="quantized layers cannot run under"):
            run(x)
        if when != "layer in place":
            assert eager(x).shape == (4, 2), f"attempt {attempt}: eager calls are not affected"
    with torch.no_grad(), pytest.raises(COMPILE_ERRORS, match="quantized layers cannot run under"):
        run(x)
    handle.remove()
    if backend == "eager" and "place" not in when:
        run(x)
    torch._dynamo.reset()


def test_compiled_and_parallel_models_are_refused_at_preparation():
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        model = small()
        with pytest.raises(UnsupportedError, match=r"eagerly|DistributedDataParallel"):
            fqtstats.prepare_(wrap(model), FQT)
        assert type(model[0]) is nn.Linear


def test_data_parallel_replicas_are_refused():
    model = small()
    fqtstats.prepare_(model, FQT)
    replica = model[0]._replicate_for_data_parallel()
    assert type(replica) is QuantLinear
    with pytest.raises(UnsupportedError, match="DataParallel"):
        replica(gaussian(4, 3))
    model(gaussian(4, 3))
