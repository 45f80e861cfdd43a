"""End-to-end bounds beside what was measured; where a variance exceeds its bound, what may be the cause."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fqtstats.bounds.theorem import Bounds, Noise, ParameterBound
from fqtstats.layers.state import Source
from fqtstats.results import NORM_TOLERANCE, TOTAL, Result
from fqtstats.schema import Json

__all__ = ["with_bounds"]

_ROUNDING = 1e-9
"""A variance may meet its bound; the two are summed in different orders."""


def with_bounds(result: Result, bounds: Bounds) -> Result:
    """The result of one configuration with the columns ``bound`` and ``bound_ratio``, and the metadata ``bounds``.

    The metadata of the configuration get ``bounds``: tolerance, draws and passes; per parameter its parts and which
    quantizer has the largest; ``unknown``: quantizers without a bound; ``exceeded``: quantizers whose own exact
    variance is above their own bound; ``unconverged``: operator norms; ``violations``: the parameters whose variance
    exceeds the bound beyond its confidence interval, with what may be the cause.
    """
    table = result.table.copy()
    places = list(zip(table["layer"].tolist(), table["parameter"].tolist(), strict=True))
    limits = [_limit(bounds, layer, parameter) for layer, parameter in places]
    table["bound"] = limits
    # Zero over zero is no number; a variance above a bound of zero is infinitely above.
    with np.errstate(divide="ignore", invalid="ignore"):
        table["bound_ratio"] = table["variance"].to_numpy() / table["bound"].to_numpy()
    violations: list[Json] = []
    for (layer, parameter), low, limit in zip(places, table["variance_low"].tolist(), limits, strict=True):
        if low > limit * (1 + NORM_TOLERANCE):
            causes: list[Json] = list(_causes(bounds, bounds.parameters.get(_name(layer, parameter))))
            ratio = low / limit if limit > 0 else math.inf
            violations.append({"layer": layer, "parameter": parameter, "ratio": ratio, "causes": causes})
    about: dict[str, Json] = {
        "tolerance": bounds.tolerance,
        "draws": bounds.draws,
        "passes": bounds.passes,
        "unknown": [_named(source, noise) for source, noise in bounds.noise.items() if math.isnan(noise.mean)],
        "exceeded": [_exceeded(source, noise) for source, noise in bounds.noise.items() if _exceeds(noise)],
        "unconverged": [
            f"of {_named(term.source, term.noise)} and {name}"
            for name, parameter in bounds.parameters.items()
            for term in parameter.unconverged
        ],
        "violations": violations,
        "parameters": {name: _about(parameter) for name, parameter in bounds.parameters.items()},
    }
    metadata = dict(result.metadata)
    metadata["configurations"] = [{**entry, "bounds": about} for entry in metadata["configurations"]]
    return Result(table, metadata)


def _name(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _limit(bounds: Bounds, layer: str, parameter: str) -> float:
    if (layer, parameter) == (TOTAL, ""):
        return math.fsum(own.bound for own in bounds.parameters.values())
    return bounds.parameters[_name(layer, parameter)].bound


def _about(parameter: ParameterBound) -> dict[str, Json]:
    about: dict[str, Json] = {
        "weight": parameter.part("grad_weight"),
        "input": parameter.part("grad_input"),
        "qat": parameter.qat,
        "error": parameter.error,
    }
    if (term := parameter.largest) is not None:
        about["largest"] = {
            "quantizer": _named(term.source, term.noise),
            "bound": term.bound,
            "noise": term.noise.mean,
            "norm_sq": term.norm.squared,
        }
    return about


def _causes(bounds: Bounds, parameter: ParameterBound | None) -> Iterator[str]:
    """What may be wrong with a parameter's bound, or anywhere in the model."""
    parameters = list(bounds.parameters.values()) if parameter is None else [parameter]
    terms = [term for own in parameters for term in own.terms]
    noise = {term.source: term.noise for term in terms}
    found = False
    for source, own in noise.items():
        if _exceeds(own):
            yield _exceeded(source, own)
        elif not own.unbiased:
            yield f"{_named(source, own)} does not claim to be unbiased, which the theorem needs"
        elif math.isnan(own.variance):
            yield f"{_named(source, own)} has no exact variance that its bound could be held against"
        else:
            continue
        found = True
    unconverged = sum(len(own.unconverged) for own in parameters)
    if unconverged:
        yield f"{unconverged} of {len(terms)} operator norms have not converged"
    elif not found:
        yield "not known: every quantizer's own exact variance is within its own bound"


def _exceeds(noise: Noise) -> bool:
    return noise.variance > noise.qat * (1 + _ROUNDING)


def _exceeded(source: Source, noise: Noise) -> str:
    ratio = noise.variance / noise.qat if noise.qat > 0 else math.inf
    return f"the exact variance of {_named(source, noise)} is {ratio:.3g} times its own bound"


def _named(source: Source, noise: Noise) -> str:
    which = "Q1" if source.site == "grad_weight" else "Q2"
    call = f", call {source.call}" if source.call else ""
    return f"{which} of {source.layer}{call} ({noise.quantizer})"
