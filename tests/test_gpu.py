"""The same numbers on CUDA: quantizer codes bit for bit, and a whole measurement within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fqtstats
from fqtstats.quantizers import QUANTIZERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def heavy_tailed(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, 6, 6, generator=generator)
    return x * torch.logspace(-4, 0, rows)[torch.randperm(rows, generator=generator)].view(-1, 1, 1, 1)


@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_codes_are_those_of_the_cpu(name: str, bits: int) -> None:
    q = fqtstats.quantizer(name, bits=min(QUANTIZERS[name].widths, key=lambda width: abs(width - bits)))
    stream = fqtstats.stream(seed=3, layer="conv1", site="grad_input")
    for rows in (1, 2, 128, 257):
        x = heavy_tailed(rows)
        on_cpu, on_gpu = q.encode(x, stream), q.encode(x.cuda(), stream)  # type: ignore[attr-defined]
        assert torch.equal(on_cpu.codes(), on_gpu.codes().cpu())
        assert torch.equal(on_cpu.decode(), on_gpu.decode().cpu())


def test_measure() -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batch = (heavy_tailed(64), torch.arange(64) % 10)
    policy = fqtstats.policies.get("statquant-bhq", bits=4)
    on_cpu = fqtstats.measure(build(), batch, loss, policy, draws=8).table
    on_gpu = fqtstats.measure(build().cuda(), (batch[0].cuda(), batch[1].cuda()), loss, policy, draws=8).table
    for column in (
        *("grad_norm_sq", "variance", "variance_input", "q_input_variance", "q_weight_variance"),
        *("variance_exact_own", "own_ratio", "own_ratio_low", "own_ratio_high"),
    ):
        np.testing.assert_allclose(on_gpu[column], on_cpu[column], rtol=1e-2)
