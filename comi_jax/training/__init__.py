"""A training run: its data, its steps, and its ends."""
