"""The leaderboard: from lm-eval's result files to one page, a table, and files for machines.

`python -m lm_eval_ext.leaderboard RESULTS_DIR... [--out DIR]` writes `leaderboard.html`, `.md`, `.csv` and `.json`.

- `files`: finds and reads results and samples; names what it had to skip
- `schema`: what a results file must look like
- `methods`: what a run is: base, L2D, finetuning or a control, and which base it belongs to
- `statistics`: the paired test, clustered where documents are grouped
- `board`: rows, cells, comparability, differences to the base, averages
- `samples`: what the drill-down shows, packed
- `plots`: figures as inline SVG
- `tables`: Markdown, CSV and JSON
- `page`: the HTML page, from `page.html`, `page.css` and `page.js`

Nothing is imported here.
"""
