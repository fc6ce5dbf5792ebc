"""Does more compute help? Training options against each other and against controls: `make study`, or
`python -m training.studies.compute --out FOLDER`.

* `tasks`: products, and a machine whose depth matters; rows, splits, tokenizers
* `prepare`: writes the rows, trains the tiny bases
* `plan`: methods, recipes and steps; all training through `python -m training.train`
* `evaluate`: everything that is asked of one checkpoint: greedy and sampled exact match at all budgets, and at one
  evaluation at the time that validation data choose
* `scores`: what was measured, read back; means and paired differences over problems and over trainings
* `report`, `plot`: tables, verdicts corrected for their number, `study.md`, `results.json` and `study.png`
* `compute`: the command; steps, logs and the record of complete ones are those of the demo
"""
