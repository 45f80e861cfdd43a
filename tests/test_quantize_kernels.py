"""Native quantize kernels: every variant against the torch path and a NumPy oracle, bit for bit."""

from __future__ import annotations

import contextlib
import importlib
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from words import Word

from fqtstats import ops
from fqtstats.errors import NonFiniteError
from fqtstats.ops import quantize
from fqtstats.ops.codes import Affine, Codes, Kept, row_bytes
from fqtstats.ops.quantize import Recipe
from fqtstats.quantizers import QUANTIZERS, options_of, quantizer, storage
from fqtstats.quantizers.grid import RULES
from fqtstats.quantizers.storage import store
from fqtstats.quantizers.uniform import PTQ
from fqtstats.random import stream

native = importlib.import_module("fqtstats._native")

VARIANTS = [k.variant for k in ops.kernels() if k.op == "quantize" and k.available and k.variant != "torch"]
STREAM = stream(seed=7, layer="kernel")
CHANNELS_LAST = torch.channels_last
# Rules of evenly spaced points; the others are in test_log_codes.py.
EVEN = [rule for rule in RULES if rule != "logarithmic"]
RECIPES = [
    Recipe(axis, rule, 8, random_bits) for axis in (None, 0, 1) for rule in EVEN for random_bits in (None, 8, 16, 24)
]
# Around every tile edge: 16 lanes, 64 codes, a Philox tile, a run of 1024, and more positions than one chunk has.
MATRICES = [(1, 1), (1, 7), (2, 15), (3, 16), (2, 17), (5, 63), (1, 64), (3, 65), (2, 127), (2, 129), (7, 576)]
LONG = [(1, 1023), (2, 1024), (2, 1025), (300, 5), (1, 2100)]
IMAGES = [(1, 1, 1, 1), (2, 1, 3, 5), (2, 3, 4, 4), (3, 16, 1, 1), (2, 17, 5, 7), (1, 64, 8, 8), (2, 70, 3, 3)]
LARGE = [(1, 3, 33, 32), (2, 33, 45, 23), (1, 65, 32, 33), (1, 2, 7, 301)]


def gaussian(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@contextlib.contextmanager
def torch_path():
    """Everything in torch operations."""
    before = os.environ.get("FQTSTATS_NATIVE")
    os.environ["FQTSTATS_NATIVE"] = "0"
    ops.native_module.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["FQTSTATS_NATIVE"]
        else:
            os.environ["FQTSTATS_NATIVE"] = before
        ops.native_module.cache_clear()


def numpy_codes(x, recipe, grid, random):
    """Codes ``[N, C, S]`` by the equations of quantize.h."""
    f = np.float32
    view = x.float().numpy().reshape(x.shape[0], x.shape[1], -1)
    one = np.ones_like(grid.step.numpy())
    offset, zero = (np.zeros_like(one) if t is None else t.numpy() for t in (grid.offset, grid.zero))
    y = ((view - offset) * (one if grid.prescale is None else grid.prescale.numpy())) * grid.scale.numpy()
    if recipe.random_bits is None:
        rounded = np.rint(y)
    else:
        fraction = (y - np.floor(y)) * f(2**recipe.random_bits)
        rounded = np.floor(y) + (random.reshape(view.shape) < np.floor(fraction).astype(np.int64)).astype(f)
    return np.clip(rounded + zero, 0, 2**recipe.bits - 1).astype(np.uint8)


def numpy_pack(codes, bits, pad, zero):
    """``[N, H, W, C]`` codes in the storage layout, one bit at a time."""
    n, h, w, c = codes.shape
    padded = np.broadcast_to(zero, (n, h + 2 * pad[0], w + 2 * pad[1], c)).copy()
    padded[:, pad[0] : pad[0] + h, pad[1] : pad[1] + w] = codes
    stream_of_bits = np.unpackbits(padded[..., None], axis=-1, bitorder="little")[..., :bits].reshape(
        *padded.shape[:3], c * bits
    )
    spare = 8 * row_bytes(c, bits) - c * bits
    return np.packbits(np.pad(stream_of_bits, [(0, 0)] * 3 + [(0, spare)]), axis=-1, bitorder="little")


def expected(x, recipe, pad=(0, 0)):
    """The codes of a recipe: grid in torch, the rest in NumPy."""
    view = x.float().reshape(x.shape[0], x.shape[1], -1)
    low, high = view.amin(recipe.shared, keepdim=True), view.amax(recipe.shared, keepdim=True)
    grid = RULES[recipe.rule](low, high, 2**recipe.bits - 1)
    random = None if recipe.random_bits is None else STREAM.bits(x.numel(), recipe.random_bits).numpy()
    codes = numpy_codes(x, recipe, grid, random)
    n, c = x.shape[:2]
    h, w = x.shape[2:] if x.dim() == 4 else (1, 1)
    zero = np.zeros((1, 1, 1, 1), np.uint8)
    if grid.zero is not None:
        zero = grid.zero.numpy().astype(np.uint8).reshape(grid.zero.shape[0], 1, 1, grid.zero.shape[1])
    storage = next(width for width in (1, 2, 4, 8) if width >= recipe.bits)
    data = numpy_pack(codes.reshape(n, c, h, w).transpose(0, 2, 3, 1), storage, pad, zero)
    affine = Affine(
        step=grid.step.flatten(),
        zero=None if grid.zero is None else grid.zero.flatten().int(),
        offset=None if grid.offset is None else grid.offset.flatten(),
        axis=recipe.axis if grid.step.numel() > 1 else None,
    )
    return Codes(torch.from_numpy(data if x.dim() == 4 else data.reshape(n, -1)), storage, tuple(x.shape), pad, affine)


def assert_same(got, want):
    assert (got.bits, got.shape, got.pad, got.affine.axis) == (want.bits, want.shape, want.pad, want.affine.axis)
    for name in ("step", "zero", "offset"):
        a, b = getattr(got.affine, name), getattr(want.affine, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert got.data.shape == want.data.shape
    assert torch.equal(got.data, want.data)


def encode(x, recipe, pad=(0, 0), **more):
    return quantize.encode(x, recipe, STREAM.words(), pad, **more)


def forms(x):
    """The same tensor in every memory format and dtype that is read in place, and unaligned."""
    buffer = torch.empty(x.numel() + 3)
    yield x
    yield buffer[3:].view(x.shape).copy_(x)
    if x.dim() == 4:
        yield x.to(memory_format=CHANNELS_LAST)


def bits_for(recipe, bits):
    return Recipe(recipe.axis, recipe.rule, max(bits, 2) if recipe.rule == "symmetric" else bits, recipe.random_bits)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_there_is_always_a_portable_variant():
    assert "scalar" in VARIANTS
    assert [k.variant for k in ops.kernels() if k.op == "quantize"][-1] == "torch"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.axis}-{r.rule}-{r.random_bits}")
def test_codes_against_numpy(variant, recipe):
    for i, shape in enumerate(MATRICES + IMAGES):
        r = bits_for(recipe, 1 + i % 8)
        pad = (i % 2, i % 3) if len(shape) == 4 else (0, 0)
        x = gaussian(shape, seed=i)
        for dtype in (torch.float32, torch.bfloat16):
            want = expected(x.to(dtype), r, pad)
            for form in forms(x):
                assert_same(encode(form.to(dtype), r, pad, variant=variant), want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_at_the_edges_of_tiles(variant, bits):
    for recipe in (
        Recipe(0, "affine", bits, 24),
        Recipe(1, "affine", bits, 16),
        Recipe(None, "zero_on_grid", bits, 24),
    ):
        for shape in LONG + LARGE:
            x = gaussian(shape, seed=bits)
            pad = (1, 2) if x.dim() == 4 else (0, 0)
            want = expected(x, recipe, pad)
            for form in forms(x):
                assert_same(encode(form, recipe, pad, variant=variant), want)


SCALES = {"unit": 1.0, "tiny": 1e-30, "lifted": 1e-36, "subnormal": 1e-40, "smallest": 3e-45, "huge": 8e37}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", EVEN)
@pytest.mark.parametrize("scale", SCALES)
def test_groups_of_every_range(variant, rule, scale):
    x = gaussian((12, 70), scale=SCALES[scale]).clamp(-1.7e38, 1.7e38)
    x[0] = 0
    x[1] = x[1, 0]
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4] = x[4].relu()
    x[5, 1:] = 0
    x[6] = x[6].sign() * SCALES[scale]
    x[7] = -0.0
    for bits in (2, 3, 8) if rule == "symmetric" else (1, 2, 3, 8):
        for axis, y in ((0, x), (1, x.t()), (None, x), (None, x[:1]), (None, x[1:2]), (0, x.view(12, 5, 2, 7))):
            for random_bits in (24, None):
                recipe = Recipe(axis, rule, bits, random_bits)
                pad = (1, 1) if y.dim() == 4 else (0, 0)
                assert_same(encode(y, recipe, pad, variant=variant), expected(y, recipe, pad))


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(pairs=st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=8), bits=st.integers(1, 8))
def test_grids_of_any_extremes(pairs, bits):
    extremes = torch.tensor(pairs, dtype=torch.float32).sort(1).values
    extremes = extremes[(extremes[:, 1].double() - extremes[:, 0].double()) <= torch.finfo(torch.float32).max]
    for rule in EVEN if bits > 1 else ("affine", "zero_on_grid"):
        x = extremes
        if rule == "mirrored":  # which is twice as wide as the larger of the two
            x = x[2 * x.double().abs().amax(1) <= torch.finfo(torch.float32).max]
        if len(x) > 1:
            recipe = Recipe(0, rule, bits, None)
            assert_same(encode(x, recipe), expected(x, recipe))


@st.composite
def tensors(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 140)))
    if draw(st.booleans()):
        shape += draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    x = gaussian(shape, seed=draw(st.integers(0, 10**6)), scale=10.0 ** draw(st.integers(-44, 37)))
    x = draw(st.sampled_from([lambda t: t, torch.relu, torch.sign, torch.abs]))(x).clamp(-1.7e38, 1.7e38)
    if len(shape) == 4 and draw(st.booleans()):
        x = x.to(memory_format=CHANNELS_LAST)
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@settings(max_examples=60)
@given(
    x=tensors(),
    recipe=st.sampled_from(RECIPES),
    bits=st.integers(1, 8),
    pad=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_codes_of_any_tensor(x, recipe, bits, pad):
    r, pad = bits_for(recipe, bits), pad if x.dim() == 4 else (0, 0)
    want = expected(x, r, pad)
    for variant in VARIANTS:
        got = encode(x, r, pad, variant=variant)
        assert_same(got, want)
        assert torch.equal(quantize.decode(got, variant=variant), want.decode())


def test_given_extremes():
    x = gaussian((9, 40))
    for axis in (None, 0, 1):
        recipe = Recipe(axis, "affine", 8, 24)
        low, high = quantize.extremes(x, axis)
        for variant in VARIANTS:
            assert_same(encode(x, recipe, extremes=(low, high), variant=variant), encode(x, recipe))
            wider = encode(x, recipe, extremes=(low - 1, high + 1), variant=variant)
            assert_same(wider, encode(x, recipe, extremes=(low - 1, high + 1), variant="scalar"))
            assert torch.equal(wider.affine.offset, low - 1)


def part_of(codes, kept):
    """The codes of the kept groups, and what they mean."""
    affine = codes.affine
    values = [None if t is None else t[kept.indices] for t in (affine.step, affine.zero, affine.offset)]
    part = Affine(*values, kept.axis if len(kept.indices) > 1 else None, affine.magnitudes)
    return Codes.pack(codes.unpack().index_select(kept.axis, kept.indices), codes.bits, part, codes.pad)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_of_the_groups_that_are_kept(variant, axis):
    """Short runs and long ones, channels far from each other and next to each other, one of them and all."""
    random = np.random.default_rng(0)
    shapes = [(9, 5), (7, 576), (3, 40_000), (1100, 3), (6, 7, 3, 3), (2, 70, 4, 4), (3, 5, 12, 11), (2, 130, 33, 32)]
    for i, shape in enumerate(shapes):
        x, size = gaussian(shape, seed=i), shape[axis]
        for count in {1, max(1, size // 4), size}:
            kept = Kept(axis, torch.from_numpy(np.sort(random.permutation(size)[:count])), size)
            for recipe in (
                Recipe(axis, "affine", 4, 24),
                Recipe(axis, "affine", 8, 8),
                Recipe(axis, "symmetric", 2, None),
            ):
                pad = (1, 2) if x.dim() == 4 else (0, 0)
                for dtype in (torch.float32, torch.bfloat16):
                    y = x.to(dtype)
                    want = part_of(encode(y, recipe, pad), kept)
                    ends = [t[kept.indices] for t in quantize.extremes(y, axis)]
                    for form in forms(y.float()):
                        got = encode(form.to(dtype), recipe, pad, extremes=ends, kept=kept, variant=variant)
                        assert_same(got, want)


@pytest.mark.parametrize("shape", [(300, 700), (2, 100_000), (40, 24, 14, 15), (1, 8, 150, 151), (3, 200, 4, 4)])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_same_on_any_number_of_threads(shape, axis):
    x = gaussian(shape)
    recipe = Recipe(axis, "affine", 4, 24)
    pad = (1, 1) if x.dim() == 4 else (0, 0)
    before = torch.get_num_threads()
    try:
        for form in forms(x):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                codes = encode(form, recipe, pad)
                results.append((codes, quantize.decode(codes), quantize.extremes(form, axis)))
            for codes, decoded, extremes in results[1:]:
                assert_same(codes, results[0][0])
                assert torch.equal(decoded, results[0][1])
                assert all(map(torch.equal, extremes, results[0][2]))
    finally:
        torch.set_num_threads(before)


# --- decode and extremes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_decode(variant, axis):
    for i, shape in enumerate(MATRICES + LONG + IMAGES + LARGE):
        for bits in (1, 2, 4, 8) if i % 2 else (1, 4):
            groups = 1 if axis is None else shape[axis]
            affine = Affine(
                gaussian((groups,), 1).abs(),
                torch.arange(groups, dtype=torch.int32) % 2**bits if i % 2 else None,
                gaussian((groups,), 2) if i % 3 else None,
                axis,
            )
            random = torch.Generator().manual_seed(i)
            raw = torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)
            codes = Codes.pack(raw, bits, affine, (i % 3, i % 2) if len(shape) == 4 else (0, 0))
            want = codes.decode()
            assert torch.equal(quantize.decode(codes, variant=variant), want)
            if len(shape) == 4:
                got = quantize.decode(codes, CHANNELS_LAST, variant=variant)
                assert torch.equal(got, want)
                assert got.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(variant, axis, dtype):
    for i, shape in enumerate(MATRICES + LONG + IMAGES + LARGE):
        x = gaussian(shape, seed=i).to(dtype)
        dims = [d for d in range(x.dim()) if d != axis]
        for form in forms(x):
            low, high = quantize.extremes(form.to(dtype), axis, variant=variant)
            assert torch.equal(low, x.float().amin(dims).view(-1))
            assert torch.equal(high, x.float().amax(dims).view(-1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_bad_element_is_found_wherever_it_is(variant, axis, value):
    for shape in ((2, 83), (1, 3, 5, 7), (2, 67, 1, 2)):
        for place in range(0, torch.Size(shape).numel(), 5):
            x = gaussian(shape)
            x.view(-1)[place] = value
            dims = [d for d in range(x.dim()) if d != axis]
            for form in forms(x):
                low, high = quantize.extremes(form, axis, variant=variant)
                finite = low.isfinite() & high.isfinite()
                assert torch.equal(finite, (x.isfinite().all(dim=dims) if dims else x.isfinite()).view(-1))
                with pytest.raises(NonFiniteError, match="1 NaN or Inf among"):
                    encode(form, Recipe(axis, "affine", 8, 24), variant=variant)


# --- store ------------------------------------------------------------------------------------------------------------

OPTIONS = [{"random_bits": n} for n in (8, 16, 24)]
# Their points are not evenly spaced, or some rows have none: test_native_gradients.py.
OWN_FILE = ("luq", "flush", "agp", "topk")
CASES = [
    (name, {**grid, **more})
    for name, cls in QUANTIZERS.items()
    if name not in OWN_FILE
    for more in (OPTIONS if "random_bits" in options_of(cls) else [{}])
    for grid in ([{}, {"grid": "affine"}] if name == "ptq" else [{}])
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str(list(v.values())))
def test_store_gives_the_codes_of_the_torch_path(name, options):
    inputs = [gaussian((24, 30)), gaussian((30, 24)).t(), gaussian((6, 5, 4, 3)), gaussian((1, 9)), gaussian((9, 1))]
    inputs += [inputs[2].to(memory_format=CHANNELS_LAST), inputs[0].bfloat16(), inputs[0].half(), torch.zeros(3, 4)]
    inputs += [gaussian((8, 3, 4, 6))[::2, :, 1:, ::3], gaussian((1, 40)).expand(8, 40), gaussian((4, 6)) * 1e-40]
    inputs.append(gaussian((16, 20)) * torch.logspace(-6, 3, 16).view(-1, 1))
    for bits in QUANTIZERS[name].widths:
        q = quantizer(name, bits=bits, **options)
        for x in inputs:
            pad = (2, 1) if x.dim() == 4 else (0, 0)
            got = store(q, x.requires_grad_(), STREAM, pad)
            with torch_path():
                want = store(q, x, STREAM, pad)
                decoded = q.encode(x, STREAM).decode()
                assert_same(got.codes, want.codes)
            assert torch.equal(got.decode(), decoded)


def test_store_takes_the_torch_path_where_there_is_no_kernel():
    x = gaussian((6, 3, 4, 4))

    class Own(PTQ):
        def _round(self, y, stream):
            return y.floor()

    for q, s in (
        (Own(4), STREAM),
        (quantizer("psq", random_bits=32), STREAM),
        (quantizer("psq", random_bits=8), Word(200)),
    ):
        got, want = store(q, x, s), q.encode(x, s)
        assert torch.equal(got.codes.unpack(), want.codes().view(x.shape))
    assert store(quantizer("pcq", per_position=True), x, STREAM) is None
    assert store(quantizer("psq"), x.double(), STREAM) is None


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in OWN_FILE])
def test_bad_input_is_refused_as_on_the_torch_path(name):
    q = quantizer(name)
    big = torch.full((4, 6), 3e38)
    big[::2, ::2] *= -1
    big[1::2, 1::2] *= -1
    refused = []
    for x in (gaussian((4, 6)).index_fill(1, torch.tensor([2]), float("nan")), big, torch.empty(0, 3)):
        got = refusal(q, x)
        with torch_path():
            assert got == refusal(q, x)
        refused.append(got is not None)
    bounded = ("sign", "scaled_sign", "dorefa_weight", "dorefa_act")  # whatever the input's range is
    assert refused == [True, name not in bounded, True]


def refusal(q, x):
    try:
        store(q, x, STREAM)
    except ValueError as error:
        return type(error), str(error)
    return None


# --- the boundary -----------------------------------------------------------------------------------------------------


def arguments(**changes):
    values = {
        "x": torch.zeros(2, 6, 5).numpy(),
        "channels_last": False,
        "axis": 0,
        "rule": 0,
        "levels": 7,
        "random_bits": 24,
        "words": (1, 2, 3, 4),
        "storage_bits": 4,
        "size": (5, 1),
        "pad": (0, 1),
        "out": np.zeros((2, 5, 3, 4), np.uint8),
        "step": np.zeros(2, np.float32),
        "zero": np.zeros(2, np.int32),
        "offset": np.zeros(2, np.float32),
        "low": None,
        "high": None,
        "kept": None,
        "threads": 1,
    }
    return {**values, **changes}


KEPT = {
    "kept": np.array([1]),
    "out": np.zeros((1, 5, 3, 4), np.uint8),
    **{name: np.zeros(1, np.float32) for name in ("step", "offset", "low", "high")},
    "zero": np.zeros(1, np.int32),
}


def test_the_arguments_of_the_next_test_are_otherwise_good():
    assert native.quantize_encode(**arguments()) == 1
    assert native.quantize_encode(**arguments(**KEPT)) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((2, 6, 5))}, TypeError, "x must be float32 or bfloat16, got 3-D float64"),
        ({"x": np.zeros((2, 6), np.float32)}, ValueError, r"x must be float32 \[\*, \*, \*\]"),
        ({"x": np.zeros((2, 6, 10), np.float32)[..., ::2]}, ValueError, "x must be .* with strides"),
        ({"x": np.zeros((0, 6, 5), np.float32)}, ValueError, "x must be not empty"),
        ({"x": np.zeros((2, 6, 4), np.float32)}, ValueError, "x must be as many positions as size has"),
        ({"channels_last": True}, ValueError, "x must be as many positions as size has"),
        ({"axis": 2}, ValueError, "axis must be -1 to 1, got 2"),
        ({"rule": 5}, ValueError, "rule must be 0 to 4, got 5"),
        ({"levels": 256}, ValueError, "levels must be 1 to 255, got 256"),
        ({"levels": 1, "rule": 2}, ValueError, "levels must be 3 to 255, got 1"),
        ({"levels": 1, "rule": 3}, ValueError, "levels must be 2 to 255, got 1"),
        ({"levels": 16}, ValueError, "storage_bits must be as many as levels have, got 4"),
        ({"storage_bits": 3}, ValueError, "storage_bits must be 1, 2, 4 or 8, got 3"),
        ({"random_bits": 25}, ValueError, "random_bits must be 0 to 24, got 25"),
        ({"size": (0, 5)}, ValueError, "size must be .* got 0"),
        ({"pad": (-1, 0)}, ValueError, "pad must be .* got -1"),
        ({"pad": (0, 0)}, ValueError, r"out must be uint8 \[2, 5, 1, 4\]"),
        ({"out": np.zeros((2, 5, 3, 4), np.int8)}, TypeError, "out must be uint8"),
        ({"step": np.zeros(3, np.float32)}, ValueError, r"step must be float32 \[2\]"),
        ({"zero": np.zeros(2, np.int64)}, TypeError, r"zero must be int32 \[2\]"),
        ({"offset": np.zeros(2, np.float64)}, TypeError, r"offset must be float32 \[2\]"),
        ({"low": np.zeros(2, np.float32)}, ValueError, "low and high must be given together"),
        ({"low": np.zeros(1, np.float32), "high": np.zeros(2, np.float32)}, ValueError, r"low must be float32 \[2\]"),
        ({**KEPT, "low": None, "high": None}, ValueError, "low and high must be given with kept"),
        ({**KEPT, "axis": -1}, ValueError, "kept needs an axis"),
        ({**KEPT, "kept": np.zeros(0, np.int64)}, ValueError, "kept must be not empty"),
        ({**KEPT, "kept": np.array([2])}, ValueError, "kept must be 0 to 1, got 2"),
        ({**KEPT, "kept": np.array([1, 1])}, ValueError, "kept must be 2 to 1, got 1"),
        ({**KEPT, "kept": np.zeros(1, np.int32)}, TypeError, r"kept must be int64 \[\*\]"),
        ({**KEPT, "step": np.zeros(2, np.float32)}, ValueError, r"step must be float32 \[1\]"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"variant": "sse9"}, ValueError, r"variant must be one of .*scalar, got 'sse9'"),
    ],
)
def test_native_boundary_is_strict(changes, error, message):
    with pytest.raises(error, match=message):
        native.quantize_encode(**arguments(**changes))


def test_native_boundary_of_the_others_is_strict():
    x, two = np.zeros((2, 6, 5), np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"low must be float32 \[6\]"):
        native.quantize_extremes(x, False, 1, two, two, 1)
    codes = np.zeros((2, 5, 1, 4), np.uint8)
    for changes, error, message in (
        ({"codes": codes[0]}, ValueError, "codes must be uint8"),
        ({"size": (2**40, 2**40)}, ValueError, "size must be 1 to 1073741824, got 1099511627776"),
        ({"channels": 9}, ValueError, r"codes must be uint8 \[2, 5, 1, 8\]"),
        ({"step": np.zeros(1, np.float32)}, ValueError, r"step must be float32 \[2\]"),
        ({"out": np.zeros((2, 5, 6), np.float32)}, ValueError, r"out must be float32 \[2, 6, 5\]"),
        ({"out": np.zeros((2, 6, 5))}, TypeError, r"out must be float32"),
    ):
        good = {"codes": codes, "storage_bits": 4, "channels": 6, "size": (5, 1), "pad": (0, 0), "axis": 0}
        good |= {"log": False, "step": two, "zero": None, "offset": None}
        good |= {"channels_last": False, "out": x, "threads": 1}
        native.quantize_decode(**good)
        with pytest.raises(error, match=message):
            native.quantize_decode(**{**good, **changes})


def test_arguments_of_encode():
    x = gaussian((3, 4))
    with pytest.raises(ValueError, match="needs the words of a stream"):
        quantize.encode(x, Recipe(0, "affine", 8, 24))
    with pytest.raises(ValueError, match=r"x must be \[N, C\]"):
        encode(x[0], Recipe(None, "affine", 8, 24))
    ends = torch.zeros(2), torch.zeros(2)
    with pytest.raises(ValueError, match="kept must be 4 groups along axis 0, got 4 along 1"):
        encode(x, Recipe(0, "affine", 8, 24), extremes=ends, kept=Kept(1, torch.arange(2), 4))
    assert encode(x.double(), Recipe(0, "affine", 8, 24)) is None
    assert encode(x, Recipe(0, "affine", 8, 32)) is None
    assert encode(x.to("meta"), Recipe(0, "affine", 8, 24)) is None


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["ptq", "psq", "pcq", "bhq", "minmax", "zero_on_grid"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_torch_defaults_change_no_bit(monkeypatch, name, default, native):
    if not native:
        monkeypatch.setattr(quantize, "native_module", lambda: None)
        monkeypatch.setattr(storage, "native_module", lambda: None)
    x = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0))

    def results():
        q, s = quantizer(name, bits=4), stream(seed=1)
        stored = store(q, x, s)
        return q(x, s), q.encode(x, s).codes(), stored.codes.data, stored.decode(), *(quantize.extremes(x, 1) or ())

    expected = results()
    with contextlib.ExitStack() as stack:
        if isinstance(default, torch.device):
            stack.enter_context(default)
        else:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(default)
        got = results()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
