"""What defines a training, as JSON: two trainings are runs of the same one if it is equal."""

from __future__ import annotations

import re
from typing import Any

from fqtstats.layers.swap import Skip
from fqtstats.measuring import describe
from fqtstats.training.recipes import Recipe

__all__ = ["recipe_as_json", "skip_as_json"]


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """All that a recipe says."""
    distillation = recipe.distillation
    return {
        "name": recipe.name,
        "source": recipe.source,
        "bits": recipe.bits,
        "optimizer": repr(recipe.optimizer),
        "label_smoothing": recipe.label_smoothing,
        "warmup": recipe.warmup,
        "decay_norms": recipe.decay_norms,
        "starts_from": recipe.starts_from,
        "rules": _without_address(recipe.rules),
        "distillation": None if distillation is None else _without_address(distillation),
        "stages": [
            {
                "name": stage.name,
                "policy": _without_address(describe(stage.policy)),
                "share": stage.share,
                "lr_scale": stage.lr_scale,
                "schedule": stage.schedule,
                "stochastic": None if stage.stochastic is None else repr(stage.stochastic),
            }
            for stage in recipe.stages
        ],
    }


def skip_as_json(skip: Skip | None) -> list[str] | None:
    """The patterns of the layers to leave in full precision, or the predicate's representation."""
    if skip is None or isinstance(skip, str):
        return None if skip is None else [skip]
    return [_without_address(skip)] if callable(skip) else list(skip)


def _without_address(value: object) -> str:
    """The representation, without where in memory a function is: it is the same in the next process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
