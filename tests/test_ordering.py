"""The study of the papers' orderings: what its statistics say of planted losses, and what becomes of its runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from fqtstats.errors import TrainingDiverged
from fqtstats.training import runs

NOISE = np.array([0.3, -0.2, 0.1, -0.4, 0.25, -0.05])
"""Of logarithms of losses, by seed."""


@pytest.fixture(scope="module")
def ordering(analysis):
    return analysis("ordering")


def planted(family, logs: dict[str, np.ndarray]) -> pd.DataFrame:
    """Rows of one family with these logarithms of losses; NaN is a run that diverged."""
    return pd.DataFrame(
        {
            "family": family.name,
            "variant": name,
            "seed": seed,
            "loss": math.exp(value),
            "test_loss": 0.0,
            "test_accuracy": 1.0,
            "diverged": "epoch 1" if math.isnan(value) else "",
            "guessing": math.log(10),
        }
        for name, values in logs.items()
        for seed, value in enumerate(values)
    )


def test_what_is_planted_is_said_and_nothing_else(ordering) -> None:
    family = ordering.FAMILIES["statquant-digits"]
    shared = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 0.0])  # of the seeds: far larger than the differences
    logs = {f"{name}@{bits}": shared.copy() for name in ("ptq", "psq", "bhq") for bits in (2, 3, 4)}
    logs["psq@2"] += 2 + NOISE
    logs["ptq@2"] += 5 + NOISE[::-1]
    logs["psq@3"] -= 2 + NOISE
    logs["ptq@3"] -= NOISE[::-1]
    logs["psq@4"] += NOISE
    logs["ptq@4"] += NOISE[::-1]
    table = ordering.compare(planted(family, logs), [family]).set_index(["better", "worse"])
    assert list(table.loc[[("bhq@2", "psq@2"), ("psq@2", "ptq@2"), ("bhq@2", "ptq@2")], "verdict"]) == ["ordered"] * 3
    assert table.loc[("bhq@3", "psq@3"), "verdict"] == "ordered the other way"
    assert table.loc[("psq@3", "ptq@3"), "verdict"] == "ordered"
    for pair in (("bhq@3", "ptq@3"), ("bhq@4", "psq@4"), ("psq@4", "ptq@4"), ("bhq@4", "ptq@4")):
        assert table.loc[pair, "verdict"].startswith("no ordering shown (difference within -")
    for row in table.to_dict("records"):  # the intervals of all claims together say the same
        shown = {"ordered": (0, math.inf), "ordered the other way": (-math.inf, 0)}.get(row["verdict"])
        if shown is None:
            assert row["log_least"] < 0 < row["log_most"]
        else:
            assert shown[0] <= row["log_least"] <= row["log_most"] <= shown[1]
        assert row["log_most"] > row["log_high"] or row["log_most"] == 0

    row, first, second = table.loc[("bhq@2", "psq@2")], logs["bhq@2"], logs["psq@2"]
    expected = scipy.stats.ttest_rel(second, first, alternative="greater")
    both = scipy.stats.ttest_rel(second, first).confidence_interval(0.95)
    np.testing.assert_allclose((row["p"], row["p_other"]), (expected.pvalue, 1 - expected.pvalue), rtol=1e-9)
    np.testing.assert_allclose((row["log_low"], row["log_high"]), both, rtol=1e-9)
    losses = scipy.stats.ttest_rel(np.exp(second), np.exp(first)).confidence_interval(0.95)
    np.testing.assert_allclose((row["difference_low"], row["difference_high"]), losses, rtol=1e-9)


def test_a_run_that_diverged_counts_with_the_loss_of_guessing(ordering) -> None:
    family = ordering.FAMILIES["1bit-adam"]
    logs = {"exact": NOISE - 3, "agp@4": NOISE - 2, "psq@1": np.where(np.arange(6) < 2, np.nan, NOISE)}
    rows = planted(family, logs)
    (row,) = ordering.compare(rows, [family]).to_dict("records")
    assert (row["diverged_better"], row["diverged_worse"], row["seeds"]) == (0, 2, 6)
    expected = np.where(np.arange(6) < 2, math.log(math.log(10)), NOISE) - logs["agp@4"]
    assert row["log"] == pytest.approx(expected.mean())
    assert list(ordering.means(rows, [family])["diverged"]) == [0, 2, 0]


def test_one_seed_tests_nothing(ordering) -> None:
    family = ordering.FAMILIES["1bit-sgd"]
    logs = {"exact": NOISE[:1], "agp@4": NOISE[:1], "psq@1": NOISE[:1] + 1}
    (row,) = ordering.compare(planted(family, logs), [family]).to_dict("records")
    assert row["verdict"].startswith("not tested")


def test_what_is_said_names_every_claim_and_whether_it_is_shown(ordering) -> None:
    family = ordering.FAMILIES["luq-digits"]
    logs = {"luq": NOISE, "exact": NOISE - 1} | {better: NOISE + 2 + NOISE[::-1] for _, better in family.claims}
    logs["int4"] = NOISE - 2 - NOISE[::-1]
    tables = {"runs": planted(family, logs)}
    counts, *told = ordering.claims(tables)
    assert "Of 4 claims that were tested, 3 are shown in training, 1 the other way round, 0 neither" in counts.text
    assert [claim.holds for claim in told] == [True, True, True, False]
    assert told[3].because
    assert told[3].text.startswith("luq-digits, luq < int4: the second's loss is 0.135 [0.102, 0.18] times")
    other = scipy.stats.ttest_1samp(logs["int4"] - logs["luq"], 0, alternative="less").pvalue
    assert f"p = 1 as claimed, {4 * other:.2g} the other way round, Holm): ordered the other way." in told[3].text
    assert list(ordering.draw(tables)) == ["claims", "variants"]


def test_runs_are_kept_and_one_that_diverges_is_a_row(ordering, analysis, monkeypatch, tmp_path) -> None:
    made = []

    def trained(variant, task, seed, model, epochs):
        made.append((variant.name, seed))
        raise TrainingDiverged("it did", {"epoch": 2, "reason": "the loss became nan, or so"}, None)

    monkeypatch.setattr(ordering, "trained", trained)
    monkeypatch.chdir(tmp_path)

    def command(out, *seeds):
        arguments = ["--families", "1bit-adam", "--seeds", *seeds, "--out", out]
        return analysis("study").command(ordering.STUDY, arguments)

    saved = command("one", "0")
    assert made == [("exact", 0), ("psq@1", 0), ("agp@4", 0)]
    assert list(saved.tables["runs"]["diverged"]) == ["epoch 2: the loss became nan, or so"] * 3
    next(Path("runs").rglob("*.json")).unlink()
    again = command("two", "0")
    assert len(made) == 4
    pd.testing.assert_frame_equal(again.tables["runs"].drop(columns="cpu_seconds"),
                                  saved.tables["runs"].drop(columns="cpu_seconds"))  # fmt: skip
    command("three", "0", "1")
    assert made[4:] == [("exact", 1), ("psq@1", 1), ("agp@4", 1)]
    assert "agp@4 < psq@1" in Path("three/table.md").read_text()


def test_runs_of_other_recipes_are_other_cases(ordering, monkeypatch) -> None:
    family, settings = ordering.FAMILIES["rotated-adam"], ordering.Settings()
    own = ordering.case(family, family.reference, 0, settings)
    assert own == ordering.case(family, family.reference, 0, settings)
    assert (own["epochs"], own["model"]) == (ordering.FINE_TUNING, "preact_resnet20")
    others = [
        ordering.case(family, dataclasses.replace(family.reference, start="exact"), 0, settings),
        ordering.case(family, dataclasses.replace(family.reference, change=ordering.as_registered), 0, settings),
    ]
    monkeypatch.setattr(ordering, "_batch_size", lambda *_: 7)
    others.append(ordering.case(family, family.reference, 0, settings))
    assert len({case["trained_sha256"] for case in (own, *others)}) == 4


def test_variants_of_a_family_differ_in_their_gradients_alone(ordering) -> None:
    for family in ordering.FAMILIES.values():
        setting = "text" if family.task == "text" else "digits"
        variants = (family.reference, *family.variants)
        recipes = {v.name: v.change(runs.run(f"{v.recipe}/{setting}", v.bits).recipe) for v in variants}
        assert {name for claim in family.claims for name in claim} == {*recipes} - {"exact"}
        forward, gradients = set(), set()
        for recipe in recipes.values():
            stages = [(stage.share, stage.lr_scale, stage.policy.activation) for stage in recipe.stages]
            policy = recipe.stages[-1].policy
            forward.add(repr((recipe.optimizer, recipe.rules, stages, policy.weight)))
            gradients.add(repr((policy.grad_input, policy.grad_weight)))
        assert (len(forward), len(gradients)) == (1, len(variants)), family.name
        assert not recipes["exact"].stages[-1].policy.quantizes_gradients
