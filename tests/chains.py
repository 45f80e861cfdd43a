"""Networks with chains of convolutions, unfused and fused, and images for them."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fqtstats
from fqtstats.layers.fusion import fuse_


def images(*shape, seed=0, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * scale + shift).contiguous(memory_format=torch.channels_last)


def network(normalized=True, bias=False, pools=(True, False, True), channels=10, seed=0):
    """``len(pools)`` stages and a head."""
    layers, before = [], 3
    for pool in pools:
        layers.append(nn.Conv2d(before, channels, 3, padding=1, bias=bias))
        layers += [nn.BatchNorm2d(channels)] if normalized else []
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if pool else []
        before = channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5 + (p.dim() == 1))
    return model


def policy(name="statquant-ptq", bits=8):
    return fqtstats.policies.get(name, bits=bits)


def twins(model, named):
    """The model prepared, and a copy that is fused as well, with their handles."""
    other = copy.deepcopy(model)
    handles = [fqtstats.prepare_(m, named, backend="native", seed=3) for m in (model, other)]
    chains = fuse_(other, handles[1])
    return model, other, handles, chains


def passed(model, x, g):
    """Output and gradients of input and parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(g)
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


X = images(6, 3, 12, 10)
G = images(6, 4, 1, 1, seed=9).flatten(1)
