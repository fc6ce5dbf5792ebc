"""Tests of the project; `python -m tests.parity DIR` compares the model with fixtures of the released code."""
