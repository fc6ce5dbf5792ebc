"""L2D in the lm-evaluation-harness: `lm_eval --model l2d`, or `python -m lm_eval_ext --model l2d`.

- `model`: the harness's model class, registered as `l2d`
- `arguments`: what `--model_args` may hold, validated without loading anything
- `record`: evaluations spent per token, for the results file
- `stopping`: ends a row's generation where its text reaches a stop string
- `bridge`: makes lm-eval 0.4.13, which has no plugins, find the model
- `tasks`: task definitions for `--include_path`

Nothing is imported here: this file runs whenever Python starts in an environment where the package is installed.
"""
