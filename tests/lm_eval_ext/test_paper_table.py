"""One command for the paper's table: a shipped sweep on the real rows, and the view of its results.

Run: `python -m pytest tests/lm_eval_ext/test_paper_table.py`. Data sets come from a folder beside the repository;
without it the sweep is skipped. Models are tiny and random, in folders with the names that the sweep expects.
"""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from l2d import L2DConfig, L2DForCausalLM
from lm_eval_ext import sweep
from lm_eval_ext.leaderboard.__main__ import write_leaderboard
from lm_eval_ext.leaderboard.paper_table import published
from lm_eval_ext.sweep_points import read_points
from tests.conftest import REPOSITORY, SIZES, randomise_path, train_tokenizer

SWEEPS = sorted((REPOSITORY / "lm_eval_ext" / "sweeps").glob("released-*.yaml"))
RECIPES = REPOSITORY / "training" / "recipes"
SMALL = dict(diffusion_dim=16, input_width=16, conditioning_width=16, frequency_width=16, lora_rank=4, lora_alpha=8.0)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_sweeps_name_the_outputs_of_recipes(file):
    plan = yaml.safe_load(file.read_text())
    folders = [plan["model_args"]["pretrained"], *plan["controls"]["finetuned"]]
    folders += [point["pretrained"] for point in plan["points"].values() if "pretrained" in point]
    outputs = [yaml.safe_load(recipe.read_text()).get("output_dir") for recipe in RECIPES.glob("*.yaml")]
    assert set(folders) <= set(outputs)
    assert {"T=15", "T=127", "adaptive", "token_search"} <= set(plan["points"]) and plan["base"] and plan["trajectory"]


@pytest.fixture
def checkpoints(shared_data, tmp_path, monkeypatch):
    """The current folder, with the data sets and a checkpoint of every recipe of Llama 3.2 1B."""
    import datasets

    monkeypatch.chdir(tmp_path)
    for folder in shared_data.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    rows = datasets.load_dataset("openai/gsm8k", "main")["test"].select(range(200))
    programs = datasets.load_dataset("openai/openai_humaneval")["test"]
    texts = [text for row in [*rows, *programs] for text in row.values()]
    tokenizer = train_tokenizer(1500, texts)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SIZES, **ids}), dtype=torch.float32)
    base_name = "meta-llama/Llama-3.2-1B-Instruct"
    base.save_pretrained(base_name)
    tokenizer.save_pretrained(base_name)
    for name, method in (("lora-sft", "lora_sft"), ("full-sft", "full_sft"), ("lora-sft-all-linear", "lora_sft")):
        folder = f"outputs/llama-3.2-1b-{name}"
        shutil.copytree(base_name, folder)
        modules = ["q_proj", "v_proj"] if name == "lora-sft" else None
        recipe = {"method": method, "base": base_name, "lora_target_modules": modules}
        (tmp_path / folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, own in {
        "l2d-lora": {},
        "l2d-full": {"variant": "full"},
        "l2d-guidance": {"guidance_classes": ["math", "coding", "general_qa"]},
        "l2d-on-lora-sft": {"base": "outputs/llama-3.2-1b-lora-sft"},
    }.items():
        own = {"variant": "lora", "base": base_name, **own}
        model = L2DForCausalLM.from_base(own.pop("base"), L2DConfig(noise_std=2.0, **SMALL, **own))
        randomise_path(model)
        model.save_pretrained(f"outputs/llama-3.2-1b-{name}")
    return tmp_path


@pytest.mark.slow
def test_the_whole_sweep_makes_the_papers_table(checkpoints, monkeypatch, capsys):
    from lm_eval.tasks import manager

    build, indices = manager.TaskIndex.build, {}

    def build_once(paths, **options):  # the index of all tasks is the same in every run
        key = str(paths)
        indices[key] = indices.get(key) or build(paths, **options)
        return indices[key]

    monkeypatch.setattr(manager.TaskIndex, "build", staticmethod(build_once))
    plan = yaml.safe_load((REPOSITORY / "lm_eval_ext" / "sweeps" / "released-llama-3.2-1b.yaml").read_text())
    plan["model_args"] |= {"device": "cpu", "dtype": "float32"}
    plan["run"] |= {"limit": 2, "gen_kwargs": "max_gen_toks=1"}
    plan["points"]["token_search"]["token_search"] = "best_of_2"
    (checkpoints / "sweep.yaml").write_text(yaml.safe_dump(plan))
    assert sweep.main(["sweep.yaml"]) == 0, capsys.readouterr().out
    board = write_leaderboard([checkpoints / plan["output"]], checkpoints / "report", only=("md", "json", "html"))
    rows = {row.setting: row for row in board.paper if row.published}
    figures = published()["bases"]["Llama 3.2 1B Instruct"]
    for setting in (
        "base",
        "lora-sft",
        "full-sft",
        "T=15",
        "T=127",
        "adaptive",
        "guided",
        "token search",
        "on lora-sft",
    ):
        row = rows[setting]
        assert row.published["mean"] == figures["mean"][setting] and row.seconds > 0
        assert set(row.means) == {"pass@1", "pass@10"} and len(row.scores) == 8
        assert row.notes == ["limit 2", "substitutes for missing rows", "gen_kwargs {'max_gen_toks': 1}"]
    assert rows["T=15"].published["mmlu"] == 41.99
    assert sum(", to t = 0." in row.label for row in board.paper) == 6  # the trajectory's inner time levels
    assert len(board.paper) == len(list((checkpoints / plan["output"] / "l2d_released").iterdir()))
    page = (checkpoints / "report" / "leaderboard.html").read_text()
    table = (checkpoints / "report" / "leaderboard.md").read_text()
    assert "The paper&#39;s table" in page or "The paper's table" in page
    assert "| Llama 3.2 1B Instruct | base:" in table and "arXiv 2501.15781" in table and "| 28.54 |" in table
    assert len(json.loads((checkpoints / "report" / "leaderboard.json").read_text())["paper_table"]) == len(board.paper)


def test_the_trajectory_is_the_first_levels_of_one_grid(l2d_dir):
    from l2d.sampler_config import SamplerConfig
    from l2d.sampling.fixed_grid import fixed_grid

    shared = {"pretrained": str(l2d_dir), "diffusion_budget": 15}
    points = read_points({"trajectory": True}, shared, {})
    whole = fixed_grid(SamplerConfig(budget=15))
    assert [point.model_args["diffusion_budget"] for point in points] == [3, 5, 7, 9, 11, 13]
    for count, point in enumerate(points, 2):
        grid = fixed_grid(SamplerConfig(budget=2 * count - 1, final_time=point.model_args["final_time"]))
        assert torch.allclose(grid.levels, whole.levels[:count], atol=1e-7)
        assert torch.allclose(
            grid.clean_weights[:-1, :], whole.clean_weights[: 2 * count - 2, : 2 * count - 2], atol=1e-6
        )
    with pytest.raises(sweep.UsageError, match="trajectory needs a fixed grid"):
        read_points({"trajectory": True}, {**shared, "solver": "bosh3"}, {})
    with pytest.raises(sweep.UsageError, match="points: a/b=.* must be a name without a slash"):
        read_points({"points": {"a/b": {}}}, shared, {})
