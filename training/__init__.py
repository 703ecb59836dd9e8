"""What surrounds the training loop: optimizers, checkpoints, autotuning, groups of seeds, and the report of a run."""
