"""What does L2D do to a real model? `make real BASE=...`, or
`python -m training.studies.real --base BASE --out FOLDER [--minutes M]`.

* `data`: GSM8K as questions of a user and answers of an assistant; how many supervised tokens there are
* `plan`: methods, recipes and steps; all training through `python -m training.train`
* `evaluate`: scores of one model at all budgets, with their cost; `equal`: of a checkpoint at equal processor time
* `elsewhere`: answers to GSM8K and MMLU by `lm_eval`, and the loss of HumanEval; slow, and last
* `tidy`: what a finished training needs no more
* `scores`: what was measured, read back, and its statistics; `report`, `plot`: `real.md`, `results.json`, `real.png`

All trainings see the same rows in the same order, so equally many supervised tokens. The command continues where it
stopped, a training from its last checkpoint. Steps, logs and the record of complete ones are those of the demo.
"""
