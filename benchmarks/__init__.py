"""Swarms and meshes on one machine: the demo, the measurements, the experiments."""
