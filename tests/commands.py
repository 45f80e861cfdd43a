"""Running the command line in tests: in this process where that tells enough, else in another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fqtstats import cli

MODULE = '''
"""A user's own models and data, good and bad."""
import os
import time

import torch
from torch import nn


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return g


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _around(function, hidden=16):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), Apply(function), nn.Linear(hidden, 10))


def slow():
    return _around(lambda x: torch.relu(_Slow.apply(x)))


def nan_gradient():
    # The derivative of the root is infinite at zero, and there it meets the product's zero derivative.
    return _around(lambda x: (x * (x > 0)).sqrt())


def no_layers():
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.BatchNorm1d(64))


def detached():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Apply(torch.Tensor.detach))


def wrong_shape():
    return nn.Sequential(nn.Linear(8, 10))


def misfit():
    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10))


def raising():
    raise OSError("no such\\nweights")


def frozen():
    return _around(torch.relu).requires_grad_(False)


def infinite_loss():
    return _around(lambda x: x * torch.inf)


def not_a_model():
    return {"weights": 3}


def needs_arguments(width):
    return _around(torch.relu, width)


def one_batch():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 64, generator=generator), torch.arange(8) % 10)]


def no_batches():
    return []


def not_data():
    return 7


def scalar_pair():
    return torch.tensor(1.0), torch.tensor(1)


constant = 5
'''


class Done(NamedTuple):
    """What a command line gave."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]
Start = Callable[..., "subprocess.Popen[str]"]

OFTEN = "from fqtstats.commands import experiments\nexperiments.SAVE_SECONDS, experiments.SAVE_SHARE = 0.1, 1.0"
PATIENCE = 240.0


@pytest.fixture
def run(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command line in this process, in an empty directory beside the user's module ``mine``."""
    monkeypatch.setenv("FQTSTATS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def call(*words: str) -> Done:
        capsys.readouterr()
        status = cli.run(words)
        return Done(status, *capsys.readouterr())

    return call


def start(*words: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """A command line in a process of its own.

    Args:
        words: the arguments.
        before: statements to execute first, with ``cli`` and ``figures`` imported.
        environment: added to the environment.
    """
    # COLUMNS and the like would change what is printed.
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    # What a shell runs in the background ignores interrupts, and so would its children.
    interrupts = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{interrupts}from fqtstats import cli\nfrom fqtstats.report import figures\n{before}\ncli.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | environment,
    )


@pytest.fixture
def started() -> Iterator[Start]:
    """Starts command lines in processes of their own, which save often; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def call(*words: str, before: str = OFTEN, **environment: str) -> subprocess.Popen[str]:
        processes.append(start(*words, before=before, **environment))
        return processes[-1]

    yield call
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def send_when(process: subprocess.Popen[str], happened: Callable[[], bool], sign: signal.Signals) -> tuple[str, str]:
    """Send ``sign`` as soon as something happened, which must be before the process ends."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(sign)
    return process.communicate(timeout=PATIENCE)


def entry_point() -> Path:
    """The installed ``fqtstats`` command."""
    return Path(sys.executable).with_name("fqtstats")
