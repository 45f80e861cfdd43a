"""Measuring one policy on one minibatch: from the captured gradients to the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from fqtstats import ops
from fqtstats.capture import IncomingGradients, LossFunction, Session
from fqtstats.determinism import single_thread
from fqtstats.errors import InputError
from fqtstats.estimators import bias, intervals
from fqtstats.estimators.moments import ErrorMoments, squared_norm
from fqtstats.estimators.sampling import sampling_variance
from fqtstats.estimators.sketch import Sketch
from fqtstats.layers.state import SITES, Site
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
    gradients,
    metadata_of,
    wide,
)
from fqtstats.policy import Policy
from fqtstats.provenance import provenance
from fqtstats.results import TOTAL, Result

__all__ = ["Arrays", "Progress", "Store", "measure"]

BIASED_BELOW = 0.01
"""Below this bias p-value the variance interval no longer assumes that there is no bias."""


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
    progress: Progress | None = None,
    store: Store | None = None,
) -> Result:
    """Bias and variance of the quantized gradient (FQT) around the full-precision one of the same network (QAT).

    One forward pass of the quantized network, then one backward pass for the QAT gradient and two per draw: one with
    both gradient quantizers, one with the same numbers but without the weight-gradient quantizers, which tells their
    contributions apart. The model is not changed. Results are bit-identical on any number of threads.

    Args:
        model: any module; its training mode is left as it is.
        batch: anything ``loss_fn`` takes; on the model's device.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        policy: the quantizers.
        draws: number of draws of the quantized gradient, at least 2.
        seed: seed of all random numbers.
        backend: how products are computed, see :func:`fqtstats.prepare_`.
        batches: further minibatches, for the sampling variance.
        skip: layers to leave in full precision: a name pattern, several, or a predicate.
        progress: called with (done, total).
        store: keeps unfinished measurements; a stored one is continued.

    Returns:
        The result; ``.table`` has one row per trainable parameter and one for the total.

    Raises:
        InputError: bad input (one line that says what to do). If draws were finished before the error, the exception's
            ``partial_result`` holds what they show; the same for KeyboardInterrupt.
        UnsupportedError: a model that cannot be measured (compiled, data-parallel).
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise InputError(f"draws must be an integer of at least 2, got {draws!r}")
    further = [] if batches is None else list(batches)
    total = 2 + len(further) + draws
    tell = progress or (lambda done, total: None)
    # One thread: the sums over large tensors made here depend on the thread count, too.
    with single_thread(), quantized(model, policy, skip, backend, seed) as handle:
        with Session(model, handle, batch, loss_fn, seed) as session:
            names = list(session.parameters)
            incoming = IncomingGradients()
            gradient = [wide(g) for g in session.qat(incoming, incoming.weight_gradient)]
            tell(1, total)
            calibration = errors_of(session, gradient, CALIBRATION_DRAW)
            tell(2, total)
            moments = ErrorMoments(names, gradient, calibration, Sketch(gradient, seed))
            # The calibration errors depend on quantizers and seed, the gradient on all the rest.
            keeper = Keeper(store, digest([*gradient, *calibration]), moments)
            del calibration
            facts = _Facts.of(session, handle, incoming, gradient)
            done = 2 + len(moments.norms)
            try:
                for index in range(draws):
                    if index not in moments.norms:
                        errors, parts = _draw(session, gradient, policy, index)
                        moments.add(index, errors, parts)
                        del errors
                        done += 1
                        tell(done, total)
                        keeper.save()
            except BaseException as error:
                keeper.save(force=True)
                _attach_result(error, facts, moments, policy, seed)
                raise
            keeper.save(force=True)
        sampling = None
        if further:
            try:
                others = gradients(model, handle, further, loss_fn, seed, lambda i: tell(2 + draws + i, total))
                sampling = sampling_variance(names, gradient, others)
            except BaseException as error:
                _attach_result(error, facts, moments, policy, seed)
                raise
        return _result(facts, moments, sampling, policy, seed)


def _attach_result(error: BaseException, facts: _Facts, moments: ErrorMoments, policy: Policy, seed: int) -> None:
    if len(moments.norms) > 1:
        error.partial_result = _result(facts, moments, None, policy, seed)  # type: ignore[attr-defined]


def _draw(
    session: Session, gradient: list[torch.Tensor], policy: Policy, index: int
) -> tuple[list[torch.Tensor], npt.NDArray[np.float64]]:
    """Errors of one draw, and the squared norms ``[2, P]`` of their parts from Q1 and Q2."""
    errors = errors_of(session, gradient, index)
    if not _uses(policy, "grad_weight"):
        input_part = [squared_norm(e) for e in errors]
        return errors, np.array([[0.0] * len(errors), input_part])
    if not _uses(policy, "grad_input"):
        return errors, np.array([[squared_norm(e) for e in errors], [0.0] * len(errors)])
    # The same draw without Q1: what remains is Q2's part, and the difference Q1's.
    upstream = errors_of(session, gradient, index, ("grad_input",))
    input_part = [squared_norm(e) for e in upstream]
    weight_part = [squared_norm(u.sub_(e)) for u, e in zip(upstream, errors, strict=True)]
    return errors, np.array([weight_part, input_part])


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
    """What the session knows beside the draws."""

    rows: list[_Row]
    incoming: IncomingGradients
    handle: Handle
    metadata: dict[str, object]

    @staticmethod
    def of(session: Session, handle: Handle, incoming: IncomingGradients, gradient: list[torch.Tensor]) -> _Facts:
        holders: dict[int, list[tuple[str, str]]] = {}
        for name, module in handle.layers.items():
            for own, p in module.named_parameters(recurse=False):
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
        return _Facts(rows, incoming, handle, metadata)

    def law(self, layers: Sequence[str], site: Site, quantity: str) -> float:
        """Sum of an exact quantity over the calls of some layers; NaN where no quantizer acts."""
        found = [self.incoming.laws[name, site] for name in layers if (name, site) in self.incoming.laws]
        return math.fsum(getattr(law, quantity) for law in found) if found else math.nan

    def own_variance(self, rows: Sequence[_Row]) -> float:
        """Exact variance of some parameters' gradients that comes from their layers' own Q1; NaN where there is none.

        Layers that share a parameter draw from streams of their own: their variances add up.
        """
        held = [key for row in rows for key in row.held_as if key in self.incoming.own]
        return math.fsum(self.incoming.own[key] for key in held) if held else math.nan


def _kept(handle: Handle) -> dict[str, object]:
    """Bytes that the layers keep for the backward pass."""
    layers = handle.kept
    names = ("activation", "activation_float32", "weight")
    return {
        **{name: sum(getattr(kept, name) for kept in layers.values()) for name in names},
        "layers": {layer: {name: getattr(kept, name) for name in names} for layer, kept in layers.items()},
    }


def _result(
    facts: _Facts, moments: ErrorMoments, sampling: npt.NDArray[np.float64] | None, policy: Policy, seed: int
) -> Result:
    norms = moments.stacked("norms")  # [n, P]
    sketches = moments.stacked("sketches")  # [n, W]
    parts = moments.stacked("parts").mean(axis=0)  # [2, P]
    mean_norm_sq = moments.mean_norm_sq()
    sketch = moments.sketch
    assert sketch is not None
    # A mean error of an element up to this is the rounding of the arithmetic, not a bias.
    floors = moments.largest * [row.rounding for row in facts.rows]
    claimed = _claims_unbiased(policy)
    rows = []
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
        test = bias.bias_test(directions, gram, row.numel * floors[p] ** 2, seed)
        estimates = _estimates(norms[:, p], mean_norm_sq[p], gram, test, claimed, row.grad_norm_sq)
        rows.append(
            {
                "layer": row.layer,
                "parameter": row.parameter,
                "quantized": row.quantized,
                "numel": row.numel,
                **estimates,
                **_laws(facts, row.laws_of),
                "variance_weight": parts[0, p],
                "variance_input": parts[1, p],
                "variance_exact_own": facts.own_variance([row]),
                "sampling_variance": math.nan if sampling is None else sampling[p],
            }
        )
    whole, numel = math.fsum(row.grad_norm_sq for row in facts.rows), sum(row.numel for row in facts.rows)
    floor_sq = math.fsum(row.numel * floor**2 for row, floor in zip(facts.rows, floors, strict=True))
    components = np.sum([sketches[:, s.directions] for s in sketch.slots], axis=0)
    directions = [_directions(components, whole, numel, math.sqrt(floor_sq / numel))]
    test = bias.bias_test(directions, gram_total, floor_sq, seed)
    rows.append(
        {
            "layer": TOTAL,
            "parameter": "",
            "quantized": any(row.quantized for row in facts.rows),
            "numel": numel,
            **_estimates(norms.sum(axis=1), float(mean_norm_sq.sum()), gram_total, test, claimed, whole),
            **_laws(facts, sorted({layer for layer, _ in facts.incoming.laws})),
            "variance_weight": parts[0].sum(),
            "variance_input": parts[1].sum(),
            "variance_exact_own": facts.own_variance(facts.rows),
            "sampling_variance": math.nan if sampling is None else float(sampling.sum()),
        }
    )
    quantizer, bits = _label(policy)
    table = pd.DataFrame(rows).assign(quantizer=quantizer, bits=bits)
    about = dict(facts.metadata)
    configuration = {
        "quantizer": quantizer,
        "bits": bits,
        "policy": describe(policy),
        "draws": len(norms),
        "loss": about.pop("loss"),
        "gradient_sha256": about.pop("gradient_sha256"),
        "kept": about.pop("kept"),
        "arithmetic": facts.handle.arithmetic,
    }
    metadata = {**about, "seeds": {"seed": seed}, "configurations": [configuration], **provenance(ops.isa())}
    return Result(table, metadata)


def _directions(components: npt.NDArray[np.float64], grad_norm_sq: float, numel: int, floor: float) -> bias.Directions:
    """Components along ``g``, ``sign g`` and ``1``, with ``floor`` times their lengths as tolerance."""
    return bias.Directions(components, floor * np.sqrt([grad_norm_sq, numel, numel]), False)


def _estimates(
    norms: npt.NDArray[np.float64],
    mean_norm_sq: float,
    gram: npt.NDArray[np.float64],
    test: bias.BiasTest,
    claimed_unbiased: bool,
    grad_norm_sq: float,
) -> dict[str, float | int]:
    n = len(norms)
    variance = intervals.sample_variance(norms, mean_norm_sq)
    if claimed_unbiased and test.p_value >= BIASED_BELOW:
        low, high = intervals.t_interval(norms)
        # It is centred on the mean of the A_i; with few draws and elements the sample variance can lie outside.
        low, high = min(low, variance), max(high, variance)
    else:
        low, high = intervals.jackknife_interval(norms, gram, variance)
    return {
        "grad_norm_sq": grad_norm_sq,
        # (||sum e||^2 - sum ||e||^2) / (n (n - 1)): every pair of different draws, hence unbiased.
        "bias_norm_sq": float((n**2 * mean_norm_sq - norms.sum()) / (n * (n - 1))),
        "bias_p": test.p_value,
        "bias_p_directed": test.directed,
        "bias_p_cross_fit": test.cross_fit,
        "bias_p_sign_flip": test.sign_flip,
        "variance": variance,
        "variance_low": low,
        "variance_high": high,
        "snr": _ratio(grad_norm_sq, variance),
        "sqrt3_margin": math.sqrt(_ratio(grad_norm_sq, 3 * variance)),
        "draws": n,
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


def _gradient_quantizers(policy: Policy) -> list[object]:
    policies = (policy, *policy.overrides.values())
    return [q for p in policies for q in (getattr(p, site) for site in SITES) if q is not None]


def _claims_unbiased(policy: Policy) -> bool:
    return all(getattr(q, "claim", None) == "unbiased" for q in _gradient_quantizers(policy))


def _label(policy: Policy) -> tuple[str, int | None]:
    q = policy.grad_input
    if q is None:
        return policy.name, None
    return getattr(q, "name", "custom"), getattr(q, "bits", None)
