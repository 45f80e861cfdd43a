"""Every quantizer of the registry against its definition: law, mean, variance, bounds, storage, edges.

A new registry row is tested by everything here that does not name a quantizer.
"""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import quantizers as oracle
from words import Word, Words

from fqtstats.errors import InputError, NonFiniteError
from fqtstats.quantizers import QUANTIZERS, options_of, quantizer
from fqtstats.random import stream

# Registry name and options; options other than the defaults are added by hand. Those of AGP are in test_agp.py: its
# codes are those of the groups that it keeps, and all elements of a group share a number.
OWN_FILE = ("agp", "topk")
CASES = [(name, {}) for name in QUANTIZERS if name not in OWN_FILE]
CASES += [("ptq", {"grid": "affine"}), ("pcq", {"per_position": True}), ("luq", {"dynamic_range": 1})]
STOCHASTIC = [case for case in CASES if "random_bits" in options_of(QUANTIZERS[case[0]]) and case[0] != "flush"]
# Their grid reaches from one extreme of the input to the other; that of the other deterministic ones does not.
NEAREST = [case for case in CASES if case[0] in ("minmax", "zero_on_grid", "symmetric", "nearest")]
FORWARD = [case for case in CASES if QUANTIZERS[case[0]].role == "forward"]
# What rounds onto a logarithmic grid: no two steps are alike, no range is too large, and no grid is of integers.
LOGARITHMIC = ("luq", "flush")
BITS = (8, 4, 2, 1)  # the widths that fill bytes; between them they meet every branch


def label(case):
    name, options = case
    return "-".join([name, *(str(value) for value in options.values())])


def build(case, bits, **more):
    name, options = case
    return quantizer(name, bits=nearest_width(name, bits), **options, **more)


def nearest_width(name, bits):
    """``bits``, or the nearest that the quantizer comes in."""
    return min(QUANTIZERS[name].widths, key=lambda width: abs(width - bits))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def row_scales(x, sigma, seed=1):
    scales = torch.exp(sigma * torch.randn(x.shape[0], generator=rng(seed), dtype=torch.float64)).to(x.dtype)
    return x * scales.view(-1, *[1] * (x.dim() - 1))


INPUTS = {
    "gaussian": lambda: gaussian(16, 40),
    "heavy_rows": lambda: row_scales(gaussian(33, 5, 4), 2.0),
    "one_large_row": lambda: gaussian(64, 16) * torch.cat([torch.ones(1, 1), torch.full((63, 1), 1e-4)]),
    "one_sided": lambda: gaussian(16, 40).abs() + 0.1,
    "negative": lambda: -gaussian(16, 40).abs() - 0.1,
    "offset": lambda: gaussian(16, 40) + 1000,
    "rectified": lambda: gaussian(16, 40).relu(),
    "sparse": lambda: gaussian(16, 40) * (gaussian(16, 40, seed=1) > 1.5),
    "two_valued": lambda: gaussian(16, 40).sign(),
    "zero_rows": lambda: gaussian(16, 40) * (torch.arange(16) % 3 == 0).view(-1, 1),
    "constant_rows": lambda: gaussian(16, 1).expand(16, 40) + gaussian(16, 40) * (torch.arange(16) < 4).view(-1, 1),
    "N": lambda: gaussian(37),
    "BTD": lambda: gaussian(4, 6, 10),
    "NCHW": lambda: gaussian(6, 3, 5, 4),
    "NCL": lambda: gaussian(6, 3, 7),
    "channels_last": lambda: gaussian(6, 3, 5, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: gaussian(40, 16).t(),
    "strided": lambda: gaussian(16, 80)[::2, ::3],
    "expanded": lambda: gaussian(1, 40).expand(8, 40),
    "bfloat16": lambda: gaussian(16, 40).to(torch.bfloat16),
    "float16": lambda: gaussian(16, 40).to(torch.float16),
    "float64": lambda: gaussian(16, 40, dtype=torch.float64),
    "subnormal": lambda: gaussian(16, 40) * 1e-40,
    "tiny": lambda: gaussian(16, 40) * 1e-30,
    "huge": lambda: gaussian(16, 40).clamp(-3, 3) * 4e37,
    "mixed_scales": lambda: row_scales(gaussian(16, 40), 30.0),
    "one_row": lambda: gaussian(1, 40),
    "two_rows": lambda: gaussian(2, 40),
    "three_rows": lambda: gaussian(3, 40),
    "one_column": lambda: gaussian(16, 1),
    "single": lambda: gaussian(1, 1),
}


def law(q, x):
    """Steps ``[N, S]`` (of the rows that are rounded), fractions there, and dense ``T`` and ``T^-1``; float64."""
    frame = q.encode(x, Word(0)).frame
    n = frame.view[0]
    flat = x.detach().double().reshape(n, -1)
    step = frame.grid.step.double().expand(frame.view).reshape(n, -1)
    if q.name in LOGARITHMIC:
        one = torch.eye(n, dtype=torch.float64)
        z = torch.where(step > 0, flat.abs() / step, 0.0)
        step = step * torch.where(z > 0, z, 1.0).log2().floor().clamp(min=0).exp2()
        inside = torch.where(step > 0, flat.abs() / step, 0.0)
        fraction = torch.where(flat < 0, 1 - inside, inside)
        return step, fraction - fraction.floor(), one, one
    inverse = torch.eye(n, dtype=torch.float64)
    if frame.transform is not None:
        inverse = frame.transform.inverse(inverse.view(n, n, 1)).view(n, n)
    forward = torch.linalg.inv(inverse)
    y = forward @ flat
    if frame.grid.offset is not None:
        y = y - frame.grid.offset.double().expand(frame.view).reshape(n, -1)
    coordinate = torch.where(step > 0, y / step, 0.0)
    return step, coordinate - coordinate.floor(), forward, inverse


def arithmetic_tolerance(q, x):
    """How far the mean may be from ``x`` by the rounding of the arithmetic, per element.

    ``tau`` steps with ``tau = 4 * 2^b * 2^-24``, and a few units in the last place of what is added up.
    """
    step, _, forward, inverse = law(q, x)
    double = x.dtype == torch.float64
    tau = 2.0**-23 if double else 4 * 2.0**q.bits * 2.0**-24
    info = torch.finfo(torch.float64 if double else torch.float32)
    flat = x.detach().double().reshape(len(step), -1).abs()
    # What is added up: elements of the row where the rows have grids (or mix), of the whole tensor otherwise.
    largest = flat.amax(1, keepdim=True) if q.name in ("psq", "bhq", "bhq-adaptive") else flat.max()
    depth = 8 + math.log2(len(step))
    spread = inverse.abs() @ (forward.abs() @ largest.expand_as(flat))
    return (inverse.abs() @ (tau * step) + depth * info.eps * spread + 4 * info.smallest_normal * info.eps).view(
        x.shape
    )


# --- mean and variance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
@pytest.mark.parametrize("kind", INPUTS)
def test_claimed_unbiased_quantizers_are_exact_in_the_mean(case, kind):
    x = INPUTS[kind]()
    for bits in (1, 3, 8):
        q = build(case, bits)
        assert q.claim == "unbiased"
        mean = q.mean(x)
        assert mean.dtype == torch.float64
        assert mean.shape == x.shape
        excess = (mean - x.double()).abs() - arithmetic_tolerance(q, x)
        assert excess.max() <= 0, f"{bits} bits: off by {excess.max():.3g} more than the tolerance"


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("kind", INPUTS)
def test_shapes_dtypes_bounds_and_storage(case, kind):
    x = INPUTS[kind]()
    before = x.clone()
    s = stream(seed=5, layer=kind)
    for bits in BITS:
        q = build(case, bits)
        if case[0] == "lsq" and kind == "huge" and bits >= 4:  # (Qn + Qp) 2 mean|x| / Qp^(1/2) is no float32
            with pytest.raises(NonFiniteError, match="range exceeds"):
                q(x, s)
            continue
        out, encoded, variance = q(x, s), q.encode(x, s), q.variance(x)
        assert out.shape == x.shape
        assert out.dtype == x.dtype
        assert bool(out.isfinite().all())
        decoded = encoded.decode()
        assert decoded.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert torch.equal(decoded.to(x.dtype), out)
        assert torch.equal(encoded.decode(), decoded), "decoding twice gives the same numbers"
        assert encoded.payload.dtype == torch.uint8
        assert encoded.payload.numel() == -(-x.numel() * q.format.storage_bits // 8)
        assert int(encoded.codes().max()) <= q.format.levels
        assert encoded.nbytes >= encoded.payload.numel() + encoded.frame.grid.step.numel() * 4
        assert variance.dtype == torch.float64
        assert variance.shape == x.shape
        assert bool((variance >= 0).all())
        assert float(variance.sum()) <= q.bound(x)
        assert torch.equal(x, before), "the input is left alone"


@pytest.mark.parametrize("case", NEAREST, ids=label)
@pytest.mark.parametrize("kind", INPUTS)
def test_forward_quantizers_round_to_nearest(case, kind):
    x = INPUTS[kind]()
    for bits in (1, 3, 8):
        q = build(case, bits)
        assert q.claim == "biased"
        step = law(q, x)[0].view(x.shape)
        out = q.encode(x, Word(0)).decode().double()
        assert torch.equal(out, q.encode(x, Word(1)).decode().double()), "no randomness"
        assert torch.equal(q.mean(x), out)
        assert not q.variance(x).any()
        assert bool(((out - x.double()).abs() <= step / 2 + arithmetic_tolerance(q, x)).all())


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
@pytest.mark.parametrize("random_bits", [1, 4, 7])
def test_mean_and_variance_by_enumeration_of_all_random_words(case, random_bits):
    for kind, bits in [("heavy_rows", 3), ("NCHW", 8), ("offset", 2), ("subnormal", 4), ("float64", 1)]:
        x = INPUTS[kind]()
        q = build(case, bits, random_bits=random_bits)
        assert q.claim == "biased"
        outcomes = torch.stack([q.encode(x, Word(word)).decode().double() for word in range(2**random_bits)])
        mean = outcomes.mean(0)
        # decode() rounds what it adds up to the compute dtype; mean() adds up the same numbers in float64.
        transformed = q.encode(x, Word(0)).frame.transform is not None
        slack = arithmetic_tolerance(q, x) if transformed else 1e-12 * outcomes.abs().amax(0)
        assert bool(((q.mean(x) - mean).abs() <= slack).all())
        if not transformed:  # with the same word everywhere, rows that are mixed would be correlated
            variance = (outcomes - mean).square().mean(0)
            assert torch.allclose(q.variance(x), variance, rtol=1e-9, atol=1e-24 * float(x.abs().max()) ** 2)


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
@pytest.mark.parametrize("random_bits", [16, 24, 32])
def test_mean_by_bisection_of_the_switch_words(case, random_bits):
    """With many random bits: find how many words round each element up, which is its probability, exactly."""
    x = INPUTS["heavy_rows"]()
    q = build(case, 3, random_bits=random_bits)
    last = torch.full((x.numel(),), 2**random_bits - 1)
    low, up = (q.encode(x, Words(words)).codes().view(-1) for words in (last, torch.zeros_like(last)))
    least, most = torch.zeros_like(last), last.clone()
    for _ in range(random_bits):
        middle = (least + most) // 2
        rounds_up = q.encode(x, Words(middle)).codes().view(-1) > low
        least, most = torch.where(rounds_up, middle + 1, least), torch.where(rounds_up, most, middle)
    assert torch.equal(least, most)
    frame = q.encode(x, Words(last)).frame
    below, above = (frame.grid.decode(codes.float().view(frame.view)).double() for codes in (low, up))
    y = below + least.view(frame.view) * 2.0**-random_bits * (above - below)
    expected = (y if frame.transform is None else frame.transform.inverse(y)).view(x.shape)
    assert torch.allclose(q.mean(x), expected, rtol=1e-12, atol=1e-13 * float(x.abs().max()))


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_few_random_bits_shift_down_by_the_truncated_fraction(case):
    x = INPUTS["heavy_rows"]().double()
    q = build(case, 4, random_bits=4)
    step, fraction, _, inverse = law(q, x)
    expected = x - (inverse @ (step * torch.remainder(fraction, 2.0**-4))).view(x.shape)
    near_switch = (fraction * 16 - (fraction * 16).round()).abs() < 1e-9
    assert not near_switch[(fraction > 1e-9) & (fraction < 1 - 1e-9)].any()
    tolerance = arithmetic_tolerance(q, x) + (inverse.abs() @ (step * near_switch / 16)).view(x.shape)
    assert bool(((q.mean(x) - expected).abs() <= tolerance).all())


VARIANCE_ORACLES = {
    "ptq": lambda x, s, b: oracle.grouped_variance(x, oracle.whole(x), oracle.zero_on_grid, b),
    "ptq-affine": lambda x, s, b: oracle.grouped_variance(x, oracle.whole(x), oracle.affine, b),
    "psq": lambda x, s, b: oracle.grouped_variance(x, oracle.by_row(x), oracle.affine, b),
    "pcq": lambda x, s, b: oracle.grouped_variance(x, oracle.by_channel(x, s), oracle.affine, b),
    "pcq-True": lambda x, s, b: oracle.grouped_variance(x, oracle.by_channel(x, 1), oracle.affine, b),
    "bhq": lambda x, s, b: oracle.bhq_variance(x, b),
    "bhq-adaptive": lambda x, s, b: oracle.bhq_adaptive_variance(x, b),
    "luq": lambda x, s, b: oracle.logarithmic_variance(x, b // 2),
    "luq-1": lambda x, s, b: oracle.logarithmic_variance(x, 1),
    "dorefa": lambda x, s, b: oracle.grouped_variance(x, oracle.by_row(x), oracle.mirrored, b),
    "int4_sr": lambda x, s, b: oracle.grouped_variance(x, oracle.whole(x), oracle.symmetric, b),
}


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
@pytest.mark.parametrize("kind", ["heavy_rows", "NCHW", "one_sided", "negative", "rectified", "zero_rows", "NCL", "N"])
def test_variance_against_the_oracle(case, kind):
    x = INPUTS[kind]()
    table = x.double().reshape(len(x), -1).tolist()
    space = math.prod(x.shape[2:])
    for bits in (1, 2, 5, 8):
        q = build(case, bits)
        expected = torch.tensor(VARIANCE_ORACLES[label(case)](table, space, q.format.levels), dtype=torch.float64)
        expected = expected.view(x.shape)
        for dtype, fraction_error in ((torch.float32, 4 * 2.0**bits * 2.0**-24), (torch.float64, 2.0**-23)):
            y = x.to(dtype)
            step, _, _, inverse = law(q, y)
            # d(f (1 - f)) <= df; rows that are mixed also carry the rounding of the sums, a few ulps of their range.
            tolerance = (inverse.square() @ (8 * fraction_error * step.square())).view(x.shape)
            assert bool(((q.variance(y) - expected).abs() <= tolerance + 1e-6 * expected).all())


@st.composite
def tensors(draw):
    """Rows of very different ranges, of any scale and sign, some constant or sparse."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    scale = 10.0 ** draw(st.integers(-38, 30))
    seed = draw(st.integers(0, 10**6))
    x = row_scales(gaussian(*shape, seed=seed, dtype=torch.float64), draw(st.sampled_from([0.0, 1.0, 4.0])), seed + 1)
    change = draw(st.sampled_from(["none", "relu", "neg", "sign", "offset", "ties", "sparse"]))
    if change == "relu":
        x = x.relu()
    elif change == "neg":
        x = -x.abs()
    elif change == "sign":
        x = x.sign()
    elif change == "offset":
        x = x + 1e3
    elif change == "ties":
        x = x.round()
    elif change == "sparse":
        x = x * (gaussian(*shape, seed=seed + 2) > 1)
    return (x * scale).to(draw(st.sampled_from([torch.float32, torch.float64])))


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
@settings(max_examples=40)
@given(x=tensors(), bits=st.integers(1, 8), random_bits=st.sampled_from([24, 32]))
def test_mean_and_bound_on_any_input(case, x, bits, random_bits):
    q = build(case, bits, random_bits=random_bits)
    assert bool(((q.mean(x) - x.double()).abs() <= arithmetic_tolerance(q, x)).all())
    variance = float(q.variance(x).sum())
    assert variance <= q.bound(x)
    out = q(x, stream(seed=bits))
    assert bool(out.isfinite().all())
    if label(case) == "ptq" and (bits > 1 or float(x.min()) * float(x.max()) >= 0):
        assert not out[x == 0].any(), "zeros stay exact zeros"
    if label(case) in ("ptq-affine", "psq") and x.dtype == torch.float64:
        assert variance <= q.published_bound(x) * (1 + 1e-9) + 1e-300


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_bit_less(bits):
    """With uniform fractions the variance grows by exactly ((2^b - 1) / (2^(b-1) - 1))^2."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64).view(1, -1)
    ratio = quantizer("psq", bits=bits - 1).variance(x).sum() / quantizer("psq", bits=bits).variance(x).sum()
    assert ratio == pytest.approx(((2**bits - 1) / (2 ** (bits - 1) - 1)) ** 2, rel=1e-3)


# --- Monte Carlo ------------------------------------------------------------------------------------------------------


def spread_of_squared_error(q, x):
    """Standard deviation of one draw's ||Q(x) - x||^2, exact: for independent e, e^T A e with A = (T^-1)^T T^-1."""
    step, f, _, inverse = law(q, x)
    v = step.square() * f * (1 - f)
    weights = (inverse.T @ inverse).square()
    diagonal = weights.diag().clone()
    # Var(e^2) = v (step^2 - 4 v) of a two-point law
    own = (diagonal @ (v * (step.square() - 4 * v))).sum()
    crossed = 2 * ((weights - diagonal.diag()) @ v * v).sum()
    return math.sqrt(own + crossed)


def squared_error(f, mean, x, draws):
    return sum(float((f(x, stream(seed=1, draw=draw)).double() - mean).square().sum()) for draw in range(draws)) / draws


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_monte_carlo_agrees_with_the_exact_variance_within_one_percent(case, bits):
    """Summed squared error over summed exact variance, 1 +- .01.

    The number of draws puts 1 % at 6 standard deviations (exact, from the two-point laws): false alarms 2e-9 each,
    5e-8 in all. Smallest defect caught with certainty (6 standard deviations beyond): variance off by 2 %. Control:
    noise scaled by 1.02, that is variance by 1.04.
    """
    x = row_scales(gaussian(64, 512), 0.7)
    q = build(case, bits)
    mean, exact = q.mean(x), float(q.variance(x).sum())
    draws = max(4, math.ceil((6 * spread_of_squared_error(q, x) / (0.01 * exact)) ** 2))
    assert draws < 200, "choose an input that needs fewer draws"
    assert squared_error(q, mean, x, draws) == pytest.approx(exact, rel=0.01)

    def louder(x, s):
        return mean + 1.02 * (q(x, s).double() - mean)

    assert squared_error(louder, mean, x, draws) != pytest.approx(exact, rel=0.01)


class Shared:
    """Control: one number for all elements."""

    def __init__(self, s):
        self.s = s

    def bits(self, shape, n=24, *, dtype=torch.int64, device=None, start=0):
        return self.s.bits((1,), n, dtype=dtype).expand(tuple(shape))


class SharedByRows:
    """Control: every row gets the same numbers."""

    width = 64

    def __init__(self, s):
        self.s = s

    def bits(self, shape, n=24, *, dtype=torch.int64, device=None, start=0):
        column = (start + torch.arange(math.prod(shape))) % self.width
        return self.s.bits(self.width, n, dtype=dtype)[column].view(tuple(shape))


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_noise_is_independent_between_elements(case):
    """The noise summed over rounded elements, squared, over the sum of their variances, averaged over 256 draws.

    The sum over 2048 elements is normal to good approximation, so the statistic is chi-square(256) / 256 and must lie
    within its 1e-8 quantiles, .57 to 1.57: false alarms 2e-8 each. Controls: noise shared by all elements, or by rows.
    """
    x = gaussian(32, 64)
    q = build(case, 4)
    step, f, forward, _ = law(q, x)
    total = float((step.square() * f * (1 - f)).sum())
    draws = 256

    def statistic(wrap):
        sums = [
            (forward @ (q(x, wrap(stream(seed=2, draw=d))).double() - x.double())).sum().item() for d in range(draws)
        ]
        return sum(e * e for e in sums) / draws / total

    low, high = (scipy.stats.chi2.ppf(p, draws) / draws for p in (1e-8, 1 - 1e-8))
    assert low < statistic(lambda s: s) < high
    assert statistic(Shared) > high
    assert statistic(SharedByRows) > high


# --- PTQ with zero on the grid ----------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    bits=st.integers(1, 8),
    low=st.floats(-1e6, 1e6, width=32),
    high=st.floats(-1e6, 1e6, width=32),
    middle=st.floats(0, 1),
)
def test_zero_on_grid_is_the_best_of_all_places_of_zero(bits, low, high, middle):
    low, high = min(low, high), max(low, high)
    values = [low, low + middle * (high - low), high]
    x = torch.tensor(values, dtype=torch.float64)
    bottom, step = oracle.zero_on_grid(x.tolist(), 2**bits - 1)
    for name in ("ptq", "zero_on_grid"):
        grid = quantizer(name, bits=bits).encode(x, Word(0)).frame.grid
        assert grid.step.item() == pytest.approx(step, rel=1e-12)
        zero = 0 if grid.zero is None else grid.zero.item()
        offset = 0 if grid.offset is None else grid.offset.item()
        # The place of zero may differ in ties; the grid must reach both ends either way.
        assert offset - zero * grid.step.item() <= low + 1e-9 * step
        assert offset + (2**bits - 1 - zero) * grid.step.item() >= high - 1e-9 * step
        if not (step == 0 or (bits == 1 and low < 0 < high)):
            assert offset == 0
        else:
            assert offset == bottom


@pytest.mark.parametrize(("bits", "most"), [(2, 2.25), (3, 49 / 36), (4, 225 / 196), (8, (255 / 254) ** 2)])
def test_zero_on_grid_exceeds_the_published_bound_by_this_much(bits, most):
    """Two-sided: at most 2.25, 1.36, 1.15 times at 2, 3, 4 bits, reached when the range is symmetric."""
    q = quantizer("ptq", bits=bits)
    ratios = []
    for positive in [1.0, *torch.logspace(-6, 6, 401).tolist()]:
        x = torch.tensor([[-1.0, positive]], dtype=torch.float64)
        ratios.append(q.bound(x) / q.published_bound(x))
    assert max(ratios) == pytest.approx(most, rel=1e-6)
    assert ratios[0] == pytest.approx(most, rel=1e-6)
    assert min(ratios) >= 1 - 1e-9


def test_zero_on_grid_really_exceeds_the_published_bound():
    """At 2 bits, with all but the extremes at mid-bin, the variance itself is above the published bound."""
    x = torch.full((1, 1000), 0.5)
    x[0, 0], x[0, 1] = -1.0, 1.0
    q = quantizer("ptq", bits=2)
    assert q.variance(x).sum() / q.published_bound(x) == pytest.approx(2.25 * 0.998, rel=1e-6)
    assert q.variance(x).sum() <= q.bound(x)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_on_grid_one_sided(bits, sign):
    """All of one sign: zero is the end point and the step is max|x| / B."""
    x = sign * torch.tensor([0.25, 0.5, 1.0])
    grid = quantizer("ptq", bits=bits).encode(x, Word(0)).frame.grid
    assert grid.step.item() == pytest.approx(1 / (2**bits - 1))
    assert grid.zero.item() == (0 if sign > 0 else 2**bits - 1)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, -2.7, 1e-42, 3e4])
@pytest.mark.parametrize("case", [*STOCHASTIC, ("flush", {}), *NEAREST], ids=label)
def test_constant_tensors_are_exact(case, value, dtype):
    for shape in [(1,), (1, 1), (2, 3), (3, 2), (16, 4, 2, 2)]:
        x = torch.full(shape, value).to(dtype)
        for bits in (1, 2, 8):
            q = build(case, bits)
            assert torch.equal(q(x, stream(draw=bits)), x)
            assert torch.equal(q.encode(x, stream()).decode().double(), x.double())
            assert torch.equal(q.mean(x), x.double())
            assert not q.variance(x).any()
            assert q.bound(x) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_scaling_by_a_power_of_two_changes_nothing(case, dtype):
    """From 2^-100 to 2^100 the same codes, so no absolute epsilon anywhere: one of 1e-8 would change them at once."""
    x = row_scales(gaussian(16, 40, dtype=dtype), 1.0)
    for bits, power in itertools.product((2, 8), (-100, -60, -30, 30, 60, 100)):
        q = build(case, bits)
        y = x * 2.0**power
        assert torch.equal(q.encode(y, stream()).codes(), q.encode(x, stream()).codes())
        assert torch.equal(q(y, stream()), q(x, stream()) * 2.0**power)
        assert torch.equal(q.variance(y), q.variance(x) * 4.0**power)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_non_finite_input_is_counted(case, bad):
    x = gaussian(6, 5)
    x[1, 2] = x[4, 0] = x[4, 4] = bad
    q = build(case, 4)
    for call in (lambda: q(x, stream()), lambda: q.encode(x, stream()), lambda: q.mean(x), lambda: q.variance(x)):
        with pytest.raises(NonFiniteError, match="3 NaN or Inf among 30") as caught:
            call()
        assert (caught.value.count, caught.value.numel) == (3, 30)


@pytest.mark.parametrize(
    "case", [c for c in [*STOCHASTIC, *NEAREST, ("lsq", {}), ("sawb", {})] if c[0] not in LOGARITHMIC], ids=label
)
def test_a_range_that_overflows_is_an_error(case):
    x = torch.tensor([[-3e38, 3e38], [-3e38, 3e38]])
    x = x.T.contiguous() if "pcq" in label(case) else x
    with pytest.raises(NonFiniteError, match="range exceeds"):
        build(case, 4)(x, stream())


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.ones(3, 3, dtype=torch.int64),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        [1.0, 2.0],
        1.0,
        None,
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}{list(getattr(x, 'shape', []))}",
)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_unusable_input(case, x):
    q = build(case, 4)
    for call in (lambda: q(x, stream()), lambda: q.encode(x, stream()), lambda: q.mean(x), lambda: q.variance(x)):
        with pytest.raises(InputError, match="expected a"):
            call()


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, True, "4", None])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_bits_out_of_range(case, bits):
    with pytest.raises(InputError, match="bits"):
        quantizer(case[0], bits=bits, **case[1])


@pytest.mark.parametrize("random_bits", [0, 33, 2.5, True, None])
@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_random_bits_out_of_range(case, random_bits):
    with pytest.raises(InputError, match="random_bits"):
        build(case, 4, random_bits=random_bits)


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_claim(case):
    claims = [build(case, 4, random_bits=r).claim for r in range(1, 33)]
    assert claims == ["biased"] * 23 + ["unbiased"] * 9


def test_other_options_out_of_range():
    with pytest.raises(InputError, match="'zero' or 'affine'"):
        quantizer("ptq", grid="log")
    with pytest.raises(InputError, match="at least 2 bits"):
        quantizer("symmetric", bits=1)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match="unknown quantizer 'bqh'; known: ") as caught:
        quantizer("bqh")
    assert all(name in str(caught.value) for name in QUANTIZERS)
    with pytest.raises(InputError, match="unknown option 'width' of quantizer 'ptq'; known: bits, random_bits, grid"):
        quantizer("ptq", width=3)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_registry(name):
    q, same = (build((name, {}), 4) for _ in range(2))
    assert type(q) is QUANTIZERS[name]
    assert q.name == name
    if not isinstance(q, torch.nn.Module):  # two with state of their own are never the same
        assert q == same
        assert hash(q) == hash(same)
    assert repr(q) == repr(same)
    assert q.role in ("gradient", "forward")
    for bits in range(1, 9):
        if bits in q.widths:
            assert quantizer(name, bits=bits).bits == bits
        else:
            with pytest.raises(InputError, match="bits"):
                quantizer(name, bits=bits)


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_thread_count_changes_no_bit(case, threads):
    x = row_scales(gaussian(96, 64, 12, 15), 1.5)
    assert x.numel() > 1_000_000
    q = build(case, 4)
    results = []
    for count in (1, 2):
        threads(count)
        encoded = q.encode(x, stream(seed=3))
        results.append((encoded.payload, encoded.decode(), q.variance(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", STOCHASTIC, ids=label)
def test_streams_decide(case):
    x = gaussian(16, 40)
    q = build(case, 3)
    assert torch.equal(q(x, stream(seed=1, draw=2)), q(x, stream(seed=1, draw=2)))
    draws = [q(x, stream(seed=1, draw=draw)) for draw in range(5)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_memory_format_changes_no_bit(case):
    x = gaussian(6, 4, 5, 3)
    q = build(case, 4)
    assert torch.equal(q(x.to(memory_format=torch.channels_last), stream()), q(x, stream()))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("case", [c for c in CASES if c[0] in ("ptq", "psq", "pcq", "nearest", "minmax")], ids=label)
def test_grid_aligned_input_is_returned_exactly(case, bits):
    """Powers of two times codes, both ends in every row, column and position."""
    levels = 2**bits - 1
    codes = torch.randint(0, levels + 1, (8, 4, 6), generator=rng(3)).float()
    codes[0], codes[1] = 0, levels
    codes[:, :, 0] = torch.tensor([0.0, levels]).repeat(4).view(8, 1)
    codes[:, :, 1] = levels - codes[:, :, 0]
    for power in (-130, -20, 0, 9):
        x = codes * 2.0**power
        q = build(case, bits)
        for draw in range(3):
            assert torch.equal(q(x, stream(draw=draw)), x)
        assert torch.equal(q.mean(x), x.double())
        assert not q.variance(x).any()


def test_gradients_are_not_tracked():
    x = gaussian(4, 5).requires_grad_()
    for case in CASES:
        assert not build(case, 4)(x, stream()).requires_grad


@pytest.mark.parametrize("case", [*((name, {}) for name in QUANTIZERS), ("luq", {"samples": 3})], ids=label)
def test_for_one_input_it_is_what_it_is_when_called(case):
    q = build(case, 4)
    x = gaussian(6, 5, 7, 3, seed=3)
    x[2] = 0.25  # a group without a range
    untouched = x.clone()
    drawn = q.for_input(x)
    for draw in (0, 1, 0):
        assert torch.equal(drawn(stream(draw=draw)), q(x, stream(draw=draw)))
    if hasattr(q, "encode_input"):
        encoded = q.encode_input(x)
        for draw in (0, 1, 0):
            one, other = encoded(stream(draw=draw)), q.encode(x, stream(draw=draw))
            assert type(one) is type(other)
            assert torch.equal(one.payload, other.payload)
            assert torch.equal(one.decode(), other.decode())
    assert torch.equal(x, untouched)
