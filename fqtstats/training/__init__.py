"""Training: the short runs behind checkpoints, and the loop and recipes of low-precision training."""
