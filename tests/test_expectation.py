"""Expectations by probing, against the law that each quantizer states of itself and against laws known by hand."""

import controls
import pytest
import torch

import fqtstats
from fqtstats.errors import InputError, NotExact
from fqtstats.verdicts.expectation import exact_mean, law
from fqtstats.verdicts.probe import Probe

RANDOM = ["ptq", "psq", "pcq", "bhq", "bhq-adaptive", "luq", "agp", "topk", "dorefa", "int4_sr"]
ELEMENTWISE = [name for name in fqtstats.QUANTIZERS if name not in ("bhq", "bhq-adaptive")]


def rows(n=12, d=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(0, -3, n, dtype=torch.float64).view(-1, 1)
    return x.to(dtype)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_and_variance_are_those_that_the_quantizer_states(name, bits, dtype):
    bits = min(fqtstats.QUANTIZERS[name].widths, key=lambda width: abs(width - bits))
    q, x = fqtstats.quantizer(name, bits=bits), rows(dtype=dtype)
    found = law(q, x)
    # In float64 the two sums are rounded, too; so is the division by the probability of a row.
    exact = dtype == torch.float32 and name != "agp"
    torch.testing.assert_close(found.mean, q.mean(x).double(), rtol=0, atol=0 if exact else 1e-15)
    torch.testing.assert_close(found.variance, q.variance(x).double(), rtol=1e-9, atol=1e-20)
    assert found.n == (24 if name in RANDOM else 0)


@pytest.mark.parametrize("n", [1, 8, 16, 24, 31])
def test_any_number_of_random_bits(n):
    q, x = fqtstats.quantizer("psq", bits=3, random_bits=n), rows()
    assert torch.equal(exact_mean(q, x), q.mean(x))


def test_coupled_quantizers_are_probed_on_their_codes():
    q, x = fqtstats.quantizer("bhq", bits=4), rows()
    with pytest.raises(NotExact, match=r"not elementwise|more than 8 values"):
        law(q, x)
    mean = exact_mean(q, x)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, q.mean(x).double(), rtol=0, atol=4e-7)
    torch.testing.assert_close(mean, x.double(), rtol=0, atol=2e-6)
    few = fqtstats.quantizer("bhq", bits=4, random_bits=8)
    assert (exact_mean(few, x) - x).abs().max() > 1e-4


def test_layouts_of_images():
    q, x = fqtstats.quantizer("pcq", bits=4), torch.randn(3, 4, 5, 6)
    mean = exact_mean(q, x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(mean, q.mean(x))


def test_laws_known_by_hand():
    x = torch.tensor([[0.25, 1.5, -3.0], [0.0, 2.0, 7.75]])

    def three_values(x, s):
        u = s.uniform(x.shape)
        return x + (u >= 0.25).float() + 2 * (u >= 0.75).float()

    found = law(three_values, x)
    assert found.values == 3
    assert torch.equal(found.mean, x.double() + 0.75 + 0.5)
    torch.testing.assert_close(found.variance, torch.full_like(found.mean, 0.5 + 9 * 0.25 - 1.25**2))

    def falling(x, s):
        return x - (s.bits(x.shape, 8) < 64).float()

    assert torch.equal(law(falling, x).mean, x.double() - 0.25)


def test_a_second_use_by_a_child_stream_alone_is_fine():
    x = rows()
    q = fqtstats.quantizer("psq", bits=4)
    assert torch.equal(exact_mean(lambda x, s: q(x, s.child("rounding")), x), q.mean(x))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x, s: x + s.uniform(x.shape) + s.child("b").uniform(x.shape), "several numbers per element"),
        (lambda x, s: x + s.bits(x.shape, 8) + s.bits(x.shape, 24), "several numbers per element"),
        (lambda x, s: x * s.uniform((x.shape[0], 1)), "12 numbers for 480 elements"),
        (lambda x, s: x + s.uniform((2, *x.shape)).sum(0), "960 numbers for a result of 480"),
        (lambda x, s: x + s.uniform(x.shape), "more than 8 values"),
        (lambda x, s: x + (s.uniform(x.shape) < 0.5).float().roll(1), "not elementwise"),
        (lambda x, s: x + float(s.words()[0]), "the stream's key"),
        (lambda x, s: x + torch.rand(x.shape), "differs from call to call"),
    ],
)
def test_what_cannot_be_probed_is_said(f, message):
    with pytest.raises(NotExact, match=message):
        exact_mean(f, rows())


def test_shared_numbers_are_marked():
    with pytest.raises(NotExact) as caught:
        law(lambda x, s: x * s.uniform((x.shape[0], 1)), rows())
    assert caught.value.shared


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x, s: x[:, :2], r"return torch.float32 \[12, 40\] like its input, got torch.float32 \[12, 2\]"),
        (lambda x, s: x.double(), "got torch.float64"),
        (lambda x, s: None, "must return a tensor, got NoneType"),
        (lambda x, s: x / 0, "480 NaN or Inf of 480"),
        (lambda x, s: 1 / 0, r"raised ZeroDivisionError: .*x \[12, 40\] torch.float32, seed 0, draw 0, site 'probe'"),
    ],
)
def test_bad_callables_are_named_with_what_replays_them(f, message):
    with pytest.raises(InputError, match=message):
        exact_mean(f, rows())


def test_the_input_is_left_alone():
    x = rows()
    before = x.clone()

    def in_place(x, s):
        return x.add_((s.uniform(x.shape) < 0.5).float())

    torch.testing.assert_close(exact_mean(in_place, x), before.double() + 0.5, rtol=0, atol=2e-7)
    assert torch.equal(x, before)


def test_sixteen_random_bits_are_found_without_sampling():
    f, x = controls.few_random_bits(16), rows(64, 256)
    step = (x.amax(1) - x.amin(1)) / 15
    assert ((exact_mean(f, x) - x).abs() / step.view(-1, 1)).max() > 2.0**-17


def test_probe_answers_like_a_stream():
    words = torch.arange(256, dtype=torch.int64) << 24
    probe = Probe(words, fqtstats.stream(seed=3, layer="a"))
    assert probe.seed == 3
    assert probe.layer == "a"
    assert torch.equal(probe.bits((16, 16), 8).view(-1), torch.arange(256))
    assert torch.equal(probe.bits(128, 8, start=128, dtype=torch.int32), torch.arange(128, 256, dtype=torch.int32))


@pytest.mark.parametrize("x", [[1.0], torch.arange(3), torch.zeros(0), torch.tensor([1.0, float("nan")])])
def test_what_is_no_input_is_said_so(x):
    with pytest.raises(InputError, match=r"^x must be (a non-empty floating-point tensor|finite)"):
        fqtstats.exact_mean(lambda x, s: x, x)
