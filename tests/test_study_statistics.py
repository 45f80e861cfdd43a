"""Statistics of single studies: exponents of regret, and expectations that are judged by intervals."""

import math

import numpy as np
import pandas as pd
import pytest

STEPS = 100


def runs_of(powers, seeds=20, noise=0.3, first=0.1, bend=0.0, shift=0.0, seed=0):
    """Runs whose excess has the mean ``variance ** power`` per optimizer, with normal noise of that relative size."""
    random, rows = np.random.default_rng(seed), []
    for optimizer, power in powers.items():
        for variance in first * np.logspace(-1, 3, 9):
            mean = variance ** (power + bend * math.log(variance)) - shift
            for number, excess in enumerate(mean * (1 + noise * random.standard_normal(seeds))):
                rows.append(
                    {"optimizer": optimizer, "size": 1.0, "variance": variance, "seed": number, "steps": STEPS,
                     "first_gradient": first, "excess": excess}
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_intervals_of_exponents_cover_them(analysis):
    """Of 300 studies: a share of up to .87, or of 1, has p < 1e-6. Those of half the width cover less."""
    regret, random = analysis("regret"), np.random.default_rng(0)
    variance = np.logspace(0, 2, 5)
    excess = variance[:, None] * (1 + 0.3 * random.standard_normal((300, 5, 20)))
    errors = excess.std(2, ddof=1) / math.sqrt(20)
    ends = []
    for mean, error in zip(excess.mean(2), errors, strict=True):
        rows = pd.DataFrame({"variance": variance, "mean": mean, "error": error, "seeds": 20})
        ends.append(regret.combined(rows, regret.slope_weights(rows)))
    value, low, high = np.array(ends).T
    assert 0.87 < np.mean((low <= 1) & (high >= 1)) < 1
    assert np.mean(abs(value - 1) < (high - low) / 4) < 0.8


def test_exponents_use_the_variances_that_dominate_and_no_others(analysis):
    regret = analysis("regret")
    runs = runs_of({"sgd": 1.0, "adam": 0.5}, noise=1e-6)
    small = runs["variance"] < 10 * 0.1 * (1 - 1e-6)
    disturbed = runs.assign(excess=runs["excess"].where(~small, -1.0))
    found = regret.exponents(disturbed).set_index("optimizer")
    assert found.loc["sgd", "whole"][0] == pytest.approx(1.0, abs=1e-5)
    assert found.loc["adam", "whole"][0] == pytest.approx(0.5, abs=1e-5)
    assert regret.sgd_less_adam(disturbed)["apart"][0][0] == pytest.approx(0.5, abs=1e-5)


def test_a_single_negative_excess_is_not_left_out(analysis):
    """The slope is that of the means with it; without any positive mean there is none."""
    regret = analysis("regret")
    runs = runs_of({"sgd": 1.0, "adam": 0.5}, noise=1e-6)
    least = runs["variance"] == runs.loc[runs["variance"] > 0.99, "variance"].min()
    one = least & (runs["seed"] == 0) & (runs["optimizer"] == "sgd")
    changed = runs.assign(excess=runs["excess"].where(~one, -1.0))
    found = regret.exponents(changed).set_index("optimizer")["whole"]
    means = changed[(changed["variance"] > 0.99) & (changed["optimizer"] == "sgd")].groupby("variance")["excess"].mean()
    slope = np.polyfit(np.log(means.index), np.log(means), 1)[0]
    assert found["sgd"][0] == pytest.approx(slope)
    assert slope > 1.001
    lost = runs.assign(excess=runs["excess"].where(~least, -1.0))
    assert all(math.isnan(ends[0]) for ends in regret.exponents(lost)["whole"])


def test_the_bend_of_a_power_law_holds_0_and_that_of_a_curve_does_not(analysis):
    regret = analysis("regret")
    straight = regret.exponents(runs_of({"sgd": 1.0, "adam": 0.5}, noise=0.1))["bend"]
    assert all(low < 0 < high for _, low, high in straight)
    curved = regret.exponents(runs_of({"sgd": 1.0, "adam": 0.5}, noise=0.1, bend=-0.05))["bend"]
    assert all(high < 0 for _, _, high in curved)


def test_gradients_and_losses_of_the_regression_agree_with_differences(analysis):
    problem = analysis("regret").Problem()
    w = np.random.default_rng(0).standard_normal((2, problem.parameters))
    loss, gradient = problem(w)
    assert loss.shape == (2,)
    step = 1e-6 * np.eye(problem.parameters)[[3]]
    differences = (problem(w + step)[0] - problem(w - step)[0]) / 2e-6
    assert gradient[:, 3] == pytest.approx(differences, rel=1e-5)
    margins = (w @ problem.x.T) * problem.sign
    assert loss == pytest.approx(np.logaddexp(0, -margins).mean(1) + 0.005 * np.square(w).sum(1))


@pytest.mark.parametrize(
    ("ends", "where"),
    [
        ((2, 1.5, 2.5), "inside"),
        ((2, 1, 3), "inside"),
        ((2, 0.9, 2.5), "open"),
        ((4, 2.9, 5), "open"),
        ((2, 0.1, 9), "open"),
        ((4, 3.5, 5), "outside"),
        ((0.5, 0.2, 0.9), "outside"),
        ((2, math.nan, math.nan), "open"),
    ],
)
def test_intervals_lie_inside_of_what_was_expected_or_outside_or_hold_an_end(analysis, ends, where):
    assert analysis("expected").place(ends, 1, 3) == where


def test_claims_are_judged_by_the_worst_interval(analysis):
    judged = analysis("expected").judged
    inside, open_, outside = (2, 1.5, 2.5), (2, 0.9, 2.5), (4, 3.5, 5)
    assert judged("x", {"a": inside}, (1, 3)).holds is True
    assert judged("x", {"a": inside, "b": open_}, (1, 3)).holds is None
    claim = judged("x", {"a": inside, "b": open_, "c": outside}, (1, 3))
    assert claim.holds is False
    assert claim.because == "not examined"
    assert claim.text == "x. Expected: 1 to 3. Inside: a. Open, as the interval holds an end of that: b. Outside: c."


def losses_of(ratio, spread, seeds=8):
    """Losses of both backends whose log ratio has this mean and standard deviation."""
    logs = np.linspace(-1, 1, seeds)
    logs *= spread / logs.std(ddof=1)
    rows = [
        {"backend": backend, "seed": seed, "epoch": 1, "loss": loss, "test_accuracy": 0.9 + 0.01 * seed}
        for seed in range(seeds)
        for backend, loss in (("simulated", 1.0), ("native", ratio * math.exp(logs[seed])))
    ]
    return {"losses": pd.DataFrame(rows)}


def test_backends_are_equal_within_the_margin_open_or_outside_and_noise_does_not_help(analysis, monkeypatch):
    study = analysis("native_training")
    monkeypatch.setattr(study, "margin", lambda: 1.25)
    verdicts = {(1.0, 0.1): True, (1.0, 1.0): None, (1.2, 0.1): None, (2.0, 0.1): False, (0.5, 0.1): False}
    for (ratio, spread), holds in verdicts.items():
        assert study.claims(losses_of(ratio, spread))[0].holds is holds


def test_the_interval_of_two_one_sided_tests_agrees_with_their_p_value(analysis, monkeypatch):
    study = analysis("native_training")
    found = study.compare(losses_of(1.1, 0.2)["losses"]).iloc[0]
    monkeypatch.setattr(study, "margin", lambda: found["tested_high"] * (1 + 1e-9))
    assert "p = 0.05;" in study.claims(losses_of(1.1, 0.2))[0].text
