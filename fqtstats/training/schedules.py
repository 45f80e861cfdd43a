"""Learning-rate schedules: from the progress of a stage, 0 to 1, to a factor of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from fqtstats.errors import InputError

__all__ = ["SCHEDULES", "Schedule", "schedule", "warmed_up"]

Schedule = Callable[[float], float]
"""From the share of a stage's steps that are done, in [0, 1], to the factor of the learning rate, in [0, 1]."""


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0. Source: I. Loshchilov and F. Hutter (arXiv 1608.03983), eq. (5), without restarts."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def step(progress: float) -> float:
    """A tenth after half of the steps, a hundredth after three quarters.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (32k and 48k of 64k).
    """
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def triangle(progress: float) -> float:
    """From 0 up to 1 at half of the steps and down to 0 again.

    Source: B. Chmiel et al. (arXiv 2112.10769), the fine-tuning in high precision (FNT): from the rate with which the
    training before ended, 0 after a cosine, to a base rate and back.
    """
    return 1 - abs(2 * progress - 1)


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "constant": constant, "step": step, "triangle": triangle}
"""By name."""


def schedule(name: str) -> Schedule:
    """A schedule by name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def warmed_up(after: Schedule, share: float) -> Schedule:
    """``after``, compressed into what is left after a warm-up: the factor first rises linearly from 0 to 1.

    Args:
        after: what follows the warm-up.
        share: of the steps that are warm-up, in [0, 1).

    Raises:
        InputError: ``share`` is out of range.
    """
    if not 0 <= share < 1:
        raise InputError(f"expected a warm-up of at least 0 and less than 1 of the steps, got {share}")

    def factor(progress: float) -> float:
        return progress / share if progress < share else after((progress - share) / (1 - share))

    return factor
