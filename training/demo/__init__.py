"""A small real run of everything: `make demo`, or `python -m training.demo --out FOLDER`.

* `data`: two skills of arithmetic, a split, a character tokenizer
* `base`: a tiny Llama, trained from scratch on both skills and stopped half-way
* `plan`: the steps of the demo as commands: data, base, three trainings through `python -m training.train`, and
  evaluations through `lm_eval`
* `runner`: runs steps two at a time, shows progress, remembers what is complete
* `workspace`: the output folder: what may be written there, and what an interrupted run left complete
* `report`, `plot`: reads the answers that the harness recorded into a table, sentences and a figure
* `timing`: how much processor time a training step of each method takes
"""
