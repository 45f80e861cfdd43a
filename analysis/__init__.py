"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""

STUDIES = ("variance_bits", "tails", "bits_over_epochs", "convergence", "recipe_of_model")
"""The studies, in the order of the index ``analysis/README.md``."""
