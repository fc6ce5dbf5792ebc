"""The commands of `python -m l2d` and what they share."""
