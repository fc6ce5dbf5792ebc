"""What the drill-down shows: every document's prompt, target, answers and scores, packed into the page.

- `pack_samples`: by task, documents and all rows' answers, as base64 of gzipped JSON

Prompts are stored once per task. The page unpacks a task when a reader opens it, so it opens as fast with 20,000
samples as with 20.
"""

import base64
import gzip
import json
from typing import Any

from lm_eval_ext.leaderboard.board import Board
from lm_eval_ext.leaderboard.files import COSTS, Sample
from lm_eval_ext.leaderboard.rows import Cell, by_document


def pack_samples(board: Board) -> dict[str, str]:
    """By task, `{"documents": [[prompt, target]...], "rows": {number: row}}`, packed.

    A row is `{"base": number, "lower": whether less is better, "answers": [...]}`; an answer is
    `[document, answer, score, cost]`; cost is an object of `files.COSTS` where the run recorded it, else `null`.
    """
    packed = {}
    for task in board.tasks:
        content = _task_content(board, task)
        if content["rows"]:
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            packed[task] = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
    return packed


def _task_content(board: Board, task: str) -> dict[str, Any]:
    documents: dict[tuple[str, int, str], int] = {}
    texts: list[list[str]] = []
    rows = {}
    for row in board.rows:
        cell = row.cells.get(task)
        if cell is None or not cell.samples:
            continue
        answers = []
        for key, sample in by_document(cell.samples).items():
            number = documents.setdefault((*key, sample.prompt), len(texts))
            if number == len(texts):
                texts.append([sample.prompt, sample.target])
            answers.append([number, sample.answer, sample.scores.get(cell.measure.metric), _cost(cell, sample)])
        base = cell.comparisons["base"].row.number if "base" in cell.comparisons else None
        rows[row.number] = {"base": base, "lower": not cell.measure.higher_is_better, "answers": answers}
    return {"documents": texts, "rows": rows}


def _cost(cell: Cell, sample: Sample) -> dict[str, Any] | None:
    cost = cell.costs.get(sample.doc_hash)
    return cost and {**{name: int(cost[name]) for name in COSTS[:-1]}, "seconds": round(cost["seconds"], 4)}
