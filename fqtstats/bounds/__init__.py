"""End-to-end bounds on the variance of a quantized gradient (arXiv 2010.14298, Theorem 2)."""

from fqtstats.bounds.causes import with_bounds
from fqtstats.bounds.theorem import Bounds, Noise, ParameterBound, Term, end_to_end_bounds

__all__ = ["Bounds", "Noise", "ParameterBound", "Term", "end_to_end_bounds", "with_bounds"]
