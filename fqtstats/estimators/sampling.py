"""Sampling variance: how much the gradient changes from minibatch to minibatch.

``batches`` are compared by their QAT gradients, which no quantizer's noise enters, so the between-batch component holds
no quantization part that would have to be taken out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fqtstats.errors import InputError
from fqtstats.estimators.moments import ErrorMoments

__all__ = ["sampling_variance"]


def sampling_variance(
    names: Sequence[str], first: Sequence[torch.Tensor], others: Iterable[list[torch.Tensor]]
) -> npt.NDArray[np.float64]:
    """Trace of the covariance matrix of one minibatch's gradient, per parameter, ``[P]``.

    Args:
        names: names of the parameters.
        first: gradient of the first batch.
        others: gradients of the further batches, made one at a time; the lists are consumed.

    Raises:
        InputError: there is no further batch.
    """
    moments: ErrorMoments | None = None
    for index, deviation in enumerate(others):
        # Deviations from the first batch's gradient; its own, zero, is the last one added.
        for place, g0 in enumerate(first):
            # Not in place: where parameters are added up, autograd gives them one tensor.
            deviation[place] = deviation[place] - g0
        if moments is None:
            moments = ErrorMoments(names, first, deviation, sketch=None)
        moments.add(index, deviation)
    if moments is None:
        raise InputError("expected at least one further batch for the sampling variance, got none")
    moments.add(len(moments.norms), [torch.zeros_like(g) for g in first])
    n = len(moments.norms)
    norms = moments.stacked("norms").sum(axis=0)
    trace: npt.NDArray[np.float64] = np.maximum(0.0, (norms - n * moments.mean_norm_sq()) / (n - 1))
    return trace
