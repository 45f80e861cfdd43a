"""Oracle of the measured moments: plain numpy in float64 on stored raw gradients, written from the formulas alone."""

from __future__ import annotations

import numpy as np


def variance(raw):
    """Sum over elements of the sample variance of ``raw`` ``[n, M]``."""
    return raw.astype(np.float64).var(axis=0, ddof=1).sum()


def bias_norm_sq(errors):
    """Unbiased estimate of ``||E e||^2`` from ``errors`` ``[n, M]``: the mean of ``<e_i, e_k>`` over all pairs."""
    n = len(errors)
    gram = errors.astype(np.float64) @ errors.astype(np.float64).T
    return (gram.sum() - np.trace(gram)) / (n * (n - 1))


def mean_error(errors):
    """``[M]``."""
    return errors.astype(np.float64).mean(axis=0)


def covariance_trace(gradients):
    """Unbiased trace of the covariance matrix of ``gradients`` ``[k, M]``."""
    return np.trace(np.atleast_2d(np.cov(gradients.astype(np.float64), rowvar=False)))


def jackknife(errors):
    """Leave-one-out standard error of :func:`variance`."""
    n = len(errors)
    left_out = np.array([variance(np.delete(errors, i, axis=0)) for i in range(n)])
    return np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
