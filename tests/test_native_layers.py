"""Layers on the native backend: integer products on codes, against the simulated backend on training batches."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_cases import case

import fqtstats
from fqtstats import Policy, quantizer
from fqtstats.layers import state
from fqtstats.layers.state import Draw
from fqtstats.ops import products
from fqtstats.ops.codes import Affine, Codes
from fqtstats.quantizers import storage


def everywhere(gradient, bits):
    """A policy with ``bits`` at every place."""
    q = quantizer(gradient, bits=bits)
    return Policy(quantizer("minmax", bits=bits), quantizer("zero_on_grid", bits=bits), q, q)


# --- parity -----------------------------------------------------------------------------------------------------------

NOT_ON_CODES = {
    "ptq": {},
    "psq": {"grad_weight": "float32: the scales of g vary along the contracted samples"},
    "bhq": {"grad_weight": "float32: the scales of g vary along the contracted samples"},
    "pcq": {"grad_input": "float32: the scales of g vary along the contracted output channels"},
}

# Each model with each quantizer, and each of them with each width.
EVERY_PAIR = [
    (name, gradient, (8, 4, 1)[(i + j) % 3])
    for i, name in enumerate(["cnn", "resnet", "mlp", "transformer"])
    for j, gradient in enumerate(NOT_ON_CODES)
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("name", "gradient", "bits"), EVERY_PAIR)
def test_parity_on_a_training_batch(name, gradient, bits):
    model, batch, loss = case(name)
    report = fqtstats.parity(model, batch, loss, everywhere(gradient, bits), seed=1)
    assert report.ok, report.table[~report.table["ok"]].to_string()
    on_codes = f"integer {bits}x{bits}"
    expected = {"forward": on_codes, "grad_input": on_codes, "grad_weight": on_codes} | NOT_ON_CODES[gradient]
    for row in report.table.itertuples():
        assert row.arithmetic == expected[row.product], row
        assert row.codes > 0
        assert row.elements > 0
        assert (row.error == 0) == (row.ulps == 0)
    layers = sum(type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d) for m in model.modules())
    assert (report.table["product"] == "forward").sum() == layers


FORWARD = {
    "lsq": (quantizer("lsq", bits=4, on="activation"), quantizer("lsq", bits=3), "integer 4x4"),
    "lsq per channel": (quantizer("lsq", bits=8, on="activation"), quantizer("lsq", per="channel"), "integer 8x8"),
    "sawb": (quantizer("sawb", on="activation"), quantizer("sawb"), "integer 4x4"),
    "sign": (quantizer("sign"), quantizer("sign", scale="channel"), "integer 1x1"),
    "scaled_sign": (quantizer("sign"), quantizer("scaled_sign"), "integer 1x1"),
    "dorefa 1": (quantizer("dorefa_act", bits=1), quantizer("dorefa_weight", bits=1), "integer 1x1"),
    "dorefa 3": (quantizer("dorefa_act", bits=3), quantizer("dorefa_weight", bits=3), "integer 4x4"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("pair", FORWARD)
def test_parity_with_forward_quantizers_of_other_papers(pair, name):
    model, batch, loss = case(name)
    activation, weight, on_codes = FORWARD[pair]
    gradient = quantizer("ptq", bits=4)
    report = fqtstats.parity(model, batch, loss, Policy(activation, weight, gradient, gradient), seed=1)
    assert report.ok, report.table[~report.table["ok"]].to_string()
    assert set(report.table["arithmetic"][report.table["product"] == "forward"]) == {on_codes}


def test_the_bound_holds_for_large_offsets():
    """An input far from zero and a gradient that sums to zero: the native formula's terms dwarf the product."""
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    batch = 100 + torch.randn(40, 64)
    q = quantizer("ptq", bits=8, grid="affine")
    policy = Policy(quantizer("minmax", bits=8), quantizer("minmax", bits=8), q, q)
    report = fqtstats.parity(model, batch, lambda m, x: (m(x) - m(x).detach().mean(0)).pow(2).sum(), policy)
    assert report.ok
    assert report.table["ulps"].max() > 8


def corrupted_store(q, x, stream, pad=(0, 0), extremes=None):
    stored = storage.store(q, x, stream, pad, extremes)
    if stored is not None and stream.site == CORRUPTED:
        data = stored.codes.data.clone()
        data.view(-1)[0] ^= 1
        stored = replace(stored, codes=replace(stored.codes, data=data))
    return stored


CORRUPTED = "weight"


@pytest.mark.parametrize("place", ["activation", "weight", "grad_input", "grad_weight"])
def test_a_single_wrong_code_fails_the_parity(monkeypatch, place):
    monkeypatch.setattr(state, "store", corrupted_store)
    monkeypatch.setitem(globals(), "CORRUPTED", place)
    report = fqtstats.parity(small.mlp(), small.batch(), small.loss, everywhere("ptq", 4))
    assert not report.ok
    name = place if place.startswith("grad") else "forward"
    wrong = report.table[~report.table["ok"]]
    assert set(wrong["product"]) == {name}
    assert (wrong["differing"] >= 1).all()


@pytest.mark.parametrize("name", ["linear", "linear_grad_input", "linear_grad_weight"])
@pytest.mark.parametrize("fault", [lambda y: y * (1 + 1e-4), lambda y: y.index_fill(0, torch.tensor([1]), math.nan)])
def test_a_wrong_product_fails_the_parity(monkeypatch, name, fault):
    """A relative error of 1e-4 is 3.2 times the bound or more on 150 inputs."""
    right = getattr(products, name)
    monkeypatch.setattr(products, name, lambda *arguments: fault(right(*arguments)))
    inspected = "forward" if name == "linear" else name.removeprefix("linear_")
    # NaN would end the pass further on: the last layer's forward product has no quantizer behind it.
    model = nn.Sequential(nn.Linear(12, 10))
    policy = everywhere("ptq", 8)
    x, y = small.batch()
    if name == "linear":
        loss = lambda m, b: F.cross_entropy(m(x).nan_to_num(), y)  # noqa: E731
    else:
        loss = lambda m, b: F.cross_entropy(m(b), y)  # noqa: E731
    report = fqtstats.parity(model, x.requires_grad_(), loss, policy)
    assert not report.ok
    assert set(report.table[~report.table["ok"]]["product"]) == {inspected}
    assert (report.table["differing"] == 0).all()


# --- how each product is computed -------------------------------------------------------------------------------------


def arithmetic_of(layer, x, policy, backend="native"):
    with fqtstats.quantized(layer, policy, backend=backend) as handle:
        layer(x).square().sum().backward()
        return handle.arithmetic[""]


def test_products_that_cannot_be_integer_say_why():
    x = torch.randn(5, 4, 6, 6, requires_grad=True)
    q = {name: quantizer(name, bits=4) for name in ("ptq", "psq", "pcq", "bhq", "minmax")}
    q["position"] = quantizer("pcq", bits=4, per_position=True)

    def of(*places, groups=1, dtype=torch.float32):
        policy = Policy(*[q.get(place, place) for place in places])
        return arithmetic_of(nn.Conv2d(4, 4, 3, groups=groups).to(dtype), x.detach().to(dtype).requires_grad_(), policy)

    whole = "integer 4x4"
    assert of("minmax", "minmax", "psq", "pcq") == {"forward": whole, "grad_input": whole, "grad_weight": whole}
    assert of("bhq", "ptq", "bhq", "ptq") == {
        "forward": whole,
        "grad_input": whole,
        "grad_weight": "float32: the scales of x vary along the contracted samples",
    }
    assert of("minmax", None, "ptq", "psq") == {
        "forward": "float32: w: no quantizer",
        "grad_input": "float32: w: no quantizer",
        "grad_weight": "float32: the scales of g vary along the contracted samples",
    }
    assert of("pcq", "psq", "ptq", "ptq") == {
        "forward": "float32: the scales of x vary along the contracted channels",
        "grad_input": "float32: the scales of w vary along the contracted output channels",
        "grad_weight": whole,
    }
    assert (
        of("pcq", "minmax", "ptq", "ptq", groups=2)["grad_weight"] == "float32: the scales of x vary along the channels"
    )
    assert of("minmax", "bhq", "ptq", "ptq")["forward"] == "float32: the transform of w mixes rows"
    no_codes = "a quantizer without codes for products"
    assert of("minmax", "minmax", lambda g, s: g, "position") == {
        "forward": whole,
        "grad_input": f"float32: g: {no_codes}",
        "grad_weight": f"float32: g: {no_codes}",
    }
    assert set(of("minmax", "minmax", "ptq", "ptq", dtype=torch.float64).values()) == {
        "float64: x: float64", "float64: g: float64",
    }  # fmt: skip


def test_a_gradient_that_sits_out_leaves_no_trace_and_one_that_changes_leaves_both():
    layer, x = nn.Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    with fqtstats.quantized(layer, everywhere("bhq", 4), backend="native") as handle:
        with handle.shared.drawing(Draw(sites=frozenset())):
            layer(x).sum().backward()
        assert list(handle.arithmetic[""]) == ["forward"]
        layer(x).sum().backward()
        layer(x[:1]).sum().backward()  # one row has one scale
        assert handle.arithmetic[""]["grad_input"] == "integer 4x4"
        assert handle.arithmetic[""]["grad_weight"] == (
            "float32: the scales of g vary along the contracted samples; integer 4x4"
        )


def test_the_simulated_backend_has_no_arithmetic_to_list():
    assert arithmetic_of(nn.Linear(6, 4), torch.randn(5, 6), everywhere("ptq", 4), "simulated") == {}


# --- layers as torch has them -----------------------------------------------------------------------------------------

BACKENDS = ["simulated", "native"]
IMAGES, LINES = (3, 4, 6, 6), (3, 4, 9)
LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 5, 3), IMAGES),
    "one output channel": (lambda: nn.Conv2d(4, 1, 3), IMAGES),
    "part of a convolution": (lambda: nn.Conv2d(4, 5, 2, padding="same"), IMAGES),
    "reflected border": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), IMAGES),
    "without a batch": (lambda: nn.Conv2d(4, 5, 3), IMAGES[1:]),
    "1-D": (lambda: nn.Conv1d(4, 5, 3), LINES),
    "1-D without a batch": (lambda: nn.Conv1d(4, 5, 3), LINES[1:]),
    "linear": (lambda: nn.Linear(9, 5), LINES),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "bias"), [("ptq", True), ("bhq", True), ("bhq", False)])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_may_be_changed_in_place(name, activation, bias, backend):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    if not bias:
        layer.bias = None
    policy = replace(everywhere("bhq", 4), activation=quantizer(activation, bits=4))
    found = []
    for copy in (lambda y: y, torch.clone):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with fqtstats.quantized(layer, policy, backend=backend):
            y = F.relu(copy(layer(leaf)).add_(0.1), inplace=True)
            y.square().sum().backward()
        found.append((y.detach(), leaf.grad, *(p.grad for p in layer.parameters())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    found[0][1].add_(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (2, 4, 6, 6)),
        (nn.Conv2d(6, 4, 3, groups=2), (2, 8, 6, 6)),
        (nn.Conv2d(4, 4, 3), (4, 6)),
        (nn.Conv2d(4, 4, 3), (1, 1, 4, 6, 6)),
        (nn.Conv2d(4, 4, 3), (2, 4, 2, 6)),
        (nn.Conv1d(4, 4, 3), (4,)),
        (nn.Conv1d(4, 4, 3), (2, 4, 2)),
        (nn.Linear(4, 4), (2, 5)),
    ],
)
@pytest.mark.parametrize("bits", [8, 1])
def test_inputs_that_torch_refuses_are_refused(layer, shape, bits, backend):
    x = torch.randn(shape)
    with pytest.raises(RuntimeError):
        layer(x)
    with (
        fqtstats.quantized(layer, everywhere("ptq", bits), backend=backend),
        pytest.raises((RuntimeError, fqtstats.errors.InputError), match=r"(?i)expected|larger|greater|multiplied"),
    ):
        layer(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear", [True, False])
def test_a_bias_of_any_strides(linear, backend):
    torch.manual_seed(0)
    layer, x = (nn.Linear(4, 5), torch.randn(3, 4)) if linear else (nn.Conv2d(4, 5, 3), torch.randn(2, 4, 5, 5))
    for bits in (8, 1):
        found = []
        for bias in (layer.bias.detach().clone(), layer.bias.detach().repeat_interleave(2)[::2]):
            layer.bias = nn.Parameter(bias)
            with fqtstats.quantized(layer, everywhere("ptq", bits), backend=backend):
                found.append(layer(x))
        assert not layer.bias.is_contiguous()
        assert torch.equal(*found)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 1])
@pytest.mark.parametrize(
    "default",
    [lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16), lambda: torch.device("meta")],
)
def test_default_dtype_and_device_change_no_bit(default, bits, backend):
    model, batch, loss = case("cnn", samples=6)
    policy = replace(everywhere("bhq", bits), grad_weight=quantizer("pcq", bits=bits))
    found = []
    for context in (contextlib.nullcontext, default):
        model.zero_grad()
        with fqtstats.quantized(model, policy, backend=backend), context():
            value = loss(model, batch)
            value.backward()
        found.append((value, *(p.grad for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- what is kept -----------------------------------------------------------------------------------------------------


def graph_tensors(y):
    """The tensors that the layers' autograd nodes keep."""
    seen, stack, found = set(), [y.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(function for function, _ in node.next_functions)
        if "Multiply" in type(node).__name__:
            found.append([t for t in node.saved_tensors if t is not None])
    return found


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_only_codes_are_kept(bits):
    model, batch, loss = case("cnn")
    batch = (batch[0].requires_grad_(), batch[1])
    with fqtstats.quantized(model, everywhere("ptq", bits), backend="native") as handle:
        value = loss(model, batch)
        kept = graph_tensors(value)
        assert len(kept) == len(handle.layers)
        assert {t.dtype for pair in kept for t in pair} == {torch.uint8}
        total = sum(t.numel() for pair in kept for t in pair)
        told = handle.kept
        assert list(told) == list(handle.layers)
        affine = sum(k.activation + k.weight for k in told.values()) - total
        assert 0 < affine <= 24 * len(kept)  # step, zero and offset of every operand
        wide = sum(k.activation_float32 for k in told.values())
        if bits == 8:
            assert 0.25 * wide < sum(k.activation for k in told.values()) < 0.6 * wide  # few channels: padded words
        del value, kept
        assert handle.kept == {}


def test_bytes_kept_of_wide_activations():
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(1024, 8))
    x = torch.randn(4, 64, 4, 4, requires_grad=True)
    for bits in (8, 4, 2, 1):
        with fqtstats.quantized(model, everywhere("ptq", bits), backend="native") as handle:
            y = model(x)
            for kept in handle.kept.values():
                assert kept.activation_float32 == 4 * x.numel()
                assert kept.activation - 12 <= x.numel() * bits / 8 <= kept.activation
            del y
    with fqtstats.quantized(model, everywhere("ptq", 8)) as handle:
        y = model(x)
        assert all(kept.activation == kept.activation_float32 for kept in handle.kept.values())
        with torch.no_grad():
            z = model(x)
        assert len(handle.kept) == 3
        assert handle.kept["0"].activation == 4 * x.numel(), "an evaluation keeps nothing"
        y.sum().backward()
        del y, z


def test_calls_of_a_layer_are_added_up():
    layer = nn.Linear(8, 8)
    with fqtstats.quantized(layer, everywhere("ptq", 8), backend="native") as handle:
        y = layer(layer(layer(torch.randn(4, 8))))
        assert handle.kept[""].activation_float32 == 3 * 4 * 4 * 8
        y.sum().backward()


# --- overflow ---------------------------------------------------------------------------------------------------------


def row(codes, step, zero=0, offset=0.0):
    affine = Affine(torch.tensor([step]), torch.tensor([zero], dtype=torch.int32), torch.tensor([offset]))
    return Codes.pack(torch.tensor([codes], dtype=torch.uint8), 8, affine)


# Two rows, their product on codes, and that of the decoded numbers.
OVERFLOWS = {
    "result": (row([1, 2], 1e20), row([1, 2], 1e20), math.inf, math.inf),
    "product of the steps": (row([0, 1], 1e20), row([1, 0], 1e20), math.nan, 0.0),
    "parts": (row([1, 1], 1e20, offset=-1e20), row([1, 1], 1e20, offset=-1e20), math.nan, 0.0),
    "terms": (row([2, 0], 1e38, zero=1), row([4, 4], 1.0), 0.0, math.nan),
}


@pytest.mark.parametrize(("x", "w", "on_codes", "decoded"), OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_overflow_is_that_of_float32(x, w, on_codes, decoded, monkeypatch):
    """What the docstring of the products says, with kernels and without."""
    found = [products.linear(x, w)]
    monkeypatch.setattr(products, "native_module", lambda: None)
    found.append(products.linear(x, w))
    for y in found:
        assert float(y) == pytest.approx(on_codes, nan_ok=True)
    assert float(x.decode() @ w.decode().t()) == pytest.approx(decoded, nan_ok=True)


# --- the same numbers -------------------------------------------------------------------------------------------------


def gradients(model, batch, loss, policy, seed=3, step=2):
    model.zero_grad()
    with fqtstats.quantized(model, policy, backend="native", seed=seed) as handle:
        handle.step = step
        loss(model, batch).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("gradient", ["ptq", "bhq"])
def test_threads_and_repetition_change_no_bit(gradient):
    """Without other layers than those that are quantized: torch's own sums depend on the number of threads."""
    model, batch = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, stride=2)), torch.randn(8, 3, 9, 9)
    policy = replace(everywhere(gradient, 8), grad_weight=quantizer("ptq", bits=8))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(gradients(model, batch, lambda m, b: (m(b) * 0.5).sum(), policy))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_changes_no_code(memory_format):
    layer = nn.Conv2d(6, 4, 3, padding=1)
    x, g = torch.randn(5, 6, 7, 7), torch.randn(5, 4, 7, 7)
    found = []
    for form in (torch.contiguous_format, memory_format):
        leaf = x.to(memory_format=form, copy=True).requires_grad_()
        layer.zero_grad()
        with fqtstats.quantized(layer, everywhere("ptq", 4), backend="native"):
            y = layer(leaf)
            y.backward(g.to(memory_format=form))
        found.append((y, leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(found[0][3], found[1][3], rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_codes_and_changes_no_bit(reentrant):
    def run(wrap):
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])
        x = y = torch.randn(4, 3, 6, 6, requires_grad=True)
        with fqtstats.quantized(layers, everywhere("bhq", 4), backend="native") as handle:
            handle.step = 1
            for first, second in zip(layers[::2], layers[1::2], strict=True):
                y = wrap(lambda y, a=first, b=second: torch.relu(b(torch.relu(a(y)))), y)
            y.square().sum().backward()
        return [x.grad, *(p.grad for p in layers.parameters())]

    plain = run(lambda f, y: f(y))
    again = run(lambda f, y: checkpoint(f, y, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# --- unbiased ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["ptq", "psq", "bhq"])
def test_draws_are_unbiased_around_the_qat_gradient(gradient):
    """48 draws of 6 parameters and the total; some p-value below 1e-6 / 7 with probability 1e-6.

    Finds the bias of rounding to nearest: the negative control below.
    """
    policy = fqtstats.policies.get(f"statquant-{gradient}", bits=4)
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 48, backend="native")
    assert result.metadata["backend"] == "native"
    assert (result.table["bias_p"] > 1e-6 / 7).all(), result.table[["layer", "parameter", "bias_p"]]
    print(f"smallest bias p {result.table['bias_p'].min():.3g}")


def test_a_bias_is_found():
    nearest = quantizer("minmax", bits=4)
    policy = Policy(*[quantizer("minmax", bits=8)] * 2, nearest, quantizer("ptq", bits=8))
    result = fqtstats.measure(small.mlp(), small.batch(), small.loss, policy, 48, backend="native")
    assert result.table["bias_p"].min() < 1e-6 / 7


def test_variance_agrees_with_the_simulated_backend():
    """Two measurements with independent seeds: each variance within 5.5 joint standard errors, 14 rows; 1e-6."""
    policy = fqtstats.policies.get("statquant-psq", bits=4)
    tables = [
        fqtstats.measure(
            small.mlp(), small.batch(), small.loss, policy, 64, seed=seed, backend=backend, method="montecarlo"
        ).table
        for seed, backend in enumerate(("simulated", "native"))
    ]
    errors = [(t["variance_high"] - t["variance_low"]) / (2 * 1.998) for t in tables]
    gap = (tables[0]["variance"] - tables[1]["variance"]).abs()
    assert (gap <= 6.5 * np.hypot(*errors)).all()
