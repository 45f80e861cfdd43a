"""The study of all recipes in analysis/recipes.py: its verdicts on made-up losses, runs that diverge, what is kept."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from fqtstats.errors import TrainingDiverged


@pytest.fixture(scope="module")
def study() -> ModuleType:
    # It stands in the repository, not in the installed package.
    path = Path(__file__).parents[1] / "analysis" / "recipes.py"
    spec = importlib.util.spec_from_file_location("analysis_recipes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- verdicts ---------------------------------------------------------------------------------------------------------

RECIPES, SEEDS = 24, 3


def made_up(shift: dict[str, float] | None = None, *, backends: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Runs whose log losses have a standard deviation of 0.2 over the seeds and ``backends`` between the backends."""
    generator, rows = np.random.default_rng(seed), []
    for index in range(RECIPES):
        recipe = f"r{index}"
        for own in range(SEEDS):
            common = math.log(0.02 * (1 + index)) + 0.2 * generator.normal()
            apart = backends * generator.normal()
            for backend, sign in (("native", 0.5), ("simulated", -0.5)):
                loss = math.exp(common + sign * (apart + (shift or {}).get(recipe, 0.0)))
                rows.append({"recipe": recipe, "backend": backend, "seed": own, "loss": loss, "diverged": ""})
    kept = {"test_loss": 0.1, "test_accuracy": 0.9, "kept_bytes": 1.0, "kept_float32_bytes": 4.0}
    about = {"data": "digits", "model": "small", "epochs": 1, "guessing": math.log(10), "accuracy": 0.9, "seconds": 1.0}
    return pd.DataFrame(rows).assign(**kept, **about)


def verdicts(study: ModuleType, rows: pd.DataFrame) -> pd.Series:
    return study.summary(rows).set_index("recipe")["verdict"]


def test_backends_that_differ_less_than_seeds_are_equal_and_others_differ(study: ModuleType) -> None:
    """Fixed seeds: nothing to fail by chance."""
    assert (verdicts(study, made_up()) == "equal").all()
    # A factor of 3 is far above the margin, exp(2.77 * 0.2) = 1.74.
    found = verdicts(study, made_up({"r3": math.log(3.0), "r5": -math.log(3.0)}))
    assert found[["r3", "r5"]].tolist() == ["differs", "differs"]
    assert (found.drop(["r3", "r5"]) == "equal").all()


def test_a_noisy_comparison_does_not_pass(study: ModuleType) -> None:
    """What the seeds do is 0.2; with backends that part by 1, three seeds cannot tell."""
    rows = made_up(backends=1.0)
    table = study.summary(rows)
    assert ((table["ratio_low"] < 1) & (table["ratio_high"] > 1)).mean() > 0.8  # "contains no difference" says nothing
    assert not (table["verdict"] == "equal").any()


def test_a_small_difference_of_all_recipes_shows_in_their_mean(study: ModuleType) -> None:
    found = study.overall(study.summary(made_up({f"r{index}": 0.15 for index in range(RECIPES)})))
    assert 1 < found["ratio_low"] < math.exp(0.15) < found["ratio_high"]
    assert found["recipes"] == RECIPES
    plain = study.overall(study.summary(made_up()))
    assert plain["ratio_low"] < 1 < plain["ratio_high"]
    # Standard deviations of the difference of two backends, and of two seeds: a third.
    assert 0.1 / (0.2 * math.sqrt(2)) == pytest.approx(plain["share"], rel=0.3)


def test_identical_losses_need_no_test(study: ModuleType) -> None:
    rows = made_up()
    same = rows["recipe"] == "r0"
    rows.loc[same, "loss"] = rows.loc[same, "seed"] + 0.1
    table = study.summary(rows).set_index("recipe")
    assert table.loc["r0", "verdict"] == "identical"
    assert table.loc["r0", "ratio"] == 1
    assert (table["verdict"].drop("r0") == "equal").all()


def test_a_recipe_that_diverges_on_one_backend_is_open_and_does_not_train(study: ModuleType) -> None:
    rows = made_up()
    lost = (rows["recipe"] == "r1") & (rows["backend"] == "native") & (rows["seed"] == 0)
    rows.loc[lost, ["loss", "diverged"]] = [math.nan, "epoch 1"]
    lost = (rows["recipe"] == "r3") & (rows["backend"] == "native")
    rows.loc[lost, ["loss", "diverged"]] = [math.nan, "epoch 1"]
    every = rows["recipe"] == "r2"
    rows.loc[every, "loss"] = math.nan
    rows.loc[every, "diverged"] = "epoch 1"
    table = study.summary(rows).set_index("recipe")
    assert table.loc["r1", ["diverged_native", "diverged_simulated", "verdict", "trains"]].tolist() == [
        1,
        0,
        "open",
        False,
    ]
    assert table.loc["r2", ["diverged_native", "diverged_simulated", "trains"]].tolist() == [3, 3, False]
    assert pd.isna(table.loc["r2", "verdict"])
    assert table.loc["r3", "verdict"] == "open"
    assert table.loc["r0", "trains"]
    assert study.draw(rows).startswith(b"\x89PNG")
    assert "| r2 |" in study.markdown(study.summary(rows))


def test_one_recipe_or_one_backend_or_one_seed_is_enough_for_a_table(study: ModuleType) -> None:
    rows = made_up()
    alone = rows[rows["recipe"] == "r0"]
    assert study.summary(alone)["verdict"].notna().all()
    for part in (alone[alone["backend"] == "native"], alone[alone["seed"] == 0]):
        table = study.summary(part)
        assert len(table) == 1
        assert study.overall(table) == {}


def test_a_run_that_is_not_there_yet_has_not_diverged(study: ModuleType) -> None:
    rows = made_up()
    missing = (rows["recipe"] == "r0") & (rows["backend"] == "native") & (rows["seed"] == 0)
    row = study.summary(rows[~missing]).iloc[0]
    assert (row["diverged_native"], row["verdict"]) == (0, "equal")


def test_moderated_variances(study: ModuleType) -> None:
    """Equal variances are pooled; unequal ones have about the prior they are drawn from."""
    generator = np.random.default_rng(0)
    df = np.full(2000, 2.0)
    pooled, more = study.moderated(np.linspace(1.9, 2.1, 5), df[:5])
    assert np.allclose(pooled, 2.0)
    assert np.allclose(more, 10)
    true = 0.5 * 8 / generator.chisquare(8, 2000)
    found, total = study.moderated(true * generator.chisquare(2, 2000) / 2, df)
    # Smyth's example: 8 degrees of freedom and the scale 0.5. 15 % are 5 standard errors of this fixed draw.
    assert total[0] == pytest.approx(10, rel=0.15)
    assert np.corrcoef(np.log(found), np.log(true))[0, 1] > 0.3


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command line, with trainings that last no time; it returns the folder and the recipes that were trained."""
    trained: list[tuple[str, str, int]] = []

    class Made:
        def __init__(self, loss: float) -> None:
            names = ("loss", "accuracy", "test_loss", "test_accuracy", "kept_bytes", "kept_float32_bytes")
            self.final = pd.Series(dict.fromkeys(names, loss))

    def train(model, records, recipe, *, backend, seed, **others):
        trained.append((recipe.name, backend, seed))
        if recipe.name == "luq" and backend == "native":
            first = {"layer": "conv1", "tensor": "gradient", "largest": 1.0, "nonfinite": 3, "numel": 4}
            found = {"epoch": 2, "reason": "the loss is nan", "first": first, "largest": [first]}
            raise TrainingDiverged("diverged", found, None)
        return Made(0.1 + 0.01 * seed)

    monkeypatch.setattr(study.loop, "train", train)
    monkeypatch.setattr(study.models, "build", lambda *args: torch.nn.Linear(1, 1))

    def run(*arguments: str) -> list[tuple[str, str, int]]:
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["recipes", "--out", str(tmp_path), *arguments])
        study.main()
        return list(trained)

    run.folder = tmp_path / "digits"
    return run


def test_a_run_that_diverges_is_a_row_and_the_study_goes_on(command) -> None:
    assert len(command("--recipes", "luq", "lsq", "--seeds", "2")) == 12  # luq, and lsq with its start
    rows = pd.read_csv(command.folder / "rows.csv")
    own = rows[(rows["recipe"] == "luq") & (rows["backend"] == "native")]
    assert own["loss"].isna().all()
    assert own["diverged"].str.contains("gradient of layer 'conv1'").all()
    assert rows.loc[rows["recipe"] == "lsq@4", "loss"].notna().all()
    assert {file.name for file in command.folder.iterdir()} == {
        "runs",
        "rows.csv",
        "summary.csv",
        "table.md",
        "run.json",
        "losses.png",
    }


def test_runs_are_not_repeated_and_processes_share_a_folder(command) -> None:
    first = command("--recipes", "exact", "luq", "--seeds", "2", "--backends", "native")
    second = command("--recipes", "exact", "luq", "--seeds", "2", "--backends", "simulated", "--only-seeds", "1")
    assert (len(first), len(second)) == (4, 2)
    assert len(pd.read_csv(command.folder / "rows.csv")) == 6
    # What was killed while it wrote a run left that run's temporary file, which is none.
    (command.folder / "runs" / "exact-simulated-1.json").unlink()
    (command.folder / "runs" / "exact-simulated-1.json.tmp").write_text("{")
    assert command("--recipes", "exact", "luq", "--seeds", "2") == [
        ("exact", "simulated", 0),
        ("luq", "simulated", 0),
        ("exact", "simulated", 1),
    ]
    assert len(pd.read_csv(command.folder / "rows.csv")) == 8
    assert command("--recipes", "exact", "luq", "--seeds", "2") == []


def test_runs_of_another_length_are_not_taken_for_these(command) -> None:
    command("--recipes", "exact", "--seeds", "2", "--epochs", "3")
    with pytest.raises(SystemExit, match="epochs 3, not 4"):
        command("--recipes", "exact", "--seeds", "2", "--epochs", "4")
    assert json.loads((command.folder / "runs" / "exact-native-0.json").read_text())["epochs"] == 3


@pytest.mark.parametrize("arguments", [("--seeds", "1"), ("--seeds", "2", "--only-seeds", "2")])
def test_seeds_that_do_not_fit_are_refused(command, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        command(*arguments)
