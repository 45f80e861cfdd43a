import hashlib
import importlib
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import philox
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from fqtstats import ops, random
from fqtstats.errors import InputError

native = importlib.import_module("fqtstats._native")

CPU = torch.device("cpu")
KEY = (0xA4093822, 0x299F31D0, 0x13198A2E, 0x03707344)
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000)
VARIANTS = [k.variant for k in ops.kernels() if k.op == "philox_bits" and k.available]
DTYPES = (torch.int32, torch.int64)
PINNED_WORDS = (0xC89F4581, 0x72422FEC, 0x3BDF1882, 0x06BA1A40)

# Every stochastic test below: probability of failing on a perfect generator.
FALSE_ALARM = 1e-6


def draw(variant, key, numel, n, dtype=torch.int64, *, threads=1, first_tile=0):
    if variant == "torch":
        return ops.philox_bits_torch(*key, numel, n, dtype, CPU, first_tile=first_tile)
    out = torch.full((numel,), -1, dtype=dtype)
    native.philox_bits(*key, n, threads, out, first_tile, variant)
    return out


# --- the generator and its layout, every variant ----------------------------------------------------------------------


def test_there_is_always_a_portable_and_a_torch_variant():
    assert {"scalar", "torch"} <= set(VARIANTS)


# Random123 1.14, tests/kat_vectors: philox4x32 10
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert philox.block(counter, key) == expected
    for variant in VARIANTS:
        if variant != "torch":
            assert native.philox_block(*counter, *key, variant) == expected
    c0, c1, c2, c3 = counter
    # c1 beyond 2^31 would make the block index negative; the fallback wraps, as a counter must.
    b = (c1 << 32 | c0) - (2**64 if c1 >> 31 else 0)
    words = ops.philox._philox_words(torch.tensor([b]), *key, c2, c3)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", range(1, 33))
def test_layout(variant, n):
    expected = torch.tensor([philox.element(KEY, i, n) for i in range(max(SIZES))])
    for dtype in DTYPES[n == 32 :]:
        for size in SIZES:
            got = draw(variant, KEY, size, n, dtype)
            assert got.dtype == dtype
            assert torch.equal(got.to(torch.int64), expected[:size])


word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=40)
@given(
    key=st.tuples(word, word, word, word), n=st.integers(1, 32), numel=st.integers(1, 300), tile=st.integers(0, 2**58)
)
def test_any_key_and_position(variant, key, n, numel, tile):
    first = tile * (64 if n > 16 else 128)
    got = draw(variant, key, numel, n, first_tile=tile)
    for i in {0, numel // 2, numel - 1}:
        assert int(got[i]) == philox.element(key, first + i, n)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "dtype"), [(24, torch.int32), (32, torch.int64), (16, torch.int32), (5, torch.int64)])
def test_same_on_any_number_of_threads(variant, n, dtype):
    numel = 400_003
    expected = draw("torch", KEY, numel, n, dtype)
    for threads in (1, 2, 3, 8):
        assert torch.equal(draw(variant, KEY, numel, n, dtype, threads=threads), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [24, 16])
def test_block_index_carries_into_the_second_counter_word(variant, n):
    per_tile = 64 if n > 16 else 128
    for carry in (1, 5):
        tile = carry * 2**28 - 1
        got = draw(variant, KEY, 3 * per_tile - 5, n, first_tile=tile)
        assert got.tolist() == [philox.element(KEY, tile * per_tile + i, n) for i in range(len(got))]
    across = draw(variant, KEY, 1500 * per_tile, n, first_tile=2**28 - 700, threads=2)
    assert torch.equal(across, draw("torch", KEY, 1500 * per_tile, n, first_tile=2**28 - 700))


# --- the operation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(100, 24, torch.int32), (129, 8, torch.int64), (0, 32, torch.int64)])
def test_opcheck(args):
    torch.library.opcheck(torch.ops.fqtstats.philox_bits.default, (*KEY, *args, CPU))


def test_op_entry_and_fallback_agree(monkeypatch):
    expected = philox_digest()
    assert torch.equal(
        torch.ops.fqtstats.philox_bits(*KEY, 777, 24, torch.int64, CPU),
        ops.philox_bits(*KEY, 777, 24, dtype=torch.int64, device=CPU),
    )
    monkeypatch.setenv("FQTSTATS_NATIVE", "0")
    ops.native_module.cache_clear()
    try:
        assert ops.isa() == "torch"
        assert {k.variant for k in ops.kernels() if k.selected} == {"torch"}
        assert philox_digest() == expected
    finally:
        monkeypatch.undo()
        ops.native_module.cache_clear()


def philox_digest():
    h = hashlib.sha256()
    for n in (1, 8, 16, 17, 24, 31):
        for dtype in DTYPES:
            h.update(random.stream(seed=3, layer="conv1").bits((7, 331), n, dtype=dtype).numpy().tobytes())
    return h.hexdigest()


def test_missing_extension_is_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "fqtstats._native", None)
    ops.native_module.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"fqtstats\._native cannot be imported"):
            random.stream().bits(10)
        random.stream().bits(10)
        assert ops.isa() == "torch"
    finally:
        monkeypatch.undo()
        ops.native_module.cache_clear()


def test_exactly_one_variant_is_selected():
    selected = [k.variant for k in ops.kernels() if k.op == "philox_bits" and k.selected]
    assert selected == [v for v in VARIANTS if ops.isa().startswith(v)][:1]


def run_isa(value, tmp_path):
    # The extension alone, without torch: it starts in a tenth of the time.
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_native', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.isa(), [r[1] for r in m.kernels() if r[0] == 'philox_bits' and r[3]])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, native.__file__],
        env=os.environ | {"FQTSTATS_ISA": value},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", [v for v in VARIANTS if v != "torch"])
def test_environment_limits_the_instruction_set(isa, tmp_path):
    assert run_isa(isa, tmp_path).stdout.split("\n")[0] == f"{isa} ['{isa}']"


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "torch"])
def test_unknown_instruction_set_is_an_error_that_lists_the_known_ones(isa, tmp_path):
    result = run_isa(isa, tmp_path)
    assert result.returncode != 0
    assert "ValueError: FQTSTATS_ISA must name an instruction set that this machine has (scalar" in result.stderr
    assert f"got '{isa}'" in result.stderr


def test_fake_and_meta():
    with FakeTensorMode():
        fake = random.stream().bits((3, 5), 24, dtype=torch.int32)
    assert (fake.shape, fake.dtype) == ((3, 5), torch.int32)
    assert random.stream().bits((3, 5), device="meta").device.type == "meta"


def _child(queue):
    torch.set_num_threads(1)
    queue.put(int(random.stream().bits(300_000).sum()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_with_one_thread_can_draw():
    expected = int(random.stream().bits(300_000).sum())  # starts the OpenMP pool, where there are threads
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert queue.get() == expected


INT = torch.int64


@pytest.mark.parametrize(
    ("out", "n", "threads", "error", "message"),
    [
        (torch.empty(4), 8, 1, TypeError, "must be an int32 or int64 tensor on the CPU, got 1-D float32"),
        (torch.empty(4, dtype=torch.int16), 8, 1, TypeError, "got 1-D int16"),
        (torch.empty(4, dtype=torch.bfloat16), 8, 1, TypeError, "got 1-D bfloat16"),
        ([0, 0], 8, 1, TypeError, "incompatible function arguments"),
        (torch.empty(2, 2, dtype=INT), 8, 1, ValueError, "must be 1-D and contiguous, got 2-D int64"),
        (torch.empty(8, dtype=INT)[::2], 8, 1, ValueError, "with strides \\[2\\]"),
        (torch.empty(4, dtype=INT), 0, 1, ValueError, "n must be 1 to 32"),
        (torch.empty(4, dtype=INT), 33, 1, ValueError, "n must be 1 to 32"),
        (torch.empty(4, dtype=torch.int32), 32, 1, ValueError, "1 to 31 for int32"),
        (torch.empty(4, dtype=INT), 8.0, 1, TypeError, "incompatible function arguments"),
        (torch.empty(4, dtype=INT), 8, 0, ValueError, "threads must be 1 to 65536"),
    ],
)
def test_native_boundary_is_strict(out, n, threads, error, message):
    with pytest.raises(error, match=message):
        native.philox_bits(1, 2, 3, 4, n, threads, out)


@pytest.mark.parametrize("word", [-1, 2**32, 1.0])
def test_native_key_words_are_32_bit(word):
    with pytest.raises(TypeError):
        native.philox_bits(word, 2, 3, 4, 8, 1, torch.empty(4, dtype=INT))


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"variant must be one of .*scalar, got 'sse9'"):
        draw("sse9", KEY, 4, 8)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    s = random.stream(seed=1, layer="fc")
    for n in (8, 16, 24, 32):
        for size in SIZES:
            assert torch.equal(s.bits(size, n, device="cuda").cpu(), s.bits(size, n))
    assert torch.equal(s.uniform((1000, 3001), device="cuda").cpu(), s.uniform((1000, 3001)))


# --- streams ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    n=st.integers(1, 32), short=st.integers(0, 2000), more=st.integers(0, 2000), seed=st.integers(-(2**63), 2**63 - 1)
)
def test_shorter_draw_is_a_prefix_and_shape_is_row_major(n, short, more, seed):
    s = random.stream(seed=seed)
    long = s.bits(short + more, n)
    assert torch.equal(s.bits((short,), n), long[:short])
    assert torch.equal(s.bits((2, short // 2), n).flatten(), long[: short // 2 * 2])
    assert long.numel() == 0 or (int(long.min()) >= 0 and int(long.max()) < 2**n)


def test_int32_and_int64_agree():
    s = random.stream()
    assert torch.equal(s.bits(1000, 31, dtype=torch.int32).to(torch.int64), s.bits(1000, 31))


def test_uniform_is_multiples_of_2_to_minus_24():
    s = random.stream(seed=5)
    u = s.uniform((10, 1000))
    assert u.dtype == torch.float32
    assert torch.equal(u * 2.0**24, s.bits((10, 1000), 24).to(torch.float32))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert torch.equal(s.uniform((10, 1000)), u)


def test_every_part_of_the_key_matters():
    streams = [random.stream()]
    for part in ("seed", "step", "draw", "call", "replica"):
        streams += [random.stream(**{part: value}) for value in (1, -1, 2**32, 2**63 - 1, -(2**63))]
    for part in ("layer", "site"):
        streams += [random.stream(**{part: value}) for value in ("a", "b", "ab", "\x00", "é")]
    # Names that run together must stay apart.
    streams += [
        random.stream(layer="a", site="b"),
        random.stream(layer="ab", site="a"),
        random.stream(layer="a", site="ba"),
    ]
    base = random.stream()
    streams += [base.child("a"), base.child("b"), base.child("a").child("b"), base.child("ab"), base.child("")]
    streams += [random.stream(site="a").child("b")]
    distinct = set(streams)
    assert len({s.words() for s in distinct}) == len(distinct) == len(streams)
    assert len({tuple(s.bits(4, 32).tolist()) for s in streams}) == len(streams)


def test_key_words_are_part_of_the_contract():
    # A change of these numbers breaks the reproducibility of every published run.
    s = random.stream(seed=1, step=2, layer="conv1", site="grad_input", draw=3, call=4, replica=5).child("mask")
    assert s.words() == PINNED_WORDS
    assert s.bits(3, 24).tolist() == [philox.element(PINNED_WORDS, i, 24) for i in range(3)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "1 to 32, got n=0"),
        ({"n": 33}, "1 to 32, got n=33"),
        ({"n": 32, "dtype": torch.int32}, "n <= 31"),
        ({"dtype": torch.float32}, "dtype must be torch.int64"),
    ],
)
def test_bad_bits(kwargs, message):
    with pytest.raises(InputError, match=message):
        random.stream().bits(4, **kwargs)
    if "n" in kwargs:
        with pytest.raises(InputError, match="n must be"):
            ops.philox_bits(*KEY, 4, kwargs["n"], dtype=kwargs.get("dtype", INT), device=CPU)


@pytest.mark.parametrize(
    "key",
    [
        {"seed": 1.0},
        {"step": True},
        {"draw": 2**63},
        {"replica": -(2**63) - 1},
        {"call": None},
        {"layer": 3},
        {"site": b"x"},
    ],
)
def test_bad_key(key):
    (name,) = key
    with pytest.raises(InputError, match=f"{name} must be"):
        random.stream(**key)


# --- statistics: each check, and a generator that it must refuse ------------------------------------------------------


def two_sided(z):
    return 2 * stats.norm.sf(abs(z))


def p_mean(u):
    """H0: u is uniform on the multiples of 2^-24 in [0, 1); normal approximation."""
    return two_sided((float(u.mean()) - (0.5 - 2.0**-25)) / np.sqrt(1 / 12 / u.size))


def p_bytes(words):
    """H0: the bytes of 32-bit words are uniform; chi-square with 255 degrees of freedom, two-sided."""
    counts = np.bincount(words.astype("<u4").view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return 2 * min(stats.chi2.sf(chi2, 255), stats.chi2.cdf(chi2, 255))


def p_correlation(u, v):
    """H0: u and v are independent and uniform; normal approximation of the correlation with the known moments."""
    return two_sided(float(((u - 0.5) * (v - 0.5)).sum()) * 12 / np.sqrt(u.size))


def uniform(numel, **key):
    return random.stream(**key).uniform(numel).numpy().astype(np.float64)


def test_mean():
    # 2^20 draws: a bias of 0.0021 is missed with probability below 1 %.
    u = uniform(2**20, seed=11)
    assert p_mean(u) > FALSE_ALARM
    biased = np.where(np.arange(u.size) % 200 == 0, 0.0, u)  # bias 0.0025
    assert p_mean(biased) < FALSE_ALARM


def test_bytes_are_uniform():
    # Per half of the alarm rate: one stream read along its elements, and the first element of many streams.
    along = random.stream(seed=12).bits(2**18, 32).numpy()
    across = np.array([int(random.stream(seed=12, draw=d).bits(1, 32)) for d in range(2**12)])
    assert p_bytes(along) > FALSE_ALARM / 2
    assert p_bytes(across) > FALSE_ALARM / 2
    two_rounds = np.array([philox.element(KEY, i, 32, rounds=2) for i in range(2**14)])
    assert p_bytes(two_rounds) < FALSE_ALARM / 2


def test_neighbouring_streams_are_uncorrelated():
    # 2^18 draws a pair: a correlation of 0.016 is missed with probability below 1 %.
    numel, pairs = 2**18, 12
    base = uniform(numel, seed=13)
    neighbours = [uniform(numel, **{"seed": 13, part: 1}) for part in ("step", "draw", "call", "replica")]
    neighbours += [uniform(numel, seed=14), uniform(numel, seed=13, layer="a"), uniform(numel, seed=13, site="a")]
    neighbours += [random.stream(seed=13).child("a").uniform(numel).numpy().astype(np.float64)]
    neighbours += [np.roll(base, lag) for lag in (1, 16, 64, 128)]
    assert len(neighbours) == pairs
    for other in neighbours:
        assert p_correlation(base, other) > FALSE_ALARM / pairs
    reused = uniform(numel, seed=13)
    assert p_correlation(base, reused) < FALSE_ALARM / pairs
    mixed = np.where(np.arange(numel) % 50 == 0, base, neighbours[0])  # correlation 0.02
    assert p_correlation(base, mixed) < FALSE_ALARM / pairs


@pytest.mark.parametrize("n", [1, 16, 17, 24, 32])
def test_a_sequence_can_be_made_in_pieces(n: int) -> None:
    s = random.stream(seed=9)
    whole = s.bits(1000, n)
    for start in (0, 128, 640, 896):
        assert torch.equal(s.bits(1000 - start, n, start=start), whole[start:])
    for start in (-128, 1, 64, 127):
        with pytest.raises(InputError, match="multiple of 128"):
            s.bits(8, n, start=start)
