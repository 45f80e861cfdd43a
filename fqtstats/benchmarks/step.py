"""One training step of VGG-16 at CIFAR size: int8 on the native backend against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F

from fqtstats import policies
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.determinism import seeded
from fqtstats.layers import fuse_, prepare_
from fqtstats.models.vgg import vgg16

__all__ = ["step_cases"]

BATCH = 64
POLICY = "statquant-ptq"
BASELINES = {
    "float32": "PyTorch float32 (default: NCHW)",
    "channels_last": "PyTorch float32, channels_last",
    "bfloat16": "PyTorch bfloat16 autocast",
}
_TARGETS = {"float32": (2.5, 4.0), "channels_last": (None, None), "bfloat16": (1.0, None)}
"""Must and aim, on two threads."""


def step_cases() -> list[Case]:
    """Forward, backward and SGD with momentum."""
    cases = []
    for threads in sorted({1, torch.get_num_threads()}):
        for kind, baseline in BASELINES.items():
            must, aim = _TARGETS[kind] if threads == 2 else (None, None)
            cases.append(
                Case(
                    name=f"VGG-16 training step, {POLICY} 8 bits, native",
                    shape=f"{BATCH}x3x32x32",
                    threads=threads,
                    baseline=baseline,
                    pair=_pair(kind),
                    must=must,
                    aim=aim,
                )
            )
    return cases


def _pair(kind: str) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        with seeded(0):
            yield _step("native"), _step(kind)

    return pair


def _step(kind: str) -> Callable[[], None]:
    model = vgg16(3, 10, (32, 32), small=True)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    if kind == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    handle = None
    if kind == "native":
        handle = prepare_(model, policies.get(POLICY, bits=8), backend="native")
        fuse_(model, handle)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        if handle is not None:
            handle.step = number
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            loss = F.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    return step
