"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""

STUDIES = ("variance_bits", "codes", "random_bits", "speed_memory")
"""The studies, in the order of the index ``analysis/README.md``."""
