"""Verdicts: what is unbiased passes, and every planted defect is found.

The false-alarm rate of every check here is 1e-6 for each verdict that must pass; defects are certain to be found at
their sizes where they show without sampling, and else with the probabilities that each test states.
"""

import itertools
import random

import controls
import numpy as np
import pytest
import torch
from scipy import stats

import fqtstats
from fqtstats.errors import BiasDetected, InputError
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import Battery, autocorrelation, spread_p, strongest_lag
from fqtstats.verdicts.blackbox import BlackBox
from fqtstats.verdicts.decisions import Decisions

UNBIASED = [name for name in fqtstats.QUANTIZERS if fqtstats.quantizer(name).claim == "unbiased"]
BIASED = [name for name in fqtstats.QUANTIZERS if name not in UNBIASED]
X = designs.natural((32, 96))


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize(
    ("bits", "dtype"), [(1, torch.float64), (2, torch.float32), (4, torch.float64), (8, torch.float32)]
)
def test_quantizers_that_claim_it_are_unbiased(name, bits, dtype):
    widths = {"luq": (2, 5), "int4_sr": (2, 8)}.get(name, (1, 8))
    q = fqtstats.quantizer(name, bits=min(max(bits, widths[0]), widths[1]))
    verdict = fqtstats.check_unbiased(q, X.to(dtype))
    assert verdict.ok, verdict
    assert verdict.unbiased
    pruned = name == "agp" and bits > 1
    assert verdict.independent == ("between groups" if pruned else True)
    assert verdict.p_value > 1e-6
    assert verdict.draws == (64 if name in ("bhq", "bhq-adaptive", "dorefa") else 640 if pruned else 576)
    assert set(verdict.minimum_detectable_bias) == {"constant", "one row", "one column", "one element"}


@pytest.mark.parametrize("name", BIASED)
def test_quantizers_that_claim_to_be_biased_are(name):
    q = fqtstats.quantizer(name, bits=min(fqtstats.QUANTIZERS[name].widths, key=lambda bits: abs(bits - 4)))
    assert q.claim == "biased"
    verdict = fqtstats.check_unbiased(q, X)
    assert not verdict.ok
    assert verdict.draws == 0  # it shows without sampling


@pytest.mark.parametrize("name", ["ptq", "psq", "pcq", "bhq"])
@pytest.mark.parametrize("random_bits", [2, 4, 8, 12, 16])
def test_few_random_bits_are_a_bias_as_claimed(name, random_bits):
    q = fqtstats.quantizer(name, bits=4, random_bits=random_bits)
    assert q.claim == "biased"
    assert not fqtstats.check_unbiased(q, X).unbiased


@pytest.mark.parametrize("defect", controls.DEFECTS)
def test_defects_are_found_without_sampling(defect):
    verdict = fqtstats.check_unbiased(controls.DEFECTS[defect], X)
    assert not verdict.unbiased
    assert verdict.draws == 0
    assert verdict.p_value == 0
    assert "by probing" in verdict.evidence


def test_what_has_no_defect_passes():
    verdict = fqtstats.check_unbiased(controls.unbroken(), X)
    assert verdict.ok, verdict


@pytest.mark.parametrize("over", ["rows", "columns", "blocks"])
def test_shared_noise_is_dependence_and_no_bias(over):
    # The correlation of errors next to each other is 1 in the first two and 3/4 in the last: beyond 40 standard
    # deviations in 16 draws.
    verdict = fqtstats.check_unbiased(controls.noise_shared(over), X)
    assert verdict.unbiased
    assert verdict.independent is False
    assert not verdict.ok
    assert verdict.method.startswith("sampled")


def test_a_black_box_is_sampled():
    def two_numbers(x, s):
        return controls.unbroken(4)(x, s) + 1e-3 * (s.child("more").uniform(x.shape) - 0.5)

    verdict = fqtstats.check_unbiased(two_numbers, X)
    assert verdict.ok, verdict
    assert verdict.method.startswith("sampled, since it uses several numbers per element")

    def shifted(x, s):
        return two_numbers(x, s) + 0.1 * controls._grid(x, 4)[1]

    # .1 steps along the constant direction of a row of 96 elements: 20 standard deviations of the mean of 64 draws.
    verdict = fqtstats.check_unbiased(shifted, X)
    assert not verdict.unbiased
    assert verdict.draws <= 64


def dithered(x, s):
    """Three values an element: the sum of two fair decisions."""
    u = s.uniform(x.shape)
    return x + 0.1 * ((u < 0.25).float() - (u >= 0.75).float())


def test_more_than_two_values():
    verdict = fqtstats.check_unbiased(dithered, X)
    assert verdict.ok, verdict
    assert verdict.method == "exact"
    assert verdict.draws == 64
    verdict = fqtstats.check_unbiased(lambda x, s: dithered(x, s) + 1e-3, X)
    assert not verdict.unbiased
    assert verdict.draws == 0


G = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40, generator=G),
        torch.randn(6, 4, 5, 3, generator=G).contiguous(memory_format=torch.channels_last),
        torch.randn(24, 12, generator=G).t(),
        torch.randn(1, 30, generator=G),
        torch.randn(16, 32, generator=G).bfloat16(),
        torch.randn(16, 32, generator=G).half(),
        torch.cat([torch.zeros(8, 16), torch.randn(8, 16, generator=G)]),
    ],
    ids=["vector", "channels last", "transposed", "one row", "bfloat16", "float16", "zero rows"],
)
def test_any_input(name, x):
    verdict = fqtstats.check_unbiased(fqtstats.quantizer(name, bits=4), x)
    assert verdict.ok, verdict


def test_bfloat16_rounds_the_expectation_and_leaves_the_draws_independent():
    # At 8 bits a step of some rows is a unit in bfloat16's last place: E is off by .3 steps, within the tolerance.
    verdict = fqtstats.check_unbiased(fqtstats.quantizer("psq", bits=8), designs.natural((1024, 64)).bfloat16())
    assert verdict.ok, verdict
    assert verdict.worst_bias > 0.1


def test_the_verdict_is_a_function_of_the_seed():
    q = fqtstats.quantizer("psq", bits=4)
    first = fqtstats.check_unbiased(q, X, seed=5)
    assert fqtstats.check_unbiased(q, X, seed=5) == first
    assert fqtstats.check_unbiased(q, X, seed=6) != first
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    fqtstats.check_unbiased(q, X, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_assert_unbiased():
    assert fqtstats.assert_unbiased(fqtstats.quantizer("psq"), X).ok
    with pytest.raises(BiasDetected, match="BIASED") as caught:
        fqtstats.assert_unbiased(controls.nearest(), X)
    assert not caught.value.verdict.ok
    assert isinstance(caught.value, AssertionError)


def test_a_deterministic_identity_is_unbiased():
    verdict = fqtstats.check_unbiased(lambda x, s: x.clone(), X)
    assert verdict.ok
    assert verdict.method == "deterministic"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(0, 3)}, "non-empty floating-point tensor"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "floating-point"),
        ({"x": torch.full((2, 3), torch.nan)}, "6 NaN or Inf of 6"),
        ({"false_alarm": 0.0}, "between 0 and 1, got 0.0"),
        ({"false_alarm": 1.0}, "between 0 and 1, got 1.0"),
        ({"draws": 3}, "at least 16, got 3"),
        ({"draws": True}, "at least 16, got True"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        fqtstats.check_unbiased(fqtstats.quantizer("psq"), **{"x": X, **arguments})


def test_black_boxes_hold_their_level():
    """400 runs of 16 draws; more rejections than are allowed here have probability 1e-6 at a size of .01.

    Finds (with probability .99) a size of .07. Smaller inputs, where rare outcomes fail to show, are refused.
    """
    x = designs.natural((8, 16))
    low, step = controls._grid(x, 4)
    y = (x - low) / step
    u = torch.rand(16 * 400, *x.shape, generator=torch.Generator().manual_seed(0))
    kept = (y.floor() + (u < y - y.floor())) * step + low
    rejected = dict.fromkeys(("directions", "cross-fit", "independence"), 0)
    for run in range(400):
        box = BlackBox(lambda x, s, run=run: kept[16 * run + s.draw], x, run)
        for draw in range(16):
            box.draw(fqtstats.stream(draw=draw))
        for finding in box.look(1e-6):
            rejected[finding.family] += finding.p_value <= 0.01
    assert max(rejected.values()) <= stats.binom.isf(1e-6, 400, 0.01), rejected


@pytest.mark.parametrize(("bits", "found"), [(2, True), (8, False)])
def test_a_black_box_shows_two_random_bits_and_not_eight(bits, found):
    # Which is why the verdict of eight rests on probing; the seed is fixed.
    few = controls.few_random_bits(bits)
    box = BlackBox(few, X)
    for draw in range(64):
        box.draw(fqtstats.stream(draw=draw))
    p = min(f.p_value for f in box.look(1e-6) if not f.about_independence)
    assert (p < 1e-6 / 12) == found
    assert not fqtstats.check_unbiased(few, X).unbiased


# --- callables that misbehave -----------------------------------------------------------------------------------------


def spoiled(how, when=lambda s: True):
    def f(x, s):
        out = controls.unbroken()(x, s)
        return how(out) if when(s) else out

    return f


def to_nan(out):
    out[3, 4] = torch.nan
    return out


def raising(out):
    raise ZeroDivisionError("in the user's code")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda out: out[:1], r"must return torch.float32 \[32, 96\] like its input, got torch.float32 \[1, 96\]"),
        (lambda out: out.double(), r"got torch.float64 \[32, 96\]"),
        (to_nan, "returned 1 NaN or Inf of 3072 elements for finite input"),
        (lambda out: out.tolist(), "must return a tensor, got list"),
        (raising, r"raised ZeroDivisionError: in the user's code \(test_unbiasedness.py, line \d+\)"),
    ],
    ids=["shape", "dtype", "nan", "type", "raises"],
)
def test_what_a_callable_returns_is_checked(how, message):
    where = "called with x .32, 96. torch.float32, seed 7, draw 0, site 'probe natural', with numbers of the probe's"
    with pytest.raises(InputError, match=f"{message}; {where}"):
        fqtstats.check_unbiased(spoiled(how), X, seed=7)
    # Only while it is sampled: then the message says which stream gives it again.
    with pytest.raises(InputError, match=f"{message}; called with .* seed 7, draw 5, site 'check natural'$"):
        fqtstats.check_unbiased(spoiled(how, lambda s: s.draw == 5 and s.site.startswith("check")), X, seed=7)


def test_the_message_gives_the_failing_call_again():
    def f(x, s):
        if s.site == "check natural" and float(s.uniform(x.shape)[0, 0]) < 0.1:
            raise ArithmeticError
        return controls.unbroken()(x, s)

    with pytest.raises(InputError, match="raised ArithmeticError") as caught:
        fqtstats.check_unbiased(f, X, seed=3)
    draw = int(str(caught.value).split("draw ")[1].split(",")[0])
    with pytest.raises(ArithmeticError):
        f(X, fqtstats.stream(seed=3, draw=draw, site="check natural"))


def test_what_ignores_its_stream_is_judged_exactly():
    verdict = fqtstats.check_unbiased(lambda x, s: x + 1e-3, X)
    assert (verdict.unbiased, verdict.method, verdict.draws, verdict.p_value) == (False, "deterministic", 0, 0.0)
    calls = itertools.count()
    verdict = fqtstats.check_unbiased(lambda x, s: x + 0.1 * (-1) ** next(calls), X, draws=32)
    assert "asks nothing of its stream, and yet its result differs from call to call" in verdict.method


def test_too_small_an_input_is_said_so():
    def two_numbers(x, s):
        return controls.unbroken(4)(x, s) + 0 * s.child("more").uniform(x.shape)

    with pytest.raises(InputError, match="16 elements are too few to be judged by draws alone"):
        fqtstats.check_unbiased(two_numbers, X[:4, :4].contiguous())
    x = torch.tensor([[0.3, 0.6]])
    verdict = fqtstats.check_unbiased(finer_than_it_looks(16), x, grid=(1.0, 0.0), draws=16)
    assert verdict.ok
    assert "2 elements are too few for them to show a bias of 0.5 steps" in verdict.evidence
    # What is computed needs no number of elements.
    assert fqtstats.check_unbiased(dithered, x).independent is None
    assert not fqtstats.check_unbiased(lambda x, s: controls.unbroken(1)(x, s) + 0.01, x).unbiased


def test_random_numbers_from_elsewhere_are_no_determinism():
    x = torch.tensor([[0.5]])
    for own in (torch.rand, lambda _: np.random.rand(), lambda _: random.random()):  # noqa: NPY002
        # One element above the grid by next to nothing comes out alike in almost every call.
        with pytest.raises(InputError, match=r"1 elements are too few .* takes random numbers from another place"):
            fqtstats.check_unbiased(lambda x, s, own=own: (x + own(1) * 1e-9).floor() + 0.5, x)
    # Where the library cannot see the generator, the repetitions tell.
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(InputError, match="differs from call to call"):
        fqtstats.check_unbiased(lambda x, s: (x + torch.rand(x.shape, generator=generator)).floor(), x)
    # Negative control: what is deterministic stays so.
    assert fqtstats.check_unbiased(lambda x, s: x.round() + 0.25, x).method == "deterministic"


def test_evidence_of_no_bias_does_not_read_like_one():
    verdict = fqtstats.check_unbiased(lambda x, s: (x * 8 + torch.rand_like(x)).floor() / 8, X)
    assert verdict.ok
    assert verdict.evidence == "the draws show nothing, and only they were looked at"


def test_what_is_no_callable_or_no_grid_is_said_so():
    with pytest.raises(InputError, match=r"something called as .*, got 'psq'; fqtstats.quantizer"):
        fqtstats.check_unbiased("psq", X)
    with pytest.raises(InputError, match=r"grid must be a pair .step, offset., got 0.125; give"):
        fqtstats.check_unbiased(lambda x, s: x, X, grid=0.125)


# --- callables whose grid is named ------------------------------------------------------------------------------------


def finer_than_it_looks(bits, step=1.0, offset=0.0):
    """Rounds onto ``step k + offset`` by a number that is put together from two: that cannot be probed."""

    def f(x, s):
        y = (x - offset) / step
        high, low = (s.child(name).bits(x.shape, bits // 2) for name in ("high", "low"))
        u = (high * 2 ** (bits // 2) + low).to(x.dtype) / 2**bits
        return (y.floor() + (u < y - y.floor())) * step + offset

    return f


LOW, STEP = controls._grid(X, 4)


@pytest.mark.parametrize(
    ("x", "grid"),
    [
        (X, (STEP, LOW)),
        (X, (0.25, 0.1)),
        (X.double(), (torch.full((96,), 0.25), torch.linspace(0, 0.2, 96))),
        (X.view(4, 8, 3, 32), (0.125, torch.zeros(8, 1, 1))),
        (X.view(-1), (0.25, 0.0)),
    ],
    ids=["rows", "tensor", "columns", "channels", "vector"],
)
def test_a_named_grid_lets_the_battery_judge(x, grid):
    f = finer_than_it_looks(24, *grid)
    verdict = fqtstats.check_unbiased(f, x, grid=grid)
    assert verdict.ok, verdict
    assert verdict.method.startswith("sampled on its grid, since it uses several numbers per element")
    assert verdict.draws == 64
    assert set(verdict.minimum_detectable_bias) == {"constant", "one row", "one column", "one element"}
    assert verdict.worst_bias is None


def test_few_random_bits_on_a_named_grid():
    # Six random bits take 2^-7 of a step from each of 65536 elements on average: in 16 draws, 19 standard deviations
    # of their mean.
    x = designs.natural((128, 512))
    low, step = controls._grid(x, 4)
    few = finer_than_it_looks(6, step, low)
    verdict = fqtstats.check_unbiased(few, x, grid=(step, low))
    assert not verdict.unbiased
    assert verdict.p_value < 1e-6
    assert "standard deviations from 0" in verdict.evidence
    assert verdict.draws == 16


def test_dependence_on_a_named_grid():
    def shared(x, s):
        y = (x - LOW) / STEP
        u = s.child("a").uniform((x.shape[0], 1)) + 0 * s.child("b").uniform(x.shape)
        return (y.floor() + (u < y - y.floor())) * STEP + LOW

    verdict = fqtstats.check_unbiased(shared, X, grid=(STEP, LOW))
    assert verdict.unbiased
    assert verdict.independent is False
    assert "are correlated" in verdict.method or "times the variance" in verdict.method
    assert verdict.minimum_detectable_bias == {}  # the battery has not judged its bias


def test_results_that_are_not_the_named_grids():
    f = finer_than_it_looks(24, STEP, LOW)
    # Another grid altogether: nothing can be said.
    with pytest.raises(InputError, match=r"results are none of its points.*steps from the offset; called with x"):
        fqtstats.check_unbiased(f, X, grid=(STEP * 1.1, LOW))
    with pytest.raises(InputError, match="results are none of its points"):
        fqtstats.check_unbiased(f, X, grid=(STEP, LOW + 0.3 * STEP))
    # Its points, but not those next to the input: certain.
    verdict = fqtstats.check_unbiased(lambda x, s: f(x, s) + STEP, X, grid=(STEP, LOW))
    assert not verdict.unbiased
    assert verdict.p_value == 0
    assert "results off the two neighbouring grid points" in verdict.evidence


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((0.0, 0.0), "every step must be positive, got 0.0"),
        ((1.0, torch.nan), "its offset must be finite"),
        ((torch.ones(3), 0.0), r"its step \[1, 3\] does not broadcast against x \[32, 96\]"),
        ((1e-7, 0.0), "torch.float32 cannot resolve a step of 1e-07"),
        (0.5, "grid must be a pair .step, offset., got 0.5; give"),
        ((0.5,), r"grid must be a pair .step, offset., got \(0.5,\); give"),
        (("wide", 0.0), "its step must be a number or a tensor, got 'wide'"),
    ],
)
def test_a_grid_that_is_none(grid, message):
    with pytest.raises(InputError, match=message):
        fqtstats.check_unbiased(controls.unbroken(), X, grid=grid)


# --- the battery alone, on decisions whose law is prescribed ----------------------------------------------------------


def findings(ups, p, draws, tolerance=0.0):
    """All findings at the last look, of decisions that `ups(stream)` makes where `p` would be right."""
    decisions = Decisions(torch.ones_like(p), p, torch.full_like(p, tolerance), p, lambda s: (ups(s), 0))
    battery = Battery(decisions)
    found = {}
    for draw in range(draws):
        battery.draw(fqtstats.stream(seed=1, draw=draw))
        if battery.draws in (16, draws):
            found.update({finding.family: finding for finding in battery.look()})
    return found


P = torch.rand(32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3


def test_battery_passes_fair_decisions():
    found = findings(lambda s: s.uniform(P.shape) < P, P, 64)
    assert set(found) == {"support", "independence", "elements", "directions", "cross-fit"}
    assert min(f.p_value for f in found.values()) > 1e-6 / 5


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("elements", lambda p: p.clone().index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(0.9).double())),
        ("directions", lambda p: p * 0.95),
        ("directions", lambda p: torch.floor(p * 16) / 16),
        (
            "cross-fit",
            lambda p: (p + 0.2 * torch.sign(torch.sin(torch.arange(p.numel()) * 7.3)).view(p.shape)).clamp(0, 1),
        ),
    ],
)
def test_battery_finds_biased_decisions(family, wrong):
    p = P.clone()
    p[3, 4] = 0.3
    bad = wrong(p)
    found = findings(lambda s: s.uniform(p.shape) < bad, p, 128)
    assert found[family].p_value < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
def test_battery_finds_shared_noise(axis):
    shape = (P.shape[0], 1) if axis else (1, P.shape[1])
    found = findings(lambda s: s.uniform(shape).expand(P.shape) < P, P, 16)
    assert found["independence"].p_value < 1e-6


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (1, 8), (2, 2), (1, 1)])
def test_lags_and_the_variance_of_their_sums(shape):
    # Against every lag's sum of products written out, and its variance over all sign patterns of two-valued errors.
    g = torch.Generator().manual_seed(0)
    e = torch.randint(0, 2, (400, *shape), generator=g).double() * 2 - 1
    for lag in ((0, 1), (1, 0), (shape[0] // 2, shape[1] // 2), (shape[0] // 2, 0)):
        direct = (e * e.roll(lag, (1, 2))).sum((1, 2))
        found = autocorrelation(e)[lag[0] % shape[0], lag[1] % shape[1]]
        assert float(found) == pytest.approx(float(direct.sum()), abs=1e-9)
    own_opposite = (2 * (shape[0] // 2) % shape[0], 2 * (shape[1] // 2) % shape[1]) == (0, 0)
    if own_opposite and shape != (1, 1):
        lag = (shape[0] // 2, shape[1] // 2)
        sums = (e * e.roll(lag, (1, 2))).sum((1, 2))
        assert float(sums.var()) == pytest.approx(2 * e[0].numel(), rel=0.5)  # twice the number of terms
    p, _ = strongest_lag(autocorrelation(e), 400 * torch.full(shape, float(e[0].numel())), 1.0)
    assert p > 1e-6


def test_battery_finds_draws_that_repeat():
    found = findings(lambda s: fqtstats.stream(draw=s.draw // 2).uniform(P.shape) < P, P, 16)
    assert found["independence"].p_value < 1e-6
    assert "consecutive" in found["independence"].evidence


# --- sums over rows and columns ---------------------------------------------------------------------------------------


def partly_shared(p, s, share):
    """Numbers of one's own, but now and then the row's."""
    common = s.child("shared").uniform((p.shape[0], 1)).expand(p.shape)
    return torch.where(s.child("which").uniform(p.shape) < share, common, s.uniform(p.shape)) < p


def paired(p, s, mirrored=False):
    """All elements of a row in pairs at random places, the same for all draws, with one number each."""
    order = fqtstats.stream(site="pairs").uniform(p.shape).argsort(1)
    first, second = order.chunk(2, 1)
    u = s.uniform(p.shape)
    taken = u.gather(1, first)
    return u.scatter(1, second, 1 - 2.0**-24 - taken if mirrored else taken) < p


U = torch.rand(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("decide", "ratio"),
    [
        (lambda p, s: partly_shared(p, s, 0.06), (1.5, 2.5)),  # 1 + 511 x .0036 / 2
        (paired, (1.4, 1.6)),
        (lambda p, s: paired(p, s, mirrored=True), (0.4, 0.6)),
    ],
    ids=["a few of a row", "pairs", "mirrored pairs"],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_battery_finds_noise_that_few_elements_share(decide, ratio, axis):
    # Sums of 64 rows in 32 differences of draws: the ratio's standard deviation is .03 to .06.
    p = U if axis else U.t().contiguous()

    def ups(s):
        up = decide(U, s)
        return up if axis else up.t().contiguous()

    found = findings(ups, p, 64)["independence"]
    assert found.p_value < 1e-6
    assert f"sums of errors over {'rows' if axis else 'columns'} have" in found.evidence
    assert ratio[0] < float(found.evidence.split("have ")[1].split()[0]) < ratio[1]
    # No lag and no pair of draws shows it.
    battery = Battery(Decisions(p, p, torch.zeros_like(p), p, lambda s: (ups(s), 0)))
    for draw in range(16):
        battery.draw(fqtstats.stream(seed=1, draw=draw))
    assert min(battery._lags()[0], battery._following()[0]) > 1e-3


def test_a_bias_of_whole_rows_does_not_widen_their_sums():
    # .1 of a step in each of 512 elements is 5 standard deviations of a row's sum, in every draw.
    biased = (U + 0.1).clamp(max=1)
    found = findings(lambda s: s.uniform(U.shape) < biased, U, 64)
    assert found["directions"].p_value < 1e-6
    battery = Battery(Decisions(U, U, torch.zeros_like(U), U, lambda s: (s.uniform(U.shape) < biased, 0)))
    for draw in range(64):
        battery.draw(fqtstats.stream(seed=1, draw=draw))
    assert min(battery._spread("rows", 1)[0], battery._spread("columns", 0)[0]) > 1e-3


@pytest.mark.parametrize("p", [(0.5, 0.5), (0.01, 0.3), (1e-3, 0.02), (0.0, 1.0)])
def test_the_spread_of_sums_holds_its_level(p):
    """Exactly: over all outcomes of two pairs of draws of a row of twelve elements, weighted by their probabilities."""
    row = torch.tensor([p * 6], dtype=torch.float64)
    decisions = Decisions(row, row, torch.zeros_like(row), row, lambda s: (row > 0, 0))
    law = np.ones(1)
    for q in p * 6:
        law = np.convolve(law, [q * (1 - q), 1 - 2 * q * (1 - q), q * (1 - q)])
    differences = np.arange(-12, 13)
    assert (differences**2 * law).sum() == pytest.approx(2 * sum(q * (1 - q) for q in p * 6))
    found = []
    for (d1, w1), (d2, w2) in itertools.product(zip(differences, law, strict=True), repeat=2):
        value, _ = spread_p(torch.tensor([[d1], [d2]]), decisions, 1)
        found.append((value, w1 * w2))
    for level in {value for value, _ in found}:
        assert sum(weight for value, weight in found if value <= level) <= level + 1e-12
    assert min(value for value, _ in found) < 0.25
