"""The released protocol against fixtures of the release, and that a damaged fixture is noticed.

Run: `python -m pytest tests/test_evaluation_parity.py`. The fixtures lie in `../shared/golden/evaluation`; without them
the tests are skipped. `python -m tests.parity.evaluation DIR` compares any folder of the same format.
"""

import json
import re

import pytest

from lm_eval_ext.released.rows import rebuilt
from tests.conftest import SHARED
from tests.parity.evaluation.__main__ import compare, main

GOLDEN = SHARED / "golden" / "evaluation"
pytestmark = pytest.mark.skipif(not list(GOLDEN.glob("*.json")), reason=f"no fixtures in {GOLDEN}")


def test_every_fixture_passes(capsys):
    assert main([str(GOLDEN)]) == 0
    passed, failed = re.fullmatch(r"(\d+) passed, (\d+) failed", capsys.readouterr().out.splitlines()[-1]).groups()
    assert int(passed) > 2000 and int(failed) == 0


DAMAGE = {
    "verdict": ("math", lambda fixture: fixture["scoring"][0].update(correct=False)),
    "extracted": ("gsm8k", lambda fixture: fixture["scoring"][0].update(extracted="18.0")),
    "rendered, base_llama": ("mmlu", lambda fixture: fixture["prompts"][0]["rendered"].update(base_llama="### ")),
    "messages": ("gsm8k", lambda fixture: fixture["prompts"][1]["messages"].pop()),
    "kept": ("mmlu_pro", lambda fixture: fixture["prompts"][0]["tokens_smollm2"].update(prompt=2048)),
    "raises": ("math", lambda fixture: fixture["crashes"][0].update(raises="KeyError")),
    "passed": ("humaneval_openai", lambda fixture: fixture["scoring"][0].update(correct=None)),
    "program": ("mbpp", lambda fixture: fixture["scoring"][0].update(program="pass")),
    "metrics": ("mmlu", lambda fixture: fixture["aggregate"].update({"mmlu/accuracy": 0.5})),
    "settings": ("mbpp", lambda fixture: fixture["settings"].update(generation_max_len=256)),
    "guidance": ("mmlu", lambda fixture: fixture["prompts"][0]["guidance"].update(category="coding")),
    "sampler": ("settings", lambda fixture: fixture["sampler"]["velocity_times"].reverse()),
    "model": ("settings", lambda f: f["by_model"]["qwen_2.5_7b_instruct_lad.cfg"]["benchmark"].update(seed=0)),
}


@pytest.mark.parametrize("quantity", DAMAGE)
def test_a_damaged_fixture_fails(quantity, tmp_path):
    name, damage = DAMAGE[quantity]
    fixture = json.loads((GOLDEN / f"{name}.json").read_text())
    for key in ("scoring", "prompts"):  # a few, for speed; the aggregate is over all of a text task
        if key in fixture and not (quantity == "metrics" and key == "scoring"):
            fixture[key] = fixture[key][:6]
    if quantity != "metrics" and isinstance(fixture.get("aggregate"), dict):
        del fixture["aggregate"]
    damage(fixture)
    (tmp_path / f"{name}.json").write_text(json.dumps(fixture))
    failed = [result for result in compare(tmp_path / f"{name}.json") if result.status == "FAIL"]
    assert {result.quantity for result in failed} == {quantity} and len(failed) <= 2


def test_unknown_files_and_empty_folders(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no NAME.json" in capsys.readouterr().err
    (tmp_path / "tea.json").write_text('{"task": "tea"}')
    assert main([str(tmp_path)]) == 1
    assert "the task 'tea' is not one of" in capsys.readouterr().out


def test_rebuilt_rows_are_those_of_the_fixtures():
    fixture = json.loads((GOLDEN / "humaneval_instruct.json").read_text())
    rows = [*fixture["scoring_docs"].values(), *(prompt["doc"] for prompt in fixture["prompts"])]
    for row in rows:
        columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        assert rebuilt({column: row[column] for column in columns}) == row
