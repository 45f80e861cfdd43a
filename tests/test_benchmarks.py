"""Benchmarks: fair pairs, honest baselines, rows that say what was compared. No test looks at a time."""

from __future__ import annotations

import copy
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import Run, run
from torch import Tensor, nn

from fqtstats import benchmarks
from fqtstats.benchmarks import Row, machine, measure, pairs, shares, step
from fqtstats.determinism import single_thread
from fqtstats.models.preact_resnet import PreActResNet

__all__ = ["run"]  # the fixture


@contextmanager
def fixed_pair() -> Iterator[pairs.Pair]:
    yield lambda: None, lambda: None


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is one call, taken once, however long that waits for a processor."""
    monkeypatch.setattr(pairs, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(pairs, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(pairs, "RETRIES", 1)


def test_pairs_are_interleaved_after_the_warm_up(untimed: None) -> None:
    calls: list[str] = []
    times = pairs.compare(lambda: calls.append("ours"), lambda: calls.append("base"), 3, lambda: calls.append("told"))
    assert calls == [*["ours"] * 2, *["base"] * 2, *["ours", "base", "told"] * 3]
    assert [len(one) for one in times] == [3, 3]


def test_short_functions_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MIN_SECONDS", 1e-3)
    monkeypatch.setattr(pairs, "WARM_SECONDS", 0.0)
    calls: list[str] = []
    pairs.compare(lambda: calls.append("ours"), lambda: time.sleep(2e-3), 1, lambda: None)
    assert len(calls) > 10


def test_a_sample_that_waited_for_a_processor_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0, 1.0, 1.0, 1.0])  # the first sample waited a second, the second did not
    monkeypatch.setattr(pairs, "_waited", lambda: next(waits))
    calls: list[str] = []
    pairs._sample(lambda: calls.append("ours"), 3)
    assert len(calls) == 6


def test_ratio_is_the_median_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drift doubles both times of the last pair; the ratios do not move.
    monkeypatch.setattr(pairs, "compare", lambda *_: ([1.0, 1.0, 2.0], [3.0, 2.0, 8.0]))
    row = pairs.run(pairs.Case("n", "s", 1, "b", fixed_pair, must=3.5, aim=4.0, work=6.0), 3, lambda: None)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (3.0, 2.5, 3.5)
    assert (row.seconds, row.baseline_seconds, row.rate) == (1.0, 3.0, 6.0)
    assert row.missed
    fields = {"name": "n", "shape": "s", "threads": 1, "allocator": "default", "baseline": "b", "must": 3.5, "aim": 4.0}
    assert fields.items() <= row.as_dict().items()


def test_the_peak_is_measured_in_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "peak", lambda kind: {"int8": 10.0}[kind])

    def compare(*arguments: Any) -> tuple[list[float], list[float]]:
        arguments[3]()
        return [2.0], [2.0]

    monkeypatch.setattr(pairs, "compare", compare)
    case = pairs.Case("n", "s", 2, "b", fixed_pair, work=8.0, peak="int8")
    told: list[int] = []
    row = pairs.run(case, 1, lambda: told.append(1))
    assert (row.rate, row.of_peak) == (4.0, 4.0 / 20.0)
    assert told == [1]


@pytest.mark.parametrize("kind", machine.PEAKS)
def test_every_peak_is_a_rate_or_absent(kind: str) -> None:
    rate = machine.peak(kind)
    assert (rate is None and kind != "copy") or (rate is not None and rate > 1e8)


def test_unknown_peak() -> None:
    with pytest.raises(ValueError, match="kind must be fp32, int8, bit or bit_table, got 'nope'"):
        machine.peak("nope")


def tiny() -> nn.Module:
    """Three convolutions and a head; the recipes leave the first and the last layer as they are."""
    layers: list[nn.Module] = []
    for before in (3, 8, 8):
        layers += [nn.Conv2d(before, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


SMALL: dict[str, dict[str, Any]] = {
    "quantization": {"ROUNDING": ((8, 16),), "CHAINS": ((32, 16, 32),), "TRANSFORMS": ((8, None),), "COLUMNS": 16},
    "products": {"SHAPES": ((32, 16, 64),)},
    "convolutions": {"SHAPES": ((2, 8, 8, 4),)},
    # Both models are the tiny one, so the ways of training the first are enough.
    "step": {"BATCH": 2, "MODELS": {"VGG-16": tiny}, "_TRAININGS": step._TRAININGS[:3]},
}


@pytest.mark.parametrize("name", [name for name in benchmarks.BENCHMARKS if name != "measure"])
def test_rows(run: Run, untimed: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = importlib.import_module(f"fqtstats.benchmarks.{benchmarks.BENCHMARKS[name][0]}")
    for constant, value in SMALL[module.__name__.rpartition(".")[2]].items():
        monkeypatch.setattr(module, constant, value)
    state = torch.get_rng_state()
    done = run("bench", name, "--rounds", "1", "--json", "rows.json")
    assert torch.equal(torch.get_rng_state(), state)
    content = json.loads(Path("rows.json").read_text())
    assert content["machine"].keys() >= {"processor", "cores", "isa", "torch"}
    rows = content["rows"]
    # Tiny sizes say nothing about speed: whether the targets are met is open, but the status has to say it.
    assert done.status == int(any(row["must"] is not None and row["ratio"] < row["must"] for row in rows))
    assert all(np.isfinite(row["ratio"]) and row["allocator"] == "default" for row in rows)
    assert {row["threads"] for row in rows} == set(machine.thread_counts())
    assert rows[0]["name"] in done.out


def test_both_allocators(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[str] = []
    monkeypatch.setattr(machine, "tune_allocator", lambda: tuned.append("tuned"))
    monkeypatch.setattr(benchmarks, "cases", lambda name: [pairs.Case(name, "s", 1, "b", fixed_pair)])
    assert run("bench", "gemm,conv", "--rounds", "1", "--allocator", "both", "--json", "rows.json").status == 0
    rows = json.loads(Path("rows.json").read_text())["rows"]
    listed = [(row["name"], row["allocator"]) for row in rows]
    assert listed == [("gemm", "default"), ("conv", "default"), ("gemm", "tuned"), ("conv", "tuned")]
    assert tuned == ["tuned"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("per_sample", [True, False])
def test_the_naive_replicate_computes_the_same_gradient(monkeypatch: pytest.MonkeyPatch, per_sample: bool) -> None:
    """Mean over repetitions against the plain gradient, both in full precision forwards: what remains is noise."""
    monkeypatch.setattr(measure, "_forward", lambda x: x)
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, batch = Small(), (torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,)))
        naive = copy.deepcopy(model)
        measure.make_naive(naive, per_sample)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        for _ in range(200):
            (F.cross_entropy(naive(batch[0]), batch[1]) / 200).backward()
    for plain, mean in zip(model.parameters(), naive.parameters(), strict=True):
        assert plain.grad is not None
        assert mean.grad is not None
        # 5 bits: a relative error of some 10 % per draw, below 2 % for the mean of 200.
        assert float((mean.grad - plain.grad).norm() / plain.grad.norm()) < 0.03


def test_measure_rows(run: Run, untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BATCH", 2)
    monkeypatch.setattr(measure, "PreActResNet", lambda *arguments: PreActResNet(3, 10, 1))  # 8 layers for 20
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        done = run("bench", "measure", "--rounds", "2", "--json", "rows.json")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert done.err == ""
    assert torch.equal(torch.get_rng_state(), state)
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [(row["name"], row["threads"], row["must"]) for row in rows] == [
        ("one psq draw, simulated", 1, 1.5),
        ("one ptq draw, simulated", 1, 1.5),
        ("one psq draw, native", 1, 3.0),
        ("one ptq draw, native", 1, 3.0),
        ("one psq draw, native", 2, None),
        ("one ptq draw, native", 2, None),
        ("one psq draw, native, split", 1, None),
        ("one ptq draw, native, split", 1, None),
    ]
    assert done.status == int(any(row["must"] is not None and row["ratio"] < row["must"] for row in rows))
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    lines = done.out.splitlines()
    assert lines[0] == "one psq draw, simulated, against naive replicate (forward and backward)"
    assert f"{rows[0]['ratio']:.2f}x" in lines[2]
    assert max(map(len, lines)) <= 100


def test_every_benchmark_is_listed_by_its_error(run: Run) -> None:
    done = run("bench", "nope")
    assert done.status == 2
    assert all(name in done.err for name in benchmarks.BENCHMARKS)
    assert all(field in Row.__dataclass_fields__ for field in ("must", "aim"))


def test_the_committed_table_is_that_of_the_committed_rows(analysis: Any) -> None:
    speed, shared = analysis("speed"), analysis("study")
    folder = shared.RESULTS / "speed"
    tables = shared.load(speed.STUDY, folder).tables
    assert (folder / "table.md").read_text() == shared.markdown(speed.STUDY, tables)
    rows = tables["speed"]
    assert set(rows["allocator"]) == set(machine.ALLOCATORS)
    assert set(rows["threads"]) >= {1, 2}
    # Every row that has a target is one that the benchmarks still list.
    listed = {
        (name, case.name, case.shape, case.must) for name in benchmarks.BENCHMARKS for case in benchmarks.cases(name)
    }
    aimed = rows[rows["must"].notna()]
    assert set(aimed[["benchmark", "name", "shape", "must"]].itertuples(index=False, name=None)) <= listed


def test_what_falls_short_is_told(analysis: Any) -> None:
    speed = analysis("speed")
    case = {"name": "n", "threads": 1, "allocator": "default", "baseline": "b", "aim": None, "seconds": 1.0}
    rows = [
        {**case, "benchmark": "gemm", "shape": shape, "ratio": ratio, "ratio_low": ratio - 1, "ratio_high": ratio + 1,
         "must": 5.0, "baseline_seconds": ratio, "rate": None, "peak": "int8", "of_peak": 0.5, "shares": {"k": 1.0}}
        for shape, ratio in (("s", 2.0), ("t", 4.0), ("u", 8.0))
    ]  # fmt: skip
    tables = speed.as_tables(rows)
    short, share = speed.claims(tables)
    assert short.holds is False
    assert (
        "2.00 [1.00, 3.00] (1 thread, default memory) to 8.00 [7.00, 9.00] (1 thread, default memory) times as fast"
        in short.text
    )
    assert "2 fall short" in short.text
    assert "they would be 4.00 to 8.00, for 1 of 2 the target is beyond this processor" in short.because
    assert "k 100% [100%, 100%]" in share.text
    assert list(speed.read(tables)["ratio"]) == [
        "**2.00x** [1.00, 3.00]",
        "**4.00x** [3.00, 5.00]",
        "8.00x [7.00, 9.00]",
    ]


def test_a_training_step_is_told_against_its_hardest_baseline_first(analysis: Any) -> None:
    speed = analysis("speed")
    case = {"benchmark": "step", "name": "n", "shape": "s", "aim": None, "must": None, "seconds": 1.0, "rate": None,
            "baseline_seconds": 1.0, "peak": None, "of_peak": None}  # fmt: skip
    known = (
        (step.BASELINES["float32"], 1, "default", 3.0),
        (step.BASELINES["channels_last"], 2, "tuned", 2.0),
        (step.BASELINES["bfloat16"], 2, "default", 1.5),
    )
    rows = [
        {**case, "baseline": baseline, "threads": threads, "allocator": allocator, "ratio": ratio,
         "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1}
        for baseline, threads, allocator, ratio in known
    ]  # fmt: skip
    _, told = speed.claims(speed.as_tables(rows))
    assert (
        "float32 2.00 [1.90, 2.10] (channels_last, 2 threads, tuned memory) to 3.00 [2.90, 3.10] "
        "(NCHW, 1 thread, default memory); bfloat16 autocast 1.50 [1.40, 1.60] (2 threads, default memory)"
    ) in told.text


def test_every_training_step_is_in_the_studies_of_speed(analysis: Any) -> None:
    speed, bits = analysis("speed"), analysis("speed_memory").BITS
    assert "step" in speed.STUDY.full.benchmarks
    cases = benchmarks.cases("step")
    assert {case.name for case in cases} <= set(bits)
    for kind in ("1-bit FQT", "LUQ", "8 bits"):
        assert any(kind in case.name for case in cases)
    for case in cases:
        assert speed.timed("step", case.threads, "default")
    assert any(speed.timed("step", case.threads, "tuned") for case in cases if case.baseline.endswith("channels_last"))


def test_ratios_to_float32_are_chained_where_they_were_not_timed(analysis: Any) -> None:
    study, speed = analysis("speed_memory"), analysis("speed")
    case = {"benchmark": "gemm", "shape": "s", "threads": 1, "allocator": "default", "must": None, "aim": None,
            "seconds": 1.0, "baseline_seconds": 1.0, "rate": None, "peak": None, "of_peak": None}  # fmt: skip
    known = (("u8 x s8 product", "torch.mm float32", 5.0), ("u8 x s8 product", "torch._int_mm", 1.0),
             ("2 x 1 bit product", "torch._int_mm", 2.5))  # fmt: skip
    rows = [
        {
            **case,
            "name": name,
            "baseline": baseline,
            "ratio": ratio,
            "ratio_low": 0.9 * ratio,
            "ratio_high": 1.1 * ratio,
        }
        for name, baseline, ratio in known
    ]
    found = study.against_float32(speed.as_tables(rows)["speed"]).set_index("name")
    assert list(found["chained"]) == [False, True]
    chained = found.loc["2 x 1 bit product"]
    assert chained["ratio"] == pytest.approx(5 / 1 * 2.5)
    assert chained["low"] == pytest.approx(12.5 * 0.9**2 / 1.1)
    assert chained["high"] == pytest.approx(12.5 * 1.1**2 / 0.9)


def test_shares_of_a_step_are_of_the_kinds_that_it_has() -> None:
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for name, value in SMALL["step"].items():
            patch.setattr(step, name, value)
        found = shares.shares(step._step("VGG-16", "native", step._ONE_BIT))
    assert tuple(found) == shares.KINDS
    assert abs(sum(found.values()) - 1) < 1e-9
    assert all(share > 0 for share in found.values())
    # What was wrapped is itself again.
    assert all(not getattr(module, name).__qualname__.startswith("_recorded") for module, name, _ in shares._OWN)
    full = shares.shares(lambda: torch.relu(torch.zeros(1 << 16)))
    assert {kind for kind, share in full.items() if share > 0} <= {"normalization, activation, pooling", "the rest"}


def test_what_a_graph_holds_is_counted_once_and_without_parameters(analysis: Any) -> None:
    memory = analysis("memory")
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    assert memory._graph(layer, x)[0] == x.nbytes
    # The second layer's input is the ReLU's result.
    assert memory._graph(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)), x)[0] == x.nbytes + 16 * 4 * 4
