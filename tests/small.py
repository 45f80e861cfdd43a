"""A small network to measure, and its gradient draws made by a plain loop."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fqtstats
from fqtstats.determinism import single_thread
from fqtstats.layers.state import SITES, Draw

LAST = "4"  # name of the last layer


def mlp(features=12, width=16, classes=10, seed=1, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
        ).to(dtype)


def batch(n=32, features=12, classes=10, seed=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=g).to(dtype), torch.randint(classes, (n,), generator=g)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def psq(bits=4):
    return fqtstats.Policy(
        grad_input=fqtstats.quantizer("psq", bits=bits), grad_weight=fqtstats.quantizer("psq", bits=bits)
    )


def draws(model, batch, policy, indices, seed=0, sites=SITES, loss_fn=loss):
    """QAT gradient and gradient draws, each by parameter name, float64 numpy ``[M]`` and ``[n, M]``."""
    parameters = dict(model.named_parameters())

    def gradient(handle, value, draw):
        with handle.shared.drawing(draw):
            found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        return [g.double().numpy().reshape(-1) for g in found]

    with single_thread(), fqtstats.quantized(model, policy, seed=seed) as handle:
        value = loss_fn(model, batch)
        qat = gradient(handle, value, Draw(sites=frozenset()))
        fqt = [gradient(handle, value, Draw(index=i, sites=frozenset(sites))) for i in indices]
    names = list(parameters)
    return dict(zip(names, qat, strict=True)), {name: np.stack([g[p] for g in fqt]) for p, name in enumerate(names)}


def rows(result):
    """The table's rows by parameter name; the total under ``"total"``."""
    table = result.table
    return {f"{r.layer}.{r.parameter}".rstrip("."): r for r in table.itertuples()}
