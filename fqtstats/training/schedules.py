"""Learning-rate schedules: factors of the learning rate by how much of a stage is done."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""Name to the factor at ``progress`` in [0, 1)."""
