"""Learning-rate schedules: from the steps of a stage that are done to a factor of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from fqtstats.errors import InputError

__all__ = ["SCHEDULES", "Schedule", "schedule", "warmed_up"]

Schedule = Callable[[int, int], float]
"""From how many of a stage's steps are done, and how many it has, to the next one's factor of the rate, in (0, 1]."""


def cosine(done: int, steps: int) -> float:
    """Half a cosine from 1 to 0, which comes after the last step.

    Source: I. Loshchilov and F. Hutter (arXiv 1608.03983), eq. (5), without restarts.
    """
    return 0.5 * (1 + math.cos(math.pi * (done / steps)))


def constant(done: int, steps: int) -> float:
    """Always 1."""
    return 1.0


def step(done: int, steps: int) -> float:
    """A tenth after half of the steps, a hundredth after three quarters.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (32k and 48k of 64k).
    """
    progress = done / steps
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def triangle(done: int, steps: int) -> float:
    """From 0 up to 1 at half of the steps and down to 0 again, each step with the factor at its middle.

    Source: B. Chmiel et al. (arXiv 2112.10769), the fine-tuning in high precision (FNT): from the rate with which the
    training before ended, 0 after a cosine, to a base rate and back.
    """
    return 1 - abs(2 * done + 1 - steps) / steps


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
    """``after`` on the steps that a warm-up leaves: the factor first rises linearly, to 1 at the warm-up's last step.

    Args:
        after: what follows the warm-up.
        share: of the steps that are warm-up, in [0, 1); their number is rounded.

    Raises:
        InputError: ``share`` is out of range.
    """
    if not 0 <= share < 1:
        raise InputError(f"expected a warm-up of at least 0 and less than 1 of the steps, got {share}")

    def factor(done: int, steps: int) -> float:
        rising = round(share * steps)
        return (done + 1) / rising if done < rising else after(done - rising, steps - rising)

    return factor
