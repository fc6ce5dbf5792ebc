"""Training of L2D models and of the finetuning baselines that they are compared with.

- `train`: the entry point, `python -m training.train --config FILE.yaml`
- `config`, `checks`, `recipe`: what a recipe may say; what must hold in it; reading it
- `data`: data sets to token ids and labels, the same for every method: reading, columns, templates, mixtures
- `trainer`: `L2DTrainer`, which draws times and noise at response positions and computes the loss
- `draws`: times and noise of a batch, and how many evaluations go through the path at a time
- `optimization`: options of the optimizer step that the release has
- `budget_metrics`: accuracy at several budgets and generated responses during training
- `checkpointing`: atomic checkpoints, resuming, full disks, damaged files
- `planning`: the dry run, and estimates of memory and operations
- `console`: one line for all processes
"""
