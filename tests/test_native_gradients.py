"""LUQ and AGP on integer codes: the codes of the torch path bit for bit, and the products within their bound."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_cases import case

import fqtstats
from fqtstats.errors import NonFiniteError
from fqtstats.ops import quantize
from fqtstats.policy import Policy
from fqtstats.quantizers import quantizer, storage
from fqtstats.quantizers.agp import AGP, TopK
from fqtstats.quantizers.luq import LUQ, Hindsight
from fqtstats.quantizers.storage import store
from fqtstats.random import stream

importlib.import_module("fqtstats._native")  # of which these are tests

STREAM = stream(seed=3, layer="gradient")
SHAPES = [(24, 30), (1, 9), (9, 1), (6, 5, 4, 3), (8, 33, 6, 5), (40, 12, 1, 1)]


def heavy(shape, seed=0):
    """Rows and channels of many sizes, some of them zeros, some constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for axis in (0, 1):
        scale = torch.exp2(4 * torch.randn(shape[axis], generator=generator))
        x = x.transpose(axis, -1).mul_(scale).transpose(axis, -1)
    if shape[0] > 3:
        x[1], x[2] = 0, 0.7
    return x.contiguous()


def forms(x):
    yield x
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
    yield x.to(torch.bfloat16)


def check(q, x, pad=(0, 0)):
    """What a quantizer stores is what it encodes, and decodes to what it gives."""
    stored = store(q, x, STREAM, pad)
    assert stored is not None
    expected = q.encode(x, STREAM)
    codes = stored.codes
    assert torch.equal(codes.unpack(), expected.codes().reshape(codes.shape))
    assert stored.shape == tuple(x.shape)
    assert torch.equal(stored.decode(), q(x.float(), STREAM))
    return stored


LUQS = [
    {},
    {"bits": 3},
    {"bits": 2},
    {"bits": 5},
    {"dynamic_range": 16},
    {"samples": 2},
    {"samples": 3, "random_bits": 16},
    {"random_bits": 32},
    {"underflow": "flush"},
    {"rounding": "nearest"},
    {"maximum": "hindsight", "largest": 0.5},
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", LUQS, ids=str)
def test_luq_stores_what_it_encodes(options, native, monkeypatch):
    if not native:
        monkeypatch.setattr(quantize, "native_module", lambda: None)
        monkeypatch.setattr(storage, "native_module", lambda: None)
    q = LUQ(**options)
    for i, shape in enumerate(SHAPES):
        for x in forms(heavy(shape, i)):
            stored = check(q, x, (1, 2) if x.dim() == 4 else (0, 0))
            assert stored.samples == q.samples
            assert stored.codes.affine.magnitudes == (q.magnitudes if q.magnitudes > 1 else 0)
            assert stored.codes.bits == {2: 2, 5: 8}.get(q.bits, 4)
    for x in (torch.zeros(3, 4), torch.full((3, 4), -0.3), torch.full((1, 1), 1e-42)):
        check(q, x)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("groups", ["sample", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_agp_stores_what_it_encodes(bits, groups, native, monkeypatch):
    if not native:
        monkeypatch.setattr(quantize, "native_module", lambda: None)
        monkeypatch.setattr(storage, "native_module", lambda: None)
    q = AGP(bits, groups=groups)
    for i, shape in enumerate(SHAPES):
        for x in forms(heavy(shape, i)):
            stored = check(q, x, (2, 1) if x.dim() == 4 else (0, 0))
            assert stored.kept is not None
            assert torch.equal(stored.kept.indices, q.encode(x, STREAM).index)
            ends = (
                [t.float() for t in (x.flatten(2).amin(-1), x.flatten(2).amax(-1))] if x.dim() == 4 else [x.float()] * 2
            )
            again = store(q, x, STREAM, (2, 1) if x.dim() == 4 else (0, 0), (ends[0], ends[1]))
            assert torch.equal(again.codes.data, stored.codes.data)
    assert not check(q, torch.zeros(3, 4)).decode().any()
    check(TopK(bits, groups=groups), heavy((24, 30)))


def test_every_stream_of_agp_keeps_others():
    q, x = AGP(4), heavy((40, 6))
    kept = [store(q, x, stream(seed=seed)).kept.indices.tolist() for seed in range(20)]
    assert len({tuple(one) for one in kept}) > 5
    for seed in range(20):
        assert kept[seed] == q.encode(x, stream(seed=seed)).index.tolist()


@pytest.mark.parametrize("q", [LUQ(), LUQ(samples=2), LUQ(maximum="hindsight", largest=1.0), AGP()], ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_refused(q, bad):
    x = torch.randn(5, 6)
    x[3, 2] = bad
    with pytest.raises(NonFiniteError, match="1 NaN or Inf among 30"):
        store(q, x, STREAM)


def test_hindsight_notes_the_maximum_on_codes():
    q = Hindsight(LUQ(maximum="hindsight"))
    for scale in (1.0, 3.0, 0.5):
        x = heavy((12, 7)) * scale
        stored = store(q, x, STREAM)
        assert float(q.seen) == float(x.abs().max())
        assert torch.equal(stored.decode(), q.current(x, STREAM))
        q.update()


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 4), (5, 4), (2, 4, 3, 3)])
def test_several_samples_of_equal_numbers(samples, shape):
    """Nothing is drawn: a tensor of equal numbers is its own offset."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 1) if len(shape) == 2 else nn.Conv2d(4, 2, 2)
    x, found = torch.randn(shape), []
    policy = replace(policy_of("luq16"), grad_weight=LUQ(samples=samples))
    for backend in ("simulated", "native"):
        with fqtstats.quantized(layer, policy, backend=backend):
            layer.zero_grad()
            layer(x).sum().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
    for simulated, native in zip(*found, strict=True):
        torch.testing.assert_close(native, simulated, rtol=1e-5, atol=1e-6)


GROUPED = "float32: part of the channels of g is kept, and they have groups"
GRADIENTS = {
    "luq": (LUQ(), LUQ(samples=2)),
    "agp": (AGP(4), AGP(4, groups="channel")),
    "agp2": (AGP(2), AGP(2, groups="channel")),
    "luq16": (LUQ(dynamic_range=16), LUQ(dynamic_range=16)),
}


def policy_of(name):
    """The forward products that each is meant for: 4 bits, 1 bit."""
    forward = {
        "agp": (quantizer("sign"), quantizer("scaled_sign")),
        "agp2": (quantizer("minmax", bits=1), quantizer("zero_on_grid", bits=1)),
        "luq": (quantizer("sawb", on="activation"), quantizer("sawb")),
        "luq16": (quantizer("minmax", bits=4), quantizer("zero_on_grid", bits=4)),
    }
    return Policy(*forward[name], *GRADIENTS[name])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("model", ["cnn", "resnet", "mlp", "transformer"])
def test_parity_on_a_training_batch(model, name):
    net, batch, loss = case(model)
    report = fqtstats.parity(net, batch, loss, policy_of(name), seed=1)
    assert report.ok, report.table[~report.table["ok"]].to_string()
    bits = 1 if name.startswith("agp") else 4
    gradient = {"agp": "4", "agp2": "2"}.get(name, "log4")
    for row in report.table.itertuples():
        width = f"{bits}x{bits}" if row.product == "forward" else f"{gradient}x{bits}"
        grouped = row.layer == "depthwise" and row.product == "grad_weight" and bits == 1
        assert row.arithmetic == (GROUPED if grouped else f"integer {width}"), row


def test_where_products_of_parts_are_not_on_integers():
    x = torch.randn(6, 4, 5, 5, requires_grad=True)
    reasons = {}
    for groups in (1, 2):
        for swapped in (False, True):
            layer = nn.Conv2d(4, 4, 3, groups=groups)
            policy = policy_of("agp")
            if swapped:
                policy = replace(policy, grad_input=policy.grad_weight, grad_weight=policy.grad_input)
            with fqtstats.quantized(layer, policy, backend="native") as handle:
                layer(x).square().sum().backward()
                found = handle.arithmetic[""]
            reasons[groups, swapped] = found["grad_input"], found["grad_weight"]
    assert reasons[1, False] == ("integer 4x1", "integer 4x1")
    assert reasons[1, True] == (
        "float32: part of g is kept along the contracted output channels",
        "float32: part of g is kept along the contracted samples",
    )
    assert reasons[2, False] == ("integer 4x1", GROUPED)


def test_only_what_is_kept_is_encoded(monkeypatch):
    """The kernels see a quarter of the gradient, not all of it and a mask."""
    seen = []
    right = quantize.encode
    monkeypatch.setattr(quantize, "encode", lambda *a, **k: seen.append(right(*a, **k)) or seen[-1])
    x = heavy((64, 16))
    stored = store(AGP(4), x, STREAM)
    assert len(seen) == 1
    assert seen[0].shape == (len(stored.kept.indices), 16) == stored.codes.shape
    assert 8 <= len(stored.kept.indices) <= 24
    assert stored.nbytes < 64 * 16 / 2
