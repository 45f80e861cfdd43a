"""Runs that are killed or interrupted: continued, they give the bytes of a run that was left alone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from commands import PATIENCE, Run, Start, run, send_when, started

import fqtstats
from fqtstats import measurement
from fqtstats.errors import InputError
from fqtstats.training.pretrain import default_config

__all__ = ["run", "started"]  # the fixtures

# Two configurations of at least 40 draws x 2 backward passes x 20 ms = 1.6 s each where SLOW is set.
COMMAND = (
    "measure", "--model", "mine:slow", "--quantizer", "bhq,psq", "--draws", "40", "--batches", "2",
    "--batch-size", "16",
)  # fmt: skip
SLOW = {"SLOW": "0.02"}


def finished(folder: str) -> bool:
    return bool(json.loads(Path(folder, "run.json").read_text())["finished"])


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same_result(one: str, two: str) -> None:
    assert Path(one, "results.parquet").read_bytes() == Path(two, "results.parquet").read_bytes()
    first, second = fqtstats.load(one).metadata, fqtstats.load(two).metadata
    assert first == second


def test_kill_and_resume(run: Run, started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Path("r/state/bhq%405.state"), Path("r/state/psq%405.state")

    process = started(*COMMAND, "--out", "r", **SLOW)
    send_when(process, first.exists, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not second.exists()

    process = started(*COMMAND, "--out", "r", "--resume", **SLOW)
    send_when(process, second.exists, signal.SIGKILL)
    assert not Path("r/results.parquet").exists()

    # While the figures are drawn the table is there already, but the run is not finished.
    drawing = "import time\nfigures.render_all = lambda result: time.sleep(600)"
    process = started(*COMMAND, "--out", "r", "--resume", before=drawing)
    send_when(process, Path("r/results.parquet").exists, signal.SIGKILL)
    assert not finished("r")
    assert second.exists()

    # Every draw is there already: none is made again.
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "_draw", None)
        done = run(*COMMAND, "--out", "r", "--resume")
    assert done.status == 0, done.err
    assert finished("r")
    assert not first.parent.exists()
    whole = run(*COMMAND, "--out", "whole")
    assert_same_result("r", "whole")
    assert done.out.rsplit("saved in", 1)[0] == whole.out.rsplit("saved in", 1)[0]


def test_kill_in_training(run: Run, started: Start) -> None:
    command = ("measure", "--model", "mlp", "--draws", "2", "--batches", "0")
    assert default_config("mlp", "digits") is not None
    process = started(*command, "--out", "r", FQTSTATS_CACHE="empty")
    send_when(process, lambda: Path("r/run.json").exists(), signal.SIGKILL)
    assert not Path("empty").exists()  # no half a checkpoint, either
    assert not any(Path("r/state").iterdir())
    done = run(*command, "--out", "r")
    assert done.status == 2
    assert "--resume" in done.err
    assert run(*command, "--out", "r", "--resume").status == 0
    assert run(*command, "--out", "whole").status == 0
    assert_same_result("r", "whole")


def test_ctrl_c_keeps_what_was_measured(run: Run, started: Start) -> None:
    command = (*COMMAND, "--seed", "3")
    process = started(*command, **SLOW)
    state = Path("runs/measure-bhq@5-and-1-more/state/bhq%405.state")
    out, err = send_when(process, state.exists, signal.SIGINT)
    assert process.returncode == 130
    assert out == ""
    assert len(err.splitlines()) == 1, err
    told, _, again = err.partition(", continue with: ")
    assert told == "fqtstats: interrupted; what was measured is in runs/measure-bhq@5-and-1-more"
    program, *words = shlex.split(again)
    assert program == "fqtstats"
    assert words == [*command, "--out", "runs/measure-bhq@5-and-1-more", "--resume"]
    done = run(*words)
    assert done.status == 0, done.err
    assert run(*command, "--out", "whole").status == 0
    assert_same_result("runs/measure-bhq@5-and-1-more", "whole")


def test_ctrl_c_before_anything_was_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "measure", interrupted)
    done = run(*COMMAND)
    assert done.status == 130
    assert done.err == "fqtstats: interrupted before anything was measured; nothing is kept\n"
    assert not Path("runs").exists()


def test_an_error_in_a_later_configuration_keeps_the_earlier_ones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = measurement.measure
    calls: list[str] = []

    def fails_at_psq(*args: object, **options: object) -> object:
        policy = args[3]
        assert isinstance(policy, fqtstats.Policy)
        calls.append(policy.name)
        if policy.name == "statquant-psq":
            raise InputError("it does not\nwork; mend it")
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(measurement, "measure", fails_at_psq)
    done = run(*COMMAND, "--out", "r")
    assert done.status == 2
    hint, error = done.err.splitlines()
    command = shlex.join(["fqtstats", *COMMAND, "--out", "r", "--resume"])
    assert hint == f"fqtstats: stopped; what was measured is in r, continue with: {command}"
    assert error == "fqtstats: error: it does not work; mend it"
    monkeypatch.setattr(measurement, "measure", original)

    # Meanwhile the user's model has changed: refused, and nothing is lost.
    mine, before = Path("mine.py"), contents("r")
    model = mine.read_text()
    mine.write_text(model.replace("torch.relu(_Slow", "torch.sigmoid(_Slow"))
    monkeypatch.delitem(sys.modules, "mine")
    done = run(*COMMAND, "--out", "r", "--resume")
    assert done.status == 2
    assert "cannot resume" in done.err
    assert contents("r") == before

    mine.write_text(model)
    monkeypatch.delitem(sys.modules, "mine")
    assert run(*COMMAND, "--out", "r", "--resume").status == 0
    assert run(*COMMAND, "--out", "whole").status == 0
    assert_same_result("r", "whole")


def test_resuming_a_finished_run_shows_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (*COMMAND, "--out", "r", "--resume")  # without a run there, one is begun
    whole = run(*command)
    assert whole.status == 0, whole.err
    before = contents("r")
    monkeypatch.setattr(measurement, "measure", None)
    again = run(*command)
    assert (again.status, again.out) == (0, whole.out)
    assert contents("r") == before


def test_bytes_do_not_depend_on_threads(run: Run, started: Start) -> None:
    command = ("measure", "--model", "mlp", "--quantizer", "bhq", "--draws", "4", "--batches", "2")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert run(*command, "--out", f"r{threads}").status == 0
    finally:
        torch.set_num_threads(before)
    process = started(*command, "--out", "omp", OMP_NUM_THREADS="1")
    assert process.communicate(timeout=PATIENCE)[1] == ""
    assert_same_result("r1", "r2")
    assert_same_result("r1", "omp")
    assert os.path.exists("omp/figures/variance.png")
