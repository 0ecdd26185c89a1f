"""Training and validation: typed options, the loop, checkpoints, and what a run leaves behind."""
