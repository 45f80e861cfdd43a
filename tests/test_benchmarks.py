"""Benchmarks: fair pairs, honest baselines, rows that say what was compared. No test looks at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import Run, run
from torch import Tensor, nn

from fqtstats import benchmarks
from fqtstats.benchmarks import Row, measure, pairs
from fqtstats.determinism import single_thread

__all__ = ["run"]  # the fixture


def test_pairs_are_interleaved_after_one_warm_up() -> None:
    calls: list[str] = []
    times = pairs.compare(lambda: calls.append("ours"), lambda: calls.append("base"), 3, lambda: calls.append("told"))
    assert calls == ["ours", "base", *["ours", "base", "told"] * 3]
    assert [len(one) for one in times] == [3, 3]


def test_ratio_is_the_median_over_pairs() -> None:
    # Drift doubles both times of the last pair; the ratios do not move.
    row = pairs.row("n", "s", 1, "b", ([1.0, 1.0, 2.0], [3.0, 2.0, 8.0]), must=1.5, aim=3.0)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (3.0, 2.5, 3.5)
    assert (row.seconds, row.baseline_seconds) == (1.0, 3.0)
    assert row.as_dict() == {
        "name": "n", "shape": "s", "threads": 1, "baseline": "b", "ratio": 3.0, "ratio_low": 2.5, "ratio_high": 3.5,
        "must": 1.5, "aim": 3.0, "seconds": 1.0, "baseline_seconds": 3.0,
    }  # fmt: skip


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
        measure._make_naive(naive, per_sample)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        for _ in range(200):
            (F.cross_entropy(naive(batch[0]), batch[1]) / 200).backward()
    for plain, mean in zip(model.parameters(), naive.parameters(), strict=True):
        assert plain.grad is not None
        assert mean.grad is not None
        # 5 bits: a relative error of some 10 % per draw, below 2 % for the mean of 200.
        assert float((mean.grad - plain.grad).norm() / plain.grad.norm()) < 0.03


def test_measure_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BATCH", 2)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        done = run("bench", "measure", "--rounds", "2", "--json", "rows.json")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    # Two samples are no benchmark: whether the targets are met is open, but the status has to say it.
    assert done.err == ""
    assert torch.equal(torch.get_rng_state(), state)
    rows = json.loads(Path("rows.json").read_text())
    assert [row["name"] for row in rows] == [
        *["one psq draw", "one ptq draw"] * 2,
        "one psq draw, split",
        "one ptq draw, split",
    ]
    assert done.status == int(any(row["must"] is not None and row["ratio"] < row["must"] for row in rows))
    fields = {"name", "shape", "threads", "baseline", "ratio", "must", "aim"}
    assert all(fields <= row.keys() for row in rows)
    assert [(row["threads"], row["must"]) for row in rows] == [*[(1, 1.5)] * 2, *[(2, None)] * 2, *[(1, None)] * 2]
    assert all(np.isfinite(row["ratio"]) and row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)
    lines = done.out.splitlines()
    assert lines[-2].endswith("[quartiles]")
    assert max(map(len, lines)) <= 80
    assert f"{rows[0]['ratio']:.2f}x" in lines[1]
    assert lines[-1] == "baseline: naive replicate (forward and backward)"


def test_every_benchmark_is_listed_by_its_error(run: Run) -> None:
    done = run("bench", "")
    assert done.status == 2
    assert all(name in done.err for name in benchmarks.BENCHMARKS)
    assert all(field in Row.__dataclass_fields__ for field in ("must", "aim"))
