"""The machine that a benchmark runs on: what it is, what it could do at best, and how it hands out memory."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from functools import cache

import torch

from fqtstats import ops
from fqtstats.errors import UnsupportedError

__all__ = ["ALLOCATORS", "PEAKS", "describe", "peak", "thread_counts", "tune_allocator"]

PEAKS = {
    "fp32": "float32 fused multiply-add",
    "int8": "u8 x s8 dot product",
    "bit": "and, popcount, add",
    "bit_table": "4 bit x 1 bit by table",
    "copy": "copy_ over 64 MB, bytes read and written",
}
"""Kinds of :func:`peak`."""

ALLOCATORS = ("default", "tuned")

_ITERATIONS = 100_000
_COPY = 1 << 24  # float32 elements: 64 MB


def peak(kind: str) -> float | None:
    """Operations (a multiplication and an addition are two) or bytes per second of one core; about 1 to 10 ms.

    None where this machine, or the build, has no such instruction.
    """
    if kind == "copy":
        source, target = _copy_buffers()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.perf_counter()
        target.copy_(source)
        elapsed = time.perf_counter() - start
        torch.set_num_threads(before)
        return 2 * source.numel() * source.element_size() / elapsed
    native = ops.native_module()
    rate: float | None = None if native is None else native.peak(kind, _ITERATIONS)
    return rate


def thread_counts() -> tuple[int, ...]:
    """One thread, and two where there are two processors."""
    return (1, 2) if (os.cpu_count() or 1) > 1 else (1,)


@cache
def _copy_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(_COPY), torch.zeros(_COPY)


def tune_allocator() -> None:
    """Let glibc keep freed memory for the rest of this process: no page faults for large tensors.

    By default it maps every block above a threshold (at most 32 MB) anew, and the kernel zeroes its pages at first use.

    Raises:
        UnsupportedError: the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        raise UnsupportedError("the tuned allocator needs glibc's mallopt; use --allocator default") from None
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def describe() -> dict[str, object]:
    """What a reader needs to judge the ratios: processor, instruction set, cores, versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "isa": ops.isa(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            facts = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    named = {key.strip(): value.strip() for key, value in facts.items()}
    name = named.get("model name", platform.machine())
    family = f", family {named['cpu family']}, model {named['model']}" if "cpu family" in named else ""
    return f"{name}{family}"
