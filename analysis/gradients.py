"""The gradients that a network's quantizers are meant for: dL/dY of every quantized layer, in a QAT backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

import fqtstats
from analysis.known import Known
from fqtstats.capture import Session
from fqtstats.determinism import single_thread
from fqtstats.experiment import Experiment
from fqtstats.layers.state import Call, Site, WeightGradient
from fqtstats.layers.swap import quantized
from fqtstats.policy import QuantizerLike

__all__ = ["incoming", "session", "weight_products"]


def incoming(network: Experiment) -> dict[str, torch.Tensor]:
    """dL/dY by layer, in forward order: ``[R, O]`` or ``[N, O, H, W]`` float32.

    Layers whose input needs no gradient have no input-gradient quantizer, and are left out.
    """
    found: dict[str, torch.Tensor] = {}

    def observe(call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
        if site == "grad_input":
            found[call.layer.name] = g.detach().clone()

    with session(network) as opened:
        opened.qat(observe)
    # A backward pass meets the last layer first.
    return Known("layer", dict(reversed(found.items())))


def weight_products(network: Experiment) -> dict[str, WeightGradient]:
    """What the weight gradient of every layer is made of; forward products as in the recipe of StatQuant."""
    found: dict[str, WeightGradient] = {}

    def observe(call: Call, gradient: WeightGradient, parameters: Sequence[str]) -> None:
        found[call.layer.name] = gradient

    with session(network) as opened:
        opened.qat(observe_weight=observe)
    return found


@contextmanager
def session(network: Experiment, quantizer: str = "ptq", bits: int = 8, seed: int = 0) -> Iterator[Session]:
    """The graph of the network's batch under the recipe of StatQuant, on one thread.

    Args:
        network: what is quantized, and its batch and loss.
        quantizer: of the input gradients; a QAT pass is the same with all of them.
        bits: of it.
        seed: of the quantizers.
    """
    policy = fqtstats.policies.get(f"statquant-{quantizer}", bits)
    with (
        single_thread(),
        quantized(network.model, policy, seed=seed) as handle,
        Session(network.model, handle, network.batch, network.loss) as opened,
    ):
        yield opened
