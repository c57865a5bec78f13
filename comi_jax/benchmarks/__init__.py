"""Benchmarks, each a command: ``python -m comi_jax.benchmarks.NAME``."""
