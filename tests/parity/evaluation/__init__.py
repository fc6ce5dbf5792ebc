"""Parity with the released evaluation: `python -m tests.parity.evaluation DIR`.

- `prompts`: conversations, rendered prompts, kept and dropped problems, guidance
- `scoring`: extraction, verdicts, programs and their runs, metrics
- `settings`: lengths, sampling, shots, sampler, settings by model
"""
