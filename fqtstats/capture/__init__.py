"""Capturing QAT and FQT gradients of the same minibatch."""

from fqtstats.capture.record import IncomingGradients, LayerLaw, add_own_variance
from fqtstats.capture.session import LossFunction, Session, trainable_parameters

__all__ = ["IncomingGradients", "LayerLaw", "LossFunction", "Session", "add_own_variance", "trainable_parameters"]
