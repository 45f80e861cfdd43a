"""Quantized layers against autograd through fake quantization, and quantizers that misbehave in them.

The native backend rounds the terms of its formula, which may be larger than the result: see ``native_slack``.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from layer_cases import FORWARD, FQT, QW, ULPS, assert_near, filled, gaussian, identity, qa, qw
from oracles import fake_quantization as oracle
from torch import nn

import fqtstats
from fqtstats import Policy, quantizer
from fqtstats.errors import InputError, NonFiniteError

pytestmark = pytest.mark.usefixtures("backend")


def native_slack(backend, terms, a, b):
    """Bound of ``fqtstats/ops/products.py``: 6 2^-24 times the sum of its terms' magnitudes.

    An operand's ``|code - zero| step + |offset|`` is at most its range and its largest magnitude, 3 times the latter.
    """
    if backend == "simulated" or a.dtype == torch.float64:
        return 0.0
    return 6 * 2.0**-24 * terms * 9 * float(a.detach().abs().max()) * float(b.detach().abs().max())


def gradients(layer, x, y, g):
    """``(dx, dw, db)`` for the incoming gradient ``g``; db is None without a bias."""
    parameters = list(layer.parameters())
    dx, dw, *db = torch.autograd.grad(y, [x, *parameters], g, retain_graph=True)
    return dx, dw, *(db or [None])


LINEAR_INPUTS = {"N,D": (7, 6), "B,T,D": (2, 5, 6), "D": (6,), "A,B,T,D": (2, 3, 2, 6), "one row": (1, 6)}


# Options of both convolutions; a pair is cut to its last number in one dimension.
CONV_OPTIONS = {
    "plain": {},
    "pointwise": {"kernel_size": 1},
    "stride": {"stride": 2},
    "strides": {"stride": (2, 3)},
    "padding": {"padding": 1},
    "paddings": {"padding": (2, 1)},
    "same": {"padding": "same"},
    "same even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "same even and odd kernel": {"kernel_size": (3, 2), "padding": "same"},
    "same even kernel dilated": {"kernel_size": 2, "padding": "same", "dilation": (3, 1)},
    "valid": {"padding": "valid"},
    "valid strided": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "reflect same even": {"kernel_size": (2, 4), "padding": "same", "padding_mode": "reflect"},
    "circular same even": {"kernel_size": (4, 2), "padding": "same", "padding_mode": "circular"},
    "replicate valid": {"padding": "valid", "padding_mode": "replicate"},
    "all at once": {
        "stride": (2, 1),
        "padding": (2, 3),
        "dilation": (2, 1),
        "groups": 2,
        "padding_mode": "circular",
        "kernel_size": (2, 3),
    },
}


# name: (dtype of the model, autocast, channels_last, batched)
VARIANTS = {
    "float32": (torch.float32, False, False, True),
    "float64": (torch.float64, False, False, True),
    "bfloat16": (torch.bfloat16, False, False, True),
    "float16": (torch.float16, False, False, True),
    "autocast": (torch.float32, True, False, True),
    "channels_last": (torch.float32, False, True, True),
    "unbatched": (torch.float32, False, False, False),
}


def conv_case(space, option, bias, variant):
    """The plain layer, its input (a leaf), the oracle's options and the context to run it in."""
    dtype, autocast, channels_last, batched = VARIANTS[variant]
    options = {"kernel_size": 3, **CONV_OPTIONS[option]}
    if space == 1:
        options = {k: v[-1] if isinstance(v, tuple) else v for k, v in options.items()}
    layer = filled((nn.Conv1d if space == 1 else nn.Conv2d)(4, 8, bias=bias, **options)).to(dtype)
    x = gaussian(*((3,) if batched else ()), 4, *(9, 7)[-space:], dtype=dtype, seed=5)
    if channels_last and space == 2:
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    del options["kernel_size"]
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    return layer, x.requires_grad_(), options, context


def check_against_oracle(layer, x, context, reference, backend):
    """QAT and FQT of ``layer`` with ``reference(x, w, b, qa, qw)`` the oracle; ``x`` is a leaf."""
    bias, w = layer.bias, layer.weight
    expected = reference(x, layer.weight, bias, qa, qw)
    handle = fqtstats.prepare_(layer, FQT, seed=11)
    handle.step = 5
    with context:
        y = layer(x)
    low = torch.bfloat16 if not isinstance(context, contextlib.nullcontext) else x.dtype
    forward_slack = native_slack(backend, w[0].numel(), x, w)
    assert_near(y, expected.to(low), 1 if low == torch.bfloat16 else ULPS, slack=forward_slack)
    g = gaussian(*y.shape, seed=9, dtype=y.dtype)
    lifted = g.to(expected.dtype)
    with handle.shared.drawing(fqtstats.layers.state.Draw(sites=frozenset())):
        qat = gradients(layer, x, y, g)
    # A bias gradient is a sum with cancellation: its rounding goes with the magnitudes that are added up.
    sums = [None, None, lifted.abs().sum() / layer.weight.shape[0]]
    for got, want, largest in zip(qat, gradients(layer, x, expected, lifted), sums, strict=True):
        if got is not None:
            assert_near(got, want, largest=largest)
    # FQT: the weight and bias gradient see Q1(g), the input gradient Q2(g); a row is a sample.
    if isinstance(layer, nn.Linear):
        rows = lifted.reshape(-1, lifted.shape[-1])
    else:
        rows = lifted if x.dim() == layer.weight.dim() else lifted.unsqueeze(0)
    q = FQT.grad_input
    q1, q2 = (
        q(rows, fqtstats.stream(seed=11, step=5, layer="", site=site, draw=0, call=0, replica=0)).view_as(lifted)
        for site in ("grad_weight", "grad_input")
    )
    fqt = gradients(layer, x, y, g)
    dx, _, _ = gradients(layer, x, expected, q2)
    wrong, dw, db = gradients(layer, x, expected, q1)
    slacks = [native_slack(backend, w[:, 0].numel(), g, w), native_slack(backend, g.numel() // w.shape[0], g, x), 0.0]
    for got, want, largest, slack in zip(fqt, (dx, dw, db), sums, slacks, strict=True):
        if got is not None:
            assert_near(got, want, largest=largest, slack=slack)
    if rows.shape[0] > 1:  # one row of few elements may round alike
        assert not torch.equal(q1, q2), "the two sites use different numbers"
        assert not torch.equal(wrong, dx)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", LINEAR_INPUTS)
def test_linear_equals_autograd_through_fake_quantization(shape, variant, bias, backend):
    dtype, autocast, _, _ = VARIANTS[variant]
    layer = filled(nn.Linear(6, 5, bias=bias)).to(dtype)
    x = gaussian(*LINEAR_INPUTS[shape], seed=5, dtype=dtype).requires_grad_()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    check_against_oracle(layer, x, context, oracle.linear, backend)


@pytest.mark.parametrize("option", CONV_OPTIONS)
@pytest.mark.parametrize("space", [1, 2], ids=["conv1d", "conv2d"])
def test_convolution_equals_autograd_through_fake_quantization(space, option, backend):
    for bias, variant in itertools.product((True, False), VARIANTS):
        layer, x, options, context = conv_case(space, option, bias, variant)
        check_against_oracle(layer, x, context, lambda *a, options=options: oracle.conv(*a, **options), backend)


def plain_and_prepared(layer, x, context):
    """Outputs and gradients of the plain layer and of the layer with quantizers that return their argument."""
    results = []
    policy = Policy(activation=identity, weight=identity, grad_input=identity, grad_weight=identity)
    for handle in (None, fqtstats.prepare_):
        if handle is not None:
            handle(layer, policy)
        with context:
            y = layer(x)
        g = gaussian(*y.shape, seed=9, dtype=y.dtype)
        results.append((y, *gradients(layer, x, y, g)))
    return results


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("option", CONV_OPTIONS)
@pytest.mark.parametrize("space", [1, 2], ids=["conv1d", "conv2d"])
def test_without_rounding_a_convolution_is_the_plain_layer(space, option):
    for bias, variant in itertools.product((True, False), VARIANTS):
        layer, x, _, context = conv_case(space, option, bias, variant)
        plain, prepared = plain_and_prepared(layer, x, context)
        for got, want in zip(prepared, plain, strict=True):
            if want is not None:
                # Autocast rounds the plain layer's operands to bfloat16, 2^-8 relative each; ours are rounded once.
                if variant == "autocast":
                    assert_near(got.bfloat16(), want.bfloat16(), 4)
                else:
                    assert_near(got, want)
        if variant == "channels_last" and space == 2:
            assert prepared[0].stride() == plain[0].stride()


@pytest.mark.parametrize("shape", LINEAR_INPUTS)
@pytest.mark.parametrize("variant", ["float32", "float64", "bfloat16", "float16"])
def test_without_rounding_a_linear_layer_is_the_plain_layer(variant, shape):
    for bias in (True, False):
        layer = filled(nn.Linear(6, 5, bias=bias)).to(VARIANTS[variant][0])
        x = gaussian(*LINEAR_INPUTS[shape], seed=5, dtype=VARIANTS[variant][0]).requires_grad_()
        plain, prepared = plain_and_prepared(layer, x, contextlib.nullcontext())
        for got, want in zip(prepared, plain, strict=True):
            if want is not None:
                assert_near(got, want)


def test_padding_changed_after_construction_is_followed_like_in_the_original():
    layer, x = nn.Conv2d(3, 4, 3, padding=1), gaussian(2, 3, 8, 8)
    layer.padding, layer.dilation, layer.stride = (2, 2), (2, 2), (1, 2)
    want = layer(x)
    fqtstats.prepare_(layer, Policy(grad_input=identity))
    assert_near(layer(x), want)


def test_autocast_leaves_float64_alone():
    layer, x = nn.Linear(3, 2).double(), gaussian(4, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        fqtstats.prepare_(layer, Policy(grad_input=identity))
        assert_near(layer(x), want)


def test_wrong_dtype_is_an_input_error_that_names_the_layer():
    model = nn.Sequential(nn.Linear(3, 2))
    fqtstats.prepare_(model, FQT)
    with pytest.raises(InputError, match=r"'0'.*float32.*float64"):
        model(gaussian(4, 3, dtype=torch.float64))


def test_what_the_batch_lacks():
    layer = filled(nn.Linear(3, 2))
    fqtstats.prepare_(layer, Policy(grad_input=FQT.grad_input, grad_weight=FQT.grad_weight))
    layer(gaussian(4, 3)).square().sum().backward()  # an input that needs no gradient
    assert layer.weight.grad is not None
    assert layer(torch.empty(0, 3)).shape == (0, 2)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_leave_the_other_gradients_unchanged(frozen):
    def run(frozen):
        layer = filled(nn.Conv2d(3, 4, 3))
        for name, p in layer.named_parameters():
            p.requires_grad_(frozen not in (name, "both"))
        x = gaussian(2, 3, 5, 5).requires_grad_()
        fqtstats.prepare_(layer, FQT)
        layer(x).square().sum().backward()
        return {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}

    whole, part = run("none"), run(frozen)
    for name, g in part.items():
        if frozen in (name, "both") and name != "x":
            assert g is None
        else:
            assert torch.equal(g, whole[name])


@pytest.mark.parametrize("place", ["activation", "weight", "grad_input", "grad_weight"])
@pytest.mark.parametrize(
    ("wrong", "arrived"),
    [
        (lambda x, s: x[:1], r"got \[1, "),
        (lambda x, s: x.double(), "float64"),
        (lambda x, s: x.numpy(force=True), "ndarray"),
        (lambda x, s: None, "NoneType"),
    ],
    ids=["shape", "dtype", "array", "none"],
)
def test_a_wrong_result_of_a_quantizer_names_layer_and_site(place, wrong, arrived):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    policy = Policy(overrides={"1": Policy(**{place: wrong})})
    fqtstats.prepare_(model, policy)
    with pytest.raises(InputError, match=f"'1', {place}: expected.*{arrived}"):
        model(gaussian(4, 3)).sum().backward()


@pytest.mark.parametrize("place", ["activation", "weight", "grad_input", "grad_weight"])
def test_a_quantizer_that_writes_into_its_argument_is_refused(place):
    model = nn.Sequential(nn.Linear(3, 3))
    fqtstats.prepare_(model, Policy(**{place: lambda x, s: x.round_()}))
    with pytest.raises(InputError, match=f"'0', {place}: .*in place"):
        model(gaussian(4, 3).requires_grad_()).square().sum().backward()


@pytest.mark.parametrize("site", ["grad_input", "grad_weight"])
def test_a_gradient_with_nan_or_inf_names_the_layer_and_the_count(site):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    fqtstats.prepare_(model, Policy(**{site: quantizer("ptq", bits=4)}))
    y = model(gaussian(4, 3))
    g = torch.ones_like(y)
    g[0, 0], g[1, 1], g[2, 0] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(NonFiniteError, match=f"'1', {site}: .* 3 NaN or Inf among 8") as caught:
        y.backward(g)
    assert (caught.value.count, caught.value.numel) == (3, 8)


def test_second_derivatives_are_refused():
    layer = nn.Linear(3, 2)
    fqtstats.prepare_(layer, FQT)
    x = gaussian(4, 3).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_network_equals_the_oracle_end_to_end():
    conv, linear = filled(nn.Conv2d(2, 4, 3, padding="same")), filled(nn.Linear(4, 3))
    x = gaussian(5, 2, 6, 6, dtype=torch.float64).requires_grad_()
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).double()
    y = oracle.conv(x, conv.weight, conv.bias, qa, qw, padding="same")
    y = F.relu(F.batch_norm(y, None, None, model[1].weight, model[1].bias, training=True)).mean((2, 3))
    loss = oracle.linear(y, linear.weight, linear.bias, qa, qw).square().sum()
    expected = torch.autograd.grad(loss, [x, *model.parameters()])
    fqtstats.prepare_(model, Policy(**FORWARD))
    got = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for a, b in zip(got, expected, strict=True):
        # The convolution's bias has no gradient before a batch norm: both are rounding noise.
        assert float((a - b).abs().max()) <= 64 * torch.finfo(torch.float64).eps * max(float(b.abs().max()), 1.0)


def test_reparametrized_weights_are_used():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(filled(nn.Linear(3, 2)))
    x = gaussian(4, 3)
    fqtstats.prepare_(layer, Policy(weight=QW))
    y = layer(x)
    assert_near(y, oracle.linear(x, layer.weight, layer.bias, None, qw))
    y.sum().backward()
    assert layer.weight_g.grad is not None
    assert layer.weight_v.grad is not None
