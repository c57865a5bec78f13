"""Hardware: chips, device meshes, and runs of several processes."""
