"""``fqtstats check``: claims tested both ways, its exit status, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import Run, run

from fqtstats.errors import InputError
from fqtstats.quantizers import QUANTIZERS
from fqtstats.verdicts import claims

__all__ = ["run"]  # a fixture

OWN = """
import torch


def fair():
    def f(x, s):
        low = x.floor()
        return low + (s.uniform(x.shape) < x - low)
    return f


def unfair():
    def f(x, s):
        return x.round()
    return f


def honest():
    f = unfair()
    f.claim = "biased"
    return f


def too_modest():
    f = fair()
    f.claim = "biased"
    return f


def wrong_shape():
    return lambda x, s: x[:1]


def nothing():
    return 3


def rows_share():
    def f(x, s):
        low = x.amin(1, keepdim=True)
        step = ((x.amax(1, keepdim=True) - low) / 15).clamp(min=1e-30)
        y = (x - low) / step
        return (y.floor() + (s.uniform((len(x), 1)) < y - y.floor())) * step + low
    return f


def not_a_number():
    return lambda x, s: x * float("nan")


def raising():
    def f(x, s):
        raise KeyError("oops")
    return f


def takes_arguments(x, s):
    return x


def model():
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    model = torch.nn.Sequential(*layers)
    for p in model.parameters():
        p.data.abs_()
    return model
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_quantizers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_table_and_two_files(run: Run, tmp_path: Path) -> None:
    done = run("check", "--quantizer", "psq,minmax", "--bits", "4", "--json", "c.json", "--junit", "c.xml")
    assert done.status == 0, done.err
    assert "psq 4 bits" in done.out
    assert "2 of 2 as claimed, at a false-alarm rate of 1e-06 for all together" in done.out
    content = json.loads((tmp_path / "c.json").read_text())
    assert [(c["name"], c["claim"], c["holds"], c["unbiased"]) for c in content["checked"]] == [
        ("psq 4 bits", "unbiased", True, True),
        ("minmax 4 bits", "biased", True, False),
    ]
    suite = ElementTree.fromstring((tmp_path / "c.xml").read_text())
    assert suite.attrib == {"name": "fqtstats check", "tests": "2", "failures": "0"}


@pytest.mark.parametrize(("name", "status"), [("fair", 0), ("unfair", 1), ("honest", 0), ("too_modest", 1)])
def test_the_users_own(run: Run, tmp_path: Path, name: str, status: int) -> None:
    done = run("check", "--module", f"own_quantizers:{name}", "--junit", "c.xml")
    assert done.status == status, done.err
    suite = ElementTree.fromstring((tmp_path / "c.xml").read_text())
    assert suite.attrib["failures"] == str(status)
    assert [case.attrib["name"] for case in suite] == [f"own_quantizers:{name}"]
    assert ("FAILS" in done.out) == bool(status)


def test_the_products_of_a_model(run: Run, tmp_path: Path) -> None:
    own = ("--model", "own_quantizers:model")
    files = ("--json", "c.json", "--junit", "c.xml")
    done = run("check", "--products", *own, "--quantizer", "psq,bhq", "--bits", "4", *files)
    assert done.status == 0, done.err
    assert "6 of 6 products ok, at a false-alarm rate of 1e-06 for all together" in done.out
    content = json.loads((tmp_path / "c.json").read_text())
    assert [one["name"] for one in content["products"]] == ["psq 4 bits", "bhq 4 bits"]
    rows = [(row["layer"], row["product"], row["verdict"]) for row in content["products"][1]["products"]]
    assert rows == [("1", "grad_weight", "ok"), ("3", "grad_input", "ok"), ("3", "grad_weight", "ok")]

    done = run("check", "--products", *own, "--module", "own_quantizers:rows_share", *files)
    assert done.status == 1
    assert "2 of 3 products ok" in done.out
    suite = ElementTree.fromstring((tmp_path / "c.xml").read_text())
    assert suite.attrib == {"name": "fqtstats check", "tests": "3", "failures": "1"}
    (failure,) = suite.iter("failure")
    assert failure.attrib["message"] == "dependent rounding"
    assert "the variance is" in str(failure.text)


def test_the_users_own_defect_is_no_verdict_on_products(run: Run) -> None:
    for name, told in (
        ("not_a_number", "layer '1', grad_weight: the quantizer returned 512 NaN or Inf of 512 elements"),
        ("raising", "raising.f raised KeyError: 'oops' (own_quantizers.py, line "),
        ("wrong_shape", "layer '1', grad_weight: expected the quantizer to return"),
    ):
        done = run("check", "--products", "--model", "own_quantizers:model", "--module", f"own_quantizers:{name}")
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert told in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--module", "own_quantizers:takes_arguments"), "name a function that takes none and returns it"),
        (("--quantizer", "nsq"), "unknown quantizer 'nsq'; known: ptq"),
        (("--bits", "x"), "expected --bits as whole numbers separated by commas, got 'x'"),
        (("--quantizer", "psq", "--bits", "9"), "bits"),
        (("--alpha", "1"), "--alpha must be a probability between 0 and 1, got 1.0"),
        (("--junit", "no/folder.xml"), "its folder does not exist"),
        (("--module", "own_quantizers:nothing"), "gave a int, expected something called as f(x, stream)"),
        (("--module", "own_quantizers:wrong_shape"), "like its input, got torch.float32 [1, 1024]"),
        (("--module", "own_quantizers:missing"), "has no attribute 'missing'"),
        (("--batch-size", "8"), "--batch-size belongs to --products"),
        (("--products", "--quantizer", "minmax"), "--products takes gradient quantizers, got 'minmax'; known: ptq"),
        (("--products", "--draws", "1"), "--draws must be at least 2, got 1"),
        (("--products", "--draws", "97", "--model", "no.such:model"), "--draws must be even"),  # before it is built
        (("--products", "--model", "own_quantizers:model", "--draws", "40"), "draws must be at least"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run("check", *arguments)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_all_of_the_registry_is_checked_and_widths_that_do_not_suit_are_left_out() -> None:
    found = {subject.name for subject in claims.subjects(list(QUANTIZERS), (8, 1), suitable=True)}
    assert {f"{name} 8 bits" for name in QUANTIZERS if name not in ("luq", "flush")} < found
    assert "psq 1 bit" in found
    assert "symmetric 1 bit" not in found
    assert not any(name.startswith("luq") for name in found)
    for names in (["psq", "luq"], ["luq"]):
        with pytest.raises(InputError, match="from 2 to 5, got bits=8"):
            claims.subjects(names, (8,))
    with pytest.raises(InputError, match="from 2 to 5, got bits=8"):
        claims.subjects(["luq", "flush"], (8,), suitable=True)
