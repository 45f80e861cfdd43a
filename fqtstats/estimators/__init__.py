"""Streaming estimators of bias and variance."""
