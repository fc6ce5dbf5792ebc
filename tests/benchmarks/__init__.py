"""Benchmarks: each measures a ratio to a peer within one run. `python -m tests.benchmarks.NAME --help`."""
