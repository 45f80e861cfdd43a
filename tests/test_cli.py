"""The command line: what it prints and writes, and one line and status 2 for whatever is wrong with the input."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Run, entry_point, run
from torch import nn

import fqtstats
from fqtstats import cli, measurement, models, ops, policies, quantizers
from fqtstats.commands import console
from fqtstats.data import SOURCES, data
from fqtstats.errors import InputError
from fqtstats.ops import products
from fqtstats.ops.extension import FALLBACKS
from fqtstats.training import pretrain
from fqtstats.training.recipes import RECIPES

__all__ = ["run"]  # the fixture

FAST = ("--model", "mlp", "--draws", "3", "--batches", "2", "--batch-size", "32")


@pytest.fixture
def fast(run: Run) -> Run:
    """A small measurement of the user's model, which needs no training."""
    return lambda *words: run("measure", "--model", "mine:slow", "--draws", "3", "--batches", "2", *words)


# --- what works ------------------------------------------------------------------------------------------------------


def test_one_configuration(run: Run) -> None:
    done = run("measure", *FAST)
    assert done.status == 0, done.err
    assert done.err == ""  # bars are for terminals
    lines = done.out.splitlines()
    assert lines[0].startswith("bhq@5: gradient bias and variance per layer, 3 draws")
    assert [line.split()[:2] for line in lines[3:9]] == [[k, p] for k in "135" for p in ("weight", "bias")]
    assert any(line.startswith("total") for line in lines)
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "saved in runs/measure-bhq@5: results.parquet, run.json, figures/variance.png"
    again = run("measure", *FAST)
    assert again.out.splitlines()[-1].startswith("saved in runs/measure-bhq@5-2:")
    one, two = (Path("runs") / name / "results.parquet" for name in ("measure-bhq@5", "measure-bhq@5-2"))
    assert one.read_bytes() == two.read_bytes()


def test_no_line_is_wider_than_the_terminal_and_no_path_is_broken(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = "a-folder-whose-name-is-so-long-that-it-needs-a-line-of-its-own-below-what-is-said"[:75]
    done = run("measure", *FAST, "--quantizer", "psq,bhq", "--bounds", "--out", folder)
    lines = done.out.splitlines()
    start = lines.index("saved in")
    assert lines[start + 1] == f"{folder}:"
    names = " ".join(lines[start + 2 :]).split()
    assert " ".join(names).startswith("results.parquet, run.json, figures/")
    assert "".join(names).count(".png") == len(list(Path(folder, "figures").iterdir())) >= 2
    assert max(map(len, lines)) <= 80

    console.say_saved(Path("p"), ["a" * 90, "b"], console.out)
    assert capsys.readouterr().out.splitlines() == ["saved in p:", f"  {'a' * 90},", "  b"]


def test_run_document(run: Run) -> None:
    assert run("measure", *FAST, "--seed", "7", "--skip", "5", "--out", "r").status == 0
    document = json.loads(Path("r/run.json").read_text())
    assert document["finished"] is True
    assert document["arguments"] == {
        "command": "measure", "quantizers": ["bhq@5"], "grad_weight": None, "model": "mlp", "data": "digits",
        "data_root": None, "image_size": None, "batch_size": 32, "batches": 2, "draws": 3, "method": "both", "seed": 7,
        "skip": "5", "checkpoint": None, "device": "cpu", "backend": "simulated",
    }  # fmt: skip
    about = document["metadata"]
    assert about["seeds"] == {"seed": 7}
    assert about["isa"] == ops.isa()
    assert about["versions"]["torch"] == torch.__version__
    assert about["data"] == {"name": "digits", "sha256": data("digits").fingerprint(), "samples": 32}
    assert all(len(digest) == 64 for digest in about["hashes"].values())
    assert {"model", "batch"} <= about["hashes"].keys()
    assert about["test_accuracy"] > 0.9
    assert about["unquantized"] == [{"layer": "5", "type": "Linear", "reason": about["unquantized"][0]["reason"]}]
    digest = hashlib.sha256(Path("r/results.parquet").read_bytes()).hexdigest()
    assert document["results_sha256"] == digest


def test_several_configurations(fast: Run) -> None:
    done = fast("--quantizer", "bhq, ptq", "--bits", "5,4,5", "--grad-weight", "psq:6", "--out", "a/b/r")
    assert done.status == 0, done.err
    assert done.out.startswith("gradient variance of the whole model")
    assert done.out.splitlines()[-1].endswith("figures/variance.png, figures/variance_vs_bits.png")
    result = fqtstats.load("a/b/r")
    assert list(map(str, result.configurations)) == ["bhq@5", "bhq@4", "ptq@5", "ptq@4"]
    described: Any = result.metadata["configurations"]
    assert ["PSQ(bits=6" in item["policy"]["grad_weight"] for item in described] == [True] * 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in Path("a/b/r/figures").iterdir())


def test_backends(run: Run) -> None:
    """The native backend says how it computed and what it kept; ``both`` adds the comparison."""
    assert run("measure", *FAST, "--out", "simulated").status == 0
    native = run("measure", *FAST, "--backend", "native", "--out", "native")
    assert native.status == 0, native.err
    text = " ".join(native.out.split())
    assert "products: 3 forward integer 8x8; 2 grad_input integer 8x8; 3 grad_weight integer 8x8" in text
    assert "kept for the backward pass: 0.0103 MB of activations (0.041 MB in float32, 3.99 times less)" in text
    assert "native against simulated" not in text
    both = run("measure", *FAST, "--backend", "both", "--out", "both")
    assert both.status == 0, both.err
    lines = both.out.splitlines()
    rows = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("native against"))) :]]
    assert [row[1] for row in rows if row[:1] == ["3"]] == ["forward", "grad_input", "grad_weight"]
    results = {name: fqtstats.load(name) for name in ("simulated", "native", "both")}
    assert results["native"].table.equals(results["both"].table)
    found = {name: result.metadata["backend"] for name, result in results.items()}
    assert found == {"simulated": "simulated", "native": "native", "both": "native"}
    parity = results["both"].metadata["configurations"][0]["parity"]
    assert [row["ok"] for row in parity] == [True] * 8
    # The same numbers are drawn; only roundings differ.
    ours, theirs = (results[name].table["variance"] for name in ("native", "simulated"))
    np.testing.assert_allclose(ours, theirs, rtol=0.2)
    again = run("measure", *FAST, "--backend", "both", "--out", "both", "--resume")
    assert (again.status, again.out) == (0, both.out)


def test_backends_that_disagree_give_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.linear
    monkeypatch.setattr(products, "linear", lambda *arguments: right(*arguments) * 1.001)
    assert run("measure", *FAST, "--backend", "native", "--out", "native").status == 0
    for _ in range(2):  # also when the finished run is shown again
        done = run("measure", *FAST, "--backend", "both", "--out", "both", "--resume")
        assert done.status == 1
        assert done.out.count("DIFFERENT") == 3
    told = run("measure", *FAST, "--backend", "both", "--out", "both", "--resume", "--json")
    assert told.status == 1
    rows = json.loads(told.out)["configurations"]
    assert len(rows) == 1


def test_exact_method(run: Run) -> None:
    words = ("measure", "--model", "mine:slow", "--method", "exact", "--quantizer", "bhq,ptq")
    done = run(*words, "--out", "r")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1].endswith("figures/variance.png, figures/variance_vs_bits.png")
    document = json.loads(Path("r/run.json").read_text())
    assert {name: document["arguments"][name] for name in ("method", "draws", "batches")} == {
        "method": "exact", "draws": 0, "batches": 0,
    }  # fmt: skip
    table = fqtstats.load("r").table
    assert table["variance"].isna().all()
    assert table["variance_exact_own"].notna().all()
    told = json.loads(run(*words, "--out", "r", "--resume", "--json").out)
    assert told["configurations"][0]["total"]["variance"] is None
    again = run(*words, "--out", "r", "--resume", "--method", "montecarlo")
    assert again.status == 2
    assert_one_line(again.err, ["method was 'exact' and is now 'montecarlo'"])


def test_json(fast: Run) -> None:
    done = fast("--json", "--out", "r")
    assert done.status == 0
    told = json.loads(done.out)  # nothing else is on stdout
    assert done.err.startswith("saved in r:")
    total = fqtstats.load("r").table.iloc[-1]
    assert told["configurations"][0]["total"]["variance"] == total["variance"]


def test_checkpoint(run: Run) -> None:
    model = models.build("mlp", data("digits"), 5)
    torch.save(model.state_dict(), "weights.pt")
    done = run("measure", *FAST, "--checkpoint", "weights.pt", "--out", "r")
    assert done.status == 0, done.err
    own = fqtstats.load("r").metadata
    assert own["weights"] == "checkpoint weights.pt"
    assert "test_accuracy" not in own


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_single_batch_has_no_sampling_variance_and_says_so(run: Run) -> None:
    done = run("measure", "--model", "mine:slow", "--data", "mine:one_batch", "--draws", "2", "--out", "r")
    assert done.status == 0, done.err
    assert done.err.startswith("fqtstats: warning: data 'mine:one_batch' has a single batch of 8 samples")
    assert len(done.err.splitlines()) == 1
    assert fqtstats.load("r").table["sampling_variance"].isna().all()


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("quantizers", quantizers.QUANTIZERS),
        ("policies", policies.POLICIES),
        ("recipes", RECIPES),
        ("models", models.MODELS),
        ("data", SOURCES),
        ("kernels", FALLBACKS),
    ],
)
def test_list(run: Run, what: str, names: Any) -> None:
    done = run("list", what)
    assert done.status == 0
    first = [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")]
    assert set(first[1:]) == set(names)
    assert "`" not in done.out


@pytest.mark.parametrize("words", [(), ("--help",), ("measure", "--help")])
def test_help(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.status == 0
    assert "Usage: fqtstats" in done.out


# --- what does not ---------------------------------------------------------------------------------------------------

GRADIENT = "ptq, psq, pcq, bhq"

# Arguments of `measure`, and what the line must say.
BAD_USAGE: list[tuple[list[str], list[str]]] = [
    (["--quantizer", "nope"], ["unknown gradient quantizer 'nope'", GRADIENT]),
    (["--quantizer", "minmax"], ["'minmax' quantizes the forward pass only", GRADIENT]),
    (["--quantizer", ""], ["--quantizer", "got ''"]),
    (["--quantizer", "bhq,,psq"], ["--quantizer", "got 'bhq,,psq'"]),
    (["--bits", "0"], ["--bits", "from 1 to 8", "got '0'"]),
    (["--bits", "9"], ["--bits", "from 1 to 8", "got '9'"]),
    (["--bits", "5,9"], ["--bits", "from 1 to 8", "got '9'"]),
    (["--bits", "-1"], ["--bits", "from 1 to 8", "got '-1'"]),
    (["--bits", "x"], ["--bits", "from 1 to 8", "got 'x'"]),
    (["--bits", "9" * 5000], ["--bits", "from 1 to 8"]),
    (["--bits", ""], ["--bits", "got ''"]),
    (["--bits", "5,,4"], ["--bits", "got '5,,4'"]),
    (["--grad-weight", "pcq"], ["--grad-weight NAME:BITS", "got 'pcq'"]),
    (["--grad-weight", "pcq:"], ["--grad-weight", "got ''"]),
    (["--grad-weight", "pcq:9"], ["--grad-weight", "got '9'"]),
    (["--grad-weight", ":8"], ["unknown gradient quantizer ''"]),
    (["--grad-weight", "minmax:8"], ["'minmax' quantizes the forward pass only", GRADIENT]),
    (["--batch-size", "0"], ["--batch-size must be at least 1, got 0"]),
    (["--batches", "-1"], ["--batches must be at least 0, got -1"]),
    (["--method", "magic"], ["unknown method 'magic'", "exact, montecarlo, both"]),
    (["--method", "exact", "--draws", "8"], ["--method exact makes no draws", "--draws 8"]),
    (["--draws", "1"], ["--draws must be at least 2, got 1"]),
    (["--seed", str(2**63)], ["seed must be an integer of at most 64 bits"]),
    (["--image-size", "0"], ["--image-size must be at least 1, got 0"]),
    (["--device", "tpu9"], ["cpu or cuda:0", "got 'tpu9'"]),
    (["--device", "meta"], ["cpu or cuda", "got 'meta'"]),
    (["--backend", "magic"], ["unknown backend 'magic'", "simulated, native, both"]),
    (["--out", ""], ["--out FOLDER"]),
    (["--resume"], ["--resume", "add --out FOLDER"]),
    (["--draws", "many"], ["--draws", "'many'", "fqtstats measure --help"]),
    (["--nope"], ["No such option", "--nope", "fqtstats measure --help"]),
    (["extra"], ["extra", "fqtstats measure --help"]),
]
BAD_INPUT: list[tuple[list[str], list[str]]] = [
    (["--model", "nope"], ["unknown model 'nope'", "preact_resnet20", "package.module:function"]),
    (["--data", "nope"], ["unknown data 'nope'", "digits", "package.module:function"]),
    (["--data", "text"], ["'preact_resnet20'", "'text' is tokens", "use transformer"]),
    (["--data-root", "x"], ["'digits' reads no directory", "'x'"]),
    (["--image-size", "8"], ["'digits' has a fixed size"]),
    (["--skip", "nope*"], ["nope*"]),
    (["--skip", "*"], ["none"]),
    (["--checkpoint", "missing.pt"], ["'missing.pt'", "found nothing"]),
    (["--checkpoint", "mine.py"], ["'mine.py' is not a checkpoint"]),
    (["--checkpoint", "other.pt"], ["'other.pt' does not fit the model", "missing", "unexpected"]),
    (["--data", "cifar10"], ["needs a root directory"]),
    (["--data", "cifar10", "--data-root", "nowhere"], ["'nowhere'", "found nothing"]),
    (["--data", "cifar10", "--data-root", "truncated"], ["data_batch_1.bin", "has 1000 bytes", "3073"]),
    (["--data", "cifar10", "--data-root", "pickled"], ["data_batch_1.bin", "pickled Python version"]),
    (["--data", "cifar10", "--data-root", "foreign"], ["data_batch_1.bin", "label 200"]),
    (["--model", "nowhere:make"], ["no module named 'nowhere'"]),
    (["--model", "mine:nope"], ["'mine' has no attribute 'nope'"]),
    (["--model", "mine:"], ["expected package.module:function, got 'mine:'"]),
    (["--model", "a b:c"], ["expected package.module:function, got 'a b:c'"]),
    (["--model", "mine:constant"], ["'mine:constant' is a int, expected a function"]),
    (["--model", "mine:not_a_model"], ["'mine:not_a_model' returned a dict", "torch.nn.Module"]),
    (["--model", "mine:needs_arguments"], ["'mine:needs_arguments'", "width", "give them defaults"]),
    (["--model", "mine:raising"], ["'mine:raising' failed in mine.py, line ", "OSError: no such"]),
    (["--model", "broken:make"], ["importing 'broken'", "ZeroDivisionError"]),
    (["--model", "mine:no_layers"], ["Linear", "Conv2d", "1: LayerNorm"]),
    (["--model", "mine:frozen"], ["trainable parameters"]),
    (["--model", "mine:detached"], ["does not depend on any trainable parameter"]),
    (["--model", "mine:wrong_shape"], ["logits of shape (128, 'classes')", "(128, 1, 8, 10)"]),
    (["--model", "mine:misfit"], ["'mine:misfit' failed: RuntimeError: ", "shapes cannot be multiplied"]),
    (["--model", "mine:infinite_loss"], ["layer '3', activation", "2048 NaN or Inf among 2048"]),
    (["--model", "mine:nan_gradient"], ["layer '1', grad_", "NaN or Inf among 2048"]),
    (["--data", "nowhere:make"], ["no module named 'nowhere'"]),
    (["--data", "mine:not_data"], ["'mine:not_data' returned a int", "Dataset"]),
    (["--data", "mine:no_batches"], ["'mine:no_batches'"]),
    (["--data", "mine:scalar_pair"], ["leading axis"]),
    (["--data", "mine:raising"], ["'mine:raising' failed in mine.py, line ", "OSError"]),
]  # fmt: skip


def assert_one_line(err: str, told: list[str]) -> None:
    assert err.startswith("fqtstats: error: ")
    assert len(err.splitlines()) == 1, err
    missing = [words for words in told if words not in err]
    assert not missing, err


@pytest.mark.parametrize(("words", "told"), BAD_USAGE, ids=lambda value: " ".join(value)[:30])
def test_bad_usage(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], told: list[str]) -> None:
    # Nothing is read or built for it.
    monkeypatch.setattr("fqtstats.run_directory.RunDirectory.create", None)
    place = [] if {"--resume", "--out"} & set(words) else ["--out", "new"]
    done = run("measure", *place, *words)
    assert (done.status, done.out) == (2, "")
    assert_one_line(done.err, told)
    assert sorted(os.listdir()) == ["mine.py"]


@pytest.mark.parametrize(("words", "told"), BAD_INPUT, ids=lambda value: " ".join(value)[:50])
def test_bad_input(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], told: list[str]) -> None:
    monkeypatch.setattr(pretrain, "checkpoint", None)  # no training is begun for it
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    Path("broken.py").write_text("1 / 0\n")
    for folder, content in (
        ("truncated", bytes(1000)), ("pickled", b"\x80\x04" + bytes(3071)), ("foreign", b"\xc8" + bytes(3072))
    ):  # fmt: skip
        Path(folder).mkdir()
        (Path(folder) / "data_batch_1.bin").write_bytes(content)
    before = sorted(os.listdir())
    done = run("measure", "--out", "runs/new", *words)
    assert (done.status, done.out) == (2, "")
    assert_one_line(done.err, told)
    # Nothing was measured: no folder is left, and the same command can be given again.
    assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("mine.py", ["mine.py", "file is in the way"]),
        ("mine.py/r", ["mine.py/r", "file is in the way"]),
        ("/proc/fqtstats-test", ["/proc/fqtstats-test"]),
        ("full", ["full is not empty and not a run", "choose another directory"]),
    ],
)
def test_unusable_place(fast: Run, monkeypatch: pytest.MonkeyPatch, place: str, told: list[str]) -> None:
    monkeypatch.setattr(measurement, "measure", None)
    Path("full").mkdir()
    Path("full/thesis.tex").touch()
    done = fast("--out", place)
    assert (done.status, done.out) == (2, "")
    assert_one_line(done.err, told)
    assert os.listdir("full") == ["thesis.tex"]


def test_used_place_and_other_arguments(fast: Run) -> None:
    assert fast("--out", "r").status == 0
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    done = fast("--out", "r")
    assert done.status == 2
    assert_one_line(done.err, ["r already holds a run", "--resume"])
    done = fast("--out", "r", "--resume", "--seed", "1", "--bits", "4")
    assert done.status == 2
    assert_one_line(done.err, ["seed was 0 and is now 1", "quantizers was ['bhq@5'] and is now ['bhq@4']"])
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda(fast: Run) -> None:
    done = fast("--device", "cuda", "--out", "new")
    assert done.status == 2
    assert_one_line(done.err, ["'cuda'", "no CUDA device is available; use --device cpu"])
    assert not Path("new").exists()


def test_the_same_command_works_once_the_problem_is_gone(run: Run) -> None:
    command = ("measure", *FAST, "--checkpoint", "weights.pt", "--out", "here")
    Path("here").mkdir()  # the user's own folder: it stays
    assert run(*command).status == 2
    assert os.listdir("here") == []
    torch.save(models.build("mlp", data("digits"), 0).state_dict(), "weights.pt")
    done = run(*command)
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "nope"], ["unknown list 'nope'", "kernels"]),
        (["bench", "nope"], ["unknown benchmark 'nope'", "measure"]),
        (["bench", "gemm,,conv"], ["several separated by commas"]),
        (["bench", "gemm", "--allocator", "jemalloc"], ["default, tuned or both", "'jemalloc'"]),
        (["bench", "measure", "--rounds", "0"], ["--rounds must be at least 1, got 0"]),
        (["bench", "measure", "--json", "nowhere/rows.json"], ["'nowhere/rows.json'", "does not exist"]),
        (["bench", "measure", "--json", "."], ["expected a file", "'.'"]),
        (["nope"], ["No such command", "nope"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_usage_of_other_commands(run: Run, words: list[str], told: list[str]) -> None:
    done = run(*words)
    assert (done.status, done.out) == (2, "")
    assert_one_line(done.err, told)


def test_a_defect_is_not_dressed_up_as_bad_input(fast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(measurement, "measure", broken)
    with pytest.raises(ZeroDivisionError):
        fast("--out", "r")
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, batch: model(batch[0]).sum(1), r"scalar tensor, got shape \[4\]"),
        (lambda model, batch: 3.0, "scalar tensor, got float"),
        (lambda model, batch: torch.ones(()), "does not depend on any trainable parameter"),
        (lambda model, batch: batch[0].clone().requires_grad_().sum(), "does not depend on any trainable parameter"),
    ],
)
def test_bad_loss(loss: Any, told: str) -> None:
    batch = (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match=told):
        fqtstats.measure(nn.Linear(3, 2), batch, loss, policies.get("statquant-psq"), draws=2)


def test_empty_batch() -> None:
    with pytest.raises(InputError, match=r"batch with samples, got a tensor of shape \[0, 3\]"):
        fqtstats.measure(
            nn.Linear(3, 2),
            (torch.ones(0, 3), torch.zeros(0, dtype=torch.int64)),
            models.loss,
            policies.get("statquant-psq"),
            draws=2,
        )


# --- the command of the README ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "cache"


def test_readme_command(tmp_path: Path, cache: Path) -> None:
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [entry_point(), "measure", "--quantizer", "bhq"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env={**os.environ, "FQTSTATS_CACHE": str(cache), "COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # how the end of a terminal's output is told
    os.close(ours)
    assert process.stdout is not None
    text = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0, shown.decode()
    bars = shown.decode()
    assert "training preact_resnet20, epoch 5" in bars
    assert "measuring bhq@5" in bars
    assert "74/74" in bars
    lines = text.splitlines()
    assert lines[0].startswith("bhq@5: gradient bias and variance per layer, 64 draws")
    rows = [line.split() for line in lines if "weight" in line or line.startswith("total")]
    assert len([row for row in rows if row[:1] == ["conv"] or "conv" in row[0] or "shortcut" in row[0]]) == 21
    assert "not quantized: 19 BatchNorm2d (no quantized counterpart)" in lines
    assert max(map(len, lines)) <= 100
    folder = tmp_path / "runs" / "measure-bhq@5"
    assert {path.name for path in folder.iterdir()} >= {"results.parquet", "run.json", "figures"}
    assert {path.name for path in (folder / "figures").iterdir()} == {"variance.png"}
    table = fqtstats.load(folder).table
    assert len(table) == 62
    numbers = table[["bias_p", "variance", "variance_low", "variance_high", "sampling_variance", "snr"]]
    assert np.isfinite(numbers.to_numpy(dtype=float)).all()
    assert (table["draws"] == 64).all()


def test_quantizers_rank_as_in_the_paper(run: Run) -> None:
    """arXiv 2010.14298, section 4: on its incoming gradients PSQ beats PTQ, and BHQ beats PSQ, at the same bits."""
    done = run("measure", "--quantizer", "bhq,psq,ptq", "--bits", "8,5", "--draws", "2", "--batches", "0", "--out", "r")
    assert done.status == 0, done.err
    table = fqtstats.load("r").table
    layers = table[table["layer"] != "total"]
    median = layers.groupby(["quantizer", "bits"])["q_input_variance"].median()  # exact: no draws in it
    for bits in (8, 5):
        assert median["ptq", bits] > median["psq", bits] > median["bhq", bits] > 0
    assert median["bhq", 5] <= median["ptq", 8]
    within = layers.dropna(subset=["q_input_bound"])
    assert (within["q_input_variance"] <= within["q_input_bound"] * (1 + 1e-9)).all()
    assert len(within) == 6 * len(within[(within["quantizer"] == "bhq") & (within["bits"] == 5)])


def test_main_reads_the_process_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fqtstats", "list", "nope"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert_one_line(capsys.readouterr().err, ["unknown list 'nope'"])


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fqtstats", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"fqtstats {fqtstats.__version__}", "")


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.status, done.out.strip()) == (0, f"fqtstats {fqtstats.__version__}")
