"""Short training: reproducible bits, the cache and its failures, the users' checkpoints."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fqtstats import models
from fqtstats.data import Data, data, wrap
from fqtstats.data.base import InMemory
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.training import pretrain as module
from fqtstats.training.pretrain import (
    CacheWarning,
    PretrainConfig,
    cache_directory,
    checkpoint,
    default_config,
    load_checkpoint,
    pretrain,
)

TINY = PretrainConfig(epochs=2, batch_size=16)


def small(source: Data, n: int = 64) -> InMemory:
    assert isinstance(source, InMemory)
    return replace(
        source,
        inputs={split: t[:n] for split, t in source.inputs.items()},
        targets={split: t[:n] for split, t in source.targets.items()},
    )


@pytest.fixture(scope="module")
def digits() -> Data:
    return small(data("digits"))


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Dropping(nn.Sequential):
    """Draws from the global generator while it trains."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 10))


@pytest.mark.parametrize("make", [None, Dropping], ids=["preact_resnet20", "dropout"])
def test_training_gives_the_same_bits_on_any_number_of_threads(make: Any, digits: Data, threads: Any) -> None:
    trained, histories = [], []
    for n in (1, 2):
        threads(n)
        torch.manual_seed(n)  # the global state must not matter
        model = models.build("preact_resnet20", digits, 0)
        if make is not None:
            torch.manual_seed(0)
            model = make()
            torch.manual_seed(n)
        state = torch.get_rng_state()
        histories.append(pretrain(model, digits, TINY))
        assert torch.equal(state, torch.get_rng_state())
        assert torch.get_num_threads() == n
        trained.append(model)
    assert same(*trained)
    assert histories[0] == histories[1]


def test_training_learns_and_reports_progress(digits: Data) -> None:
    seen: list[tuple[int, int, int, int]] = []

    def progress(epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        assert math.isfinite(loss)
        seen.append((epoch, epochs, step, steps))

    model = models.build("mlp", digits, 0)
    history = pretrain(model, digits, PretrainConfig(epochs=10, batch_size=16), progress)
    assert seen == [(epoch, 10, step, 4) for epoch in range(1, 11) for step in range(1, 5)]
    assert len(history.losses) == 10
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert history.test_accuracy is not None
    assert history.test_accuracy > 0.5
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_training_on_tokens_and_without_a_test_split() -> None:
    text = small(data("text"))
    assert pretrain(models.build("transformer", text, 0), text, TINY).test_accuracy is not None
    own = wrap(lambda: [(torch.zeros(4, 5), torch.arange(4) % 2)] * 3, "m:f")
    history = pretrain(models.build("mlp", own, 0), own, TINY)
    assert history.test_accuracy is None


def test_divergence_is_an_error(digits: Data) -> None:
    with pytest.raises(InputError, match=r"training diverged: loss (nan|inf) in epoch \d, step \d+; lower lr=1e\+30"):
        pretrain(models.build("mlp", digits, 0), digits, replace(TINY, lr=1e30))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": math.nan}, {"momentum": 1.0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(wrong))} must be .*, got "):
        PretrainConfig(**({"epochs": 1} | wrong))


# --- the cache


def test_cache_miss_then_hit(digits: Data, tmp_path: Path) -> None:
    calls: list[int] = []

    def progress(epoch: int, *_: float) -> None:
        calls.append(epoch)

    one, info = checkpoint("mlp", digits, TINY, cache_dir=tmp_path / "new" / "dir", progress=progress)
    assert not info.cached
    assert info.path is not None
    assert list(info.path.parent.iterdir()) == [info.path]
    assert calls
    calls.clear()
    two, again = checkpoint("mlp", digits, TINY, cache_dir=tmp_path / "new" / "dir", progress=progress)
    assert again.cached
    assert not calls
    assert same(one, two)
    assert (again.key, again.path, again.history) == (info.key, info.path, info.history)


def test_the_key_covers_what_the_weights_depend_on(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(name: str = "mlp", source: Data = digits, config: PretrainConfig = TINY) -> str:
        return checkpoint(name, source, config, cache_dir=tmp_path)[1].key

    base = key()
    assert key() == base
    keys = {base, key("preact_resnet20"), key(source=small(digits, 48))}
    keys |= {key(config=replace(TINY, **{f: v})) for f, v in (("lr", 0.05), ("epochs", 1), ("seed", 1))}
    assert len(keys) == 6
    monkeypatch.setattr("fqtstats.__version__", "0.0.0")
    assert key() not in keys


def test_a_damaged_file_is_trained_again(digits: Data, tmp_path: Path) -> None:
    one, info = checkpoint("mlp", digits, TINY, cache_dir=tmp_path)
    assert info.path is not None
    whole = info.path.read_bytes()
    for damaged in (whole[:-1], whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:], b""):
        info.path.write_bytes(damaged)
        with pytest.warns(CacheWarning, match="is damaged; training it again"):
            two, again = checkpoint("mlp", digits, TINY, cache_dir=tmp_path)
        assert not again.cached
        assert same(one, two)
        assert checkpoint("mlp", digits, TINY, cache_dir=tmp_path)[1].cached


def test_a_cache_that_cannot_be_written(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(CacheWarning, match="cannot store the checkpoint in .*, going on without"):
        model, info = checkpoint("mlp", digits, TINY, cache_dir=tmp_path / "file" / "cache")
    assert info.path is None
    expected = models.build("mlp", digits, TINY.seed)
    pretrain(expected, digits, TINY)
    assert same(model, expected)


def test_an_interruption_leaves_nothing_behind(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: float) -> None:
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        checkpoint("mlp", digits, TINY, cache_dir=tmp_path, progress=interrupt)
    assert torch.get_num_threads() == before
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # ... nor while the file is being written
        patch.setattr(module.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint("mlp", digits, TINY, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_may_change_behind_the_key_is_not_cached(tmp_path: Path) -> None:
    own = wrap(lambda: [(torch.zeros(4, 5), torch.arange(4) % 2)] * 3, "m:f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = checkpoint("mlp", own, TINY, cache_dir=tmp_path)
    assert (info.path, info.cached) == (None, False)
    assert not list(tmp_path.iterdir())


def test_cache_directory(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQTSTATS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "own"
    _, info = checkpoint("mlp", digits, TINY)
    assert info.path is not None
    assert info.path.parent == tmp_path / "own"
    monkeypatch.delenv("FQTSTATS_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "fqtstats"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_directory() == tmp_path / ".cache" / "fqtstats"


# --- the users' checkpoints


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_load_checkpoint(wrap: Any, digits: Data, tmp_path: Path) -> None:
    one, two = models.build("preact_resnet20", digits, 0), models.build("preact_resnet20", digits, 1)
    torch.save(wrap(one.state_dict()), tmp_path / "c.pt")
    load_checkpoint(two, tmp_path / "c.pt")
    assert same(one, two)


def test_load_checkpoint_errors(digits: Data, tmp_path: Path) -> None:
    model = models.build("mlp", digits, 0)
    untouched = models.build("mlp", digits, 0)
    file = tmp_path / "c.pt"

    def rejected(pattern: str) -> None:
        with pytest.raises(InputError, match=rf"\A.*{pattern}.*\Z"):
            load_checkpoint(model, file)
        assert same(model, untouched)

    rejected("found nothing")
    for junk in (b"", b"junk", b"PK\x03\x04junk"):
        file.write_bytes(junk)
        rejected("is not a checkpoint of tensors that can be read safely")
    torch.save(model, file)
    rejected("is not a checkpoint of tensors that can be read safely")
    for foreign in ([1, 2], {}, {"epoch": 3}, torch.zeros(3)):
        torch.save(foreign, file)
        rejected("that is no state_dict")

    state: dict[str, Tensor] = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    torch.save({k: v for k, v in state.items() if k != "1.bias"} | {"extra": torch.zeros(1)}, file)
    rejected(r"does not fit the model: missing \(1\): 1\.bias; unexpected \(1\): extra;")
    torch.save(state | {"5.weight": torch.zeros(3, 128)}, file)
    rejected(r"shapes \(1\): 5\.weight \(3, 128\) for \(10, 128\)")
    torch.save({f"module.{k}": v for k, v in state.items()}, file)
    rejected(r"missing \(6\): 1\.weight, 1\.bias, 3\.weight; unexpected \(6\): module\.1\.weight")
    file.unlink()
    file.mkdir()
    rejected("found a directory")


def test_the_default_training_ends_with_a_good_fit_and_heavy_tails(tmp_path: Path) -> None:
    source = data("digits")
    config = default_config("preact_resnet20", "digits")
    assert config is not None
    model, info = checkpoint("preact_resnet20", source, config, cache_dir=tmp_path)
    assert info.history.test_accuracy is not None
    assert info.history.test_accuracy >= 0.95
    outputs: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda *args: outputs.append(args[-1]))
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    model.eval()
    with single_thread():
        loss = models.loss(model, next(source.batches(128, seed=100)))
        gradients = torch.autograd.grad(loss, outputs)
    for hook in hooks:
        hook.remove()
    ratios = []
    for gradient in gradients:
        low, high = gradient.flatten(1).aminmax(dim=1)
        ratios.append(((high - low).max() / (high - low).median()).item())
    assert min(ratios) > 50


def test_default_configs() -> None:
    for name in models.MODELS:
        expected = "text" if name == "transformer" else "digits"
        assert default_config(name, expected) is not None
    assert default_config("mlp", "cifar10") is None
    assert default_config("mlp", "text") is None
