"""Where a number was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fqtstats.schema import Json

__all__ = ["provenance"]

_PACKAGES = ("fqtstats", "torch", "numpy", "scipy", "pandas", "pyarrow", "scikit-learn", "matplotlib")


def _cpu_model() -> str:
    """The processor's name as the system gives it; "" where it gives none."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def provenance(isa: str | None = None) -> dict[str, Json]:
    """Where a number was made: versions (None for a package that is not installed), system and processor.

    Args:
        isa: the instruction set that the kernels used, for instance ``"avx2"``; None where none was used.
    """
    versions: dict[str, Json] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "platform": f"{platform.system()}, {' '.join(platform.libc_ver()).strip() or 'libc unknown'}",
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "isa": isa,
    }
