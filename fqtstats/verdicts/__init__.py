"""Decisions: unbiased or not, at a stated error rate."""
