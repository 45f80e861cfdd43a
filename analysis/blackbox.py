"""Tests of callables of unknown grid, and of whole gradients: do they hold their size, and what do they find?

``python -m analysis.blackbox`` (some ten minutes) writes to ``analysis/results/blackbox/``:

* ``size.csv``: null runs at levels .01 and .001: quantizers as callables of unknown grid, an input of one row, and the
  gradient of a small network whose backward pass is quantized. Each family of tests at 64 draws alone, and the verdict
  as it is made, on looks at 16, 32 and 64 draws. Elements of a gradient, and of BHQ's results, depend on each other:
  what the tests of independence find there is no false alarm, and they are left out. Sign flips are calibrated by
  permutation and take no part in verdicts of three looks at these levels (``tests/test_bias.py`` has their size).
* ``power.csv``: planted defects in the quantizers of a network's backward pass, on its gradient, at a false-alarm rate
  of 1e-6: in how many runs 32 and 64 draws find each. Eight random bits are among them because draws do not find those;
  probing the quantizer does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import fqtstats
from fqtstats.capture.session import Session
from fqtstats.commands.console import progress
from fqtstats.determinism import seeded
from fqtstats.verdicts import designs
from fqtstats.verdicts.battery import LOOKS as ALL_LOOKS
from fqtstats.verdicts.blackbox import DRAWS, FAMILIES, BlackBox
from fqtstats.verdicts.probe import StreamFunction

FOLDER = Path(__file__).parent / "results" / "blackbox"
QUANTIZERS = ("ptq", "psq", "pcq", "bhq")
BITS = 4
LOOKS = [n for n in ALL_LOOKS if n <= DRAWS]
SHAPE = (16, 64)
POOL = 8192
"""Draws of a subject, of which the null runs are made."""
FEATURES = 16
SAMPLES = 64
LEVELS = (0.01, 0.001)
FALSE_ALARM = 1e-6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nulls", type=int, default=2000, help="null runs per subject")
    parser.add_argument("--seeds", type=int, default=20, help="runs per defect")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    size(given.nulls).to_csv(given.out / "size.csv", index=False)
    power(given.seeds).to_csv(given.out / "power.csv", index=False)


# --- subjects ---------------------------------------------------------------------------------------------------------


@contextmanager
def gradient(policy: fqtstats.Policy, heavy: bool = False) -> Iterator[tuple[StreamFunction, torch.Tensor]]:
    """The gradient of a small network's weights and biases, ``[42, 17]``, and its draws as a callable.

    Args:
        policy: of the backward pass.
        heavy: whether one sample counts thirty times, which gives the gradients that arrive at layers a tail.
    """
    with seeded(1):
        hidden = [m for _ in range(2) for m in (nn.Linear(FEATURES, FEATURES), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(FEATURES, 10))
        batch = torch.randn(SAMPLES, FEATURES), torch.randint(10, (SAMPLES,))
    weights = torch.ones(SAMPLES)
    weights[3] = 30.0 if heavy else 1.0

    def loss(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (nn.functional.cross_entropy(m(b[0]), b[1], reduction="none") * weights).mean()

    def matrix(parts: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return torch.cat([torch.cat([weight, bias[:, None]], 1) for weight, bias in pairs])

    with fqtstats.quantized(model, policy, seed=0) as handle, Session(model, handle, batch, loss) as session:
        # A run's seed and its draw make one index of the session's draws.
        yield lambda x, s: matrix(session.draw(s.seed * DRAWS + s.draw)), matrix(session.qat())


@contextmanager
def opaque(name: str, shape: tuple[int, ...]) -> Iterator[tuple[StreamFunction, torch.Tensor]]:
    """A quantizer on a natural input."""
    yield fqtstats.quantizer(name, bits=BITS), designs.natural(shape)


def both(q: object) -> fqtstats.Policy:
    """One quantizer for both gradients of a layer."""
    return fqtstats.Policy(grad_input=q, grad_weight=q)  # type: ignore[arg-type]


SUBJECTS = {
    **{name: lambda name=name: opaque(name, SHAPE) for name in QUANTIZERS},
    "psq, one row": lambda: opaque("psq", (1, 64)),
    **{
        f"gradient, {name}": lambda name=name: gradient(both(fqtstats.quantizer(name, bits=BITS)))
        for name in ("psq", "bhq")
    },
}


# --- size -------------------------------------------------------------------------------------------------------------


def size(runs: int) -> pd.DataFrame:
    """Rejection rates of unbiased subjects."""
    rows = []
    with progress() as bars:
        task = bars.add_task("null runs", total=len(SUBJECTS) * runs)
        for name, make in SUBJECTS.items():
            found = []
            with make() as (f, x):
                kept = torch.stack([f(x, fqtstats.stream(draw=draw)) for draw in range(POOL)])
            for seed in range(runs):
                found.append(
                    _p_values(_again(kept, seed), x, seed, elements_depend="gradient" in name or name == "bhq")
                )
                bars.advance(task)
            for tests in found[0]:
                for level in LEVELS:
                    rejected = sum(p[tests] <= level for p in found)
                    rows.append({"subject": name, "tests": tests, "level": level, "runs": runs, "rejected": rejected})
            print(pd.DataFrame(rows[-2 * len(found[0]) :]).to_string(), flush=True)
    table = pd.DataFrame(rows)
    return table.assign(rate=table["rejected"] / table["runs"])


def _again(kept: torch.Tensor, run: int) -> StreamFunction:
    """Draws that were made before. Runs of one round through the pool share none, and each round shuffles it anew."""
    turn, place = divmod(run, POOL // DRAWS)
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(turn))[place * DRAWS :]
    return lambda x, s: kept[order[s.draw]]


def _p_values(f: StreamFunction, x: torch.Tensor, seed: int, elements_depend: bool) -> dict[str, float]:
    """Of each family at the last look (independence: at the only one), and of the whole verdict."""
    box = BlackBox(f, x, seed)
    families: dict[str, float] = {}
    verdict = 1.0
    for look in LOOKS:
        while box.draws < look:
            box.draw(fqtstats.stream(seed=seed, draw=box.draws))
        for finding in box.look(FALSE_ALARM):
            if finding.about_independence and elements_depend:
                continue
            families[finding.family] = finding.p_value
            verdict = min(verdict, finding.p_value)
    return {**families, "the verdict": min(1.0, verdict * len(LOOKS) * FAMILIES)}


# --- power ------------------------------------------------------------------------------------------------------------


def _grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest element and step of each row."""
    rows = x.reshape(len(x), -1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return low, ((high - low) / (2**BITS - 1)).clamp(min=1e-30)


def _right(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    low, step = _grid(x)
    y = (x - low) / step
    return (y.floor() + (s.uniform(x.shape) < y - y.floor())) * step + low


def _nearest(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    low, step = _grid(x)
    return ((x - low) / step).round() * step + low


def _zero_point_rounded(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    low, step = _grid(x)
    return _right(x, s) - low + (low / step).round() * step


def _clipped(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    keep = x.numel() - max(1, x.numel() // 1000)
    limit = x.abs().reshape(-1).kthvalue(keep).values
    return _right(x.clamp(-limit, limit), s)


def _channel_scaled(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    out = _right(x, s)
    out[:, 0] *= 1.1
    return out


def _rows_pruned(x: torch.Tensor, s: fqtstats.Stream) -> torch.Tensor:
    """Keeps a row with a probability that grows with its norm, and forgets to divide by it."""
    norms = x.norm(dim=1, keepdim=True)
    return _right(x, s) * (
        s.child("kept").uniform(norms.shape) < (norms / norms.median().clamp(min=1e-30)).clamp(max=1)
    )


def _one_layer(q: Callable[[torch.Tensor, fqtstats.Stream], torch.Tensor]) -> fqtstats.Policy:
    return fqtstats.Policy(grad_input=_right, grad_weight=_right, overrides={"2": both(q)})


DEFECTS: dict[str, tuple[fqtstats.Policy, bool]] = {
    "none": (both(_right), False),
    "none, heavy-tailed": (both(_right), True),
    "rows pruned without 1/p": (both(_rows_pruned), False),
    "zero point rounded": (both(_zero_point_rounded), False),
    **{f"{r} random bits": (both(fqtstats.quantizer("psq", bits=BITS, random_bits=r)), False) for r in (2, 4, 8)},
    "largest .1 % clipped, heavy-tailed": (both(_clipped), True),
    "a channel of one layer scaled by 1.1": (_one_layer(_channel_scaled), False),
    "one layer rounds to nearest": (_one_layer(_nearest), False),
}
"""Policies of the backward pass, and whether the loss is heavy-tailed."""


def power(seeds: int) -> pd.DataFrame:
    """Share of the runs that find each defect."""
    rows = []
    level = FALSE_ALARM / (len(LOOKS) * FAMILIES)
    with progress() as bars:
        task = bars.add_task("defects", total=len(DEFECTS) * seeds)
        for defect, (policy, heavy) in DEFECTS.items():
            found = {32: 0, 64: 0}
            families: set[str] = set()
            with gradient(policy, heavy) as (f, x):
                for seed in range(seeds):
                    first = _found_after(f, x, seed, level)
                    for draws in found:
                        found[draws] += first[0] <= draws
                    families |= first[1]
                    bars.advance(task)
            rows.append(
                {
                    "defect": defect,
                    "runs": seeds,
                    **{f"found in {draws} draws": count / seeds for draws, count in found.items()},
                    "tests": ", ".join(sorted(families)),
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _found_after(f: StreamFunction, x: torch.Tensor, seed: int, level: float) -> tuple[float, set[str]]:
    box = BlackBox(f, x, seed)
    for look in LOOKS:
        while box.draws < look:
            box.draw(fqtstats.stream(seed=seed, draw=box.draws))
        families = {f.family for f in box.look(level) if f.p_value < level and not f.about_independence}
        if families:
            return look, families
    return np.inf, set()


if __name__ == "__main__":
    main()
