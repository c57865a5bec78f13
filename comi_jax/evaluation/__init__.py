"""Answers measured: predictions, metrics and tables."""
