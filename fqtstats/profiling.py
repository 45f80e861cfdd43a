"""Profiling one policy on one minibatch: which quantizer puts how much variance into which gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from fqtstats import ops
from fqtstats.capture import LossFunction, Session
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.estimators.decomposition import (
    FEWEST,
    Decomposition,
    Estimator,
    Sources,
    mean_and_error,
    one_at_a_time,
    precision_reached,
    probe,
)
from fqtstats.estimators.moments import squared_norm
from fqtstats.estimators.sampling import sampling_variance
from fqtstats.layers.swap import Skip, quantized
from fqtstats.measuring import (
    CALIBRATION_DRAW,
    Keeper,
    Progress,
    Store,
    describe,
    digest,
    errors_of,
    further_batches,
    gradients,
    metadata_of,
    wide,
)
from fqtstats.policy import Policy
from fqtstats.profiles import Profile
from fqtstats.provenance import provenance
from fqtstats.results import TOTAL

__all__ = ["METHODS", "profile"]

METHODS: dict[str, Estimator] = {"probes": probe, "one-at-a-time": one_at_a_time}
"""The estimators by name."""


def profile(
    model: nn.Module,
    batch: object,
    loss_fn: LossFunction,
    policy: Policy,
    precision: float = 0.05,
    seed: int = 0,
    backend: str = "simulated",
    batches: Sequence[object] | None = None,
    *,
    method: str = "probes",
    most_probes: int = 256,
    skip: Skip | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Profile:
    """How much variance each gradient quantizer puts into each parameter's gradient (StatQuant, theorem 2).

    The quantizers are taken to be unbiased. What different ones put into a gradient then adds up to the variance that
    :func:`fqtstats.measure` estimates. The expectation is over draws, in which the gradients that arrive at the lower
    layers are quantized themselves. The model is not changed. Results are bit-identical on any number of threads.

    Args:
        model: any module; its training mode is left as it is.
        batch: anything ``loss_fn`` takes; on the model's device.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        policy: the quantizers.
        precision: stops when the standard error of every source's total variance is at most this share of it (of 1 % of
            the grand total for smaller sources), and the grand total's likewise; between 0 and 1.
        seed: seed of all random numbers.
        backend: how products are computed, see :func:`fqtstats.prepare_`.
        batches: further minibatches, each like ``batch``, for the sampling variance.
        method: ``"probes"``: an error with the covariance of the quantizer's goes down from each layer;
            ``"one-at-a-time"``: draws in which the quantizers are switched on one after the other, much slower; it
            takes models with reentrant checkpoints, too.
        most_probes: draws to stop at if the precision is not reached, at least 4; a warning says so then.
        skip: layers to leave in full precision: a name pattern, several, or a predicate.
        progress: called with (done, total) backward passes; the total is estimated from what was seen so far.
        store: keeps unfinished profiles; a stored one is continued.

    Returns:
        The profile: ``.table`` by source and parameter, ``.sources``, ``.parameters``.

    Raises:
        InputError: bad input (one line that says what to do). If two probes were finished before the error, the
            exception's ``partial_result`` holds what they show; the same for KeyboardInterrupt.
        UnsupportedError: a model that cannot be profiled.
    """
    if isinstance(precision, bool) or not isinstance(precision, int | float) or not 0 < precision < 1:
        raise InputError(f"precision must be a number between 0 and 1, got {precision!r}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if isinstance(most_probes, bool) or not isinstance(most_probes, int) or most_probes < FEWEST:
        raise InputError(f"most_probes must be an integer of at least {FEWEST}, got {most_probes!r}")
    further = further_batches(batches)
    # One thread: the sums over large tensors made here depend on the thread count, too.
    with single_thread(), quantized(model, policy, skip, backend, seed) as handle:
        with Session(model, handle, batch, loss_fn, seed, injectable=method == "probes") as session:
            sources = Sources(session)
            gradient = [wide(g) for g in session.qat(sources, sources.weight_gradient)]
            if not sources.calls:
                raise InputError(
                    "expected a policy with gradient quantizers (grad_input, grad_weight) that act on this model, got "
                    f"{policy.name!r} with none"
                )
            found = Decomposition(sources, METHODS[method], gradient)
            tally = _Tally(progress, found, len(further))
            tally.add()
            calibration = errors_of(session, gradient, CALIBRATION_DRAW)
            tally.add()
            # The calibration errors depend on quantizers and seed, the gradient on all the rest.
            keeper = Keeper(store, f"{method} {digest([*gradient, *calibration])}", found)
            del calibration
            tally.done = 2 + found.passes(len(found))
            norms = np.array([squared_norm(g) for g in gradient])
            facts = _Facts.of(session, sources, norms, policy, method, precision, seed, gradient)
            try:
                for n in range(1, most_probes + 1):
                    found.draw(n - 1, tally.add)
                    keeper.save()
                    if n >= FEWEST:
                        reached = precision_reached(found.totals(n))
                        if reached <= precision:
                            break
                        # Standard errors fall with the square root of the number.
                        needed = math.ceil(n * (reached / precision) ** 2)
                        tally.probes = min(max(n + 1, needed), most_probes)
            except BaseException as error:
                keeper.save(force=True)
                _attach_result(error, facts, found, len(found))
                raise
            keeper.save(force=True)
        sampling = None
        if further:
            try:
                others = gradients(model, handle, further, loss_fn, seed, lambda i: tally.add())
                sampling = sampling_variance(list(session.parameters), gradient, others)
            except BaseException as error:
                _attach_result(error, facts, found, n)
                raise
    if reached > precision:
        warnings.warn(
            f"the profile has a precision of {reached:.2g} after {n} probes, not the {precision:g} asked for; raise "
            "most_probes",
            UserWarning,
            stacklevel=2,
        )
    return _result(facts, found, n, sampling)


class _Tally:
    """Counts backward passes.

    Attributes:
        probes: how many are expected.
        done: passes so far.
    """

    def __init__(self, progress: Progress | None, found: Decomposition, further: int) -> None:
        self.probes, self.done = FEWEST, 0
        self._progress, self._found, self._further = progress, found, further

    def add(self) -> None:
        """One more."""
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, max(self.done, 2 + self._found.passes(self.probes) + self._further))


@dataclass(frozen=True)
class _Facts:
    """What is known beside the draws."""

    sources: pd.DataFrame  # without the variances
    parameters: pd.DataFrame  # likewise, and without the total
    precision: float
    metadata: dict[str, object]

    @staticmethod
    def of(
        session: Session,
        sources: Sources,
        norms: npt.NDArray[np.float64],
        policy: Policy,
        method: str,
        precision: float,
        seed: int,
        gradient: Sequence[Any],
    ) -> _Facts:
        quantizers = [(layer, site, sources.quantizers[layer, site]) for layer, site in sources.keys]
        rows = [
            {"layer": layer, "site": site, "quantizer": getattr(q, "name", "custom"), "bits": getattr(q, "bits", None)}
            for layer, site, q in quantizers
        ]
        names = [name.rpartition(".") for name in session.parameters]
        parameters = {
            "layer": [layer for layer, _, _ in names],
            "parameter": [parameter for _, _, parameter in names],
            "numel": [p.numel() for p in session.parameters.values()],
            "grad_norm_sq": norms,
        }
        sampled = sources.sampled if method == "probes" else sources.keys
        metadata: dict[str, object] = {
            "method": method,
            "precision": precision,
            "sampled": [{"layer": layer, "site": site} for layer, site in sampled],
            "policy": describe(policy),
            "seeds": {"seed": seed},
            **metadata_of(session, gradient),
            **provenance(ops.isa()),
        }
        table = pd.DataFrame(rows).astype({"bits": "Int64"})
        return _Facts(table, pd.DataFrame(parameters), precision, metadata)


def _attach_result(error: BaseException, facts: _Facts, found: Decomposition, n: int) -> None:
    if n > 1:
        error.partial_result = _result(facts, found, n, None)  # type: ignore[attr-defined]


def _result(facts: _Facts, found: Decomposition, n: int, sampling: npt.NDArray[np.float64] | None) -> Profile:
    draws = found.first(n)  # [n, S, P]
    variance, error = mean_and_error(draws)
    pairs = [
        {
            "source_layer": source.layer,
            "source_site": source.site,
            "layer": parameter.layer,
            "parameter": parameter.parameter,
            "variance": variance[s, p],
            "standard_error": error[s, p],
        }
        for s, source in enumerate(facts.sources.itertuples())
        for p, parameter in enumerate(facts.parameters.itertuples())
        if draws[:, s, p].any()
    ]
    of_source, of_source_error = mean_and_error(draws.sum(axis=2))
    total, total_error = mean_and_error(draws.sum(axis=(1, 2)))
    sources = facts.sources.assign(
        variance=of_source,
        standard_error=of_source_error,
        share=of_source / total if total > 0 else math.nan,
    )
    of_parameter, of_parameter_error = mean_and_error(draws.sum(axis=1))
    parameters = facts.parameters.assign(
        variance=of_parameter,
        standard_error=of_parameter_error,
        sampling_variance=math.nan if sampling is None else sampling,
    )
    last = {
        "layer": TOTAL,
        "parameter": "",
        "numel": parameters["numel"].sum(),
        "grad_norm_sq": math.fsum(parameters["grad_norm_sq"]),
        "variance": total,
        "standard_error": total_error,
        "sampling_variance": math.nan if sampling is None else math.fsum(sampling),
    }
    reached = precision_reached(found.totals(n))
    metadata = {
        **facts.metadata,
        "probes": n,
        "converged": n >= FEWEST and reached <= facts.precision,
        "precision_reached": reached,
        "backward_passes": 2 + found.passes(n),
    }
    columns = ["source_layer", "source_site", "layer", "parameter", "variance", "standard_error"]
    table = pd.DataFrame(pairs, columns=columns)
    return Profile(table, sources, pd.concat([parameters, pd.DataFrame([last])], ignore_index=True), metadata)
