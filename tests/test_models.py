"""The reference models: shapes on every kind of data that fits, finite gradients, seeds, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fqtstats import models
from fqtstats.determinism import isolated, seeded, single_thread
from fqtstats.errors import InputError


@dataclass(frozen=True)
class Shape:
    """Stands in for data: a model needs no more."""

    name: str
    kind: str
    input_shape: tuple[int, ...]
    num_classes: int

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        with seeded(0):
            if self.kind == "tokens":
                tokens = torch.randint(self.num_classes, (n, self.input_shape[0] + 1))
                return tokens[:, :-1], tokens[:, 1:]
            return torch.randn(n, *self.input_shape), torch.arange(n) % self.num_classes


DIGITS = Shape("digits", "image", (1, 8, 8), 10)
CIFAR = Shape("cifar100", "image", (3, 20, 12), 100)
LARGE = Shape("images", "image", (3, 66, 33), 7)
TINY = Shape("pixels", "image", (2, 1, 3), 4)
TEXT = Shape("text", "tokens", (64,), 97)
FEATURES = Shape("m:f", "features", (5,), 3)
SHAPES = (DIGITS, CIFAR, LARGE, TINY, TEXT, FEATURES)

# The ImageNet head of VGG-16 has 1.2e8 weights: too slow; the larger pre-activation network is the same class.
SLOW = {("vgg16", LARGE), ("preact_resnet56", LARGE)}
CASES = [
    (name, shape)
    for name, model in models.MODELS.items()
    for shape in SHAPES
    if shape.kind in model.kinds and (name, shape) not in SLOW
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread only waits."""
    with single_thread():
        yield


@pytest.mark.parametrize(("name", "shape"), CASES, ids=[f"{name}-{shape.name}" for name, shape in CASES])
def test_forward_and_backward(name: str, shape: Shape) -> None:
    model = models.build(name, shape, seed=0)
    batch = shape.batch(3)
    logits = model(batch[0])
    assert logits.shape == (*batch[1].shape, shape.num_classes)
    loss = models.loss(model, batch)
    assert loss.shape == ()
    loss.backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None, parameter
        assert p.grad.isfinite().all(), parameter


def test_vgg16_for_large_images_has_the_papers_head() -> None:
    with torch.device("meta"):
        model = models.MODELS["vgg16"].make(Shape("images", "image", (3, 224, 224), 1000))
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    # torchvision's vgg16_bn has 138 365 992; its 13 convolutions have biases, 4224 in all, which BN makes useless.
    assert sum(p.numel() for p in model.parameters()) == 138_365_992 - 4224


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_resnets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = models.MODELS[name].make(Shape("images", "image", (3, 224, 224), 1000))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("name", "layers"), [("preact_resnet20", 20), ("preact_resnet56", 56)])
def test_preact_depth(name: str, layers: int) -> None:
    model = models.build(name, CIFAR, 0)
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(weighted) == layers


@pytest.mark.parametrize("name", models.MODELS)
def test_products_with_weights_are_plain_layers(name: str) -> None:
    shape = TEXT if "tokens" in models.MODELS[name].kinds else DIGITS
    model = models.build(name, shape, 0)
    owners = {type(m) for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners <= {nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding}
    assert owners & {nn.Conv2d, nn.Linear}


@pytest.mark.parametrize("name", models.MODELS)
def test_initialization_depends_on_the_seed_alone(name: str) -> None:
    shape = TEXT if "tokens" in models.MODELS[name].kinds else DIGITS
    state = torch.get_rng_state()
    one = models.build(name, shape, 0).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    two = models.build(name, shape, 0).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = models.build(name, shape, 1).state_dict()
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_the_transformer_is_causal() -> None:
    model = models.build("transformer", TEXT, 0).eval()
    tokens, _ = TEXT.batch(2)
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % TEXT.num_classes
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert difference[:40].max() == 0
    assert difference[40:].min() > 0
    assert model(tokens[:, :10]).shape == (2, 10, 97)


def test_initial_loss_is_near_that_of_guessing() -> None:
    assert models.loss(models.build("transformer", TEXT, 0), TEXT.batch(8)).item() == pytest.approx(
        math.log(97), rel=0.05
    )


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"unknown model 'alexnet'; known: mlp, .*\Z"):
        models.build("alexnet", DIGITS, 0)
    with pytest.raises(InputError, match=r"'transformer' takes tokens, but data 'digits' is image; use mlp, .*vgg16\Z"):
        models.build("transformer", DIGITS, 0)
    with pytest.raises(InputError, match=r"'vgg16' takes image, but data 'text' is tokens; use transformer\Z"):
        models.build("vgg16", TEXT, 0)
    with pytest.raises(InputError, match="needs integer class targets"):
        models.build("mlp", Shape("m:f", "features", (5,), 0), 0)


@pytest.mark.parametrize(
    ("output", "targets", "pattern"),
    [
        (torch.zeros(3, 4), torch.zeros(3), "torch.float32 targets"),
        (torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.long), r"got shape \(3, 2, 4\)"),
        ((torch.zeros(3, 4),), torch.zeros(3, dtype=torch.long), "got a tuple"),
    ],
)
def test_loss_errors(output: Any, targets: Tensor, pattern: str) -> None:
    class Fixed(nn.Module):
        def forward(self, _: Tensor) -> Any:
            return output

    with pytest.raises(InputError, match=pattern):
        models.loss(Fixed(), (torch.zeros(3, 1), targets))


def test_the_users_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fqtstats_users_model.py").write_text(
        "import torch\ndef make(): return torch.nn.Linear(5, 3)\ndef wrong(): return 3\n"
    )
    one, two = (models.build("fqtstats_users_model:make", FEATURES, 0) for _ in range(2))
    assert isinstance(one, nn.Linear)
    assert isinstance(two, nn.Linear)
    assert torch.equal(one.weight, two.weight)
    with pytest.raises(InputError, match=r"returned a int, expected a torch\.nn\.Module"):
        models.build("fqtstats_users_model:wrong", FEATURES, 0)


# --- determinism.py


def test_single_thread_restores_also_on_errors() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with single_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_isolated_randomness() -> None:
    with seeded(7):
        expected = [torch.rand(2) for _ in range(3)]
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    got, mine = [], []
    for item in isolated((torch.rand(2) for _ in range(3)), 7):
        got.append(item)
        mine.append(torch.rand(1))
    assert torch.equal(torch.stack(got), torch.stack(expected))
    assert torch.equal(torch.cat(mine), undisturbed)
