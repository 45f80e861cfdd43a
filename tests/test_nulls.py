"""What is said of null runs, and the calls that judge them: the package's own."""

import pandas as pd
import pytest
import torch

import fqtstats
from fqtstats.verdicts.battery import LOOKS, TESTS, Battery
from fqtstats.verdicts.blackbox import BlackBox
from fqtstats.verdicts.decisions import Decisions

P = torch.full((32, 32), 0.3, dtype=torch.float64)


def streams(n=1000):
    return (fqtstats.stream(seed=1, draw=draw) for draw in range(n))


def decided(ups):
    return Battery(Decisions(P, P, torch.zeros_like(P), P, lambda s: (ups(s), 0)))


def test_a_share_is_judged_by_the_side_that_its_interval_lies_on(analysis):
    """0 of 100 has the interval [0, .036], 100 of 100 [.964, 1], 50 of 100 [.398, .602]."""
    at_most, at_least = analysis("shares").at_most, analysis("shares").at_least
    assert [at_most(count, 100, 0.04) for count in (0, 1, 50)] == [True, None, False]
    assert [at_least(count, 100, 0.96) for count in (100, 99, 50)] == [True, None, False]
    assert at_most(0, 100, 0.04, comparisons=5) is None  # an interval that holds with others is wider


def rates(*rejected, level=0.01, runs=1000):
    return pd.DataFrame(
        {"subject": list("abcdef")[: len(rejected)], "level": level, "runs": runs, "rejected": rejected}
    )


def test_sizes_are_shown_open_or_contradicted(analysis):
    """Of 3000 runs together: 6 refused are below .01, 24 leave it open, 60 are above."""
    sizes = analysis("nulls").pooled_sizes
    for rejected, holds, said in (
        ((2, 2, 2), True, "below"),
        ((8, 8, 8), None, "open"),
        ((20, 20, 20), False, "above"),
    ):
        (claim,) = sizes(rates(*rejected), "a test", "subjects")
        assert claim.holds is holds
        assert said in claim.text
    (claim,) = sizes(rates(0, 100), "tests", "subjects", by="subject")  # of the one below, of the other above
    assert claim.holds is False
    assert "a below, b above" in claim.text


def test_one_subject_that_is_above_a_level_contradicts(analysis):
    each = analysis("nulls").each_size
    several = pd.concat([rates(20, 25, level=0.05), rates(3, 4, level=0.01)])
    assert each(several, "A test", ["subject"]).holds is True
    several.iloc[-1, several.columns.get_loc("rejected")] = 40  # at the level that is not the largest
    assert each(several, "A test", ["subject"]).holds is False


def test_null_runs_and_subjects_share_no_stream(analysis):
    taken = analysis("nulls").streams
    found = [s for subject in ("a", "b") for run in (0, 1) for s, _ in zip(taken(subject, run), range(3), strict=False)]
    assert len(set(found)) == len(found) == 12


def test_the_battery_judges_at_its_looks():
    """Fair decisions fail with probability 1e-6 at most; with P(up) off by .05 they fail at the first look."""
    fair = decided(lambda s: s.uniform(P.shape) < P)
    judged = fair.judge(streams(), 40, 1e-6)
    assert judged.failure is None
    assert fair.draws == 32  # the last look within 40 draws
    assert judged.tests == TESTS
    wrong = decided(lambda s: s.uniform(P.shape) < P + 0.05)
    judged = wrong.judge(streams(), 256, 1e-6, designs=3)
    assert judged.bias is not None
    assert wrong.draws == LOOKS[0]
    assert judged.tests == 3 * TESTS
    assert judged.p_value <= 1e-6


def test_a_dependence_is_no_bias():
    """One number for all elements: told as a dependence, by both; a biased callable is told as biased."""
    common = decided(lambda s: (s.uniform((1, 1)) < P).expand(P.shape))
    judged = common.judge(streams(), 64, 1e-6)
    assert judged.bias is None
    assert judged.failure is judged.dependence is not None

    def rounded(x, s):
        return (s.uniform((1, 1)) < x).to(x.dtype).expand(x.shape)

    judged = BlackBox(rounded, P).judge(streams(), 64, 1e-6)
    assert judged.bias is None
    assert judged.dependence is not None
    judged = BlackBox(lambda x, s: (s.uniform(x.shape) < x + 0.1).to(x.dtype), P).judge(streams(), 64, 1e-6)
    assert judged.bias is not None
    assert judged.p_value <= 1e-6


@pytest.mark.parametrize("most", [16, 31, 64])
def test_looks_stop_at_the_most_draws(most):
    battery = decided(lambda s: s.uniform(P.shape) < P)
    battery.judge(streams(), most, 1e-6)
    assert battery.draws == max(n for n in LOOKS if n <= most)
