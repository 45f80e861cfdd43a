"""Speed against named baselines: ratios measured side by side in one run, never a timed test."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from fqtstats.benchmarks import machine
from fqtstats.benchmarks.pairs import Case, Row, run
from fqtstats.errors import InputError

__all__ = ["BENCHMARKS", "Row", "cases", "run_all"]

BENCHMARKS = {
    "quantize": ("quantization", "quantize_cases"),
    "gemm": ("products", "gemm_cases"),
    "conv": ("convolutions", "convolution_cases"),
    "step": ("step", "step_cases"),
    "measure": ("measure", "measure_cases"),
}
"""Name to the module and function that list its cases."""


def cases(name: str) -> list[Case]:
    """The cases of one benchmark.

    Raises:
        InputError: unknown name (lists the known ones).
    """
    if name not in BENCHMARKS:
        raise InputError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    module, function = BENCHMARKS[name]
    listed: list[Case] = getattr(importlib.import_module(f"fqtstats.benchmarks.{module}"), function)()
    return listed


def run_all(
    names: Sequence[str], rounds: int, allocators: Sequence[str], tell: Callable[[int, int, str], None]
) -> list[Row]:
    """Run benchmarks, once per allocator setting.

    Args:
        names: of :data:`BENCHMARKS`.
        rounds: interleaved pairs per row.
        allocators: of :data:`fqtstats.benchmarks.machine.ALLOCATORS`; ``"tuned"`` stays in force in this process.
        tell: called with (rounds done, rounds in total, what is running).
    """
    listed = [case for name in names for case in cases(name)]
    total, done = len(allocators) * len(listed) * rounds, 0
    rows = []
    for allocator in sorted(allocators, key=machine.ALLOCATORS.index):  # there is no way back from the tuned one
        if allocator == "tuned":
            machine.tune_allocator()
        for case in listed:

            def step(title: str = case.name) -> None:
                nonlocal done
                done += 1
                tell(done, total, title)

            rows.append(run(case, rounds, step, allocator))
    return rows
