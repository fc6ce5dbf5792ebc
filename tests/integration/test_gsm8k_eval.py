"""Stock `gsm8k`, 5-shot, on real data, offline, through the plain command: budget 1 is the base, 15 is recorded as 15.

Run: `python -m pytest tests/integration/test_gsm8k_eval.py` (about 40 seconds)
"""

from pathlib import Path

import pytest

from tests.integration.harness import Run, module, start
from tests.test_lm_eval_cli import harness

STOCK = ("--tasks", "gsm8k", "--num_fewshot", "5", "--limit", "3", "--gen_kwargs", "max_gen_toks=24")
WRITTEN = ("--log_samples", "--batch_size", "3")


@pytest.fixture(scope="module")
def runs(shared_data, l2d_dir, base_dir, tmp_path_factory) -> dict[str, Run]:
    """The base through `hf`, and the checkpoint at budgets 1 and 15, run where `datasets` finds the data's folders."""
    work = tmp_path_factory.mktemp("gsm8k")
    (work / "openai").symlink_to(Path(shared_data) / "openai")
    l2d = ("--model", "l2d", "--model_args")
    commands = {
        "hf": (module("lm_eval"), "--model", "hf", "--model_args", f"pretrained={base_dir}"),
        "1": (harness(), *l2d, f"pretrained={l2d_dir},diffusion_budget=1"),
        "15": (harness(), *l2d, f"pretrained={l2d_dir},diffusion_budget=15"),
    }
    started = {
        name: start(command, work / name, *model, *STOCK, *WRITTEN, cwd=work)
        for name, (command, *model) in commands.items()
    }
    return {name: run.finish() for name, run in started.items()}


def test_budget_1_gives_the_samples_of_hf(runs):
    assert len(runs["hf"].samples("gsm8k")) == 6  # 3 problems, 2 filters
    assert runs["1"].samples("gsm8k") == runs["hf"].samples("gsm8k")


def test_budget_15_spends_15_per_token(runs):
    ours = runs["15"].results["config"]["l2d"]
    assert ours["asked_per_token"] == {"mean": 15.0, "median": 15, "p95": 15, "max": 15}
    assert 3 <= ours["generated_tokens"] <= 3 * 24
    assert runs["15"].results["n-shot"]["gsm8k"] == 5
    assert "exact_match,strict-match" in runs["15"].results["results"]["gsm8k"]
