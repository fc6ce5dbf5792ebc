"""Checkpoints on a hub, by name: found in a real cache offline, fetched in two steps, refused in one sentence.

The hub itself is replaced where `huggingface_hub` is called: files are put into a cache as it lays them out.

Run: `python -m pytest tests/l2d/test_hub.py` (about 15 seconds)
"""

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from l2d import L2DForCausalLM
from l2d.__main__ import main
from l2d.checkpoint.hub import checkpoint_folder, commit_of, config_folder
from lm_eval_ext import sweep
from lm_eval_ext.__main__ import main as lm_eval
from lm_eval_ext.arguments import UsageError, parse_arguments
from lm_eval_ext.harness.preflight import check_checkpoint, refuse_checkpoint
from lm_eval_ext.leaderboard.__main__ import write_leaderboard
from lm_eval_ext.model import L2DLM
from tests.integration.harness import TASKS
from tests.training_runs import write_jsonl
from training.compare_budgets.__main__ import main as controls

NAME, NOWHERE = "someone/model", "someone/else"
NEW, OLD = "a" * 40, "0123456789" * 4
SENTENCE = "is neither a directory nor complete in the hub's cache, and HF_HUB_OFFLINE forbids fetching it"


@pytest.fixture(scope="module")
def versions(make_l2d, base_dir) -> dict[str, Path]:
    """Two versions of a checkpoint by their commits, as they were saved."""
    return {NEW: make_l2d(base_dir), OLD: make_l2d(base_dir, classes=["math", "coding"])}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, in the place of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models--someone--model"


def put(cache: Path, commit: str, folder: Path, files: list[str]) -> Path:
    """Files of `folder` as a snapshot in the cache, linked to its blobs."""
    snapshot = cache / "snapshots" / commit
    for name in files:
        blob, link = cache / "blobs" / f"{commit[:4]}-{name.replace('/', '-')}", snapshot / name
        for place in (blob.parent, link.parent):
            place.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            shutil.copy(folder / name, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def refer(cache: Path, name: str, commit: str) -> None:
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / name).write_text(commit)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def cached(cache, versions) -> Path:
    """Both versions in the cache: the branch main, and the tag v1."""
    for ref, commit in (("main", NEW), ("v1", OLD)):
        put(cache, commit, versions[commit], names(versions[commit]))
        refer(cache, ref, commit)
    return cache


class Remote:
    """A hub with one model at one commit; `asked` is what was called, `taken` are the files that were fetched."""

    def __init__(self, cache: Path, folder: Path):
        self.cache, self.folder = cache, folder
        self.asked: list[tuple[str, str | None]] = []
        self.taken: list[str] = []

    def take(self, files: list[str]) -> Path:
        self.taken += files
        return put(self.cache, NEW, self.folder, files)

    def hf_hub_download(self, name, file, *, subfolder=None, revision=None, local_files_only=False):
        if local_files_only and not self.taken:
            raise errors.LocalEntryNotFoundError("nothing is in the cache")
        self.asked.append(("file", revision))
        return str(self.take([f"{subfolder}/{file}" if subfolder else file]) / (subfolder or "") / file)

    def snapshot_download(self, name, *, revision, allow_patterns, ignore_patterns):
        self.asked.append(("snapshot", revision))
        patterns = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return str(self.take(list(filter_repo_objects(names(self.folder), **patterns))))


@pytest.fixture
def remote(cache, versions, tmp_path, monkeypatch) -> Remote:
    """A hub that is reached; beside the checkpoint its model has files that nobody should fetch."""
    folder = tmp_path / "remote"
    shutil.copytree(versions[NEW], folder)
    for name in ("pytorch_model.bin", "training_args.bin", "trainer_state.json", "checkpoint-5/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for us")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("a template")
    (folder / "recipe.yaml").write_text("columns: {prompt: question, completion: answer}\n")
    found = Remote(cache, folder)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


# ---- what is in the cache ----------------------------------------------------------------------------------------


def test_offline_the_cache_is_enough(cached, versions):
    for revision, commit in ((None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)):
        folder = checkpoint_folder(NAME, revision)
        assert Path(folder) == cached / "snapshots" / commit and commit_of(folder) == commit
        assert config_folder(NAME, revision) == folder
        model = L2DForCausalLM.from_pretrained(NAME, **({} if revision is None else {"revision": revision}))
        wanted = L2DForCausalLM.from_pretrained(versions[commit])
        assert model.name_or_path == NAME and model.config.guidance_classes == wanted.config.guidance_classes
        for (name, found), (_, value) in zip(model.trained_parameters(), wanted.trained_parameters(), strict=True):
            assert torch.equal(found, value), name
    assert commit_of(versions[NEW]) is None


def test_cached_elsewhere_or_in_a_subfolder(cached, versions, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert L2DForCausalLM.from_pretrained(NAME, cache_dir=cached.parent, local_files_only=True).name_or_path == NAME
    shutil.copytree(versions[OLD], tmp_path / "parent" / "inner")
    other = tmp_path / "empty" / cached.name
    put(other, OLD, tmp_path / "parent", names(tmp_path / "parent"))
    refer(other, "main", OLD)
    for name in (NAME, tmp_path / "parent"):
        assert L2DForCausalLM.from_pretrained(name, subfolder="inner").config.guidance_classes == ["math", "coding"]


def test_a_folder_is_itself_and_has_no_revisions(cached, versions, tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    (tmp_path / NAME).symlink_to(versions[OLD])
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder(NAME) == config_folder(NAME) == NAME
    with pytest.raises(ValueError, match="revision='v1' does not apply to the directory 'someone/model': leave it out"):
        checkpoint_folder(NAME, "v1")
    assert L2DForCausalLM.from_pretrained(NAME, revision="v1").config.guidance_classes  # as in transformers
    with pytest.raises(UsageError, match="revision='v1' does not apply to a model that is loaded already"):
        L2DLM(L2DForCausalLM.from_pretrained(NAME), revision="v1")


def test_lm_eval_by_name_and_its_provenance(cached, versions, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    init = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda *a, **k: init(*a, **{**k, "include_defaults": False}))
    common = ["--tasks", "l2d_test_choice", "--include_path", str(TASKS), "--limit", "2", "--device", "cpu"]
    for revision in ("main", "v1"):
        given = f"pretrained={NAME},revision={revision},diffusion_budget=3"
        options = ["--model", "l2d", "--model_args", given, "--output_path", str(tmp_path / revision)]
        lm_eval([*options, "--log_samples", *common])
    lm_eval(["--model", "l2d", "--model_args", f"pretrained={versions[OLD]}", "--output_path", str(tmp_path), *common])
    results = {}
    for place in ("main", "v1"):
        (file,) = (tmp_path / place).glob("someone__model/results_*.json")  # the harness's folder is of the name
        results[place] = json.loads(file.read_text())
        assert results[place]["model_name"] == NAME
    ours = {place: found["config"]["l2d"] for place, found in results.items()}
    assert [(one["revision"], one["commit"]) for one in ours.values()] == [("main", NEW), ("v1", OLD)]
    (file,) = tmp_path.glob("*/results_*.json")
    local = json.loads(file.read_text())["config"]["l2d"]
    assert local["revision"] is local["commit"] is None
    assert local["checkpoint_fingerprint"] == ours["v1"]["checkpoint_fingerprint"]
    assert local["checkpoint_fingerprint"] != ours["main"]["checkpoint_fingerprint"]

    write_leaderboard([tmp_path / "main", tmp_path / "v1"], tmp_path / "report")
    rows = json.loads((tmp_path / "report" / "leaderboard.json").read_text())["rows"]
    found = {row["setting"]["model"]: row["provenance"][0]["commit"] for row in rows}
    assert found == {f"{NAME}@main": NEW, f"{NAME}@v1": OLD}
    assert OLD in (tmp_path / "report" / "leaderboard.html").read_text()


def test_a_model_object_is_labelled_by_its_name(cached):
    lm = L2DLM(NAME, device="cpu")
    assert lm.config._name_or_path == NAME and lm.tokenizer.name_or_path == str(cached / "snapshots" / NEW)


def test_by_hand_and_controls(cached, tmp_path, capsys):
    main(["trace", NAME, "--revision", "v1", "--guidance-class", "math", "--prompt", "1 + 1", "--max-new-tokens", "2"])
    assert "2 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["trace", NAME, "--guidance-class", "math", "--prompt", "1 + 1"])  # main has no classes
    assert "guidance_class='math' needs a model" in capsys.readouterr().err
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}] * 2)
    options = ["--data", str(tmp_path / "data.jsonl"), "--times", "0.5", "--budgets", "1", "--device", "cpu"]
    controls([NAME, "--revision", "v1", *options, "--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["checkpoint"], written["revision"], written["commit"]) == (NAME, "v1", OLD)
    assert f"--model_args pretrained={NAME},revision=v1,diffusion_budget=2" in capsys.readouterr().out


def test_sweeps(cached, tmp_path):
    content = {"output": str(tmp_path / "out"), "tasks": ["l2d_test_choice"], "base": True}
    content |= {"model_args": {"pretrained": NAME, "revision": "v1", "guidance_class": "math"}}
    content |= {"grid": {"diffusion_budget": [3]}, "controls": {"one_evaluation": [0.5]}}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    for setting in sweep.read_plan(file).settings:
        assert (setting.model_args["pretrained"], setting.model_args["revision"]) == (NAME, "v1")
    file.write_text(yaml.safe_dump({**content, "model_args": {"pretrained": NOWHERE}}))
    with pytest.raises(UsageError, match=SENTENCE):
        sweep.read_plan(file)


@pytest.mark.parametrize("model_args", [f"pretrained={NAME}", {"pretrained": NAME, "revision": "v1"}, "a folder"])
def test_the_harness_own_class_is_refused_from_python_too(cached, versions, model_args):
    from lm_eval import simple_evaluate

    given = {"pretrained": str(versions[NEW]), "revision": "main"} if model_args == "a folder" else model_args
    with pytest.raises(UsageError, match="is an L2D checkpoint, which --model hf would not evaluate"):
        simple_evaluate(model="hf", model_args=given, tasks=["l2d_test_choice"])


# ---- what is fetched ---------------------------------------------------------------------------------------------


def test_config_is_fetched_and_checked_before_the_rest(remote, monkeypatch):
    for arguments in ({"diffusion_budget": 14}, {"guidance_class": "math"}):
        with pytest.raises(UsageError, match=next(iter(arguments))):
            parse_arguments({"pretrained": NAME, **arguments})
    with pytest.raises(SystemExit):
        main(["chat", NAME, "--budget", "14"])
    with pytest.raises(SystemExit):
        controls([NAME, "--data", "nowhere.jsonl", "--budgets", "14"])
    assert set(remote.taken) == {"config.json"} and {kind for kind, _ in remote.asked} == {"file"}
    settings = parse_arguments({"pretrained": NAME, "revision": "v2", "diffusion_budget": 15})
    assert settings.checkpoint.name == NAME and settings.checkpoint.revision == "v2"
    remote.asked.clear()
    check_checkpoint(settings)
    assert remote.asked == [("snapshot", NEW)]  # of the commit that was checked


def test_the_harness_own_class_is_refused_before_anything_else_is_fetched(remote):
    for _ in range(2):  # of the hub, and of the cache
        with pytest.raises(UsageError, match=f"pretrained='{NAME}' is an L2D checkpoint"):
            refuse_checkpoint("hf", f"pretrained={NAME},dtype=float32")
    assert set(remote.taken) == {"config.json"}


def test_the_command_line_asks_the_hub_once_for_other_models(remote, monkeypatch):
    """Without a network every question waits; a model of another kind is left to the harness."""
    (remote.folder / "config.json").write_text('{"model_type": "llama"}')
    few = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", few)
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: sys.exit("loaded"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    given = ["--model", "hf", "--model_args", f"pretrained={NAME}", "--tasks", "l2d_test_choice"]
    with pytest.raises(SystemExit, match="^loaded$"):
        lm_eval([*given, "--include_path", str(TASKS)])
    assert remote.asked == [("file", None)]


def test_only_what_is_read_is_fetched(remote, versions):
    folder = Path(checkpoint_folder(NAME))
    more = ["recipe.yaml", "additional_chat_templates/tools.jinja"]
    assert set(names(folder)) == {*names(versions[NEW]), *more} - {"README.md"}
    assert L2DForCausalLM.from_pretrained(NAME).config.model_type == "l2d"


def test_the_recipe_comes_along(remote, tmp_path, capsys):
    write_jsonl(tmp_path / "data.jsonl", [{"question": "1 + 1 =", "answer": " 2"}] * 2)
    controls([NAME, "--data", str(tmp_path / "data.jsonl"), "--times", "0.5", "--budgets", "1", "--device", "cpu"])
    assert "best single evaluation: t = 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "{", "[]"])
def test_other_models_are_refused_by_their_config(remote, content):
    (remote.folder / "config.json").write_text(content)
    for load in (L2DForCausalLM.from_pretrained, lambda name: parse_arguments({"pretrained": name})):
        with pytest.raises(ValueError, match="config.json|L2D checkpoint"):
            load(NAME)
    assert set(remote.taken) == {"config.json"}


def test_pickles_are_no_weights(remote):
    (remote.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"pretrained='{NAME}' has no safetensors, neither on the hub nor in its"):
        checkpoint_folder(NAME)


# ---- refusals ----------------------------------------------------------------------------------------------------


def ways(name: str):
    """Every way in: from Python, by model args, and the commands by hand."""
    return [
        lambda: L2DForCausalLM.from_pretrained(name),
        lambda: parse_arguments({"pretrained": name}),
        lambda: main(["chat", name]),
        lambda: main(["trace", name, "--prompt", "x"]),
        lambda: controls([name, "--data", "nowhere.jsonl"]),
    ]


def refusal(way, capsys) -> str:
    with pytest.raises((ValueError, SystemExit)) as caught:
        way()
    said = str(caught.value) if isinstance(caught.value, ValueError) else capsys.readouterr().err.strip()
    assert "\n" not in said and said.endswith(".")
    return said


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (NOWHERE, SENTENCE),
        ("nowhere", SENTENCE),
        ("./nowhere", "pretrained='./nowhere' is not a directory: give the folder of an L2D checkpoint."),
        ("a name", "pretrained='a name' is neither a directory nor a name on the hub"),
    ],
)
def test_offline_what_is_not_there_is_one_sentence(cached, capsys, number, name, sentence):
    said = refusal(ways(name)[number], capsys)
    assert sentence in said and "give the folder of an L2D checkpoint" in said


def test_offline_a_part_is_not_enough(cache, versions):
    put(cache, NEW, versions[NEW], ["config.json"])
    refer(cache, "main", NEW)
    settings = parse_arguments({"pretrained": NAME})
    with pytest.raises(UsageError, match="no safetensors|neither a directory nor complete in the hub's cache"):
        check_checkpoint(settings)
    with pytest.raises(UsageError, match="at revision='v3' is neither a directory nor complete"):
        parse_arguments({"pretrained": NAME, "revision": "v3"})


REFUSED = [
    (errors.GatedRepoError, "is gated: ask for access on its page on the hub, then run hf auth login or set HF_TOKEN."),
    (errors.RepositoryNotFoundError, "the hub shows no model of that name: give the folder of an L2D checkpoint, corr"),
    (errors.RevisionNotFoundError, "at revision='v9' is not on the hub: give a branch, a tag or a whole commit hash."),
    (errors.EntryNotFoundError, "is not an L2D checkpoint: it holds no config.json on the hub."),
    (
        errors.LocalEntryNotFoundError,
        "is neither a directory nor complete in the hub's cache, and the hub cannot be reached",
    ),
    (OSError, "could not be fetched (No space left): try again, or give the folder of an L2D checkpoint."),
]


@pytest.mark.parametrize(("kind", "sentence"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_what_the_hub_refuses_is_one_sentence(cache, monkeypatch, kind, sentence):
    error = kind.__new__(kind, "No space left.\nand much more")

    def fetch(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(UsageError) as caught:
        parse_arguments({"pretrained": NAME, "revision": "v9"})
    said = str(caught.value)
    assert said.startswith(f"pretrained='{NAME}' at revision='v9'") and sentence in said and "\n" not in said


# ---- what is uploaded --------------------------------------------------------------------------------------------


def test_a_checkpoint_is_uploaded_with_card_curve_and_results(cache, versions, tmp_path, monkeypatch, capsys):
    """And what was uploaded loads by its name."""
    folder, hub, made = tmp_path / "mine", tmp_path / "hub", []
    shutil.copytree(versions[NEW], folder)
    (folder / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/optimizer.pt", "training_args.bin", "checkpoint-5/model.safetensors"):
        (folder / name).write_text("stays at home")
    measured = [{"task": "gsm8k", "metric": "exact_match", "budget": b, "value": b / 20} for b in (1, 15)]
    (folder / "budget_results.json").write_text(json.dumps(measured))

    def create_repo(self, name, *, private, exist_ok):
        made.append((name, private, exist_ok))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, commit_message):
        patterns = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in filter_repo_objects(names(Path(folder_path)), **patterns):
            (hub / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, hub / name)
        return SimpleNamespace(commit_url=f"address of {repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    with pytest.raises(SystemExit):
        main(["card", str(folder), "--push", NAME])
    assert "reaches no hub while HF_HUB_OFFLINE is set" in capsys.readouterr().err and not made
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    main(["card", str(folder), "--push", NAME, "--private"])
    assert made == [(NAME, True, True)] and f"address of {NAME}" in capsys.readouterr().out
    more = {"README.md", "budget_curve.png", "budget_results.json"}
    assert set(names(hub)) == {*names(versions[NEW]), *more}
    assert f'from_pretrained("{NAME}")' in (hub / "README.md").read_text()
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(Remote(cache, hub), name))
    assert L2DForCausalLM.from_pretrained(NAME).name_or_path == NAME
