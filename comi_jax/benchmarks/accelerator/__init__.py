"""What ``benchmarks.device`` measures."""
