"""Evaluation: predictions, metrics and tables."""
