"""The tasks `l2d_released_*`: prompts, lengths, scores and refusals on made-up rows with the real data sets' columns.

Run: `python -m pytest tests/lm_eval_ext/test_released.py`. `tests/test_evaluation_parity.py` compares the protocol with
fixtures of the release.
"""

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_ext.arguments import UsageError
from lm_eval_ext.released.answers import judge
from lm_eval_ext.released.benchmarks import BENCHMARKS
from lm_eval_ext.released.math_answers import equal, extract
from lm_eval_ext.released.programs import pass_at_k, pass_rates, passes
from lm_eval_ext.released.rows import load
from lm_eval_ext.released.task import ReleasedTask
from tests.conftest import REPOSITORY
from tests.integration.oracle import Oracle

TASKS = ["gsm8k", "math", "humaneval", "mbpp", "mmlu", "mmlu_pro"]
FOLDER = REPOSITORY / "lm_eval_ext" / "tasks" / "released"
LONG = "1 + 2 " * 700


def made_up(path: str, name: str | None = None, **_):
    """Rows with the columns of the real data sets; every second problem says what its answer is to be in `right`."""
    numbers = range(12)
    if path == "openai/gsm8k":
        rows = [dict(question=f"{n} + 1?", answer=f"It is {n + 1}.\n#### {n + 1}") for n in numbers]
        test = [{**r, "right": f"#### {n + 1},"} for n, r in enumerate(rows)]
        test[2]["question"] = LONG
        splits = {"train": rows, "test": test}
    elif path == "DigitalLearningGmbH/MATH-lighteval":
        rows = [dict(problem=f"Half of {n}?", solution=f"\\boxed{{\\frac{{{n}}}{{2}}}}") for n in numbers]
        test = [{**row, "right": f"\\boxed{{{n}/2}}"} for n, row in enumerate(rows)]
        test[0]["right"] = "\\boxed{\\sqrt}"  # the release aborts
        splits = {"train": rows[::-1], "test": test}
    elif path == "codeparrot/instructhumaneval":
        rows = [
            dict(prompt=f'def plus_{n}(x):\n    """Add {n}."""\n', canonical_solution=f"    return x + {n}\n",
                 context=f"\n\ndef plus_{n}(x): \n", instruction=f"Add {n}.", entry_point=f"plus_{n}",
                 test=f"def check(f):\n    assert f(1) == {n + 1}\n", right=f"\n    return x + {n}\n")
            for n in numbers
        ]  # fmt: skip
        splits = {"test": rows}
    elif path == "google-research-datasets/mbpp":
        rows = [dict(text=f"Add {n}.", code=f"def f(x):\r\n  return x + {n}",
                     test_list=[f"assert f({m}) == {m + n}" for m in range(3)]) for n in numbers]  # fmt: skip
        splits = {"prompt": rows[6:], "test": [{**r, "text": f"{r['text']}!", "right": r["code"]} for r in rows]}
    elif path == "cais/mmlu":
        rows = [dict(question=f"Pick {n % 4}", subject=s, choices=list("wxyz"), answer=n % 4)
                for n in numbers for s in ("anatomy", "astronomy")]  # fmt: skip
        splits = {"dev": rows, "test": [{**row, "right": f"({'ABCD'[row['answer']]})"} for row in rows]}
    else:
        assert path == "TIGER-Lab/MMLU-Pro", path
        rows = [dict(question=f"Pick {n}", category=s, options=[f"option {m}" for m in range(3 + n % 8)], answer="?",
                     answer_index=n % 3) for n in numbers for s in ("law", "math")]  # fmt: skip
        splits = {"validation": rows, "test": [{**row, "right": "ABC"[row["answer_index"]]} for row in rows]}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in splits.items()})


@pytest.fixture(scope="module", autouse=True)
def data():
    """The made-up rows in place of all data sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", made_up)
        load.cache_clear()
        yield
    load.cache_clear()


def answer(doc, repeat):
    """Right for every problem whose text ends with an even digit, in code for the first two of its samples."""
    text = str(doc.get("question") or doc.get("problem") or doc.get("instruction") or doc.get("text"))
    number = int("".join(filter(str.isdigit, text)) or 0)
    return doc["right"] if number % 2 == 0 and repeat < 2 else "none?"


def evaluate(model, tasks, **options):
    """The harness with our tasks only."""
    options = {"apply_chat_template": True, "confirm_run_unsafe_code": True, "bootstrap_iters": 0, **options}
    metadata = options.get("metadata")
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    return simple_evaluate(model, tasks=tasks, task_manager=manager, **options)


@pytest.fixture(scope="module")
def oracle(l2d_dir):
    return Oracle(answer, pretrained=str(l2d_dir), device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def results(oracle, data):
    return evaluate(oracle, ["l2d_released", "l2d_released_greedy"], limit=6)


def metrics(results, task):
    return {name.partition(",")[0]: value for name, value in results["results"][task].items()}


@pytest.mark.parametrize("twin", ["", "_greedy"])
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_answers(results, task, twin):
    name = f"l2d_released_{task}{twin}"
    found, samples = metrics(results, name), results["samples"][name]
    assert len(samples) == 6 == results["n-samples"][name]["effective"]
    kwargs = results["configs"][name]["generation_kwargs"]
    assert (kwargs["until"], kwargs["max_gen_toks"]) == ([], 512 if task in ("humaneval", "mbpp") else 256)
    assert kwargs.get("temperature", 0) == (0 if twin else 1.0)
    right = [answer(sample["doc"], 0) != "none?" for sample in samples]
    share = sum(right) / len(right)
    if task not in ("humaneval", "mbpp"):
        raised = 1 if task == "math" else 0
        assert found["accuracy"] == pytest.approx(share - raised / 6)
        assert found["format_accuracy"] == found["accuracy"] and found.get("raised", 0) == raised
    elif twin:
        assert found["pass@1"] == share and "pass@5" not in found
    else:
        assert found["pass@1"] == pytest.approx(share * 0.2) and found["pass@10"] == share
        assert found["pass@5"] == pytest.approx(share * (1 - 8 * 7 * 6 * 5 * 4 / (10 * 9 * 8 * 7 * 6)))
    assert found["left_out"] == (1 if task == "gsm8k" else 0)
    assert LONG not in [sample["doc"].get("question") for sample in samples]


def test_rows_keep_their_numbers_and_shots_are_skipped(results):
    numbers = [sample["doc_id"] for sample in results["samples"]["l2d_released_gsm8k"]]
    assert numbers == [0, 1, 3, 4, 5, 6]  # row 2 is too long
    numbers = [sample["doc_id"] for sample in results["samples"]["l2d_released_humaneval"]]
    assert numbers == [5, 6, 7, 8, 9, 10]
    assert results["n-samples"]["l2d_released_humaneval"] == {"original": 12, "effective": 6}


def test_prompts_are_conversations(results):
    prompts = {task: results["samples"][f"l2d_released_{task}"][-1]["arguments"][0][0] for task in TASKS}
    for task, prompt in prompts.items():
        assert prompt.count("<|user|>") == 6 == prompt.count("<|assistant|>"), task
    assert prompts["gsm8k"].endswith("<|user|>\n6 + 1?\n<|assistant|>\n")
    assert prompts["humaneval"].endswith("<|user|>\nAdd 10.\n<|assistant|>\n\n\ndef plus_10(x):")  # left open
    assert "\ndef plus_4(x): \n    return x + 4\n</s>" in prompts["humaneval"]
    assert '<|user|>\n"""\nAdd 5.!\nassert f(0) == 5\n"""\n\n<|assistant|>' in prompts["mbpp"]
    assert "\r\n" in prompts["mbpp"]
    assert "Choices:\nA. w\nB. x\nC. y\nD. z\n\nAnswer:\n<|assistant|>" in prompts["mmlu"]
    assert "Question:\nPick 2\nChoices:\nA. option 0\nB. option 1" in prompts["mmlu_pro"]
    solution = "\\boxed{\\frac{%d}{2}}"
    assert [solution % n in prompts["math"] for n in (11, 9, 7, 5, 3, 10)] == [True] * 5 + [False]


def test_the_schedule_of_code_tasks_is_the_default_and_recorded(results, l2d_dir, make_l2d, base_dir):
    changed = results["config"]["l2d"]["task_samplers"]
    for task in TASKS:
        schedule = {"choice_temperature": "polynomial_1_1.0"} if task in ("humaneval", "mbpp") else {}
        assert changed[f"l2d_released_{task}"] == [schedule]
    own = Oracle(answer, pretrained=str(l2d_dir), device="cpu", choice_temperature=0.5)
    changed = evaluate(own, ["l2d_released_mbpp"], limit=1)["config"]["l2d"]["task_samplers"]
    assert changed == {"l2d_released_mbpp": [{}]}  # what model args say stays
    guided = make_l2d(base_dir, classes=["math", "coding", "general_qa"])
    own = Oracle(answer, pretrained=str(guided), device="cpu", guidance_class="auto", guidance_scale=1.5)
    changed = evaluate(own, ["l2d_released"], limit=1)["config"]["l2d"]["task_samplers"]
    assert changed["l2d_released_mmlu"] == [{}]
    humaneval = {"choice_temperature": "polynomial_1_1.0", "guidance_class": None, "guidance_scale": 1.0}
    assert changed["l2d_released_humaneval"] == [humaneval]


@pytest.mark.parametrize("template", ["fixed_date_llama3", "base_llama"])
def test_the_released_templates(oracle, template):
    found = evaluate(oracle, ["l2d_released_gsm8k"], limit=1, metadata={"released_template": template})
    prompt = found["samples"]["l2d_released_gsm8k"][0]["arguments"][0][0]
    end = "0 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert prompt.endswith("### Question ###\n0 + 1?\n### Answer ###\n" if template == "base_llama" else end)
    assert found["configs"]["l2d_released_gsm8k"]["metadata"]["released_template"] == template


def test_substitutes_for_missing_rows(oracle, monkeypatch):
    rows = made_up("codeparrot/instructhumaneval")["test"].select_columns(
        ["prompt", "canonical_solution", "entry_point", "test"]
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name: {"test": rows if "humaneval" in path else made_up(path)["test"]}
    )
    monkeypatch.setattr("lm_eval_ext.released.rows.SUBSTITUTE_SHOTS", [1, 2, 3, 4, 5])
    load.cache_clear()
    for source in (None, "released"):  # there is no local copy
        with pytest.raises(UsageError, match="has no split 'train' here.*get the whole data set"):
            evaluate(oracle, ["l2d_released_math"], metadata={"released_rows": source} if source else None)
    monkeypatch.setattr(Oracle, "_decode", lambda self, batch, *_: pytest.fail("nothing is to be generated"))
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata={"released_rows": "substitute"})
    tasks = manager.load(["l2d_released_math", "l2d_released_humaneval"])["tasks"]
    for task in tasks.values():
        assert isinstance(task, ReleasedTask)
        task.build_all_requests(limit=3, apply_chat_template=True, chat_template=oracle.apply_chat_template)
    assert [instance.doc_id for instance in tasks["l2d_released_math"].instances] == [0, 6, 7]
    assert "Write a function plus_5(x) to solve" in tasks["l2d_released_humaneval"].instances[0].args[0]
    load.cache_clear()


def test_a_local_copy_without_some_rows_gets_substitutes(tmp_path, monkeypatch, caplog):
    """Of MATH's training split and of instructhumaneval; never where the released rows are demanded."""
    monkeypatch.chdir(tmp_path)
    for folder in ("DigitalLearningGmbH/MATH-lighteval", "openai/openai_humaneval"):
        (tmp_path / folder).mkdir(parents=True)
    rows = {name: made_up(BENCHMARKS[name].path)["test"] for name in ("math", "humaneval")}

    def read(path, name):
        if "instruct" in path:
            raise FileNotFoundError(path)
        return {"test": rows["humaneval" if "humaneval" in path else "math"]}

    monkeypatch.setattr(datasets, "load_dataset", read)
    monkeypatch.setattr("lm_eval_ext.released.rows.SUBSTITUTE_SHOTS", [1, 2, 3, 4, 5])
    for name, message in (("math", "shots are test rows"), ("humaneval", "rebuilt from openai/openai_humaneval")):
        load.cache_clear()
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
        (task,) = manager.load([f"l2d_released_{name}"])["tasks"].values()
        assert task.rows.substituted and task.config.metadata["released_rows"] == "substitute"
        assert message in caplog.text
        with pytest.raises(UsageError, match="has no split 'train'|cannot be read"):
            load(name, "released")
    load.cache_clear()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"apply_chat_template": False}, "needs --apply_chat_template"),
        ({"confirm_run_unsafe_code": False}, "confirm with --confirm_run_unsafe_code"),
        ({"num_fewshot": 0}, "--num_fewshot 0: the released protocol has 5"),
        ({"system_instruction": "Be brief."}, "--system_instruction"),
        ({"fewshot_as_multiturn": False}, "--fewshot_as_multiturn false"),
        ({"cache_requests": True}, "--cache_requests"),
        ({"metadata": {"released_template": "chatml"}}, "released_template='chatml' is not known"),
        ({"metadata": {"released_rows": "all"}}, "released_rows='all' is not known: use released or substitute"),
    ],
)
def test_refusals_before_a_model_is_loaded(options, sentence, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UsageError, match=sentence):
        evaluate("hf", ["l2d_released_mbpp"], model_args={"pretrained": "/nowhere"}, **options)


@pytest.mark.parametrize("kind", ["hf", "l2d"])
def test_tokenizers_without_template_or_end_token(kind, base_dir, l2d_dir, tokenizer, tmp_path, monkeypatch):
    import copy

    for name, sentence in (("chat_template", "no chat template"), ("eos_token", "no end-of-sequence token")):
        other = copy.deepcopy(tokenizer)
        setattr(other, name, None)
        other.save_pretrained(tmp_path / name)
        arguments = {"pretrained": str(base_dir if kind == "hf" else l2d_dir), "tokenizer": str(tmp_path / name)}
        monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("a model is loaded"))
        with pytest.raises(UsageError, match=sentence):
            evaluate(kind, ["l2d_released_gsm8k"], model_args=arguments)


def test_problems_that_are_all_too_long(oracle, monkeypatch):
    monkeypatch.setattr("lm_eval_ext.released.rendering.MAX_TOKENS", 10)
    with pytest.raises(UsageError, match="l2d_released_mmlu: none of 24 problems has at most"):
        evaluate(oracle, ["l2d_released_mmlu"])


def test_special_tokens_stay_in_answers(base_dir, l2d_dir, oracle):
    """Those of `--model hf` and of `--model l2d`; the text ends at the tokenizer's end token."""
    plain = HFLM(pretrained=str(base_dir), device="cpu", batch_size=2)
    ids = plain.tokenizer("#### 18<s>9</s>7", add_special_tokens=False)["input_ids"]
    for skipped, text in ((False, "#### 18<s>9"), (True, "#### 189")):
        plain._model_generate = _answers(plain, ids, skipped)
        request = _request({"max_gen_toks": 16, "skip_special_tokens": skipped, "until": []})
        (cut,) = plain.generate_until([request], disable_tqdm=True)
        assert cut.startswith(text) and ("<s>" in cut) == (not skipped) == (cut == text)  # else what no model generates
        settings = oracle._parse_generation(dict(request.args[1]), oracle._sources([request])[0])
        assert oracle._text(ids[: ids.index(2) + 1], settings) == text
    with pytest.raises(UsageError, match="skip_special_tokens='yes' must be true or false"):
        oracle._parse_generation({"skip_special_tokens": "yes"}, oracle._sources([request])[0])


def _answers(model, ids, skipped):
    import torch

    def generate(input_ids, **kwargs):
        assert "skip_special_tokens" not in kwargs
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)

    model.model.generate = generate
    return lambda *args, **kwargs: HFLM._model_generate(model, *args, **kwargs)


def _request(kwargs):
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, ("1 + 1 =", kwargs), 0, ("tea", 0, 1))


# ---- answers and programs --------------------------------------------------------------------------------------------


def test_numbers():
    row = {"answer": "so\n#### 1,234"}
    for text in (
        "#### 1234",
        "#### 1,2,34 pieces",
        "##### 1234",
        "#### 1234%",
        "#### 1234 or #### 7",
        "so #### 1234e0",
    ):
        assert judge("gsm8k", row, text).correct, text
    for text in ("1234", "#### 1234.", "#### 01234", "####  1234", "#### $1234", "#### 7 #### 1234", "### 1234"):
        assert not judge("gsm8k", row, text).correct, text


def test_letters():
    row = {"answer": 1, "choices": list("wxyz")}
    for text in ("B", "(B)", "CRAB", "B_2", "E or B", "CB", "B\u00b2"):
        assert judge("mmlu", row, text).correct, text
    for text in ("", "b", "Both", "B2", "A: B", "BC"):
        assert not judge("mmlu", row, text).correct, text
    row = {"answer_index": 2, "options": ["", "", "", ""]}
    assert judge("mmlu_pro", row, "I think E, so C").correct
    row["options"] *= 3
    assert not judge("mmlu_pro", row, "I think C").correct  # I is an option's letter now


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("\\fbox{2}", None),
        ("\\boxed 2", 2.0),
        ("\\boxed {2} or 3", None),
        ("\\fbox{1} \\boxed{2", 2.0),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("-15 or 1/2", 2.0),
        ("1,500", 500.0),
        ("\u0663.\u0661", 3.1),
        ("\\boxed{}", ""),
        ("\\boxed{ x = 2}", "x=2"),
        ("\\boxed{x = 2}", "2"),
        ("\\boxed{x=y=2}", "x=y=2"),
        ("\\boxed{\\dfrac34\n}", "\\frac{3}{4}"),
        ("\\boxed{\\frac{1}2}", "\\frac{1}2"),
        ("\\boxed{\\frac1{22}+\\frac1}", "\\frac1{22}+\\frac1"),
        ("\\boxed{-1/2}", "\\frac{-1}{2}"),
        ("\\boxed{1/2/3}", "1/2/3"),
        ("\\boxed{01/2}", "01/2"),
        ("\\boxed{.5}", "\\frac{1}{2}"),
        ("\\boxed{0.50}", "0.50"),
        ("\\boxed{\\sqrt2 + \\sqrt 3}", "\\sqrt{2}+\\sqrt{}3"),
        ("\\boxed{a_{1} b_{2} c_{3}}", "a_1b_{2}c_{3}"),
        ("\\boxed{1,2}", "12"),
        ("\\boxed{(1,\\!000, 2)}", "(1,000,2)"),
        ("\\boxed{5 \\text{ cm} \\text{ or}}", "5"),
        ("\\boxed{5\\text{cm}}", "5\\text{cm}"),
        ("\\boxed{\\left(30^\\circ\\right)}", "(30)"),
        ("\\boxed{\\$ .5\\%}", "\\frac{1}{2}"),
    ],
)
def test_extraction_in_math(text, answer):
    assert extract(text) == answer and type(extract(text)) is type(answer)


def test_equality_in_math():
    half = "\\frac{1}{2}"
    for one, other in ((2.0, "2"), ("2516_8", "25168"), (0.75, half), ("0.5", half), (half, "0.3"), ("2e0", "2")):
        assert equal(one, other) == (one != 0.75), (one, other)
        assert equal(other, one) == (one != 0.75), (one, other)
    for one, other in (("\\frac{2}{4}", half), (half + "x", "0.5"), ("nan", "nan "), (None, None), ("", None)):
        assert not equal(one, other), (one, other)
    for word, error in (("nan", ValueError), ("inf", OverflowError)):
        with pytest.raises(error):
            equal(word, half)
    for text in ("\\boxed{\\sqrt}", "\\boxed{2\\frac }"):
        with pytest.raises(IndexError):
            extract(text)


def test_programs():
    ends = ["x = 1", "if __name__ == '__main__':\n    raise ValueError", "print('a' * 10)", "\r\nx = '\u00e4'\r\n"]
    assert passes(ends) == [True] * len(ends)
    fails = [
        "1 / 0", "import sys; sys.exit(0)", "exit()", "input()", "import sys; sys.stdin.read()", "x = (",
        "\ud800", "\0",
        "import os; os._exit(0)", "import os; os.remove('x')", "import subprocess; subprocess.run(['true'])",
        "raise KeyboardInterrupt",
    ]  # fmt: skip
    assert passes(fails) == [False] * len(fails)
    endless = ["while True: pass", "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
               "10 ** 10 ** 10", "import time; time.sleep(60)"]  # fmt: skip
    assert passes(endless, seconds=0.5) == [False] * len(endless)


def test_pass_at_k():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3) and pass_at_k(10, 6, 5) == 1
    assert pass_rates([(10, 10), (5, 0)]) == {"pass@1": 0.5, "pass@5": 0.5}
