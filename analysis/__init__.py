"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""

STUDIES = ("variance_bits", "codes", "heat_map", "bounds", "random_bits", "speed_memory")
"""The studies, in the order of the index ``analysis/README.md``."""
