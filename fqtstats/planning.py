"""Planning bits: how many each gradient quantizer gets, so that the gradient's variance is smallest or within a budget.

By theorem 2 of arXiv 2010.14298 the variance of the quantized gradient is a sum over the gradient quantizers. How the
term of one depends on its own bits is known up to a factor from the quantizer's exact variance on gradients that arrive
there: for a weight-gradient quantizer (Q1) carried on to its layer's gradients, for an input-gradient quantizer (Q2) as
it is. :func:`fqtstats.profile` gives the factors, and :class:`fqtstats.allocation.Allocation` then divides the bits.

Other bits change what arrives at the lower layers, and Q2's noise may take another shape: so the plan is profiled, and
made anew from there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from fqtstats.allocation import Allocation
from fqtstats.capture import LossFunction, Session
from fqtstats.errors import InputError, UnreachableError
from fqtstats.estimators import exact
from fqtstats.layers.state import Call, Site, WeightGradient
from fqtstats.layers.swap import Skip, quantized
from fqtstats.measurement import measure
from fqtstats.measuring import Store
from fqtstats.plans import Plan, assigned, bits_are_free, plain_policy, uniform
from fqtstats.policy import Policy, QuantizerLike
from fqtstats.profiles import SITES, Profile
from fqtstats.profiling import profile
from fqtstats.quantizers.base import StochasticQuantizer

__all__ = ["BITS", "PlanProgress", "plan"]

BITS = range(1, 9)
"""All the bits that the package's quantizers may have."""

ROUNDS = 3
"""Plans that are made and profiled, if the first does not come back before."""

MOST_ROUNDS = 8
"""Likewise where none has met the budget yet."""

LAW_DRAWS = 4
"""Backward passes over which the variances of quantizers with other bits are averaged."""

DOUBTFUL = 1.5
"""A uniform policy is profiled as a candidate for the narrowest if up to so many times the limit is expected of it."""

SITE_TRIES = 2
"""At most so many policies with one width for each site are profiled; what is expected of them is from far away."""

Key = tuple[str, Site]


class PlanProgress(Protocol):
    """Told what is being done, and after every backward pass or batch of it how many there were and will be."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def plan(
    model: nn.Module,
    batch: object,
    loss_fn: LossFunction,
    policy: Policy,
    *,
    budget: float | None = None,
    mean_bits: float | None = None,
    batches: Sequence[object] | None = None,
    bits: Collection[int] = BITS,
    precision: float = 0.05,
    seed: int = 0,
    backend: str = "simulated",
    draws: int = 64,
    most_probes: int = 256,
    skip: Skip | None = None,
    progress: PlanProgress | None = None,
    store: Callable[[str], Store] | None = None,
) -> Plan:
    """Divide bits among the gradient quantizers of a network.

    Give either ``budget``, for the fewest bits whose variance is within it, or ``mean_bits``, for the least variance
    with that many. The quantizers are taken to be unbiased. Which bits to choose is solved exactly for the variances
    that are expected; the variance that is then predicted is a profile with the chosen bits, and it is compared with
    :func:`fqtstats.measure`, which shares the profile's random numbers but not its method. The model is not changed.

    Args:
        model: any module; its training mode is left as it is.
        batch: anything ``loss_fn`` takes; on the model's device.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        policy: the quantizers. Those that are not stochastic quantizers of the package (or subclasses), or that do not
            have all of 1 to 8 bits, stay as they are; the bits of the others matter with a budget only, where planning
            starts from them.
        budget: sampling variance and quantization variance together are at most this many times the sampling variance,
            as far as predicted; above 1. It needs ``batches``.
        mean_bits: at most this mean over all gradient quantizers that have a number of bits.
        batches: further minibatches, for the sampling variance.
        bits: those that may be chosen.
        precision: of the profiles, see :func:`fqtstats.profile`.
        seed: seed of all random numbers.
        backend: how products are computed, see :func:`fqtstats.prepare_`.
        draws: draws to measure the planned policy with, and the simpler ones that it is compared with; 0 for none.
        most_probes: draws to end a profile at.
        skip: layers to leave in full precision: a name pattern, several, or a predicate.
        progress: called with (what, done, total).
        store: gives by name where an unfinished profile or measurement is kept; stored ones are continued.

    Returns:
        The plan; ``.policy`` is the planned policy, ``.table`` has one row per quantizer, ``.comparison`` the total
        variance, predicted and measured, beside that of simpler policies that meet the same target: one with the same
        bits everywhere (with ``mean_bits`` only where these are a whole number), and the best found with the same bits
        in all weight-gradient and the same in all input-gradient quantizers, where it is better than the former.

    Raises:
        InputError: bad input (one line that says what to do).
        UnreachableError: (an InputError) a target that cannot be reached; the message says what can be.
        UnsupportedError: a model that cannot be profiled.
    """
    widths = _widths(bits)
    further = [] if batches is None else list(batches)
    _check_target(budget, mean_bits, further)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0 or draws == 1:
        raise InputError(f"draws must be an integer of at least 2, or 0 for no measurement; got {draws!r}")
    if not isinstance(policy, Policy):
        raise InputError(f"expected a fqtstats.Policy, got {policy!r}; see fqtstats.policies.get")
    bench = _Bench(
        model, batch, loss_fn, further, widths, precision, seed, backend, draws, most_probes, skip, progress, store
    )
    if mean_bits is not None:
        rounds, best, others = _with_mean_bits(bench, policy, mean_bits)
    else:
        assert budget is not None
        rounds, best, others = _within_budget(bench, policy, budget)
    rows = [bench.row("plan", best), *(bench.row(name, point) for name, point in others.items())]
    comparison = pd.DataFrame(rows).assign(sampling_variance=best.sampling)
    sources = best.profile.sources
    free = [key in best.laws for key in best.keys]
    metadata = {
        **{name: value for name, value in best.profile.metadata.items() if name not in ("policy", "method", "sampled")},
        "target": {"mean_bits": mean_bits} if budget is None else {"budget": budget},
        "bits": list(widths),
        "policy": plain_policy(policy),
        "rounds": [
            {"mean_bits": point.mean_bits, "variance": point.variance, "standard_error": point.error}
            for point in rounds
        ],
    }
    return Plan(sources.assign(fixed=np.logical_not(free)), comparison, metadata, policy)


def _widths(bits: Collection[int]) -> tuple[int, ...]:
    chosen = list(bits) if isinstance(bits, Collection) else []
    if not chosen or not all(isinstance(b, int) and not isinstance(b, bool) and b in BITS for b in chosen):
        raise InputError(f"expected bits to be integers from {BITS[0]} to {BITS[-1]}, got {bits!r}")
    return tuple(sorted(set(chosen)))


def _check_target(budget: float | None, mean_bits: float | None, further: Sequence[object]) -> None:
    if (budget is None) == (mean_bits is None):
        raise InputError(f"expected either budget or mean_bits, got {'neither' if budget is None else 'both'}")
    name, value = ("mean_bits", mean_bits) if budget is None else ("budget", budget)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a number, got {value!r}")
    if budget is not None and budget <= 1:
        raise InputError(f"budget must be above 1 (times the sampling variance), got {budget!r}; for instance 1.1")
    if budget is not None and not further:
        raise InputError("a budget is relative to the sampling variance, which needs further minibatches; give batches")


# --- points -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """A policy that was profiled.

    Attributes:
        policy: the policy.
        profile: its profile.
        laws: by quantizer whose bits can be chosen, its variance by bits (its own among them), up to a factor each.
        sampling: the sampling variance; NaN without further batches.
    """

    policy: Policy
    profile: Profile
    laws: dict[Key, dict[int, float]]
    sampling: float

    @property
    def keys(self) -> list[Key]:
        """The quantizers."""
        return list(self.profile.sources[["layer", "site"]].itertuples(index=False, name=None))

    @property
    def bits(self) -> dict[Key, int]:
        """Of all quantizers that have a number of them."""
        found = zip(self.keys, self.profile.sources["bits"], strict=True)
        return {key: int(width) for key, width in found if not pd.isna(width)}

    @property
    def total_bits(self) -> int:
        return sum(self.bits.values())

    @property
    def mean_bits(self) -> float:
        return self.total_bits / len(self.bits)

    @property
    def variance(self) -> float:
        return float(self.profile.total["variance"])

    @property
    def error(self) -> float:
        """Standard error of the variance."""
        return float(self.profile.total["standard_error"])

    @property
    def fixed_variance(self) -> float:
        """Of the quantizers whose bits cannot be chosen."""
        rows = zip(self.keys, self.profile.sources["variance"], strict=True)
        return math.fsum(variance for key, variance in rows if key not in self.laws)

    @property
    def fixed_bits(self) -> int:
        return sum(width for key, width in self.bits.items() if key not in self.laws)

    def curves(self, widths: Sequence[int]) -> list[dict[int, float]]:
        """The expected variance by bits of each quantizer in ``laws``, as far as it is known."""
        variances = dict(zip(self.keys, self.profile.sources["variance"], strict=True))
        return [_curve(law, self.bits[key], float(variances[key]), widths) for key, law in self.laws.items()]

    def assigned(self, policy: Policy, chosen: Sequence[int]) -> Policy:
        """``policy`` with these bits in the quantizers of ``laws``."""
        return assigned(policy, dict(zip(self.laws, chosen, strict=True)))

    def option(self, widths: Mapping[str, int]) -> _Option:
        """What is expected with one width for each site."""
        chosen = [widths[site] for _, site in self.laws]
        curves = zip(self.curves(sorted(set(chosen))), chosen, strict=True)
        variance = self.fixed_variance + math.fsum(curve.get(width, math.inf) for curve, width in curves)
        return _Option(widths, self.fixed_bits + sum(chosen), variance)


def _curve(law: Mapping[int, float], own: int, variance: float, widths: Sequence[int]) -> dict[int, float]:
    """The variance by bits that is in proportion to the law, and ``variance`` at ``own`` bits."""
    if law[own] > 0:
        return {b: variance * (law[b] / law[own]) for b in widths}
    # There happens to be no noise with these bits. How much it is with others is not known: none with noise are taken.
    return {b: 0.0 for b in widths if law[b] == 0} or {widths[-1]: variance}


@dataclass(frozen=True)
class _Option:
    """A policy with one width for each site: how many bits it has in all, and what variance is expected of it."""

    widths: Mapping[str, int]
    bits: int
    variance: float

    def below(self, other: _Option) -> bool:
        """Whether the other one has as many bits or more at both sites, and is not the same."""
        return self.widths != other.widths and all(b <= other.widths[site] for site, b in self.widths.items())

    @property
    def same(self) -> bool:
        return len(set(self.widths.values())) == 1


@dataclass
class _Bench:
    """Model, data and options; profiles and measures policies on them."""

    model: nn.Module
    batch: object
    loss_fn: LossFunction
    further: list[object]
    widths: tuple[int, ...]
    precision: float
    seed: int
    backend: str
    draws: int
    most_probes: int
    skip: Skip | None
    progress: PlanProgress | None
    store: Callable[[str], Store] | None
    sampling: float | None = None
    count: int = 0

    def point(self, policy: Policy) -> _Point:
        """Profile a policy."""
        self.count += 1
        found = profile(
            self.model,
            self.batch,
            self.loss_fn,
            policy,
            precision=self.precision,
            batches=self.further if self.sampling is None else None,  # it does not depend on the bits
            most_probes=self.most_probes,
            **self._common(f"profile {self.count}", f"profiling policy {self.count}"),
        )
        if self.sampling is None:
            self.sampling = float(found.total["sampling_variance"])
        return _Point(policy, found, self._laws(policy), self.sampling)

    def row(self, name: str, point: _Point) -> dict[str, object]:
        """What :attr:`Plan.comparison` has of a point."""
        measured = [math.nan] * 3
        if self.draws:
            self.count += 1
            common = self._common(f"measurement {self.count}", f"measuring {point.mean_bits:.3g} bits")
            result = measure(self.model, self.batch, self.loss_fn, point.policy, self.draws, **common)
            total = result.total(result.configurations[0])
            measured = [float(total[name]) for name in ("variance", "variance_low", "variance_high")]
        widths = {
            site: {width for key, width in point.bits.items() if key in point.laws and key[1] == site} for site in SITES
        }
        q1, q2 = (next(iter(found)) if name != "plan" and found else None for found in widths.values())
        return {
            "policy": name,
            "q1_bits": q1,
            "q2_bits": q2,
            "mean_bits": point.mean_bits,
            "predicted": point.variance,
            "predicted_error": point.error,
            **dict(zip(("measured", "measured_low", "measured_high"), measured, strict=True)),
            "draws": self.draws,
        }

    def _common(self, key: str, what: str) -> dict[str, Any]:
        tell = self.progress
        return {
            "seed": self.seed,
            "backend": self.backend,
            "skip": self.skip,
            "store": None if self.store is None else self.store(key),
            "progress": None if tell is None else lambda done, total: tell(what, done, total),
        }

    def _laws(self, policy: Policy) -> dict[Key, dict[int, float]]:
        """Summed variances by quantizer and bits."""
        found: dict[Key, npt.NDArray[np.float64]] = {}
        widths = list(self.widths)

        def note(key: Key, q: QuantizerLike, variance: Callable[[StochasticQuantizer], float]) -> None:
            if bits_are_free(q):
                with torch.no_grad():
                    values = [variance(replace(q, bits=b)) for b in (*widths, q.bits)]
                found[key] = found.get(key, np.zeros(len(values))) + values
                own[key] = q.bits

        def observe(call: Call, site: Site, q: QuantizerLike, g: torch.Tensor) -> None:
            if site == "grad_input":
                note((call.layer.name, site), q, lambda q: float(q.variance(g).sum()))

        def observe_weight(call: Call, weight: WeightGradient, parameters: Sequence[str]) -> None:
            def variance(q: StochasticQuantizer) -> float:
                return math.fsum(exact.summed(replace(weight, q=q), parameters).values())

            note((call.layer.name, "grad_weight"), weight.q, variance)

        own: dict[Key, int] = {}
        with (
            quantized(self.model, policy, self.skip, self.backend, self.seed) as handle,
            Session(self.model, handle, self.batch, self.loss_fn, self.seed) as session,
        ):
            for index in range(LAW_DRAWS):
                session.draw(index, ("grad_input",), observe=observe, observe_weight=observe_weight)
        return {key: dict(zip((*widths, own[key]), values.tolist(), strict=True)) for key, values in found.items()}


# --- targets ----------------------------------------------------------------------------------------------------------

Found = tuple[list[_Point], _Point, dict[str, _Point]]
"""The plans that were profiled, the best of them, and simpler policies that meet the same target, by name."""


def _with_mean_bits(bench: _Bench, policy: Policy, mean_bits: float) -> Found:
    """The least variance with at most this mean."""
    start = min(bench.widths, key=lambda width: abs(width - mean_bits))
    first = bench.point(_same(policy, start))
    _require_choice(first)
    total = math.floor(mean_bits * len(first.bits) + 1e-9) - first.fixed_bits
    rounds: dict[tuple[int, ...], _Point] = {}
    point = first
    while len(rounds) < ROUNDS:
        allocation = Allocation(point.curves(bench.widths))
        chosen = allocation.within_bits(total)
        if chosen is None:
            fewest = int(np.isfinite(allocation.least).argmax()) + first.fixed_bits
            reachable = _rounded_up(fewest / len(first.bits))
            raise UnreachableError(
                f"mean_bits {mean_bits:g} cannot be reached with the bits allowed; at least {reachable} can"
            )
        if chosen in rounds:
            break
        point = rounds[chosen] = bench.point(point.assigned(policy, chosen))
    points = list(rounds.values())
    best = min(points, key=lambda point: (point.variance, point.total_bits))
    others = {}
    width, rest = divmod(total, len(first.laws))
    if not rest and width in bench.widths:
        others["uniform"] = first if width == start else bench.point(_same(policy, width))
    options = [option for option in _by_site(best, bench.widths) if option.bits <= total + first.fixed_bits]
    full = [option for option in options if not any(option.below(other) for other in options) and not option.same]
    tried = [
        bench.point(uniform(policy, option.widths))
        for option in sorted(full, key=lambda option: option.variance)[:SITE_TRIES]
    ]
    quietest = min([*tried, *others.values()], key=lambda point: point.variance, default=None)
    if quietest in tried:
        others["by site"] = quietest
    return points, best, others


def _within_budget(bench: _Bench, policy: Policy, budget: float) -> Found:
    """The fewest bits whose variance is within the budget."""
    point = bench.point(policy)
    _require_choice(point)
    sampling = point.sampling
    if not sampling > 0:
        raise InputError("the sampling variance is zero, nothing is within a budget relative to it; use mean_bits")
    aim = limit = (budget - 1) * sampling
    missed = False
    rounds: dict[tuple[int, ...], _Point] = {}
    while True:
        allocation = Allocation(point.curves(bench.widths))
        quietest = allocation.within_bits(len(allocation.least) - 1)
        assert quietest is not None
        within = allocation.within_variance(aim - point.fixed_variance)
        chosen = quietest if within is None or len(rounds) >= MOST_ROUNDS else within
        met = [known for known in rounds.values() if known.variance <= limit]
        if met and (chosen in rounds or len(rounds) >= ROUNDS):
            break
        if chosen not in rounds:
            rounds[chosen] = bench.point(point.assigned(policy, chosen))
        point = rounds[chosen]
        if point.variance > limit:
            if chosen == quietest:
                reachable = _rounded_up(point.variance / sampling)
                raise UnreachableError(
                    f"budget {budget:g} cannot be met: with the most bits everywhere the quantizers add {reachable} "
                    f"times the sampling variance; the smallest reachable budget is {1 + reachable:.12g}"
                )
            if missed:  # also with what is expected from near by
                aim *= min(limit / point.variance, 0.99)
            missed = True
    best = min(met, key=lambda point: (point.total_bits, point.variance))
    others = {}
    for width in bench.widths:
        if best.option(dict.fromkeys(SITES, width)).variance <= DOUBTFUL * limit:
            point = bench.point(_same(policy, width))
            if point.variance <= limit:
                others["uniform"] = point
                break
    options = [option for option in _by_site(best, bench.widths) if option.variance <= limit and not option.same]
    for option in sorted(options, key=lambda option: (option.bits, option.variance))[:SITE_TRIES]:
        if "uniform" in others and option.bits >= others["uniform"].total_bits:
            break
        point = bench.point(uniform(policy, option.widths))
        if point.variance <= limit:
            others["by site"] = point
            break
    return list(rounds.values()), best, others


def _same(policy: Policy, width: int) -> Policy:
    return uniform(policy, dict.fromkeys(SITES, width))


def _by_site(point: _Point, widths: Sequence[int]) -> list[_Option]:
    """All policies with one width for Q1 and one for Q2; none where only one of the two can be chosen."""
    if {site for _, site in point.laws} != set(SITES):
        return []
    return [point.option(dict(zip(SITES, pair, strict=True))) for pair in itertools.product(widths, repeat=2)]


def _require_choice(point: _Point) -> None:
    if not point.laws:
        raise InputError(
            "expected a policy with a gradient quantizer whose bits can be chosen (ptq, psq, pcq, bhq), got "
            f"{point.policy.name!r} with none that acts"
        )


def _rounded_up(value: float) -> float:
    """To three significant digits."""
    scale = 10.0 ** (2 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
