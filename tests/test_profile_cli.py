"""``fqtstats profile``: what it prints and writes, resuming, and one line for whatever is wrong with the input."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Run, run, start

import fqtstats
from fqtstats import profiling
from fqtstats.commands import experiments
from fqtstats.errors import InputError
from fqtstats.profiles import Profile

__all__ = ["run"]  # the fixture

# Met with the fewest probes there are.
ROUGH = ("profile", "--model", "mine:slow", "--precision", "0.9", "--batch-size", "16", "--batches", "2")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all the rest; they have tests of their own."""
    monkeypatch.setattr(Profile, "figures", lambda profile: {})


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_one_line(text: str, parts: list[str]) -> None:
    assert len(text.splitlines()) == 1, text
    assert text.startswith("fqtstats: error: ")
    assert all(part in text for part in parts), text


def assert_same_profile(one: str, two: str) -> None:
    first, second = fqtstats.load_profile(one), fqtstats.load_profile(two)
    assert first.files() == second.files()
    assert first.metadata == second.metadata


def test_a_profile(run: Run) -> None:
    done = run(*ROUGH)
    assert (done.status, done.err) == (0, "")  # bars are for terminals
    lines = done.out.splitlines()
    assert lines[0].startswith("bhq@5: gradient variance by quantizer, ")
    assert [line.split()[:3] for line in lines[3:6]] == [
        ["1", "Q1", "pcq@8"], ["3", "Q1", "pcq@8"], ["3", "Q2", "bhq@5"],
    ]  # fmt: skip
    assert any(line.startswith("total") for line in lines)
    assert any(line.startswith("to blame for ") for line in lines)
    assert any(line.startswith("total over a minibatch's sampling variance: ") for line in lines)
    figures = "figures/matrix.png, figures/parameters.png, figures/sources.png"
    files = f"profile.parquet, sources.parquet, parameters.parquet, the same as .csv, run.json, {figures}"
    assert " ".join(done.out.rpartition("saved in")[2].split()) == f"runs/profile-bhq@5: {files}"
    assert max(map(len, lines)) <= 80
    profile = fqtstats.load_profile("runs/profile-bhq@5")
    assert len(profile.sources) == 3
    assert profile.metadata["arguments"] == {
        "command": "profile", "quantizer": "bhq@5", "grad_weight": None, "model": "mine:slow", "data": "digits",
        "data_root": None, "image_size": None, "batch_size": 16, "batches": 2, "precision": 0.9, "method": "probes",
        "most_probes": 256, "seed": 0, "skip": None, "checkpoint": None, "device": "cpu", "backend": "simulated",
    }  # fmt: skip
    assert profile.metadata["data"]["samples"] == 16
    assert profile.metadata["versions"]["torch"]


def test_options_reach_the_profile(run: Run, undrawn: None) -> None:
    words = ("--method", "one-at-a-time", "--backend", "native", "--skip", "1", "--seed", "3", "--batches", "0")
    done = run(*ROUGH, *words, "--grad-weight", "psq:6", "--out", "r")
    assert done.status == 0, done.err
    assert "sampling" not in done.out
    profile = fqtstats.load_profile("r")
    about = profile.metadata
    assert (about["method"], about["backend"], about["seeds"]["seed"]) == ("one-at-a-time", "native", 3)
    assert [entry["layer"] for entry in about["unquantized"]] == ["1"]
    assert profile.sources["quantizer"].tolist()[0] == "psq"
    assert profile.parameters["sampling_variance"].isna().all()


def test_without_a_quantized_input_gradient_it_is_called_what_was_asked_for(run: Run, undrawn: None) -> None:
    done = run(*ROUGH, "--skip", "3", "--quantizer", "psq,ptq", "--out", "r")
    assert done.status == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[3:5]] == ["psq@5", "ptq@5"]


def test_several_profiles_are_folders_in_one(run: Run, undrawn: None) -> None:
    done = run(*ROUGH, "--quantizer", "bhq,psq", "--json", "--out", "r")
    assert done.status == 0, done.err
    told = json.loads(done.out)["profiles"]  # nothing else is on stdout
    assert done.err == "saved in r: bhq@5, psq@5\n"
    for entry, label in zip(told, ("bhq@5", "psq@5"), strict=True):
        profile = fqtstats.load_profile(f"r/{label}")
        assert entry["label"] == profile.label == label
        assert entry["parameters"][-1]["variance"] == profile.total["variance"]
        assert len(entry["table"]) == len(profile.table)
        assert entry["metadata"] == profile.metadata
    with pytest.raises(InputError, match=r"r is not a run directory.*; name one of the runs in it: bhq@5, psq@5"):
        fqtstats.load_profile("r")
    shown = run(*ROUGH, "--quantizer", "bhq,psq", "--out", "r", "--resume")
    assert shown.out.splitlines()[0].strip() == "gradient variance of the whole model"
    # Another one joins them; those that are there stay.
    before = contents("r")
    assert run(*ROUGH, "--quantizer", "bhq,ptq", "--out", "r", "--resume").status == 0
    after = contents("r")
    assert {name: after[name] for name in before} == before
    assert "ptq@5/profile.parquet" in after


def test_interrupted_and_resumed(run: Run, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bar: object, done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiments.MeasuringBar, "__call__", interrupted)
        done = run(*ROUGH)
    assert (done.status, done.out) == (130, "")
    told, _, again = done.err.strip().partition(", continue with: ")
    assert told == "fqtstats: interrupted; what was measured is in runs/profile-bhq@5"
    program, *words = shlex.split(again)
    assert (program, words) == ("fqtstats", [*ROUGH, "--out", "runs/profile-bhq@5", "--resume"])
    assert run(*ROUGH, "--out", "whole").status == 0
    assert run(*words).status == 0
    assert_same_profile("runs/profile-bhq@5", "whole")
    # A finished run is shown, not made again.
    monkeypatch.setattr(profiling, "profile", None)
    before = contents("whole")
    shown = run(*ROUGH, "--out", "whole", "--resume")
    assert (shown.status, shown.out.splitlines()[0][:6]) == (0, "bhq@5:")
    assert contents("whole") == before


def test_kill_and_resume(run: Run, undrawn: None) -> None:
    often = "from fqtstats.commands import experiments\nexperiments.SAVE_SECONDS = 0.0"
    process = start(*ROUGH, "--out", "r", before=often, SLOW="0.05")
    state, end = Path("r/state/bhq%405.state"), time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(InputError, match="not finished; continue it with --resume"):
        fqtstats.load_profile("r")
    assert run(*ROUGH, "--out", "r", "--resume").status == 0
    assert run(*ROUGH, "--out", "whole").status == 0
    assert_same_profile("r", "whole")


def test_interrupted_before_anything_was_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "profile", interrupted)
    done = run(*ROUGH, "--quantizer", "bhq,psq")
    assert done.status == 130
    assert done.err == "fqtstats: interrupted before anything was measured; nothing is kept\n"
    assert not Path("runs").exists()


def test_an_error_in_a_later_one_keeps_the_earlier_ones(
    run: Run, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = profiling.profile

    def fails_at_psq(*args: Any, **options: Any) -> Profile:
        if args[3].name == "statquant-psq":
            raise InputError("it does not\nwork; mend it")
        return original(*args, **options)

    command = (*ROUGH, "--quantizer", "bhq,psq", "--out", "r")
    monkeypatch.setattr(profiling, "profile", fails_at_psq)
    done = run(*command)
    assert done.status == 2
    hint, error = done.err.splitlines()
    assert hint == (
        "fqtstats: stopped; what was measured is in r, continue with: " + shlex.join(["fqtstats", *command, "--resume"])
    )
    assert error == "fqtstats: error: it does not work; mend it"
    assert os.listdir("r") == ["bhq@5"]
    before = contents("r")
    monkeypatch.setattr(profiling, "profile", original)
    assert run(*command, "--resume").status == 0
    assert before.items() <= contents("r").items()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--precision", "0"], ["--precision must be a number between 0 and 1, got 0"]),
        (["--precision", "1.5"], ["--precision must be a number between 0 and 1, got 1.5"]),
        (["--precision", "nan"], ["--precision must be a number between 0 and 1, got nan"]),
        (["--method", "guess"], ["unknown method 'guess'", "probes, one-at-a-time"]),
        (["--most-probes", "1"], ["--most-probes must be at least ", "got 1"]),
        (["--quantizer", "nope"], ["unknown gradient quantizer 'nope'"]),
        (["--bits", "9"], ["--bits", "from 1 to 8", "got '9'"]),
        (["--batches", "-1"], ["--batches must be at least 0, got -1"]),
        (["--backend", "both"], ["unknown backend 'both'; known: simulated, native"]),
        (["--device", "tpu9"], ["cpu or cuda:0", "got 'tpu9'"]),
        (["--resume"], ["--resume", "add --out FOLDER"]),
        (["--draws", "3"], ["No such option", "--draws", "fqtstats profile --help"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_usage(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], told: list[str]) -> None:
    monkeypatch.setattr("fqtstats.run_directory.RunDirectory.create", None)
    done = run("profile", *words)
    assert (done.status, done.out) == (2, "")
    assert_one_line(done.err, told)
    assert os.listdir() == ["mine.py"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "mine:no_layers"], ["Linear", "Conv2d"]),
        (["--model", "mine:nan_gradient"], ["NaN or Inf", "'1.weight'"]),
        (["--model", "mine:raising"], ["'mine:raising' failed in mine.py"]),
        (["--data", "mine:no_batches"], ["'mine:no_batches'"]),
        (["--skip", "nope*"], ["nope*"]),
        (["--checkpoint", "missing.pt"], ["'missing.pt'"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_leaves_nothing(run: Run, words: list[str], told: list[str]) -> None:
    done = run(*ROUGH, *words, "--quantizer", "bhq,psq", "--out", "a/b")
    assert (done.status, done.out) == (2, "")
    assert_one_line(done.err, told)
    assert not Path("a").exists()


def test_used_places(run: Run, undrawn: None) -> None:
    assert run(*ROUGH, "--out", "single").status == 0
    assert run(*ROUGH, "--quantizer", "bhq,psq", "--out", "several").status == 0
    before = {folder: contents(folder) for folder in ("single", "several")}
    for words, told in (
        (["--out", "single"], ["single already holds a run", "--resume"]),
        (["--out", "single", "--resume", "--seed", "1"], ["seed was 0 and is now 1"]),
        (["--out", "single", "--quantizer", "bhq,psq"], ["single holds a single run", "choose another --out"]),
        (["--out", "several"], ["several is not empty and not a run"]),
        (["--out", "several", "--quantizer", "ptq,psq"], ["several/psq@5 already holds a run"]),
    ):
        done = run(*ROUGH, *words)
        assert (done.status, done.out) == (2, "")
        assert_one_line(done.err, told)
    assert {folder: contents(folder) for folder in ("single", "several")} == before
    measured = run("measure", "--model", "mine:slow", "--out", "single", "--resume")
    assert measured.status == 2
    assert_one_line(measured.err, ["single holds a run of 'profile', expected one of 'measure'; choose another --out"])
    Path("single/run.json").write_text("{")
    damaged = run(*ROUGH, "--out", "single", "--resume")
    assert damaged.status == 2
    assert_one_line(damaged.err, ["single/run.json is corrupted", "measure anew in another directory"])
