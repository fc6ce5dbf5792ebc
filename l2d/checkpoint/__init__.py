"""Checkpoints on disk and on a hub: what is checked before anything is loaded, and loading."""
