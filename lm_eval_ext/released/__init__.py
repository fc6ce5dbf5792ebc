"""The evaluation protocol of the L2D release: the tasks `l2d_released_*` of the harness.

- `benchmarks`: the six benchmarks: rows, conversations, references, guidance classes
- `answers`, `math_answers`: what counts as an answer in a text, and when it is right
- `programs`: programs of a completion, how they are run (`runner`), pass@k
- `rendering`: chat templates, the release's own two among them, and the length filter
- `rows`: the data sets, with what replaces them where a hub cannot be reached
- `options`: what a run may choose, and what tasks set for `--model l2d`
- `task`: the harness's task class; `preflight`: what a run needs, checked before a model is loaded

Source: the release of Cetin et al., 2025 (SakanaAI/L2D, revision 456871e), followed to the letter, oddities included.
"""
