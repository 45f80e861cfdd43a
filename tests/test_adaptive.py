"""BHQ with adaptive grouping: never more variance than BHQ or PSQ, unbiased, and the same choices everywhere."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import quantizers as oracle
from words import Word

import fqtstats
from fqtstats import ops
from fqtstats.data import data
from fqtstats.errors import InputError, NonFiniteError
from fqtstats.ops.householder import householder_adapt
from fqtstats.quantizers import adaptive, quantizer
from fqtstats.quantizers.adaptive import adapt
from fqtstats.quantizers.base import extremes, rows
from fqtstats.quantizers.bhq import BlockHouseholder, group_rows
from fqtstats.quantizers.storage import store
from fqtstats.random import stream

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in ops.kernels() if k.op == "householder" and k.available and k.variant != "torch"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS = {
    "gaussian": lambda n, d, seed: gaussian(n, d, seed=seed),
    "rectified": lambda n, d, seed: gaussian(n, d, seed=seed).relu(),
    "two_valued": lambda n, d, seed: gaussian(n, d, seed=seed).sign() + 0.001 * gaussian(n, d, seed=seed + 1),
    "exactly_two_valued": lambda n, d, seed: gaussian(n, d, seed=seed).sign(),
    "one_large_row": lambda n, d, seed: (
        gaussian(n, d, seed=seed) * torch.cat([torch.ones(1), torch.full((n - 1,), 1e-4)]).double().view(n, 1)
    ),
    "heavy_rows": lambda n, d, seed: gaussian(n, d, seed=seed) * torch.exp(2 * gaussian(n, 1, seed=seed + 1)),
    "some_constant": lambda n, d, seed: (
        gaussian(n, 1, seed=seed).expand(n, d) + gaussian(n, d, seed=seed + 1) * (torch.arange(n) % 3 == 0).view(n, 1)
    ),
    "all_zero": lambda n, d, seed: torch.zeros(n, d, dtype=torch.float64),
    "constant": lambda n, d, seed: torch.full((n, d), 0.3, dtype=torch.float64),
    "ties": lambda n, d, seed: gaussian(n, d, seed=seed).round(),
    "offset": lambda n, d, seed: gaussian(n, d, seed=seed) + 1000,
    "large_constant_beside": lambda n, d, seed: torch.where(
        (torch.arange(n) % 4 == 1).view(n, 1), 1e6, gaussian(n, d, seed=seed)
    ),
    "huge_ratio": lambda n, d, seed: (
        gaussian(n, d, seed=seed) * 10.0 ** -(torch.arange(n) * 8 % 30).view(n, 1).double()
    ),
}


@st.composite
def inputs(draw):
    n, d = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    x = KINDS[draw(st.sampled_from(sorted(KINDS)))](n, d, draw(st.integers(0, 10**6)))
    x = x * 10.0 ** draw(st.sampled_from([0, 0, 0, -8, -30, -38, -44, 30]))
    return x.to(draw(st.sampled_from([torch.float32, torch.float32, torch.float64])))


def total(name, x, **options):
    return float(quantizer(name, **options).variance(x).sum())


def choice_of_torch(x, bits, random_bits=24):
    view = rows(x)
    low, high = extremes(view, 0)
    published = BlockHouseholder.of(group_rows((high.double() - low.double()).view(-1)), view.dtype)
    transform, found = adapt(published, view, low, high, 2**bits - 1, random_bits)
    for known, expected in zip(found, transform.forward_extremes_in_torch(view), strict=True):
        assert torch.equal(known, expected)
    return transform


# --- variance ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(x=inputs(), bits=st.integers(1, 8), random_bits=st.sampled_from([24, 24, 6, 32]))
@example(x=KINDS["exactly_two_valued"](12, 9, 0).float(), bits=4, random_bits=24)
@example(x=torch.tensor([[0.0, -2.6625e-44]]), bits=4, random_bits=24)
def test_never_more_variance_than_the_published_quantizer_or_psq(x, bits, random_bits):
    options = {"bits": bits, "random_bits": random_bits}
    least = min(total("psq", x, **options), total("bhq", x, **options))
    q = quantizer("bhq", grouping="adaptive", **options)
    variance = float(q.variance(x).sum())
    assert variance <= least * (1 + 1e-12)
    if random_bits >= 24:
        assert variance <= q.bound(x)
        assert q.bound(x) <= quantizer("bhq", **options).bound(x) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("rectified", 1.4, 3.0), ("two_valued", 8, 80), ("one_large_row", 1.0, 1.2), ("heavy_rows", 1.05, 1.4)],
)
def test_what_it_saves_on_the_published_quantizer(kind, least, most):
    x = KINDS[kind](64, 128, 3)
    assert least < total("bhq", x, bits=4) / total("bhq-adaptive", x, bits=4) < most


def test_less_variance_than_the_published_quantizer_in_a_trained_network(gradients):
    ratios = []
    for x in gradients:
        published, adaptive = (total(name, x, bits=4) for name in ("bhq", "bhq-adaptive"))
        assert adaptive < published
        ratios.append(adaptive / published)
    assert sum(ratios) / len(ratios) < 0.97


@pytest.fixture(scope="module")
def gradients():
    """Incoming gradients of a small network after a few steps, one for each layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )
    source = data("digits")
    x, labels = next(iter(source.batches(128, seed=0, epoch=0)))
    x = x.flatten(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    found = []
    for layer in (model[0], model[2]):
        layer.register_full_backward_hook(lambda module, grads, incoming: found.append(incoming[0].detach().clone()))
    torch.nn.functional.cross_entropy(model(x.requires_grad_()), labels).backward()
    return found


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("kind", ["heavy_rows", "rectified", "one_large_row"])
def test_variance_by_enumeration_of_codes(kind, bits):
    """The codes over all 4-bit words, decoded with the oracle's dense inverse of the chosen maps."""
    x = KINDS[kind](9, 7, 5)
    q = quantizer("bhq-adaptive", bits=bits, random_bits=4)
    encoded = [q.encode(x, Word(word)) for word in range(16)]
    frame = encoded[0].frame
    noise = torch.stack([e.codes().double() * frame.grid.step for e in encoded]).var(0, correction=0).view(9, 7)
    inverse = torch.zeros(9, 9, dtype=torch.float64)
    order, scale, position = frame.transform.order.tolist(), frame.transform.row_scale.view(-1).tolist(), 0
    sizes = dict(zip(frame.transform.heads.tolist(), frame.transform.sizes.long().tolist(), strict=True))
    while position < 9:
        n = sizes.get(position, 1)
        h = oracle.householder(n) if n > 1 else [[1.0]]
        for i in range(n):
            for j in range(n):
                inverse[order[position + i], position + j] = h[i][j] / scale[position + i]
        position += n
    assert torch.allclose(q.variance(x), inverse.square() @ noise, rtol=1e-9, atol=1e-300)


# --- mean -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "rectified", "one_large_row", "heavy_rows", "some_constant"])
def test_unbiased_by_probing(kind):
    x = KINDS[kind](12, 16, 1).float()
    q = quantizer("bhq-adaptive", bits=4)
    mean = fqtstats.exact_mean(q, x)
    assert torch.allclose(mean, x.double(), rtol=0, atol=2e-6 * float(x.abs().max()))
    assert torch.allclose(q.mean(x), mean, rtol=0, atol=1e-6 * float(x.abs().max()))


# --- the same choices everywhere --------------------------------------------------------------------------------------


def assert_same(found, expected):
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.heads, expected.heads)
    assert torch.equal(found.sizes, expected.sizes)
    assert torch.equal(found.scale, expected.row_scale.view(-1))


@settings(max_examples=100)
@given(x=inputs(), bits=st.integers(1, 8), random_bits=st.sampled_from([4, 24, 32]))
def test_large_inputs_are_worked_on_piece_by_piece_with_the_same_choices(x, bits, random_bits):
    """With pieces of 16 elements every input but the smallest ones is large."""
    if len(x) < 2 or not bool((x.amax(1) > x.amin(1)).any()):
        return
    expected = choice_of_torch(x, bits, random_bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive, "_PIECE", 16)
        found = choice_of_torch(x, bits, random_bits)
    for name in ("order", "heads", "sizes", "row_scale"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@settings(max_examples=100)
@given(x=inputs(), bits=st.integers(1, 8), random_bits=st.sampled_from([4, 24, 32]))
def test_native_choices_are_those_of_torch(x, bits, random_bits):
    x = x.float()
    view = rows(x)
    low, high = extremes(view, 0)
    if len(x) < 2 or not bool((high > low).any()):
        return
    expected = choice_of_torch(x, bits, random_bits)
    for variant in VARIANTS:
        found = householder_adapt(view, low.view(-1), high.view(-1), bits, random_bits, variant=variant)
        assert_same(found, expected)


@pytest.mark.parametrize("bits", [2, 8])
def test_native_choices_between_close_candidates(bits):
    """Long rows with many bits, where the first intervals often leave open which candidate is least."""
    for seed in range(6):
        x = torch.randn(64, 4100, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -3, 64).view(-1, 1)
        expected = choice_of_torch(x, bits)
        view = rows(x)
        low, high = extremes(view, 0)
        for variant in VARIANTS:
            assert_same(householder_adapt(view, low.view(-1), high.view(-1), bits, 24, variant=variant), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("heavy_rows", (40, 37)), ("rectified", (24, 6, 5, 4)), ("gaussian", (20, 2051)), ("gaussian", (12, 70, 3, 5))],
)
def test_codes_are_those_of_encode(kind, shape, dtype):
    """In channels-last memory, too, where the exact sums still go by the logical order; and with every thread count."""
    flat = KINDS[kind](shape[0], torch.Size(shape[1:]).numel(), 2)
    x = flat.view(shape).to(dtype)
    q, s = quantizer("bhq-adaptive", bits=4), stream(seed=3)
    encoded = q.encode(x, s)
    forms = [x] if x.dim() == 2 else [x, x.to(memory_format=torch.channels_last)]
    before = torch.get_num_threads()
    try:
        for form in forms:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                stored = store(q, form, s)
                assert torch.equal(stored.codes.unpack(), encoded.codes().view(shape))
                assert torch.equal(stored.decode(), encoded.decode())
                assert torch.equal(stored.transform.row_scale, encoded.frame.transform.row_scale)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["heavy_rows", "rectified", "exactly_two_valued"])
def test_codes_without_the_extension_are_those_with_it(kind, monkeypatch):
    x = KINDS[kind](40, 130, 4).float()
    q, s = quantizer("bhq-adaptive", bits=4), stream(seed=3)
    encoded, stored = q.encode(x, s), store(q, x, s)
    monkeypatch.setenv("FQTSTATS_NATIVE", "0")
    ops.native_module.cache_clear()
    try:
        fallback = q.encode(x, s)
    finally:
        monkeypatch.undo()
        ops.native_module.cache_clear()
    assert torch.equal(fallback.codes(), encoded.codes())
    assert torch.equal(fallback.codes().view(x.shape), stored.codes.unpack())
    assert torch.equal(fallback.decode(), encoded.decode())
    for found in (encoded.frame.transform, stored.transform):
        assert torch.equal(fallback.frame.transform.row_scale, found.row_scale)
        assert torch.equal(fallback.frame.transform.heads, found.heads)


@pytest.mark.parametrize("bits", [2, 5])
def test_few_random_bits_leave_nothing_to_the_intervals(bits):
    """With 4 random bits the intervals overlap nearly always: the exact sums decide, in every implementation."""
    x = KINDS["gaussian"](30, 50, 7).float().view(30, 10, 5, 1)
    q, s = quantizer("bhq-adaptive", bits=bits, random_bits=4), stream(seed=1)
    encoded = q.encode(x, s)
    for form in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(store(q, form, s).codes.unpack(), encoded.codes().view(x.shape))
    assert_same(
        householder_adapt(rows(x), x.flatten(1).amin(1), x.flatten(1).amax(1), bits, 4), choice_of_torch(x, bits, 4)
    )


def test_a_group_beyond_float32_stays_alone():
    """Scaled, the large constant row overflows: the published quantizer refuses this input."""
    x = torch.zeros(4, 6)
    x[0] = torch.linspace(0, 1, 6)
    x[1:, 0] = 1e-38
    x[2] += 3e38
    q = quantizer("bhq-adaptive", bits=4)
    with pytest.raises(NonFiniteError):
        quantizer("bhq", bits=4).variance(x)
    assert torch.equal(q.variance(x), quantizer("psq", bits=4).variance(x))
    assert torch.equal(store(q, x, stream()).decode(), q(x, stream()))


@pytest.mark.parametrize("bits", [5, 7])
def test_codes_that_overflow_have_no_finite_variance(bits):
    """At the end of float32 the largest code stands for infinity; the choices are still the same everywhere."""
    most, levels, inputs_beyond = float(torch.finfo(torch.float32).max), 2**bits - 1, 0
    for seed in range(200):
        n, d = (2, 3, 4, 8)[seed % 4], (2, 3, 5, 16, 40)[seed % 5]
        low = (-most / 2, 0.0, -most / 4, -most)[seed % 4]
        codes = torch.randint(0, levels + 1, (n, d), generator=torch.Generator().manual_seed(seed))
        codes[0, :2] = torch.tensor([0, levels])
        x = low + codes.double() / levels * most
        x[1:] *= (1, 0.5, 0.25)[seed % 3]
        x = x.float()
        least, largest = x.amin(1), x.amax(1)
        if not bool((largest.double() - least.double() <= most).all()):
            continue
        known = adaptive._exact(x, least.view(-1, 1), largest.view(-1, 1), levels, 24)
        assert not known.isnan().any()
        view, expected = rows(x), choice_of_torch(x, bits)
        inputs_beyond += int(known.isinf().any())
        for variant in VARIANTS:
            assert_same(householder_adapt(view, least, largest, bits, 24, variant=variant), expected)
    assert inputs_beyond > 50


def arguments(**changes):
    values = {"x": np.arange(20, dtype=np.float32).reshape(4, 5) ** 2, "bits": 4, "random_bits": 24}
    values |= {"order": np.zeros(4, np.int64), "heads": np.zeros(2, np.int64), "sizes": np.zeros(2)}
    values |= {"scale": np.zeros(4, np.float32), "threads": 1}
    return {**values, "low": values["x"].min(1), "high": values["x"].max(1), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((4, 5))}, TypeError, "x must be float32"),
        ({"x": np.zeros((0, 5), np.float32)}, ValueError, "x must be not empty"),
        ({"bits": 9}, ValueError, "bits must be 1 to 8, got 9"),
        ({"random_bits": 33}, ValueError, "random_bits must be 1 to 32, got 33"),
        ({"scale": np.zeros(5, np.float32)}, ValueError, r"scale must be float32 \[4\]"),
        ({"low": np.zeros(3, np.float32)}, ValueError, r"low must be float32 \[4\]"),
        ({"high": np.zeros(4)}, TypeError, "high must be float32"),
        ({"threads": 0}, ValueError, "threads must be 1 to 65536, got 0"),
        ({"variant": "sse9"}, ValueError, r"variant must be one of .*scalar, got 'sse9'"),
    ],
)
def test_native_boundary_is_strict(changes, error, message):
    assert native.householder_adapt(**arguments())[1] >= 0
    with pytest.raises(error, match=message):
        native.householder_adapt(**arguments(**changes))


# --- names ------------------------------------------------------------------------------------------------------------


def test_options_and_names():
    x = KINDS["heavy_rows"](16, 20, 0).float()
    named, option = quantizer("bhq-adaptive", bits=3), quantizer("bhq", bits=3, grouping="adaptive")
    assert torch.equal(named(x, stream()), option(x, stream()))
    assert named.claim == "unbiased"
    assert fqtstats.policies.get("statquant-bhq-adaptive", bits=3).grad_input == named
    with pytest.raises(InputError, match="grouping must be 'published' or 'adaptive', got 'best'"):
        quantizer("bhq", grouping="best")
    with pytest.raises(InputError, match="grouping of 'bhq-adaptive' must be 'adaptive'"):
        quantizer("bhq-adaptive", grouping="published")
