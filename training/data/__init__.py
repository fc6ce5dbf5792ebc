"""Training data: loading, mixtures, and from rows to tokens and labels."""
