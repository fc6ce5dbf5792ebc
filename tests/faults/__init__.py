"""Faults: what happens when a run is killed, a disk is full, or a file is damaged or hostile."""
