"""A stand-in for the hub's `code_eval` metric, so that code tasks run offline: pass@k of programs against their tests.

Found by `evaluate.load("code_eval")` where the current folder holds this one.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import comb

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    """pass@k, the unbiased estimate."""

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="pass@k", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references, k=(1, 10, 100), **_):
        with ThreadPoolExecutor(4) as pool:
            jobs = [[f"{code}\n{test}" for code in codes] for codes, test in zip(predictions, references, strict=True)]
            passed = [list(pool.map(passes, programs)) for programs in jobs]
        scores = {}
        for size in k:
            if all(len(results) >= size for results in passed):
                values = [1 - comb(len(r) - sum(r), size) / comb(len(r), size) for r in passed]
                scores[f"pass@{size}"] = sum(values) / len(values)
        return scores, passed


def passes(program: str) -> bool:
    """Whether `program` ends without an error in an interpreter of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-"], input=program, text=True, capture_output=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
