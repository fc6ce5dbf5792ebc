"""Where we meet lm-eval itself: registration, checks before its start, its files and its cache."""
