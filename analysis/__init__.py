"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""

STUDIES = (
    "variance_bits",
    "profile",
    "plan",
    "recipes",
    "ordering",
    "native_training",
    "exact",
    "battery",
    "blackbox",
    "verdicts",
    "generator",
    "agp_bound",
    "regret",
    "speed",
    "memory",
)
"""The studies, in the order of the index ``analysis/README.md``."""
