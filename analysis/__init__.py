"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""

STUDIES = (
    "variance_bits",
    "plan",
    "profile",
    "recipes",
    "ordering",
    "native_training",
    "memory",
    "speed",
)
"""The studies, in the order of the index ``analysis/README.md``."""
