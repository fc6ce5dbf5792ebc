"""The leaderboard: from lm-eval's result files to one page, a table, and files for machines.

`python -m lm_eval_ext.leaderboard RESULTS_DIR... [--out DIR]` writes `leaderboard.html`, `.md`, `.csv` and `.json`.

- `files`, `schema`: finds and reads results and samples, checks them, names what it had to skip
- `methods`, `protocol`, `provenance`: what a run is, how it was measured, where it comes from
- `rows`: a model and setting with its scores; `comparisons`: paired tests against the base and the controls
- `board`: comparability, averages, controls
- `samples`, `plots`, `tables`, `page`: the drill-down, figures, Markdown, CSV and JSON, and the HTML page
- `paper_table`: the paper's table, with its figures (`published.yaml`)

Errors, intervals and tests are those of `l2d.statistics`.
Nothing is imported here.
"""
