"""One training step of networks at CIFAR size: low-bit training on the native backend against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fqtstats import policies
from fqtstats.benchmarks import machine
from fqtstats.benchmarks.pairs import Case, Pair
from fqtstats.benchmarks.shares import shares
from fqtstats.determinism import seeded
from fqtstats.layers import fuse_, prepare_
from fqtstats.models.resnet import BasicBlock, ResNet
from fqtstats.models.vgg import vgg16
from fqtstats.policy import Policy
from fqtstats.training import recipes

__all__ = ["step_cases"]

BATCH = 64
POLICY = "statquant-ptq"
BASELINES = {
    "float32": "PyTorch float32 (default: NCHW)",
    "channels_last": "PyTorch float32, channels_last",
    "bfloat16": "PyTorch bfloat16 autocast",
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "VGG-16": lambda: vgg16(3, 10, (32, 32), small=True),
    "ResNet-18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), 3, 10, small=True),
}


def _of_recipe(name: str, model: nn.Module, images: torch.Tensor) -> Policy:
    """The policy of a recipe's last stage, with its rules for first, last and down-sampling layers."""
    return recipes.get(name).for_model(model, images[:2], pretrained=True).stages[-1].policy


def _int8(model: nn.Module, images: torch.Tensor) -> Policy:
    return policies.get(POLICY, bits=8)


_Choice = Callable[[nn.Module, torch.Tensor], Policy]


@dataclass(frozen=True, slots=True)
class _Training:
    """Something to time.

    Attributes:
        model: key of :data:`MODELS`.
        name: of the way of training.
        policy: for a model and some images.
        targets: must and aim on two threads, by baseline.
    """

    model: str
    name: str
    policy: _Choice
    targets: dict[str, tuple[float | None, float | None]]


_ONE_BIT, _LUQ = partial(_of_recipe, "1bit-agp-sgd"), partial(_of_recipe, "luq")
_TRAININGS = (
    _Training("VGG-16", f"{POLICY} 8 bits", _int8, {"float32": (2.5, 4.0), "bfloat16": (1.0, None)}),
    _Training("VGG-16", "1-bit FQT, AGP 4 bits", _ONE_BIT, {"float32": (4.0, 8.0)}),
    _Training("VGG-16", "LUQ", _LUQ, {}),
    _Training("ResNet-18", f"{POLICY} 8 bits", _int8, {}),
    _Training("ResNet-18", "1-bit FQT, AGP 4 bits", _ONE_BIT, {}),
)


def step_cases() -> list[Case]:
    """Forward, backward and SGD with momentum."""
    cases = []
    for training in _TRAININGS:
        for threads in machine.thread_counts():
            for kind, baseline in BASELINES.items():
                if kind == "channels_last" and not training.targets:
                    continue
                must, aim = training.targets.get(kind, (None, None)) if threads == 2 else (None, None)
                cases.append(
                    Case(
                        name=f"{training.model} training step, {training.name}, native",
                        shape=f"{BATCH}x3x32x32",
                        threads=threads,
                        baseline=baseline,
                        pair=_pair(training, kind),
                        must=must,
                        aim=aim,
                        shares=shares if kind == "float32" else None,
                    )
                )
    return cases


def _pair(training: _Training, kind: str) -> Callable[[], AbstractContextManager[Pair]]:
    @contextmanager
    def pair() -> Iterator[Pair]:
        with seeded(0):
            yield _step(training.model, "native", training.policy), _step(training.model, kind)

    return pair


def _step(name: str, kind: str, choice: _Choice | None = None) -> Callable[[], None]:
    model = MODELS[name]()
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    if kind == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    handle = None
    if choice is not None:
        handle = prepare_(model, choice(model, images), backend="native")
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
