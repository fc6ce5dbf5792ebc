"""What does L2D do to a real model? `make real BASE=...`, or
`python -m training.studies.real --base BASE --out FOLDER [--minutes M]`.

* `data`: GSM8K as questions of a user and answers of an assistant; how many supervised tokens there are
* `plan`: methods, recipes and steps; all training through `python -m training.train`

All trainings see the same rows in the same order, so equally many supervised tokens. The command continues where it
stopped, a training from its last checkpoint. Steps, logs and the record of complete ones are those of the demo.
"""
