"""Measuring one policy on one minibatch: from the captured gradients to the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from fqtstats import ops
from fqtstats.bounds import Bounds, end_to_end_bounds, with_bounds
from fqtstats.capture import IncomingGradients, LossFunction, Session, add_own_variance
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.estimators import bias, intervals
from fqtstats.estimators.moments import ErrorMoments, squared_norm
from fqtstats.estimators.sampling import sampling_variance
from fqtstats.estimators.sketch import Sketch
from fqtstats.layers.state import SITES, Call, Site, WeightGradient
from fqtstats.layers.swap import Handle, Skip, quantized
from fqtstats.measuring import (
    CALIBRATION_DRAW,
    Arrays,
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
from fqtstats.provenance import provenance
from fqtstats.results import TOTAL, Result

__all__ = ["METHODS", "Arrays", "Progress", "Store", "measure", "measure_prepared"]

Array = npt.NDArray[np.float64]

BIASED_BELOW = 0.01
"""Below this bias p-value the variance interval no longer assumes that there is no bias; below this p-value of
``own_ratio`` the closed form no longer stands in for what was drawn."""

_DRAWN = (
    *("bias_norm_sq", "bias_p", "bias_p_directed", "bias_p_cross_fit", "bias_p_sign_flip"),
    *("variance", "variance_low", "variance_high", "variance_gain", "variance_weight", "variance_input"),
    *("own_ratio", "own_ratio_low", "own_ratio_high", "own_ratio_p", "snr", "sqrt3_margin"),
)
"""Columns that only draws fill."""

_SLACK = 0.1
"""The closed form stands in for draws only where the rounding of the arithmetic is below this part of Q1's error."""

METHODS = ("exact", "montecarlo", "both")
"""What is known in closed form, alone; draws alone; or both, compared with each other and put together."""


def measure(
    model: nn.Module,
    batch: object,
    loss_fn: LossFunction,
    policy: Policy,
    draws: int = 64,
    seed: int = 0,
    backend: str = "simulated",
    batches: Sequence[object] | None = None,
    *,
    skip: Skip | None = None,
    bounds: bool = False,
    progress: Progress | None = None,
    store: Store | None = None,
    method: str = "both",
) -> Result:
    """Bias and variance of the quantized gradient (FQT) around the full-precision one of the same network (QAT).

    One forward pass of the quantized network, then one backward pass for the QAT gradient and two per draw: one with
    both gradient quantizers, one with the same numbers but without the weight-gradient quantizers, which tells their
    contributions apart. The model is not changed. Results are bit-identical on any number of threads.

    What a layer's own weight-gradient quantizer (Q1) adds to an error has mean zero and a variance that is known in
    closed form, given the gradient that arrives. The method "both" computes this variance in every draw, and uses it
    twice. ``own_ratio`` is the drawn squared error from Q1 over its exact mean: far from 1, the roundings are not
    independent. And where the gradient is unbiased (claimed, and not refuted by the draws), ``variance`` is the mean of
    ``||u_i||^2`` plus that exact variance instead of the one of ``||e_i||^2``, where ``u_i`` is the part of the error
    ``e_i`` that arrives through later layers. This has the same mean and, by the Rao-Blackwell theorem, never a larger
    standard error.

    Args:
        model: any module; its training mode is left as it is.
        batch: anything ``loss_fn`` takes; on the model's device.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        policy: the quantizers.
        draws: number of draws of the quantized gradient, at least 2; the method "exact" makes none.
        seed: seed of all random numbers.
        backend: how products are computed, see :func:`fqtstats.prepare_`.
        batches: further minibatches, each like ``batch``, for the sampling variance.
        skip: layers to leave in full precision: a name pattern, several, or a predicate.
        bounds: whether to compute the end-to-end bound of every parameter's variance (:mod:`fqtstats.bounds`): some
            twenty passes over a part of the network for every layer and parameter below it.
        progress: called with (done, total).
        store: keeps unfinished measurements; a stored one is continued.
        method: "exact": what is known in closed form, from one backward pass; what only draws show is NaN.
            "montecarlo": draws, and every variance from them alone. "both".

    Returns:
        The result; ``.table`` has one row per trainable parameter and one for the total.

    Raises:
        InputError: bad input (one line that says what to do). If draws were finished before the error, the exception's
            ``partial_result`` holds what they show; the same for KeyboardInterrupt.
        UnsupportedError: a model that cannot be measured (compiled, data-parallel), or not bounded.
    """
    _check(method, draws)
    further = further_batches(batches)
    # One thread: the sums over large tensors made here depend on the thread count, too.
    with single_thread(), quantized(model, policy, skip, backend, seed) as handle:
        return measure_prepared(
            model,
            handle,
            batch,
            loss_fn,
            draws,
            seed,
            further,
            bounds=bounds,
            progress=progress,
            store=store,
            method=method,
        )


def _check(method: str, draws: int) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if method != "exact" and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 2):
        raise InputError(f"draws must be an integer of at least 2, got {draws!r}")


def measure_prepared(
    model: nn.Module,
    handle: Handle,
    batch: object,
    loss_fn: LossFunction,
    draws: int,
    seed: int,
    further: list[object],
    *,
    bounds: bool = False,
    progress: Progress | None = None,
    store: Store | None = None,
    method: str = "both",
) -> Result:
    """:func:`measure` on a model that is prepared already, at its handle's step; nothing of the model is changed.

    Args:
        model: the model.
        handle: its handle.
        batch, loss_fn, draws, bounds, progress, store, method: as in :func:`measure`.
        seed: of the forward pass and of the tests; the quantizers draw from the handle's.
        further: further minibatches.
    """
    drawn = method != "exact"
    before = 2 + draws if drawn else 1  # passes before the further batches
    total = before + len(further)
    tell = progress or (lambda done, total: None)
    with Session(model, handle, batch, loss_fn, seed) as session:
        names = list(session.parameters)
        incoming = IncomingGradients()
        gradient = [wide(g) for g in session.qat(incoming, incoming.weight_gradient)]
        tell(1, total)
        facts = _Facts.of(session, handle, incoming, gradient, handle.policy, method, seed)
        moments = _moments(session, facts, gradient, draws, store, tell, total) if drawn else None
    sampling = None
    if further:
        try:
            others = gradients(model, handle, further, loss_fn, seed, lambda i: tell(before + i, total))
            sampling = sampling_variance(names, gradient, others)
        except BaseException as error:
            _attach_result(error, facts, moments)
            raise
    result = _result(facts, moments, sampling)
    if bounds:
        try:
            found = _bounds(model, handle, batch, loss_fn, seed, lambda i, n: tell(total + i, total + n))
        except BaseException as error:
            error.partial_result = result  # type: ignore[attr-defined]
            raise
        result = with_bounds(result, found)
    return result


def _bounds(
    model: nn.Module, handle: Handle, batch: object, loss_fn: LossFunction, seed: int, tell: Progress
) -> Bounds:
    # In a session of its own: there, attention is computed in another way than the measured one may be.
    with Session(model, handle, batch, loss_fn, seed, recordable=True) as session:
        return end_to_end_bounds(session, seed=seed, progress=tell)


def _attach_result(error: BaseException, facts: _Facts, moments: ErrorMoments | None) -> None:
    if moments is None or len(moments) > 1:
        error.partial_result = _result(facts, moments, None)  # type: ignore[attr-defined]


def _moments(
    session: Session,
    facts: _Facts,
    gradient: list[torch.Tensor],
    draws: int,
    store: Store | None,
    tell: Progress,
    total: int,
) -> ErrorMoments:
    """The draws, those of a stored measurement among them."""
    calibration = errors_of(session, gradient, CALIBRATION_DRAW)
    tell(2, total)
    moments = ErrorMoments(list(session.parameters), gradient, calibration, Sketch(gradient, facts.seed))
    # The calibration errors depend on quantizers and seed, the gradient on all the rest.
    keeper = Keeper(store, digest([*gradient, *calibration]), moments)
    del calibration
    if len(moments) and bool(moments.own) != (facts.method == "both"):
        raise InputError(
            f"cannot resume with method {facts.method!r}: the saved draws were made with another one; give that one, "
            "or start anew in another folder"
        )
    done = 2 + len(moments)
    try:
        for index in range(draws):
            if index not in moments.norms:
                moments.add(index, *_draw(session, facts, gradient, index))
                done += 1
                tell(done, total)
                keeper.save()
    except BaseException as error:
        keeper.save(force=True)
        _attach_result(error, facts, moments)
        raise
    keeper.save(force=True)
    return moments


def _draw(
    session: Session, facts: _Facts, gradient: list[torch.Tensor], index: int
) -> tuple[list[torch.Tensor], Array, Array | None]:
    """Errors of one draw, the squared norms ``[2, P]`` of their parts from Q1 and Q2, and the exact mean of the first.

    The last is None with the method "montecarlo".
    """
    errors = errors_of(session, gradient, index)
    zeros, own = [0.0] * len(errors), facts.incoming.own
    if not _uses(facts.policy, "grad_weight"):
        parts = [zeros, [squared_norm(e) for e in errors]]
    elif not _uses(facts.policy, "grad_input"):
        parts = [[squared_norm(e) for e in errors], zeros]  # what arrives at the layers is the QAT gradient
    else:
        own = {}

        def observe(call: Call, weight_gradient: WeightGradient, parameters: Sequence[str]) -> None:
            add_own_variance(own, call, weight_gradient, parameters)

        # The same draw without Q1: what remains is Q2's part, and the difference Q1's. The gradients that arrive at the
        # layers are those of the draw, because Q1 does not change what travels on.
        upstream = errors_of(session, gradient, index, ("grad_input",), observe if facts.method == "both" else None)
        input_part = [squared_norm(e) for e in upstream]
        parts = [[squared_norm(u.sub_(e)) for u, e in zip(upstream, errors, strict=True)], input_part]
    if facts.method != "both":
        return errors, np.array(parts), None
    exact = [_own_variance(own, [row]) for row in facts.rows]
    # A parameter that no Q1 is known to round has no such part, unless the draw says otherwise.
    exact = [0.0 if math.isnan(value) and part == 0 else value for value, part in zip(exact, parts[0], strict=True)]
    return errors, np.array(parts), np.array(exact)


def _uses(policy: Policy, site: Site) -> bool:
    return any(getattr(p, site) is not None for p in (policy, *policy.overrides.values()))


@dataclass(frozen=True)
class _Row:
    """One trainable parameter: where it is, how large, which quantized layers hold it, and how it is rounded.

    ``held_as`` has the names of those layers and what the parameter is called there.
    """

    layer: str
    parameter: str
    quantized: bool
    numel: int
    grad_norm_sq: float
    held_as: tuple[tuple[str, str], ...]
    laws_of: tuple[str, ...]
    rounding: float


@dataclass(frozen=True)
class _Facts:
    """What the session knows beside the draws.

    ``rounding`` is relative: that of gradients on their way from layer to layer, which is coarse under autocast.
    """

    rows: list[_Row]
    incoming: IncomingGradients
    handle: Handle
    metadata: dict[str, object]
    policy: Policy
    method: str
    seed: int
    rounding: float

    @staticmethod
    def of(
        session: Session,
        handle: Handle,
        incoming: IncomingGradients,
        gradient: list[torch.Tensor],
        policy: Policy,
        method: str,
        seed: int,
    ) -> _Facts:
        holders: dict[int, list[tuple[str, str]]] = {}
        for name, module in handle.layers.items():
            for own, p in module.named_parameters():  # those of its quantizers among them
                holders.setdefault(id(p), []).append((name, own))
        shown: set[str] = set()
        rows = []
        for (name, p), g in zip(session.parameters.items(), gradient, strict=True):
            layer, _, parameter = name.rpartition(".")
            # A layer's quantizers are shown once, beside the first of its trainable parameters.
            held_as = tuple(holders.get(id(p), ()))
            laws_of = tuple(holder for holder, _ in held_as if holder not in shown)
            shown.update(laws_of)
            # Some units in the last place of the products, and half a unit of the dtype that the gradient is cast to.
            rounding = max(8 * torch.finfo(g.dtype).eps, torch.finfo(p.dtype).eps / 2)
            quantized = id(p) in holders
            rows.append(_Row(layer, parameter, quantized, p.numel(), squared_norm(g), held_as, laws_of, rounding))
        metadata = {**metadata_of(session, gradient), "kept": _kept(handle)}
        passed = max((torch.finfo(dtype).eps / 2 for dtype in handle.shared.dtypes), default=0.0)
        return _Facts(rows, incoming, handle, metadata, policy, method, seed, passed)

    def law(self, layers: Sequence[str], site: Site, quantity: str) -> float:
        """Sum of an exact quantity over the calls of some layers; NaN where no quantizer acts."""
        found = [self.incoming.laws[name, site] for name in layers if (name, site) in self.incoming.laws]
        return math.fsum(getattr(law, quantity) for law in found) if found else math.nan

    def few_roundings(self, rows: Sequence[_Row]) -> float:
        """``1 / K`` as :func:`fqtstats.estimators.exact.few_roundings`, for some parameters together."""
        own = np.nan_to_num([_own_variance(self.incoming.own, [row]) for row in rows])
        few = [max((self.incoming.few.get(layer, 0.0) for layer, _ in row.held_as), default=0.0) for row in rows]
        return float((own**2 * few).sum() / own.sum() ** 2) if own.sum() > 0 else 0.0


def _own_variance(own: Mapping[tuple[str, str], float], rows: Sequence[_Row]) -> float:
    """Exact variance of some parameters' gradients that comes from their layers' own Q1; NaN where there is none.

    Layers that share a parameter draw from streams of their own: their variances add up.
    """
    held = [key for row in rows for key in row.held_as if key in own]
    return math.fsum(own[key] for key in held) if held else math.nan


def _kept(handle: Handle) -> dict[str, object]:
    """Bytes that the layers keep for the backward pass."""
    layers = handle.kept
    names = ("activation", "activation_float32", "weight")
    return {
        **{name: sum(getattr(kept, name) for kept in layers.values()) for name in names},
        "layers": {layer: {name: getattr(kept, name) for name in names} for layer, kept in layers.items()},
    }


def _result(facts: _Facts, moments: ErrorMoments | None, sampling: Array | None) -> Result:
    rows = [
        {
            "layer": row.layer,
            "parameter": row.parameter,
            "quantized": row.quantized,
            "numel": row.numel,
            "grad_norm_sq": row.grad_norm_sq,
            **_laws(facts, row.laws_of),
            "variance_exact_own": _own_variance(facts.incoming.own, [row]),
            "sampling_variance": math.nan if sampling is None else sampling[p],
        }
        for p, row in enumerate(facts.rows)
    ]
    rows.append(
        {
            "layer": TOTAL,
            "parameter": "",
            "quantized": any(row.quantized for row in facts.rows),
            "numel": sum(row.numel for row in facts.rows),
            "grad_norm_sq": math.fsum(row.grad_norm_sq for row in facts.rows),
            **_laws(facts, sorted({layer for layer, _ in facts.incoming.laws})),
            "variance_exact_own": _own_variance(facts.incoming.own, facts.rows),
            "sampling_variance": math.nan if sampling is None else float(sampling.sum()),
        }
    )
    quantizer, bits = _label(facts.policy)
    found = [dict.fromkeys(_DRAWN, math.nan)] * len(rows) if moments is None else _from_draws(facts, moments)
    draws = 0 if moments is None else len(moments)
    table = pd.DataFrame([row | drawn for row, drawn in zip(rows, found, strict=True)])
    table = table.assign(quantizer=quantizer, bits=bits, draws=draws)
    about = dict(facts.metadata)
    configuration = {
        "quantizer": quantizer,
        "bits": bits,
        "policy": describe(facts.policy),
        "method": facts.method,
        "draws": draws,
        "loss": about.pop("loss"),
        "gradient_sha256": about.pop("gradient_sha256"),
        "kept": about.pop("kept"),
        "arithmetic": facts.handle.arithmetic,
    }
    metadata = {**about, "seeds": {"seed": facts.seed}, "configurations": [configuration], **provenance(ops.isa())}
    return Result(table, metadata)


def _from_draws(facts: _Facts, moments: ErrorMoments) -> list[dict[str, float]]:
    """What draws show, by column, for every row and the total."""
    norms = moments.stacked("norms")  # [n, P]
    sketches = moments.stacked("sketches")  # [n, W]
    parts = moments.stacked("parts")  # [n, 2, P]
    own = moments.stacked("own") if moments.own else np.full_like(norms, math.nan)  # [n, P]
    mean_norm_sq = moments.mean_norm_sq()
    sketch = moments.sketch
    assert sketch is not None
    # A mean error of an element up to this is the rounding of the arithmetic, not a bias.
    floors = moments.largest * [max(row.rounding, facts.rounding) for row in facts.rows]
    # What arrives at a layer is the same with and without its Q1, whose part has the rounding of the product alone.
    own_floors = moments.largest * [row.rounding for row in facts.rows]
    found = []
    gram_total = np.zeros((len(norms), len(norms)))
    for p, row in enumerate(facts.rows):
        buckets = sketches[:, sketch.slots[p].buckets]
        gram = buckets @ buckets.T
        gram_total += gram
        directions = [
            _directions(sketches[:, sketch.slots[p].directions], row.grad_norm_sq, row.numel, floors[p]),
            *(
                bias.Directions(
                    sums, floors[p] * np.sqrt(np.full(sums.shape[1], row.numel / max(1, sums.shape[1]))), True
                )
                for sums in sketch.row_and_column_sums(p, sketches)
            ),
        ]
        floor_sq = row.numel * floors[p] ** 2
        test = bias.bias_test(directions, gram, floor_sq, facts.seed)
        own_floor_sq = row.numel * own_floors[p] ** 2
        errors = _Errors(norms[:, p], parts[..., p : p + 1], own[:, p : p + 1], mean_norm_sq[p], gram, own_floor_sq)
        found.append(_estimates(facts, [row], errors, test))
    floor_sq, own_floor_sq = (
        math.fsum(row.numel * floor**2 for row, floor in zip(facts.rows, each, strict=True))
        for each in (floors, own_floors)
    )
    numel = sum(row.numel for row in facts.rows)
    components = np.sum([sketches[:, s.directions] for s in sketch.slots], axis=0)
    whole = math.fsum(row.grad_norm_sq for row in facts.rows)
    directions = [_directions(components, whole, numel, math.sqrt(floor_sq / numel))]
    test = bias.bias_test(directions, gram_total, floor_sq, facts.seed)
    errors = _Errors(norms.sum(axis=1), parts, own, float(mean_norm_sq.sum()), gram_total, own_floor_sq)
    found.append(_estimates(facts, facts.rows, errors, test))
    return found


def _directions(components: Array, grad_norm_sq: float, numel: int, floor: float) -> bias.Directions:
    """Components along ``g``, ``sign g`` and ``1``, with ``floor`` times their lengths as tolerance."""
    return bias.Directions(components, floor * np.sqrt([grad_norm_sq, numel, numel]), False)


@dataclass(frozen=True)
class _Errors:
    """What the draws show of one parameter's error, or of all together.

    Attributes:
        norms: ``||e_i||^2``, ``[n]``.
        parts: of each parameter, the parts from Q1 and Q2, ``[n, 2, p]``.
        own: of each parameter, the exact mean of the part from Q1, ``[n, p]``; NaN where it is not known.
        mean_norm_sq: squared norm of the mean error.
        gram: ``[n, n]``, of sketches.
        floor_sq: squared norm of the rounding of the products.
    """

    norms: Array
    parts: Array
    own: Array
    mean_norm_sq: float
    gram: Array
    floor_sq: float

    def own_ratio(self, few_roundings: float) -> tuple[intervals.MeanRatio, bool]:
        """Drawn over exact part from Q1, of those parameters of which both are known; and whether they agree."""
        known = np.isfinite(self.own).all(axis=0)
        drawn, exact = self.parts[:, 0, known].sum(axis=1), self.own[:, known].sum(axis=1)
        # The difference of two computed gradients has the rounding of both, which the closed form leaves out.
        slack = 2 * math.sqrt(_ratio(self.floor_sq, float(exact.mean())))
        ratio = intervals.mean_ratio(drawn, exact, extra=few_roundings, slack=slack)
        strict = intervals.mean_ratio(drawn, exact, extra=few_roundings)
        return ratio, slack < _SLACK and not strict.p_value < BIASED_BELOW

    def conditioned(self) -> Array:
        """``E ||e_i||^2`` given the gradients that arrive, ``[n]``."""
        conditioned: Array = self.parts[:, 1].sum(axis=1) + self.own.sum(axis=1)
        return conditioned


def _estimates(facts: _Facts, rows: Sequence[_Row], errors: _Errors, test: bias.BiasTest) -> dict[str, float]:
    norms, n = errors.norms, len(errors.norms)
    grad_norm_sq = math.fsum(row.grad_norm_sq for row in rows)
    ratio, agree = errors.own_ratio(facts.few_roundings(rows))
    p_value = ratio.p_value if _claims_unbiased(facts.policy, ("grad_weight",)) else math.nan
    variance, gain = intervals.sample_variance(norms, errors.mean_norm_sq), math.nan
    if not (_claims_unbiased(facts.policy) and test.p_value >= BIASED_BELOW):
        low, high = intervals.jackknife_interval(norms, errors.gram, variance)
    elif errors.own.sum() > 0 and agree:
        conditioned = errors.conditioned()
        variance, (low, high) = float(conditioned.mean()), intervals.t_interval(conditioned)
        # Equal numbers have a mean that may be rounded, and then a variance.
        gain = _ratio(float(norms.var(ddof=1)), float(conditioned.var(ddof=1)) if np.ptp(conditioned) > 0 else 0.0)
    else:
        low, high = intervals.t_interval(norms)
        # It is centred on the mean of the A_i; with few draws and elements the sample variance can lie outside.
        low, high = min(low, variance), max(high, variance)
    parts = errors.parts.mean(axis=0).sum(axis=1)
    return {
        # (||sum e||^2 - sum ||e||^2) / (n (n - 1)): every pair of different draws, hence unbiased.
        "bias_norm_sq": float((n**2 * errors.mean_norm_sq - norms.sum()) / (n * (n - 1))),
        "bias_p": test.p_value,
        "bias_p_directed": test.directed,
        "bias_p_cross_fit": test.cross_fit,
        "bias_p_sign_flip": test.sign_flip,
        "variance": variance,
        "variance_low": low,
        "variance_high": high,
        "variance_gain": gain,
        "variance_weight": parts[0],
        "variance_input": parts[1],
        "own_ratio": ratio.value,
        "own_ratio_low": ratio.low,
        "own_ratio_high": ratio.high,
        "own_ratio_p": p_value,
        "snr": _ratio(grad_norm_sq, variance),
        "sqrt3_margin": math.sqrt(_ratio(grad_norm_sq, 3 * variance)),
    }


def _ratio(numerator: float, denominator: float) -> float:
    if denominator > 0:
        return numerator / denominator
    return math.inf if numerator > 0 else math.nan


def _laws(facts: _Facts, layers: Sequence[str]) -> dict[str, float]:
    return {
        "q_input_variance": facts.law(layers, "grad_input", "variance"),
        "q_input_bound": facts.law(layers, "grad_input", "bound"),
        "q_weight_variance": facts.law(layers, "grad_weight", "variance"),
        "q_weight_bound": facts.law(layers, "grad_weight", "bound"),
        "q_input_grad_norm_sq": facts.law(layers, "grad_input", "grad_norm_sq"),
    }


def _gradient_quantizers(policy: Policy, sites: Sequence[Site]) -> list[object]:
    policies = (policy, *policy.overrides.values())
    return [q for p in policies for q in (getattr(p, site) for site in sites) if q is not None]


def _claims_unbiased(policy: Policy, sites: Sequence[Site] = SITES) -> bool:
    return all(getattr(q, "claim", None) == "unbiased" for q in _gradient_quantizers(policy, sites))


def _label(policy: Policy) -> tuple[str, int | None]:
    q = policy.grad_input
    if q is None:
        return policy.name, None
    return getattr(q, "name", "custom"), getattr(q, "bits", None)
