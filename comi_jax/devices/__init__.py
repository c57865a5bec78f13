"""Machines: chips, meshes of devices, and processes that work together."""
