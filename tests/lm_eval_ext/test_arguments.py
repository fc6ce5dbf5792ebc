"""Model args of `--model l2d`: what is refused, with which sentence, and that nothing is loaded for it.

Run: `python -m pytest tests/lm_eval_ext/test_arguments.py`
"""

import dataclasses
import json
import subprocess
import sys

import pytest

from l2d.sampler_config import SamplerConfig
from lm_eval_ext.arguments import ARGUMENTS, HARNESS_ARGUMENTS, SAMPLER_ARGUMENTS, UsageError, parse_arguments

CLASSES = ["math", "coding"]


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but the `config.json` of a checkpoint with guidance classes."""
    return write_config(tmp_path / "checkpoint", guidance_classes=CLASSES)


def write_config(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "l2d", "base_name_or_path": "base", **config}))
    return path


BAD = [
    (dict(diffusion_budgett=15), "'diffusion_budgett' is not known: did you mean 'diffusion_budget'?"),
    (dict(budget=15), "'budget' is not known: did you mean 'diffusion_budget'? (python -m lm_eval_ext args lists all)"),
    (dict(peft="adapter"), "'peft' is not known: python -m lm_eval_ext args lists all."),
    (dict(load_in_4bit=True), "load_in_4bit=True is not how the base"),
    (dict(diffusion_budget=-1.0), "diffusion_budget=-1"),
    (dict(diffusion_budget=0), "diffusion_budget=0 must be a whole number of at least 1"),
    (dict(diffusion_budget=15.5), "diffusion_budget=15.5 must be a whole number"),
    (dict(diffusion_budget=float("nan")), "diffusion_budget=nan must be a whole number"),
    (dict(diffusion_budget=float("inf")), "diffusion_budget=inf must be a whole number"),
    (dict(diffusion_budget="many"), "diffusion_budget='many' must be a whole number"),
    (dict(diffusion_budget=True), "diffusion_budget=True must be a whole number"),
    (dict(diffusion_budget=14), "diffusion_budget=14 cannot be met by solver='midpoint'"),
    (dict(diffusion_budget=15, solver="rk4"), "use 13 or 17"),
    (dict(solver="midpiont"), "solver='midpiont' is not known; choose one of: euler, midpoint"),
    (dict(solver=4), "solver=4 is not known"),
    (dict(final_time=1.5), "final_time=1.5"),
    (dict(final_time=0), "final_time=0"),
    (dict(rtol=0), "rtol=0 must be a number above 0"),
    (dict(atol="small"), "atol='small' must be a number above 0"),
    (dict(max_evaluations=0), "max_evaluations=0 must be a whole number of at least 1"),
    (dict(guidance_scale="strong"), "guidance_scale='strong' must be a finite number"),
    (dict(guidance_scale=1.5), "guidance_scale=1.5 needs guidance_class, one of: math, coding"),
    (dict(guidance_class="maths"), "guidance_class='maths' is not a class of this model; choose one of: math, coding"),
    (dict(guidance_class=2), "guidance_class=2 is not a class of this model"),
    (dict(choice="mean"), "choice='mean' is not known; choose one of: sample, average"),
    (dict(choice_temperature="linear"), "choice_temperature='linear' must be"),
    (dict(choice_temperature=-0.5), "choice_temperature=-0.5 must be"),
    (dict(mc_samples=0), "mc_samples=0 must be a whole number of at least 1"),
    (dict(seed=-1.0), "seed=-1"),
    (dict(speculation="maybe"), "speculation='maybe' must be true or false"),
    (dict(dtype="float31"), "dtype='float31' must be auto, float32, bfloat16, float16 or float64"),
    (dict(device="gpu"), "device='gpu' must be cpu, cuda"),
    (dict(batch_size=0), "batch_size=0 must be a whole number of at least 1, 'auto' or 'auto:N'"),
    (dict(batch_size="automatic"), "batch_size='automatic' must be"),
    (dict(max_batch_size=-1.0), "max_batch_size=-1 must be a whole number of at least 1"),
    (dict(max_length=1), "max_length=1 must be a whole number of at least 2"),
    (dict(parallelize="yes"), "parallelize='yes' must be true or false"),
    (dict(trust_remote_code=1), "trust_remote_code=1 must be true or false"),
    (dict(chat_template_args="x"), "chat_template_args='x' must be a JSON object"),
    (dict(max_cpu_memory="10GiB"), "max_cpu_memory has no effect, since no part of a base can be offloaded"),
    (dict(offload_folder="off"), "offload_folder has no effect"),
    (dict(max_memory_per_gpu="lots"), "max_memory_per_gpu='lots' must be a number of bytes"),
    (dict(base="/nowhere/base"), "base='/nowhere/base' is not a directory"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_bad_argument_is_one_sentence(folder, arguments, sentence):
    with pytest.raises(UsageError) as caught:
        parse_arguments({"pretrained": str(folder), **arguments})
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    assert caught.value.code == f"l2d: {message}"  # what an uncaught one prints
    assert isinstance(caught.value, ValueError)


def test_bad_checkpoint_folder(tmp_path, base_dir):
    for arguments, sentence in [
        ({}, "'pretrained' is missing"),
        ({"pretrained": str(tmp_path / "nowhere")}, "is not a directory: give the folder of an L2D checkpoint."),
        (
            {"pretrained": "name/on-hub"},
            "neither a directory nor complete in the hub's cache, and HF_HUB_OFFLINE forbids",
        ),
        ({"pretrained": str(base_dir), "revision": "v1"}, "revision='v1' does not apply to the directory"),
        ({"pretrained": str(tmp_path)}, "holds no config.json"),
        ({"pretrained": str(base_dir)}, "is a 'llama' model, not an L2D checkpoint: evaluate it with --model hf"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            parse_arguments(arguments)


@pytest.mark.parametrize("value", [True, "", ["v1"]])
def test_what_is_no_revision(folder, value):
    with pytest.raises(UsageError, match="must be a branch, a tag or a commit"):
        parse_arguments({"pretrained": str(folder), "revision": value})


def test_guidance_without_classes(tmp_path):
    plain = write_config(tmp_path / "plain")
    with pytest.raises(UsageError, match="guidance_scale=1.5 needs a model that was trained with guidance classes"):
        parse_arguments({"pretrained": str(plain), "guidance_scale": 1.5})
    with pytest.raises(UsageError, match="guidance_class='math' needs a model"):
        parse_arguments({"pretrained": str(plain), "guidance_class": "math"})


def test_good_arguments(folder):
    sampler = dict(diffusion_budget=31.0, guidance_scale=1.5, guidance_class="coding")
    sampler |= dict(choice_temperature="polynomial_1_1.0")
    harness = dict(dtype="bfloat16", batch_size="auto:4", max_length=512.0, device=None)
    settings = parse_arguments({"pretrained": str(folder), **sampler, **harness})
    assert settings.sampler == SamplerConfig(
        budget=31, guidance_scale=1.5, guidance_class="coding", choice_temperature="polynomial_1_1.0"
    )
    assert settings.harness == dict(dtype="bfloat16", batch_size="auto:4", max_length=512)


def test_settings_of_the_checkpoint_are_the_defaults(tmp_path):
    folder = write_config(tmp_path / "checkpoint", sampler={"budget": 7, "choice": "average"})
    assert parse_arguments({"pretrained": str(folder)}).sampler == SamplerConfig(budget=7, choice="average")
    given = parse_arguments({"pretrained": str(folder), "diffusion_budget": 3}).sampler
    assert given == SamplerConfig(budget=3, choice="average")


def test_names_are_complete():
    assert set(SAMPLER_ARGUMENTS.values()) == {field.name for field in dataclasses.fields(SamplerConfig)}
    assert {"pretrained", "base", *SAMPLER_ARGUMENTS, *HARNESS_ARGUMENTS} < ARGUMENTS.keys()
    assert all(one.help and one.kind.allowed for one in ARGUMENTS.values())


def test_validation_loads_nothing_heavy():
    code = (
        "import sys\nfrom lm_eval_ext.arguments import parse_arguments\n"
        "try:\n    parse_arguments({'pretrained': '/nowhere', 'diffusion_budget': 4})\n"
        "finally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "False False\n"
    assert done.stderr.startswith("l2d: diffusion_budget=4 cannot be met")
    assert done.stderr.count("\n") == 1
