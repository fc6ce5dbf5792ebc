"""L2D in the lm-evaluation-harness: `lm_eval --model l2d`, or `python -m lm_eval_ext --model l2d`.

- `model`: the harness's model class, registered as `l2d`; `generating` and `scoring` are its two kinds of requests
- `arguments`: what `--model_args` may hold, validated without loading anything; `argument_table`: the same as a table
- `generation_requests`, `token_search`, `stopping`: settings of a request, search over its tokens, where its text stops
- `guidance`: the guidance class of a task
- `record`, `compute_files`: evaluations spent per token and per request, in and beside the results file
- `cache`: keeps response caches of different settings apart
- `early`: checks the command line of `--model l2d` before the harness reads its tasks
- `bridge`: makes lm-eval 0.4.13, which has no plugins, find the model and our tasks
- `tasks`: task definitions, the paper's protocol among them
- `sweep`: a grid of settings, resumed where it was stopped
- `leaderboard`: reports over results

Nothing is imported here: this file runs whenever Python starts in an environment where the package is installed.
"""
