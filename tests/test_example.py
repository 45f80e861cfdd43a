"""The example in analysis/ft_transformer.py: somebody else's model, measured through ``module:function``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import fqtstats

ROOT = Path(__file__).parents[1]


def test_a_model_that_this_project_did_not_write(tmp_path: Path) -> None:
    run = tmp_path / "run"
    spec = "analysis.ft_transformer"
    command = f"measure --model {spec}:model --data {spec}:data --batch-size 32 --draws 8 --batches 2 --out {run}"
    # "-P" keeps the checkout's sources off the path: the installed package is what runs.
    program = "import sys; from fqtstats.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *command.split()],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "net.backbone.blocks.0.attention.W_q" in done.stdout
    table = fqtstats.load(run).table
    quantized = table[table["quantized"] & (table["layer"] != "total") & (table["parameter"] == "weight")]
    assert {
        "net.backbone.blocks.0.attention.W_v",
        "net.backbone.blocks.0.ffn.linear1",
        "net.backbone.output.linear",
    } <= set(quantized["layer"])
    # What is not an nn.Linear keeps its full-precision products and is listed.
    assert not table.set_index("layer")["quantized"].get("net.cont_embeddings").any()
    total = table[table["layer"] == "total"].iloc[0]
    assert total["variance"] > 0
    assert np.isfinite(total["sampling_variance"])
    assert total["bias_p"] > 1e-6
