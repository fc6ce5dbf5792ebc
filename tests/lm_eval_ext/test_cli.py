"""The real command line: `lm_eval` and `python -m lm_eval_ext` on stock and made-up tasks, compute files, refusals.

Run: `python -m pytest tests/lm_eval_ext/test_cli.py` (about a minute; most of it is lm-eval reading its own tasks)
"""

import functools
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest

from lm_eval_ext.argument_table import help_text
from lm_eval_ext.arguments import ARGUMENTS
from tests.conftest import REPOSITORY, SHARED
from tests.integration.harness import TASKS, Run, module, start

CPUS = REPOSITORY / "training" / "accelerate_configs" / "cpu_2.yaml"
TWO_PROCESSES = [*module("accelerate.commands.launch"), "--config_file", str(CPUS), "-m"]
SCRIPT = Path(sys.executable).parent / "lm_eval"
OURS = ("l2d_test_generate", "l2d_test_choice", "l2d_test_rolling", "l2d_test_repeats")
INCLUDE = ("--include_path", str(TASKS))
WRITTEN = ("--log_samples", "--batch_size", "4", "--limit", "9", "--gen_kwargs", "max_gen_toks=12", *INCLUDE)
HUB = SHARED / "data" / "hub" / "openai"
STOCK = ("gsm8k",) if HUB.is_dir() else ()
"""Stock tasks on real data, 5-shot, offline, where the data are there."""
SPREAD = ("l2d_test_search", *(("l2d_released_gsm8k",) if STOCK else ()))
"""A search over tokens, and the released protocol, which samples: the same from any number of processes."""


def installed() -> bool:
    """Whether the package, and with it the hook for lm-eval 0.4.13, is installed in this environment."""
    try:
        return any(f.name == "l2d_lm_eval.pth" for f in importlib.metadata.distribution("l2d").files or [])
    except importlib.metadata.PackageNotFoundError:
        return False


def harness() -> list[str]:
    """The plain command where our hook is installed, else our own way into the same command line."""
    return [str(SCRIPT)] if installed() else module("lm_eval_ext")


@pytest.fixture(scope="module")
def runs(l2d_dir, base_dir, tmp_path_factory) -> dict[str, Run]:
    """The base through `--model hf`; the checkpoint at budgets 1 and 15, the latter also on two processes (gloo).

    At budget 15 also `SPREAD`, which needs the chat template.
    """
    work = tmp_path_factory.mktemp("work")
    if STOCK:
        (work / "openai").symlink_to(HUB)  # `datasets` finds the data's folders in the current one
    l2d = ("--model", "l2d", "--model_args")
    both, spread = ",".join((*OURS, *STOCK)), ",".join((*OURS, *SPREAD))
    chat = ("--apply_chat_template",)
    two = [*TWO_PROCESSES, "lm_eval" if installed() else "lm_eval_ext"]
    commands = {
        "hf": (module("lm_eval"), both, "--model", "hf", "--model_args", f"pretrained={base_dir}"),
        "1": (harness(), both, *l2d, f"pretrained={l2d_dir},diffusion_budget=1"),
        "15": (
            harness(),
            ",".join((spread, *STOCK)),
            *l2d,
            f"pretrained={l2d_dir},diffusion_budget=15,guidance_scale=1.0",
            *chat,
        ),
        "two processes": (two, spread, *l2d, f"pretrained={l2d_dir},diffusion_budget=15", *chat),
    }
    started = {}
    for name, (command, tasks, *model) in commands.items():
        subcommand = [] if name == "1" else ["run"]  # both ways of calling it
        started[name] = start([*command, *subcommand], work / name, "--tasks", tasks, *model, *WRITTEN, cwd=work)
    return {name: run.finish() for name, run in started.items()}


@pytest.mark.parametrize("task", ["l2d_test_generate", "l2d_test_choice", "l2d_test_rolling", *STOCK])
def test_budget_1_gives_the_samples_of_hf(runs, task):
    assert runs["1"].samples(task) == runs["hf"].samples(task)
    assert runs["1"].results["results"][task] == runs["hf"].results["results"][task]
    assert runs["15"].samples(task) != runs["hf"].samples(task)


def test_stock_gsm8k_is_5_shot(runs):
    if not STOCK:
        pytest.skip(f"{HUB} is absent: no real data on this machine")
    assert runs["15"].results["n-shot"]["gsm8k"] == 5
    assert len(runs["15"].samples("gsm8k")) == 18  # 9 problems, 2 filters
    assert all(line["nfe_requested_per_token"] == 15 for line in runs["15"].compute("gsm8k"))


@pytest.mark.parametrize("name", ["hf", "15", "two processes"])
def test_compute_files_are_keyed_like_the_samples(runs, name):
    if name == "hf":
        assert not list(runs[name].output.glob("**/compute_*"))
        return
    tokens = 0
    for task, repeats in {
        "l2d_test_generate": 1,
        "l2d_test_choice": 5,
        "l2d_test_rolling": 1,
        "l2d_test_repeats": 2,
    }.items():
        lines = runs[name].compute(task)
        found = {(line["doc_id"], line["doc_hash"], line["prompt_hash"]) for line in lines}
        samples = runs[name].samples(task)
        assert found == {(sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in samples}
        assert len(lines) == 9 * repeats
        tokens += sum(line["generated_tokens"] + line["scored_tokens"] for line in lines)
        assert all(line["seconds"] > 0 for line in lines)
    if name == "two processes":
        spread = [line for task in SPREAD for line in runs[name].compute(task)]
        tokens += sum(line["generated_tokens"] + line["scored_tokens"] for line in spread)
        ours = runs[name].results["config"]["l2d"]
        assert tokens == ours["generated_tokens"] + ours["scored_tokens"]


def test_results_record_settings_and_cost(runs, l2d_dir):
    config = runs["15"].results["config"]
    assert config["model"] == "l2d"
    ours = config["l2d"]
    assert ours["sampler"]["budget"] == 15
    assert ours["nfe_requested_per_token"] == {"mean": 15.0, "median": 15, "p95": 15, "max": 15}
    assert ours["nfe_computed_per_token"]["mean"] >= 14
    assert 1 <= ours["passes_per_token"]["mean"] <= 14
    assert ours["generated_tokens"] > 0
    assert ours["scored_tokens"] > 0
    assert ours["task_samplers"]["l2d_test_generate"] == [{}]
    assert runs["1"].results["config"]["l2d"]["nfe_requested_per_token"]["max"] == 1


def test_two_processes_give_the_results_of_one(runs):
    one, two = runs["15"], runs["two processes"]
    for task in ("l2d_test_generate", "l2d_test_repeats"):  # 9 documents: the harness pads the second process's
        assert sorted(two.samples(task), key=lambda sample: sample["doc_id"]) == one.samples(task)
        equal = [sample["resps"] for sample in two.samples(task) if sample["doc_id"] in (0, 7, 8)]
        assert equal[0] != equal[1] != equal[2]  # three documents of one prompt, on both processes
    for task in OURS:
        metrics = one.results["results"][task]
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        found = {name: two.results["results"][task][name] for name in numbers}
        assert found == pytest.approx(numbers, rel=1e-5)  # other batches, other rounding
    ours, theirs = two.results["config"]["l2d"], one.results["config"]["l2d"]
    assert ours["world_size"] == 2
    for name in ("checkpoint_fingerprint", "base_fingerprint", "nfe_requested_per_token", "sampler"):
        assert ours[name] == theirs[name]
    assert ours["task_samplers"].items() <= theirs["task_samplers"].items()
    for task in OURS:  # rounds and computed may differ: what is evaluated together is decided per batch
        keys = ("doc_id", "request", "repeat", "generated_tokens", "scored_tokens", "nfe_requested")
        assert [[line[key] for key in keys] for line in two.compute(task)] == [
            [line[key] for key in keys] for line in one.compute(task)
        ]


@pytest.mark.parametrize("task", SPREAD)
def test_two_processes_search_and_sample_as_one(runs, task):
    one, two = runs["15"], runs["two processes"]
    assert sorted(two.samples(task), key=lambda sample: sample["doc_id"]) == one.samples(task)
    assert len({sample["resps"][0][0] for sample in one.samples(task)}) > 1
    assert two.results["results"][task] == one.results["results"][task]


def test_plain_command_finds_the_model():
    if not installed():
        pytest.skip("the package is not installed in this environment (python -m pip install -e .)")
    assert harness() == [str(SCRIPT)]


def test_a_refusal_is_one_line_with_status_1(l2d_dir, tmp_path):
    arguments = f"pretrained={l2d_dir},difusion_budget=3"
    run = start(harness(), tmp_path / "out", "--model", "l2d", "--model_args", arguments, "--tasks", OURS[0], *INCLUDE)
    _, stderr = run.process.communicate(timeout=900)
    assert run.process.returncode == 1
    assert "Traceback" not in stderr
    assert "Loading weights" not in stderr
    *_, last = stderr.strip().splitlines()
    assert last.startswith("l2d: model argument 'difusion_budget' is not known: did you mean 'diffusion_budget'?")
    assert not any(tmp_path.iterdir())


NEEDS_CLASSES = "needs a model that was trained with guidance classes"
REFUSED = [
    ("pretrained={l2d},budget=3", "l2d: model argument 'budget' is not known: did you mean 'diffusion_budget'?"),
    ("pretrained={l2d},peft=x", "l2d: model argument 'peft' is not known"),
    ("pretrained={l2d},load_in_8bit=True", "l2d: load_in_8bit=True is not how the base of"),
    ("diffusion_budget=3", "l2d: model argument 'pretrained' is missing"),
    ("pretrained=/nowhere", "l2d: pretrained='/nowhere' is not a directory"),
    ("pretrained={base}", "is a 'llama' model, not an L2D checkpoint: evaluate it with --model hf"),
    ("pretrained={l2d},base=/nowhere/else", "l2d: base='/nowhere/else' is not a directory"),
    ("pretrained={l2d},diffusion_budget=14", "l2d: diffusion_budget=14 cannot be met by solver='midpoint'"),
    ("pretrained={l2d},diffusion_budget=-1", "l2d: diffusion_budget=-1"),
    ("pretrained={l2d},diffusion_budget=0", "l2d: diffusion_budget=0 must be a whole number"),
    ("pretrained={l2d},diffusion_budget=1.5", "l2d: diffusion_budget=1.5 must be a whole number"),
    ("pretrained={l2d},diffusion_budget=nan", "l2d: diffusion_budget=nan must be a whole number"),
    ("pretrained={l2d},diffusion_budget=inf", "l2d: diffusion_budget=inf must be a whole number"),
    ("pretrained={l2d},diffusion_budget=many", "l2d: diffusion_budget='many' must be a whole number"),
    ("pretrained={l2d},diffusion_budget=15,solver=rk4", "use 13 or 17"),
    ("pretrained={l2d},solver=rk5", "l2d: solver='rk5' is not known; choose one of: euler, midpoint"),
    ("pretrained={l2d},final_time=2", "l2d: final_time=2 must be a number from 0 to 1"),
    ("pretrained={l2d},rtol=0", "l2d: rtol=0 must be a number above 0"),
    ("pretrained={l2d},max_evaluations=0", "l2d: max_evaluations=0 must be a whole number"),
    ("pretrained={l2d},guidance_scale=2", f"l2d: guidance_scale=2 {NEEDS_CLASSES}"),
    ("pretrained={l2d},guidance_class=math", f"l2d: guidance_class='math' {NEEDS_CLASSES}"),
    ("pretrained={l2d},guidance_class=auto", f"l2d: guidance_class='auto' {NEEDS_CLASSES}"),
    ("pretrained={l2d},choice=mean", "l2d: choice='mean' is not known; choose one of: sample, average"),
    ("pretrained={l2d},choice_temperature=-1", "l2d: choice_temperature=-1"),
    ("pretrained={l2d},mc_samples=0", "l2d: mc_samples=0 must be a whole number"),
    ("pretrained={l2d},seed=-1", "l2d: seed=-1"),
    ("pretrained={l2d},speculation=maybe", "l2d: speculation='maybe' must be true or false"),
    ("pretrained={l2d},token_search=best_of_0", "l2d: token_search='best_of_0' must be best_of_N or beam_N"),
    ("pretrained={l2d},token_search=mcts", "l2d: token_search='mcts' must be best_of_N or beam_N"),
    ("pretrained={l2d},dtype=float31", "l2d: dtype='float31' must be auto, float32"),
    ("pretrained={l2d},device=gpu", "l2d: device='gpu' must be cpu, cuda"),
    ("pretrained={l2d},batch_size=0", "l2d: batch_size=0 must be a whole number of at least 1, 'auto' or 'auto:N'"),
    ("pretrained={l2d},max_length=1", "l2d: max_length=1 must be a whole number of at least 2"),
    ("pretrained={l2d},parallelize=yes", "l2d: parallelize='yes' must be true or false"),
    ("pretrained={l2d},parallelize=true,device=cpu", "l2d: parallelize spreads a base over GPUs, and this run is on"),
    ("pretrained={l2d},trust_remote_code=1", "l2d: trust_remote_code=1 must be true or false"),
]


@pytest.fixture
def command_line(monkeypatch):
    """The command line in this process, with our test tasks alone and no model to be loaded."""
    from lm_eval.tasks import TaskManager

    from l2d import L2DForCausalLM
    from lm_eval_ext.__main__ import main

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    init = TaskManager.__init__
    few = functools.partialmethod(init, include_defaults=False)  # the harness's own tasks take seconds to index
    monkeypatch.setattr(TaskManager, "__init__", few)
    monkeypatch.setattr(L2DForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    rest = ["--tasks", OURS[0], *INCLUDE]
    return lambda model_args, model="l2d", more=(): main(["--model", model, "--model_args", model_args, *rest, *more])


@pytest.mark.parametrize(("model_args", "sentence"), REFUSED, ids=[model_args for model_args, _ in REFUSED])
def test_bad_invocations(command_line, l2d_dir, base_dir, model_args, sentence):
    with pytest.raises(SystemExit) as caught:
        command_line(model_args.format(l2d=l2d_dir, base=base_dir))
    assert sentence in caught.value.code  # an uncaught SystemExit prints a text and ends with status 1
    assert "\n" not in caught.value.code


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("foo=1", "'foo' is not known: python -m lm_eval_ext args lists the sampler's, transformers'"),
        ("budget=3", "'budget' is not known: did you mean 'diffusion_budget'?"),
        ("topk=3", "'topk' is not known: did you mean 'top_k'?"),
        ("pad_token_id=3", "'pad_token_id' is set by the model class"),
        ("max_length=20", "set max_gen_toks instead"),
        ("num_return_sequences=2", "'num_return_sequences' cannot be used"),
        ("num_beams=2", "num_beams=2: num_beams cannot be used: the L2D sampler decodes greedily or samples"),
        ("penalty_alpha=0.6", "penalty_alpha=0.6: penalty_alpha cannot be used"),
        ("top_k=many", "generation setting top_k='many'"),
        ("early_stopping=[1]", "generation setting early_stopping="),
        (
            "top_p=0.9,max_new_tokens=4,until=x,token_search=best",
            "token_search='best' must be",
        ),  # names are right
    ],
)
def test_wrong_generation_settings_are_refused_before_any_task(command_line, l2d_dir, given, sentence):
    with pytest.raises(SystemExit) as caught:
        command_line(f"pretrained={l2d_dir}", more=["--gen_kwargs", given])
    assert sentence in caught.value.code and "\n" not in caught.value.code


def test_a_beam_search_that_the_models_generation_settings_contradict_is_refused(command_line, l2d_dir, tmp_path):
    folder = shutil.copytree(l2d_dir, tmp_path / "l2d")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.2}))
    for model_args, more in ((",token_search=beam_2", []), ("", ["--gen_kwargs", "token_search=beam_2"])):
        with pytest.raises(SystemExit) as caught:
            command_line(f"pretrained={folder}{model_args}", more=more)
        assert "token_search=beam_2 cannot follow repetition_penalty=1.2" in caught.value.code


def test_the_harness_own_class_gets_no_l2d_checkpoint(command_line, l2d_dir, base_dir, monkeypatch):
    """It would score with the base and generate with the path."""
    from lm_eval.models.huggingface import HFLM

    with pytest.raises(SystemExit) as caught:
        command_line(f"pretrained={l2d_dir}", model="hf")
    assert "is an L2D checkpoint, which --model hf would not evaluate" in caught.value.code
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: sys.exit("loaded"))
    with pytest.raises(SystemExit, match="^loaded$"):
        command_line(f"pretrained={base_dir}", model="hf")


@pytest.mark.parametrize("model_args", ["help=true", "pretrained=help"])
def test_help_lists_the_model_args(command_line, capsys, model_args):
    with pytest.raises(SystemExit) as caught:
        command_line(model_args)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in ARGUMENTS)


def test_args_command(capsys, monkeypatch):
    from lm_eval_ext.__main__ import main

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    main(["args", "--markdown"])
    assert capsys.readouterr().out.startswith("| argument | allowed | default | meaning | per task |")
    main(["run", "--model", "l2d", "--model_args", "help"])
    assert capsys.readouterr().out == help_text() + "\n"
