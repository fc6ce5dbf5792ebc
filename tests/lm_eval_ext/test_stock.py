"""Stock tasks of the harness, unchanged: multiple choice and rolling on made-up rows, `humaneval` on real data.

Run: `python -m pytest tests/lm_eval_ext/test_stock.py`
"""

import random
from pathlib import Path

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_ext.model import L2DLM
from tests.conftest import REPOSITORY, TRAINING_TEXT
from tests.integration.oracle import Oracle

TASKS = ["arc_easy", "wikitext"]


def made_up(path: str, name: str | None = None, **_):
    """Rows with the columns of ARC and of wikitext's documents."""
    generator = random.Random(0)
    words = " ".join(TRAINING_TEXT).split()
    if path.endswith("ai2_arc"):
        rows = [
            {
                "id": f"q{number}",
                "question": " ".join(generator.sample(words, 4 + number % 5)),
                "choices": {
                    "text": [" ".join(generator.sample(words, 1 + n)) for n in range(4)],
                    "label": list("ABCD"),
                },
                "answerKey": "ABCD"[number % 4],
            }
            for number in range(10)
        ]
    else:
        rows = [{"page": " ".join(generator.choices(words, k=20 + 7 * number)) + " ."} for number in range(5)]
    table = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({"train": table, "validation": table, "test": table})


@pytest.fixture(scope="module")
def manager():
    """All of the harness's tasks, indexed once."""
    return TaskManager()


@pytest.fixture(scope="module")
def scores(manager, l2d_dir, base_dir):
    """`scores(model)`: metrics of both tasks, and the answer to every request by task and document."""

    def run(model, backwards=False):
        if backwards:
            for method in ("loglikelihood", "loglikelihood_rolling"):
                setattr(model, method, reversed_requests(getattr(model, method)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets, "load_dataset", made_up)
            results = simple_evaluate(model, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
        metrics = {
            f"{task} {name}": value
            for task, values in results["results"].items()
            for name, value in values.items()
            if isinstance(value, float)
        }
        answers = [
            float(response[0][0] if task == "arc_easy" else response[0])
            for task in TASKS
            for sample in results["samples"][task]
            for response in sample["resps"]
        ]
        return metrics, answers

    def ours(batch_size, backwards=False, **arguments):
        model = L2DLM(pretrained=str(l2d_dir), device="cpu", batch_size=batch_size, max_length=64, **arguments)
        return run(model, backwards)

    ours.hf = lambda: run(HFLM(pretrained=str(base_dir), device="cpu", batch_size=4, max_length=64))
    return ours


def reversed_requests(method):
    """The same method of a model, given its requests in the opposite order."""
    return lambda requests: method(requests[::-1])[::-1]


def close(found, wanted, tolerance):
    """Whether both have equal answers, and metrics that follow from them."""
    assert found[1] == pytest.approx(wanted[1], abs=tolerance, rel=0)
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    return True


def test_budget_1_equals_hf(scores):
    assert len(scores.hf()[1]) == 10 * 4 + 5
    assert close(scores(4, diffusion_budget=1), scores.hf(), 1e-5)


def test_batches_and_order_do_not_matter_at_15(scores):
    wanted = scores(1, diffusion_budget=15)
    assert max(abs(a - b) for a, b in zip(wanted[1], scores.hf()[1], strict=True)) > 0.1
    for size in (3, 16):
        assert close(scores(size, diffusion_budget=15), wanted, 1e-4)
    assert close(scores("auto", diffusion_budget=15), wanted, 1e-4)
    assert close(scores(3, backwards=True, diffusion_budget=15), wanted, 1e-4)


def test_canonical_solutions_pass_humaneval(manager, shared_data, l2d_dir, tmp_path, monkeypatch):
    (tmp_path / "openai").symlink_to(Path(shared_data) / "openai")
    (tmp_path / "code_eval").symlink_to(REPOSITORY / "tests" / "integration" / "code_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    oracle = Oracle(lambda doc, _: doc["canonical_solution"], pretrained=str(l2d_dir), device="cpu", batch_size=16)
    results = simple_evaluate(
        oracle, tasks=["humaneval"], task_manager=manager, confirm_run_unsafe_code=True, bootstrap_iters=0
    )
    assert results["results"]["humaneval"]["pass@1,create_test"] == 1.0
    assert results["n-samples"]["humaneval"]["effective"] == 164
