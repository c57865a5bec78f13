"""A training run: data, steps, checkpoints, evaluation and shutdown."""
