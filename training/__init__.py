"""Training of L2D models and of the finetuning baselines that they are compared with.

- `train`: the entry point, `python -m training.train --config FILE.yaml`
- `config`, `checks`, `recipe`: what a recipe may say; what must hold in it; reading it
- `data`: data sets to token ids and labels, the same for every method
- `mixture`: subsets, excluded rows, and an example per assistant turn
- `trainer`: `L2DTrainer`, which draws times and noise at response positions and computes the loss
- `noising`, `pieces`: what a batch is asked, and how many queries at a time
- `budgets`: accuracy at several budgets and generated responses during training
- `saving`: atomic checkpoints, and a clean stop on SIGTERM
- `checkpoints`: which folders may be written to, and from which a run may resume
- `dry_run`: parameters, memory, examples and schedule of a recipe, without weights
- `card`: the model card
- `console`, `writing`, `checksums`: one line for all processes; full disks; damaged files
"""
