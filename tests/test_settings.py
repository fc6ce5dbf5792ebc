"""A setting is declared once: a new field of a configuration is in every command, table, check and description.

Run: `python -m pytest tests/test_settings.py`
"""

import dataclasses
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from l2d.checkpoint.settings import CheckpointSettings
from l2d.config import L2DConfig
from l2d.sampler_config import SamplerConfig, unusual
from l2d.settings import check_settings, declared, one_of, optional, positive, truth, whole
from tests.conftest import REPOSITORY

NEW_FIELD = """
import dataclasses
import l2d.sampler_config
from l2d.settings import setting, whole

@dataclasses.dataclass(frozen=True)
class Extended(l2d.sampler_config.SamplerConfig):
    sharpness: int = setting(2, whole(1, 9), "how sharp it is", shown="sharp as {}")

l2d.sampler_config.SamplerConfig = Extended
"""


def with_new_field(code: str, *arguments: str) -> str:
    """What `code` prints in a process whose `SamplerConfig` has one field more."""
    command = [sys.executable, "-c", NEW_FIELD + textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_new_sampler_field_is_everywhere_without_torch(tmp_path):
    """`replace`, the table of model args, model args, generation kwargs, sweeps, command lines, the leaderboard."""
    (tmp_path / "l2d").mkdir()
    config = {"model_type": "l2d", "base_name_or_path": "base", "sampler": {"sharpness": 5}}
    (tmp_path / "l2d" / "config.json").write_text(json.dumps(config))
    code = """
        import argparse, sys
        from l2d.cli.session import add_sampler_arguments, sampler_from
        from l2d.sampler_config import SamplerConfig, unusual
        from lm_eval_ext.argument_table import help_text, markdown
        from lm_eval_ext.arguments import UsageError, parse_arguments, sampler_changes
        from lm_eval_ext.sweep_controls import read_controls

        folder = sys.argv[1]
        assert SamplerConfig().replace(sharpness=3).to_dict()["sharpness"] == 3
        assert "sharpness*  [a whole number from 1 to 9; default 2]" in help_text() and "how sharp it is" in help_text()
        assert "| `sharpness` |" in markdown()
        assert parse_arguments({"pretrained": folder}).sampler.sharpness == 5
        assert parse_arguments({"pretrained": folder, "sharpness": 4.0}).sampler.sharpness == 4
        for wrong in ({"sharpness": 10}, {"sharpnes": 3}):
            try:
                parse_arguments({"pretrained": folder, **wrong})
            except UsageError as error:
                print(error)
        assert sampler_changes({"sharpness": 7, "until": []}) == {"sharpness": 7}
        (point,) = read_controls({"one_evaluation": 0.1}, {"pretrained": folder, "sharpness": 6, "diffusion_budget": 7})
        assert point.model_args["sharpness"] == 6 and point.model_args["diffusion_budget"] == 2
        parser = argparse.ArgumentParser()
        add_sampler_arguments(parser)
        assert sampler_from(parser.parse_args([folder, "--sharpness", "8"])) == {"sharpness": 8}
        assert "how sharp it is" in parser.format_help().replace("\\n", " ")
        assert unusual({"budget": 31, "sharpness": 8}) == ["sharp as 8"]
        assert "torch" not in sys.modules
    """
    lines = with_new_field(code, str(tmp_path / "l2d")).splitlines()
    assert lines[0] == "sharpness=10 must be a whole number from 1 to 9."
    assert lines[1].startswith("model argument 'sharpnes' is not known: did you mean 'sharpness'?")


def test_a_new_sampler_field_is_in_results_caches_checkpoints_and_recipes(l2d_dir, base_dir):
    """`config.l2d` of results, what a response cache is kept apart by, `config.json`, the recipe's `sampler`."""
    code = """
        import sys
        from l2d import L2DConfig
        from lm_eval_ext.model import L2DLM
        from lm_eval_ext.requests.jobs import parse_generation
        from training.config import ModelArguments

        model = L2DLM(pretrained=sys.argv[1], device="cpu", sharpness=7)
        assert model.get_model_info()["l2d"]["sampler"]["sharpness"] == 7
        stored = {}
        model.set_cache_hook(type("Hook", (), {"dbdict": stored}))
        assert '"sharpness": 7' in str(stored) and '"draft_tokens"' not in str(stored)
        assert parse_generation({"sharpness": 3}, model.sampler, None, 8, None).sampler.sharpness == 3
        assert L2DConfig(sampler={"sharpness": 4}).default_sampler().sharpness == 4
        assert ModelArguments(base=sys.argv[2], sampler={"sharpness": 4}).l2d_config().sampler == {"sharpness": 4}
        for make in (L2DConfig, lambda **options: ModelArguments(**options).l2d_config()):
            try:
                make(sampler={"sharpness": 0})
            except ValueError as error:
                print(error)
    """
    said = with_new_field(code, str(l2d_dir), str(base_dir)).splitlines()
    assert said.count("sharpness=0 must be a whole number from 1 to 9.") == 2


@pytest.mark.parametrize(
    "kind, value, kept",
    [(whole(1), "15", 15), (whole(0), 3.0, 3), (positive, "1.5", 1.5), (truth, "False", False),
     (one_of("a", "b"), "a", "a"), (optional(positive), None, None)],
)  # fmt: skip
def test_values_that_are_kept(kind, value, kept):
    assert kind.check("x", value) == kept and type(kind.check("x", value)) is type(kept)


@pytest.mark.parametrize(
    "kind, value",
    [(whole(1), 0), (whole(1), True), (whole(1, 5), 6), (whole(1), "1.5"), (whole(1), float("inf")), (whole(1), None),
     (positive, 0), (positive, True), (positive, "nan"), (positive, 10**400), (truth, 1), (one_of("a", "b"), ["a"]),
     (optional(positive), -1)],
)  # fmt: skip
def test_values_that_are_refused(kind, value):
    with pytest.raises(ValueError, match="x="):
        kind.check("x", value)


def test_recipes_and_resuming_follow_the_declarations_of_a_checkpoint(tmp_path):
    """Defaults and help of recipe options are the checkpoint's; all settings of the weights are compared."""
    from training.checkpointing.resume import check_same_model
    from training.config import L2D_SETTINGS, ModelArguments

    known = declared(CheckpointSettings)
    options = {field.name: field for field in dataclasses.fields(ModelArguments)}
    for name in set(L2D_SETTINGS) - {"lora_rank", "lora_alpha"}:
        assert options[name].default == known[name].default
        assert options[name].metadata["help"].lower() == known[name].help.lower() + "."
    assert {"noise_std", "carried_state", "sampler"} < set(L2D_SETTINGS)
    L2DConfig().save_pretrained(tmp_path)
    other = {"variant": "full", "guidance_classes": ["math"]}
    other |= {"carried_state": True, "noise_free": True, "warm_start": True, "own_values_rank": 4, "own_keys_rank": 4}
    for name in (name for name, one in known.items() if one.of_the_weights):
        changed = other[name] if name in other else 2 * (known[name].default or 0.25)
        now = L2DConfig(**{name: changed})
        with pytest.raises(ValueError, match=f"was trained with another {name}: set what it was"):
            check_same_model(str(tmp_path), SimpleNamespace(config=now))


def test_every_declaration_is_whole():
    for one in [*declared(SamplerConfig).values(), *declared(CheckpointSettings).values()]:
        assert one.help and one.kind.allowed and one.check(one.default) in (one.default, {})
    sampler = SamplerConfig()
    check_settings(sampler)
    assert sampler == SamplerConfig()


def test_unusual_values_in_words():
    assert unusual(SamplerConfig().to_dict()) == []
    values = {"solver": "euler", "seed": 3, "rtol": 1e-3, "speculation": False, "budget": 31, "mc_samples": 4}
    assert unusual(values) == ["euler", "4 noise draws", "seed 3"]
    assert unusual({**values, "solver": "bosh3"}, ("solver",)) == ["rtol 0.001", "4 noise draws", "seed 3"]
