"""Checkpoints of a training run: atomic saving, exact resuming, full disks."""
