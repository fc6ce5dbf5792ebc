"""L2D in the lm-evaluation-harness: `lm_eval --model l2d`, or `python -m lm_eval_ext --model l2d`.

- `model`: the harness's model class, registered as `l2d`
- `arguments`: what `--model_args` may hold, validated without loading anything; `argument_table`: the same as a table
- `generation_names`: what generation kwargs may hold
- `requests`: how requests are answered: generation, scoring, search over tokens, guidance by task, the cost of each
- `harness`: what lm-eval lacks: plugins, checks before it reads its tasks, compute files, safe response caches
- `tasks`: task definitions, the paper's protocol among them
- `sweep`: a grid of settings, resumed where it was stopped
- `leaderboard`: reports over results

Nothing is imported here: this file runs whenever Python starts in an environment where the package is installed.
"""
