"""A short, reproducible training run that gives the measurements a meaningful checkpoint, and its cache."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fqtstats
from fqtstats import models
from fqtstats.data.base import Data
from fqtstats.determinism import seeded, single_thread
from fqtstats.errors import InputError
from fqtstats.hashing import tensor_digest
from fqtstats.policy import PREFIX
from fqtstats.training.evaluation import evaluate

__all__ = [
    "CacheWarning",
    "CheckpointInfo",
    "History",
    "PretrainConfig",
    "Progress",
    "accuracy",
    "cache_directory",
    "checkpoint",
    "default_config",
    "load_checkpoint",
    "pretrain",
]


class CacheWarning(UserWarning):
    """The checkpoint cache cannot be used as it is; the work goes on without it."""


class Progress(Protocol):
    """Called after every training step; epoch and step count from 1 to epochs and steps (per epoch)."""

    def __call__(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None: ...


@dataclass(frozen=True)
class PretrainConfig:
    """SGD with momentum, weight decay and a cosine schedule from ``lr`` to 0 over all steps.

    Attributes:
        epochs: passes over the training split.
        batch_size: samples per step.
        lr: first learning rate.
        momentum: in [0, 1).
        weight_decay: L2 coefficient, on every parameter.
        seed: of the initialization, the batch order and dropout.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0 and math.isfinite(self.lr), "positive and finite"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0 and math.isfinite(self.weight_decay), "finite and not negative"),
        ):
            if not ok:
                raise InputError(f"{name} must be {want}, got {getattr(self, name)}")


@dataclass(frozen=True)
class History:
    """What a training run gave.

    Attributes:
        losses: mean training loss of each epoch, in nats.
        test_accuracy: share of correct predictions on the test split; None if the data has none.
        seconds: wall time.
    """

    losses: tuple[float, ...]
    test_accuracy: float | None
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a checkpoint came from.

    Attributes:
        key: sha256 of everything the trained weights depend on.
        path: the cached file; None if it could not be stored or is not cached.
        cached: whether the model was read from the cache.
        history: of the training run, now or when it was stored.
    """

    key: str
    path: Path | None
    cached: bool
    history: History


# (model, data) -> a run of at most about a minute on one core. The convolutional ones stop early on purpose: samples
# that are not yet fitted then stand out, which gives the heavy-tailed rows that the methods are about.
_DEFAULTS: dict[tuple[str, str], PretrainConfig] = {
    ("mlp", "digits"): PretrainConfig(epochs=10),
    ("preact_resnet20", "digits"): PretrainConfig(epochs=5),
    ("preact_resnet56", "digits"): PretrainConfig(epochs=5),
    ("resnet18", "digits"): PretrainConfig(epochs=4, lr=0.02),
    ("resnet50", "digits"): PretrainConfig(epochs=4, lr=0.01),
    ("vgg16", "digits"): PretrainConfig(epochs=4, lr=0.02),
    ("transformer", "text"): PretrainConfig(epochs=1, batch_size=32, lr=0.3),
}


def default_config(model_name: str, data_name: str) -> PretrainConfig | None:
    """The default short training of a model on a data source, or None if there is none."""
    return _DEFAULTS.get((model_name, data_name))


def pretrain(model: nn.Module, data: Data, config: PretrainConfig, progress: Progress | None = None) -> History:
    """Train the model in place; on the CPU the result is the same bit for bit whatever the number of threads.

    The global random state and the number of threads are left as they were.

    Args:
        model: from the data's inputs to logits.
        data: classes or next tokens as targets.
        config: how long and how fast.
        progress: told about every step.

    Raises:
        InputError: the loss became infinite or NaN, or the data does not fit the model.
    """
    started = time.monotonic()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    steps = data.steps(config.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    means = []
    with single_thread(), seeded(config.seed, device):
        model.train()
        for epoch in range(config.epochs):
            total = 0.0
            for step, (inputs, targets) in enumerate(data.batches(config.batch_size, seed=config.seed, epoch=epoch)):
                done = (epoch * steps + step) / (config.epochs * steps)
                optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done))
                loss = models.loss(model, (inputs.to(device), targets.to(device)))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                value = loss.item()
                if not math.isfinite(value):
                    raise InputError(
                        f"training diverged: loss {value} in epoch {epoch + 1}, step {step + 1}; lower lr={config.lr}"
                    )
                total += value
                if progress is not None:
                    progress(epoch + 1, config.epochs, step + 1, steps, value)
            means.append(total / steps)
        optimizer.zero_grad()
        test = accuracy(model, data, "test") if "test" in data.splits else None
    model.train(was_training)
    return History(tuple(means), test, time.monotonic() - started)


def accuracy(model: nn.Module, data: Data, split: str = "test") -> float:
    """Share of targets (for tokens: of positions) at which the largest logit is right, in evaluation mode."""
    return evaluate(model, data, split).accuracy


def cache_directory() -> Path:
    """``$FQTSTATS_CACHE``, else ``fqtstats`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("FQTSTATS_CACHE")
    if own:
        return Path(own)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification has relative paths ignored.
    return (xdg if xdg.is_absolute() else Path("~/.cache").expanduser()) / "fqtstats"


def checkpoint(
    model_name: str,
    data: Data,
    config: PretrainConfig,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, CheckpointInfo]:
    """The trained model, from the cache if it is there, else trained and stored.

    The key covers the model's name and initial weights, the data's fingerprint, the configuration and the versions of
    torch and fqtstats. The file appears at once and complete, or not at all. A damaged file is trained again and a
    directory that cannot be written is done without, both with a :class:`CacheWarning`. The user's own models, and
    data whose fingerprint does not cover every record, are never cached: their code may change behind the key.

    Args:
        model_name: as for :func:`fqtstats.models.build`.
        data: what to train on.
        config: how.
        cache_dir: default :func:`cache_directory`.
        progress: told about every training step; not called on a cache hit.

    Raises:
        InputError: as :func:`fqtstats.models.build` and :func:`pretrain`.
    """
    model = models.build(model_name, data, config.seed)
    key = _key(model_name, model, data, config)
    if model_name not in models.MODELS or not data.fingerprint_complete:
        return model, CheckpointInfo(key, None, False, pretrain(model, data, config, progress))
    directory = cache_directory() if cache_dir is None else Path(cache_dir)
    path = directory / f"{model_name}-{data.name.replace(':', '-')}-{key[:16]}.ckpt"
    history = _read(path, model)
    if history is not None:
        return model, CheckpointInfo(key, path, True, history)
    history = pretrain(model, data, config, progress)
    try:
        _write(path, model, history)
    except OSError as error:
        warnings.warn(
            f"cannot store the checkpoint in {str(directory)!r} ({error.strerror}), going on without; "
            "set FQTSTATS_CACHE to a writable directory",
            CacheWarning,
            stacklevel=2,
        )
        return model, CheckpointInfo(key, None, False, history)
    return model, CheckpointInfo(key, path, False, history)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a user's weights into the model, all or nothing.

    Args:
        model: receives the weights.
        path: a file by ``torch.save``: a state_dict, or a dictionary with one under ``"state_dict"`` or ``"model"``.

    Raises:
        InputError: the file is missing or no such checkpoint, or its keys or shapes differ from the model's.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"expected a checkpoint at {str(file)!r}, found {'a directory' if file.is_dir() else 'nothing'}; "
            "name a file made by torch.save(model.state_dict(), path)"
        )
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what a foreign file makes it raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{str(file)!r} is not a checkpoint of tensors that can be read safely ({reason[:120]}); "
            "save it with torch.save(model.state_dict(), path)"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise InputError(
            f"{str(file)!r} holds a {type(loaded).__name__} that is no state_dict; expected names and tensors, bare or "
            "under 'state_dict' or 'model'"
        )
    own = model.state_dict()
    learned = [str(name) for name in loaded if name not in own and f".{PREFIX}" in f".{name}"]
    if learned:
        raise InputError(
            f"{str(file)!r} was trained with quantized layers, not in full precision: it has what quantizers learned "
            f"({len(learned)}: {', '.join(learned[:3])}); give a full-precision checkpoint"
        )
    differences = {
        "missing": [name for name in own if name not in loaded],
        "unexpected": [str(name) for name in loaded if name not in own],
        "shapes": [
            f"{name} {tuple(loaded[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in loaded and loaded[name].shape != tensor.shape
        ],
    }
    if any(differences.values()):
        told = "; ".join(
            f"{what} ({len(names)}): {', '.join(names[:3])}" for what, names in differences.items() if names
        )
        raise InputError(f"{str(file)!r} does not fit the model: {told}; build the model that it was saved from")
    model.load_state_dict(dict(loaded))


def _key(model_name: str, model: nn.Module, data: Data, config: PretrainConfig) -> str:
    parts = {
        "model": model_name,
        "initial": tensor_digest(model.state_dict()),
        "data": [data.name, data.fingerprint()],
        "config": asdict(config),
        "torch": torch.__version__,
        "fqtstats": fqtstats.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# A cached file is one line, the sha256 of the rest, followed by what torch.save wrote.
def _write(path: Path, model: nn.Module, history: History) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "history": asdict(history)}, buffer)
    payload = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C as well
        os.unlink(temporary)
        raise


def _read(path: Path, model: nn.Module) -> History | None:
    """Load the cached weights; None if there are none that can be used."""
    try:
        digest, _, payload = path.read_bytes().partition(b"\n")
    except OSError:
        return None  # missing, or unreadable: storing it again will tell
    if hashlib.sha256(payload).hexdigest().encode() == digest:
        stored: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
        model.load_state_dict(stored["state_dict"])
        return History(**stored["history"])
    warnings.warn(f"the cached checkpoint {str(path)!r} is damaged; training it again", CacheWarning, stacklevel=3)
    return None
