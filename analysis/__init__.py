"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""

STUDIES = (
    "variance_bits",
    "bits_over_epochs",
    "tails",
    "codes",
    "heat_map",
    "profile",
    "plan",
    "bounds",
    "convergence",
    "recipes",
    "recipe_of_model",
    "ordering",
    "native_training",
    "random_bits",
    "exact",
    "battery",
    "blackbox",
    "verdicts",
    "generator",
    "agp_bound",
    "regret",
    "speed",
    "memory",
    "speed_memory",
)
"""The studies, in the order of the index ``analysis/README.md``."""
