"""``fqtstats train`` and ``fqtstats compare``: runs that are killed, full disks, divergence, and what is compared."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from commands import Run, Start, run, send_when, started
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console

import fqtstats
from fqtstats import comparison, files, models
from fqtstats.commands import experiments
from fqtstats.data import data
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.report import comparisons, trainings
from fqtstats.schema import parquet_bytes
from fqtstats.training.recipes import RECIPES, Definition, Recipe, Stage
from fqtstats.trainings import EPOCHS, TIMES, VARIANCE, Training

__all__ = ["run", "started"]  # the fixtures

FAST = ("train", "--model", "mlp", "--batch-size", "128", "--epochs", "2")
# 11 steps an epoch, and 20 ms or more in each: the whole takes a second at least where SLOW is set.
KILLED = (
    "train",
    "--model",
    "mine:slow",
    "--epochs",
    "4",
    "--bits",
    "4",
    "--variance-every",
    "4",
    "--variance-draws",
    "2",
)
SLOW = {"SLOW": "0.02"}
STATE = Path("r/state/checkpoint.state")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these trainings."""
    for module in (trainings, comparisons):
        monkeypatch.setattr(module, "render_all", lambda result: {})


def assert_same(one: str, two: str) -> None:
    first, second = fqtstats.load_training(one), fqtstats.load_training(two)
    assert first.metadata["hashes"] == second.metadata["hashes"]
    pd.testing.assert_frame_equal(
        first.epochs.drop(columns=[*TIMES]), second.epochs.drop(columns=[*TIMES]), check_exact=True
    )
    assert Path(one, "variance.parquet").read_bytes() == Path(two, "variance.parquet").read_bytes()
    assert Path(one, "model.pt").read_bytes() == Path(two, "model.pt").read_bytes()


# --- continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_killed_and_interrupted_runs_end_with_the_same_bits(run: Run, started: Start) -> None:
    process = started(*KILLED, "--out", "r", **SLOW)
    send_when(process, STATE.exists, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not Path("r/model.pt").exists()
    before = STATE.read_bytes()

    process = started(*KILLED, "--out", "r", "--resume", **SLOW)
    out, err = send_when(process, lambda: STATE.read_bytes() != before, signal.SIGINT)
    assert process.returncode == 130
    assert out == ""
    told, _, again = err.splitlines()[-1].partition(", continue with: ")
    assert told == "fqtstats: interrupted; what was trained is in r"
    assert shlex.split(again) == ["fqtstats", *KILLED, "--out", "r", "--resume"]

    done = run(*KILLED, "--out", "r", "--resume")
    assert done.status == 0, done.err
    assert not STATE.parent.exists()
    whole = run(*KILLED, "--out", "whole")
    assert whole.status == 0, whole.err
    assert_same("r", "whole")
    assert fqtstats.load_training("r").metadata["resumed_at"] > 0
    # A finished run is shown, and nothing is trained again.
    again_shown = run(*KILLED, "--out", "r", "--resume")
    assert (again_shown.status, again_shown.out) == (0, done.out)


@pytest.mark.usefixtures("without_figures")
def test_a_full_disk_leaves_the_last_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(experiments, "SAVE_SHARE", math.inf)
    original, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 12:  # a file and its folder each time
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        done = run(*FAST, "--out", "r")
    assert done.status == 2
    hint, error = done.err.splitlines()[-2:]
    assert hint.startswith("fqtstats: stopped; what was trained is in r, continue with: fqtstats train")
    assert error.startswith("fqtstats: error: cannot write r/state/checkpoint.state: No space left on device")
    assert STATE.exists()
    assert not list(Path("r").rglob("*.tmp"))
    again = run(*FAST, "--out", "r", "--resume")
    assert again.status == 0, again.err
    assert run(*FAST, "--out", "whole").status == 0
    assert_same("r", "whole")
    assert fqtstats.load_training("r").metadata["resumed_at"] > 0


def test_other_arguments_and_other_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SAVE_SECONDS", 0.0)
    original = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda d: (_ for _ in ()).throw(KeyboardInterrupt) if STATE.exists() else original(d)
    )
    assert run(*FAST, "--out", "r").status == 130
    monkeypatch.setattr(files.os, "fsync", original)
    before = STATE.read_bytes()
    for words, message in (
        (("--bits", "3"), "bits was None and is now 3"),
        (("--recipe", "statquant-psq"), "recipe was 'statquant-bhq' and is now 'statquant-psq'"),
        (("--seed", "1"), "seed was 0 and is now 1"),
    ):
        done = run(*FAST, *words, "--out", "r", "--resume")
        assert done.status == 2
        assert message in done.err
    # The same arguments, but what they name has changed meanwhile.
    monkeypatch.setattr(models, "build", lambda name, source, seed, build=models.build: build(name, source, seed + 1))
    done = run(*FAST, "--out", "r", "--resume")
    assert done.status == 2
    assert "cannot resume: the saved checkpoint is of another run" in done.err
    assert STATE.read_bytes() == before


# --- what a run gives -------------------------------------------------------------------------------------------------


def test_a_run(run: Run) -> None:
    done = run(*FAST, "--variance-every", "8", "--variance-draws", "2")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].rstrip() == "training of statquant-bhq@5, seed 0"
    assert max(map(len, lines)) <= 80
    place = "runs/train-statquant-bhq@5"
    figures = ", ".join(f"figures/{name}.png" for name in ("accuracy", "gradient_variance", "loss"))
    said = done.out.rpartition("saved in")[2]
    assert " ".join(said.split()) == f"{place}: epochs.parquet, variance.parquet, model.pt, run.json, {figures}"
    assert [line.split(":")[0].split(",")[0] for line in done.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    found = fqtstats.load_training(place)
    assert found.label == "statquant-bhq@5"
    assert list(found.epochs.columns) == [column.name for column in EPOCHS]
    assert list(found.variance.columns) == [column.name for column in VARIANCE]
    assert list(found.totals["step"]) == [0, 8, 16]
    assert found.metadata["arguments"] == {
        "command": "train", "recipe": "statquant-bhq", "bits": None, "model": "mlp", "data": "digits",
        "data_root": None, "image_size": None, "epochs": 2, "batch_size": 128, "lr": None, "seed": 0, "skip": None,
        "checkpoint": None, "teacher": None, "augment": False, "variance_every": 8, "variance_draws": 2,
        "threads": 1, "device": "cpu", "backend": "simulated",
    }  # fmt: skip
    assert repr(found).startswith("Training(statquant-bhq@5, seed 0: finished after 2 epochs, loss ")
    assert "<td>" in found._repr_html_()
    for figure in (found.plot_loss(), found.plot_accuracy(), found.plot_variance()):
        assert len(figure.axes) == 1

    # Its weights are a checkpoint to start from, and to measure.
    command = ("--recipe", "exact", "--checkpoint", f"{place}/model.pt")
    more = run(*FAST, *command, "--json", "--out", "more")
    assert more.status == 0, more.err
    shown = json.loads(more.out)
    assert [row["epoch"] for row in shown["epochs"]] == [1, 2]
    assert shown["metadata"]["weights"] == f"checkpoint {place}/model.pt"


@pytest.mark.usefixtures("without_figures")
def test_what_was_trained_with_quantized_layers_is_no_full_precision_checkpoint(run: Run) -> None:
    for recipe, out in (("statquant-qat", "qat"), ("joint-2-4", "joint"), ("exact", "exact")):
        done = run(*FAST[:-1], "1", "--recipe", recipe, "--out", out)
        assert done.status == 0, done.err
    for out, networks in (("qat", ["model"]), ("joint", ["model", "student-2"]), ("exact", [])):
        assert fqtstats.load_training(out).metadata["quantized"] == networks
    lsq = (*FAST[:-1], "1", "--recipe", "lsq", "--checkpoint")
    for file, recipe in (("qat/model.pt", "statquant-qat"), ("joint/student-2.pt", "joint-2-4")):
        done = run(*lsq, file, "--out", "r")
        assert done.status == 2
        assert len(done.err.splitlines()) == 1, done.err
        assert f"'{file}' was trained by {recipe}; give a full-precision checkpoint" in done.err
        assert not Path("r").exists()
    # The teacher is in full precision, and nothing is known of weights from elsewhere.
    shutil.copy("qat/model.pt", "model.pt")
    for number, file in enumerate(("exact/model.pt", "joint/teacher.pt", "model.pt")):
        done = run(*lsq, file, "--out", f"lsq-{number}")
        assert done.status == 0, done.err
    done = run(*FAST, "--recipe", "exact", "--checkpoint", "lsq-0/model.pt", "--out", "r")
    assert done.status == 2
    assert "'lsq-0/model.pt' was trained with quantized layers, not in full precision" in done.err
    # A recipe that does not ask for full precision takes any weights that fit.
    assert run(*FAST[:-1], "1", "--checkpoint", "qat/model.pt", "--out", "r").status == 0


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("recipe", ["exact/digits", "exact"])
def test_a_run_of_a_recipe_has_options_of_its_own_unless_they_are_given(run: Run, recipe: str) -> None:
    done = run("train", "--recipe", recipe, "--model", "mlp", "--epochs", "1", "--out", "r")
    assert done.status == 0, done.err
    arguments = fqtstats.load_training("r").metadata["arguments"]
    expected = {"model": "mlp", "data": "digits", "epochs": 1, "batch_size": 64, "augment": False, "image_size": None}
    assert {name: arguments[name] for name in expected} == expected
    assert run("train", "--recipe", recipe, "--model", "mlp", "--epochs", "1").status == 0
    assert os.listdir("runs") == [f"train-{recipe.replace('/', '-')}"]


@pytest.mark.usefixtures("without_figures")
def test_a_run_keeps_its_augmentation_where_its_own_data_are_named(run: Run) -> None:
    Path("cifar").mkdir()
    for name in [*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]:
        Path("cifar", name).write_bytes(bytes(3073 * 2))
    command = ("train", "--recipe", "statquant-psq/cifar10", "--model", "mlp", "--epochs", "1")
    own = ("--data", "cifar10", "--data-root", "cifar", "--batch-size", "4")
    for place, words, augment in (("own", own, True), ("other", ("--data", "digits"), False)):
        done = run(*command, *words, "--out", place)
        assert done.status == 0, done.err
        assert fqtstats.load_training(place).metadata["arguments"]["augment"] is augment


@pytest.mark.usefixtures("without_figures")
def test_divergence_is_an_outcome(run: Run) -> None:
    command = (*FAST, "--lr", "1e6", "--out", "r")
    done = run(*command)
    assert done.status == 1
    assert done.err.startswith("fqtstats: training diverged in epoch 1, step ")
    text = " ".join(done.out.split())
    assert "no epoch was finished" in text
    assert "first in: " in text
    found = fqtstats.load_training("r")
    assert found.diverged
    assert found.metadata["diverged"]["last_good_step"] == 0
    state = torch.load("r/model.pt", weights_only=True)
    assert all(bool(torch.isfinite(t).all()) for t in state.values())
    again = run(*command, "--resume")
    assert (again.status, again.out, again.err) == (1, done.out, "")


@pytest.mark.usefixtures("without_figures")
def test_tensorboard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = run(*FAST, "--tensorboard")
    assert done.status == 2
    assert "pip install tensorboard" in done.err
    assert not Path("runs").exists()
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == "r/tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert run(*FAST, "--variance-every", "11", "--variance-draws", "2", "--tensorboard", "--out", "r").status == 0
    assert [(name, step) for name, _, step in written if name in ("loss", "gradient/variance")] == [
        ("gradient/variance", 0), ("loss", 11), ("gradient/variance", 11), ("loss", 22),
    ]  # fmt: skip
    assert written[-1][0] == "closed"


def test_list_recipes(run: Run) -> None:
    done = run("list", "recipes")
    assert done.status == 0
    assert "statquant-bhq" in done.out
    assert "2010.14298" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "mine"), "unknown recipe 'mine'; known: exact"),
        (("--bits", "9"), "not defined for 9 bits; known: 1, 2"),
        (("--recipe", "exact", "--bits", "4"), "not defined for 4 bits"),
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
        (("--lr", "-1"), "lr"),
        (("--backend", "both"), "unknown backend 'both'"),
        (("--resume",), "--resume needs the folder of the run"),
        (("--skip", "no*"), "matches no layer"),
        (("--checkpoint", "none.pt"), "found nothing"),
        (("--checkpoint", "other.pt"), "does not fit the model"),
        (("--checkpoint", "lsq.pt"), "trained with quantized layers, not in full precision: it has what quantizers"),
        (("--teacher", "fits.pt"), "has no teacher"),
        (("--recipe", "exact", "--variance-every", "5"), "recipe 'exact' quantizes no gradient"),
        (("--data", "cifar10"), "needs a root directory"),
        (("--data", "cifar10", "--data-root", "cifar"), "cifar"),
        (("--data", "text"), "takes image or features"),
        (("--recipe", "from-full"), "full-precision"),
        (("--recipe", "stages"), "3 stages"),
        (("--recipe", "lsq/imagenet"), "known: lsq/digits, lsq/text"),
        (("--augment",), "data 'digits' has no augmentation"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Run, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defined(name: str, shares: tuple[float, ...], starts_from: Any = "scratch") -> None:
        qat = fqtstats.policies.get("statquant-qat")
        stages = tuple(Stage(f"stage {index}", qat, share) for index, share in enumerate(shares))
        recipe = Recipe(name, "", None, stages, starts_from=starts_from)
        monkeypatch.setitem(RECIPES, name, Definition(name, "", "", lambda bits: recipe))

    defined("from-full", (1.0,), "full-precision")
    defined("stages", (0.2, 0.3, 0.5))
    torch.save(models.build("preact_resnet20", data("digits"), 0).state_dict(), "other.pt")
    fits = models.build("mlp", data("digits"), 0).state_dict()
    torch.save(fits, "fits.pt")
    torch.save({**fits, "1.fqt_weight.step": torch.ones(())}, "lsq.pt")
    Path("cifar").mkdir()
    for name in [*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]:
        Path("cifar", name).write_bytes(bytes(3073 * 2 + 5))  # truncated
    done = run(*FAST, *words)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1, done.err
    assert message in done.err
    assert not Path("runs").exists()


# --- comparing --------------------------------------------------------------------------------------------------------


def made(name: str, seed: int, values: dict[str, float], **about: Any) -> Training:
    """A training of two epochs, by its last ones."""
    row = {"stage": "training", "network": "model", "steps": 1, "lr": 0.1, "variance": math.nan, "snr": math.nan}
    row |= {"kept_bytes": None, "kept_float32_bytes": None, **dict.fromkeys(TIMES, 0.0)}
    epochs = [{**row, "epoch": epoch, **{key: value + 2 - epoch for key, value in values.items()}} for epoch in (1, 2)]
    variance = pd.DataFrame(columns=[column.name for column in VARIANCE])
    return Training(pd.DataFrame(epochs), variance, {"recipe": {"name": name, "bits": 4}, "seed": seed, **about})


def values(center: float, generator: np.random.Generator) -> dict[str, float]:
    return {metric: center + generator.normal() for metric in comparison.METRICS}


def test_groups_and_pairs() -> None:
    generator = np.random.default_rng(0)
    numbers = {
        (name, seed): values(center, generator)
        for name, center in (("a", 1), ("b", 1.5), ("c", 9))
        for seed in range(5)
    }
    del numbers["b", 4]
    trainings = [made(name, seed, found) for (name, seed), found in numbers.items()]
    found = fqtstats.compare(trainings)
    pairs = found.pairs[found.pairs["metric"] == "loss"].set_index(["first", "second"])
    p = {}
    for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
        seeds = [seed for seed in range(5) if (first, seed) in numbers and (second, seed) in numbers]
        one, two = ([numbers[name, seed]["loss"] for seed in seeds] for name in (first, second))
        test = scipy.stats.ttest_rel(two, one)
        row = pairs.loc[f"{first}@4", f"{second}@4"]
        assert row["seeds"] == len(seeds)
        assert row["p"] == pytest.approx(test.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval()))
        assert row["difference"] == pytest.approx(np.mean(two) - np.mean(one))
        p[first, second] = test.pvalue
    # Holm: the smallest times three, the next times two (at least the one before), and so on.
    ordered, least = sorted(p, key=lambda pair: p[pair]), 0.0
    for rank, pair in enumerate(ordered):
        least = max(least, min(1.0, p[pair] * (3 - rank)))
        assert pairs.loc[f"{pair[0]}@4", f"{pair[1]}@4"]["p_holm"] == pytest.approx(least)
    group = found.groups[(found.groups["group"] == "a@4") & (found.groups["metric"] == "loss")].iloc[0]
    losses = [numbers["a", seed]["loss"] for seed in range(5)]
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(losses), scipy.stats.sem(losses))
    assert (group["runs"], group["mean"]) == (5, pytest.approx(np.mean(losses)))
    assert (group["low"], group["high"]) == (pytest.approx(low), pytest.approx(high))


def test_edges_of_comparisons() -> None:
    same = dict.fromkeys(comparison.METRICS, 1.0)
    diverged = made("b", 1, same, diverged={"step": 3})
    found = fqtstats.compare([made("a", 0, same), made("a", 1, same), made("b", 0, same), diverged, made("b", 2, same)])
    rows = found.groups[found.groups["metric"] == "loss"].set_index("group")
    assert list(rows.loc["b@4", ["runs", "diverged"]]) == [2, 1]
    pair = found.pairs.iloc[0]
    assert pair["seeds"] == 1
    assert math.isnan(pair["p"])
    assert math.isnan(pair["p_holm"])
    alike = fqtstats.compare([made(name, seed, same) for name in "ab" for seed in (0, 1)])
    assert set(alike.pairs["p"]) == {1.0}
    alone = fqtstats.compare([made("a", 0, same)])
    assert alone.pairs.empty
    assert math.isnan(alone.groups.iloc[0]["low"])
    # What tells groups of one recipe apart is in their names.
    named = fqtstats.compare([made("a", 0, same, settings={"backend": name}) for name in ("native", "simulated")])
    assert list(named.metadata["groups"]) == ["a@4 backend=native", "a@4 backend=simulated"]
    with pytest.raises(InputError, match="run 0 and run 1 are both runs of a@4 with seed 0"):
        fqtstats.compare([made("a", 0, same)] * 2)
    with pytest.raises(InputError, match="at least one"):
        fqtstats.compare([])


def test_configurations_are_told_apart_by_what_they_are_not_by_how_options_were_typed() -> None:
    same = dict.fromkeys(comparison.METRICS, 1.0)

    def one(seed: int, rate: float, **arguments: object) -> Training:
        recipe = {"name": "a", "bits": 5, "optimizer": f"Optimizer(lr={rate})"}
        settings = {"epochs": 2, "backend": "native"}
        asked = {"model": "mlp", "bits": None, "lr": None, "epochs": 2, "recipe": "a", **arguments}
        data = {"name": "digits", "sha256": "0"}
        return made("a", seed, same, recipe=recipe, settings=settings, data=data, arguments=asked)

    typed = [one(0, 0.1), one(1, 0.1, bits=5), one(2, 0.1, lr=0.1), one(3, 0.1, recipe="a/digits")]
    found = fqtstats.compare(typed)
    assert list(found.metadata["groups"]) == ["a@5"]
    assert list(found.groups["runs"]) == [4] * 4
    with pytest.raises(InputError, match="both runs of a@5 with seed 0"):
        fqtstats.compare([one(0, 0.1), one(0, 0.1, bits=5)])
    # Where runs of a configuration were asked for in several words, its name has what came of them.
    others = [one(0, 0.2, lr=0.2), one(1, 0.2, lr=0.2)]
    assert list(fqtstats.compare([*typed, *others]).metadata["groups"]) == [
        "a@5 optimizer=Optimizer(lr=0.1)",
        "a@5 optimizer=Optimizer(lr=0.2)",
    ]
    assert list(fqtstats.compare([typed[2], *others]).metadata["groups"]) == ["a@5 lr=0.1", "a@5 lr=0.2"]
    models = [one(0, 0.1), one(0, 0.1, model="vgg16")]
    assert list(fqtstats.compare(models).metadata["groups"]) == ["a@5 model=mlp", "a@5 model=vgg16"]


@pytest.mark.parametrize("missing", ["recipe", "settings", "data"])
def test_arguments_tell_apart_what_the_metadata_do_not(missing: str) -> None:
    """A training of which it is not known what came of the arguments is told from others by all of them."""
    same = dict.fromkeys(comparison.METRICS, 1.0)

    def one(seed: int, rate: float) -> Training:
        about = {"recipe": {"name": "a", "bits": 5}, "settings": {"epochs": 2}, "data": {"name": "digits"}}
        return made("a", seed, same, **(about | {missing: {}}), arguments={"lr": rate})

    found = fqtstats.compare([one(0, 0.1), one(1, 0.1), one(0, 0.2)])
    assert [name.partition(" ")[2] for name in found.metadata["groups"]] == ["lr=0.1", "lr=0.2"]


def test_tables_that_do_not_fit_are_no_training_and_no_comparison(tmp_path: Path) -> None:
    one = made("a", 0, dict.fromkeys(comparison.METRICS, 0.5))
    twice = pd.concat([one.epochs, one.epochs.iloc[:1]])
    with pytest.raises(InputError, match="expected one row per epoch, network in the table 'epochs' of a training"):
        Training(twice, one.variance, {})
    found = fqtstats.compare([one])
    with pytest.raises(InputError, match="table 'pairs' of a comparison"):
        comparison.Comparison(found.groups, found.pairs.drop(columns="p"), found.curves, {})
    with pytest.raises(InputError, match="metadata"):
        comparison.Comparison(found.groups, found.pairs, found.curves, {"a": object()})
    # On disk, where the sums are right and the table is not.
    one.save(tmp_path / "r")
    content = parquet_bytes(twice, EPOCHS)
    (tmp_path / "r" / "epochs.parquet").write_bytes(content)
    document = json.loads((tmp_path / "r" / "run.json").read_text())
    document["epochs_sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "r" / "run.json").write_text(json.dumps(document))
    with pytest.raises(RunDirectoryError, match="holds no valid training: expected one row per epoch"):
        fqtstats.load_training(tmp_path / "r")


def alike_groups() -> comparison.Comparison:
    """Two configurations whose names take 40 and 43 characters."""
    same = dict.fromkeys(comparison.METRICS, 0.5)
    settings = [{"backend": "native", "epochs": 10}, {"backend": "simulated", "epochs": 20}]
    runs = [made("statquant-bhq", seed, same, settings=own) for own in settings for seed in (0, 1)]
    return fqtstats.compare(runs)


def test_names_of_configurations_have_the_room_that_there_is() -> None:
    found = alike_groups()
    names = list(found.metadata["groups"])
    assert [len(name) for name in names] == [40, 43]
    printed = {}
    for width in (60, 80, 120):
        console = Console(width=width, file=io.StringIO())
        console.print(comparisons.summary(found))
        printed[width] = console.file.getvalue()
        assert max(cell_len(line) for line in printed[width].splitlines()) <= width
    # In the table of groups, as the pairs have two names.
    groups = printed[120].partition("\n\n")[0]
    assert all(name in groups for name in names)
    # Where a name is cut the line is full.
    for width in (60, 80):
        cut = [line for line in printed[width].splitlines() if "…" in line]
        assert cut
        assert {len(line.rstrip()) for line in cut} <= {width - 1, width}


@pytest.mark.parametrize("width", [3.3, 7.0])
def test_the_legend_lies_on_no_line(width: float) -> None:
    figure = alike_groups().plot(width=width)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    extent, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert not extent.overlaps(axes)
    assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1
    # Axes of the caller's have their legend inside, as their figure has more than these lines.
    ax = Figure().subplots()
    assert alike_groups().plot(ax=ax) is ax.figure
    assert ax.get_legend() is not None


def test_compare(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["exact-0", "exact-1", "statquant-ptq-0", "statquant-ptq-1"]
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "render_all", lambda training: {})
        for place in places:
            recipe, _, seed = place.rpartition("-")
            typed = ("--bits", "5") if place == "statquant-ptq-0" else ()  # the default
            assert run(*FAST[:-1], "1", "--recipe", recipe, "--seed", seed, *typed, "--out", place).status == 0
    done = run("compare", *places, "--out", "c")
    assert done.status == 0, done.err
    assert "statquant-ptq@5" in done.out
    figures = ", ".join(f"figures/{metric}.png" for metric in sorted(comparison.METRICS))
    assert " ".join(done.out.split()).endswith(figures)
    found = fqtstats.load_comparison("c")
    assert list(found.groups["runs"]) == [2, 2] * 4
    assert set(found.pairs["seeds"]) == {2}
    assert repr(found).startswith("Comparison(exact: loss ")
    monkeypatch.setattr(comparisons, "render_all", lambda result: {})
    shown = json.loads(run("compare", *places, "--metric", "test_loss", "--json").out)
    assert len(shown["pairs"]) == 4
    finals = {place: fqtstats.load_training(place).final["loss"] for place in places}
    mean = (finals["exact-0"] + finals["exact-1"]) / 2
    assert shown["groups"][0]["mean"] == pytest.approx(mean)
    for words, message in (
        ((), "Missing argument"),
        (("nothing",), "expected the run directory of a training, found nothing"),
        (("c",), "expected a training in c, but the run there is a comparison; read it with fqtstats.load_comparison"),
        ((*places, "--metric", "speed"), "unknown metric 'speed'"),
    ):
        failed = run("compare", *words)
        assert failed.status == 2
        assert message in failed.err
