"""Questions answered with the instrument: one file each, run as ``python -m analysis.<name>``."""
