"""The model class: exact at t = 0, small on disk, and strict about what it loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from l2d import L2DConfig, L2DForCausalLM, SamplerConfig
from l2d.integrity import fingerprint
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from tests.conftest import randomise_path


@pytest.fixture(params=["lora", "full"])
def model(request, make_base, make_l2d):
    folder = make_l2d(make_base("qwen2"), request.param, ["math", "coding"])
    return L2DForCausalLM.from_pretrained(folder)


def some_ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_at_time_zero_are_the_bases_bit_for_bit(model):
    ids = some_ids()
    state = model.paths.main_path(ids)
    index = torch.arange(ids.shape[1]).expand_as(ids)
    x = torch.randn(*ids.shape, model.config.diffusion_dim) * 50
    at_zero = model.paths.path_logits(state, PathInputs(index, x, torch.zeros(ids.shape)))
    assert torch.equal(at_zero, model.base(ids).logits)
    later = model.paths.path_logits(state, PathInputs(index, x, torch.full(ids.shape, 0.5)))
    assert float((later - at_zero).abs().max()) > 0.1  # the path does matter


@torch.no_grad()
def test_evaluations_do_not_see_each_other(model):
    ids = some_ids()
    state = model.paths.main_path(ids)
    generator = torch.Generator().manual_seed(3)
    index = torch.tensor([[2, 5, 5, 8], [0, 1, -1, -1]])
    x = torch.randn(2, 4, model.config.diffusion_dim, generator=generator)
    time = torch.rand(2, 4, generator=generator)
    classes = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 0]])
    together = model.paths.path_logits(state, PathInputs(index, x, time, classes))
    for row, slot in ((0, 0), (0, 2), (1, 1)):
        alone = PathInputs(*(v[row : row + 1, slot : slot + 1] for v in (index, x, time, classes)))
        single = model.paths.path_logits(model.paths.main_path(ids[row : row + 1]), alone)
        torch.testing.assert_close(together[row, slot], single[0, 0], rtol=1e-4, atol=1e-4)
    assert not together[1, 2:].any()


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model):
    first, second = some_ids(1, 6, 1), some_ids(1, 5, 2)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    state = model.paths.main_path(packed, None, positions)
    index = torch.arange(11)[None]
    x = torch.randn(1, 11, model.config.diffusion_dim, generator=torch.Generator().manual_seed(0))
    time = torch.full((1, 11), 0.4)
    logits = model.paths.path_logits(state, PathInputs(index, x, time))
    for ids, part in ((first, slice(0, 6)), (second, slice(6, 11))):
        alone = PathInputs(index[:, : ids.shape[1]], x[:, part], time[:, part])
        expected = model.paths.path_logits(model.paths.main_path(ids), alone)
        torch.testing.assert_close(logits[:, part], expected, rtol=1e-4, atol=1e-4)


def test_training_output_is_the_cross_entropy_of_path_logits(model):
    ids = some_ids()
    index = torch.tensor([[3, 4, 5, 6], [2, 3, -1, -1]])
    targets = torch.tensor([[7, 8, 9, 2], [5, 2, 0, 0]])
    generator = torch.Generator().manual_seed(4)
    time, noise = torch.rand(3, 2, 4, generator=generator), torch.randn(3, 2, 4, 16, generator=generator)
    classes = torch.randint(0, 3, (3, 2, 4), generator=generator)
    output = model(input_ids=ids, noised_targets=NoisedTargets(index, targets, time, noise, classes))
    output.nll.sum().backward()
    assert all(p.grad is not None for _, p in model.trained_parameters())
    assert all(p.grad is None for p in model.base.parameters())
    state = model.paths.main_path(ids)
    with torch.no_grad():
        for draw in range(3):
            t = time[draw].unsqueeze(-1)
            x = (1 - t) * noise[draw] * model.config.noise_std + t * model.path.embed_tokens(targets)
            logits = model.paths.path_logits(state, PathInputs(index, x, time[draw], classes[draw]))
            expected = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none") * (index >= 0)
            torch.testing.assert_close(output.nll[draw], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.valid, index >= 0)


def test_base_and_modes_stay_frozen(model):
    model.train()
    assert model.path.training and not model.base.training
    assert not any(p.requires_grad for p in model.base.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.trained_parameters()}


def test_only_trained_tensors_are_saved_and_come_back(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert tensors.keys() == {name for name, _ in model.trained_parameters()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(again, L2DForCausalLM)
    assert again.config.base_fingerprint == model.config.base_fingerprint == fingerprint(model.base)
    for (name, value), (_, other) in zip(model.trained_parameters(), again.trained_parameters(), strict=True):
        assert torch.equal(value, other), name
    ids = some_ids()
    settings = dict(max_new_tokens=5, sampler={"guidance_scale": 1.5, "guidance_class": "math"})
    assert torch.equal(model.generate(ids, **settings), again.generate(ids, **settings))


def test_sharded_checkpoints_load(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = L2DForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(model.trained_parameters(), again.trained_parameters(), strict=True)
    )


def test_a_moved_experiment_folder_still_finds_its_base(make_base, make_l2d, tmp_path):
    base = make_base("llama", seed=5)
    shutil.copytree(make_l2d(base), tmp_path / "new" / "l2d")
    shutil.copytree(base, tmp_path / "new" / base.name)
    config = json.loads((tmp_path / "new" / "l2d" / "config.json").read_text())
    config["base_name_or_path"] = str(tmp_path / "old" / base.name)
    (tmp_path / "new" / "l2d" / "config.json").write_text(json.dumps(config))
    assert L2DForCausalLM.from_pretrained(tmp_path / "new" / "l2d").base.config.hidden_size == 32
    shutil.rmtree(tmp_path / "new" / base.name)
    with pytest.raises(ValueError, match="pass base="):
        L2DForCausalLM.from_pretrained(tmp_path / "new" / "l2d")


def _without(tensors: dict) -> dict:
    return dict(list(tensors.items())[1:])


def _extra(tensors: dict) -> dict:
    return {**tensors, "path.more": torch.zeros(1)}


def _misshapen(tensors: dict) -> dict:
    name = next(iter(tensors))
    return {**tensors, name: torch.zeros(1, 1)}


def _not_finite(tensors: dict) -> dict:
    name = next(iter(tensors))
    return {**tensors, name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_without, "lacks"), (_extra, "unexpected"), (_misshapen, "shape"), (_not_finite, "not finite")],
)
def test_damaged_checkpoints_are_refused(l2d_dir, tmp_path, damage, said):
    shutil.copytree(l2d_dir, tmp_path / "l2d")
    file = tmp_path / "l2d" / "model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=said):
        L2DForCausalLM.from_pretrained(tmp_path / "l2d")


def test_truncated_files_foreign_folders_and_foreign_bases_are_refused(l2d_dir, base_dir, make_base, tmp_path):
    shutil.copytree(l2d_dir, tmp_path / "l2d")
    file = tmp_path / "l2d" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    cases = [
        (dict(name=tmp_path / "l2d"), "damaged"),
        (dict(name=base_dir), "not an L2D checkpoint"),
        (dict(name=tmp_path / "nothing"), "is not a directory: give the folder of an L2D checkpoint"),
        (dict(name=l2d_dir, base=tmp_path / "nothing"), "base"),
        (dict(name=l2d_dir, base=l2d_dir), "itself an L2D checkpoint"),
        (dict(name=l2d_dir, base=make_base("llama", seed=9)), "not the base"),
    ]
    for settings, said in cases:
        with pytest.raises(ValueError, match=said) as error:
            L2DForCausalLM.from_pretrained(settings.pop("name"), **settings)
        assert "\n" not in str(error.value)


def test_fingerprint_is_the_same_in_bfloat16_and_changes_with_any_finetuning(base_dir):
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    own = fingerprint(base)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)) == own
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(base) != own


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_bfloat16_inference(make_base, make_l2d, variant):
    model = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), variant), dtype=torch.bfloat16)
    assert model.base.dtype == torch.bfloat16
    out = model.generate(some_ids(), max_new_tokens=4)
    assert out.shape == (2, 13)


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_fresh_path_changes_nothing_at_any_budget(base_dir, variant):
    settings = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, lora_rank=2)
    model = L2DForCausalLM.from_base(str(base_dir), L2DConfig(variant=variant, **settings)).eval()
    ids = some_ids()
    expected = model.base.generate(ids, max_new_tokens=5, do_sample=False)
    for budget in (1, 3, 15):
        assert torch.equal(model.generate(ids, max_new_tokens=5, sampler={"budget": budget}), expected)
    randomise_path(model)
    assert not torch.equal(model.generate(ids, max_new_tokens=5), expected)


def test_config_is_validated_and_registered(l2d_dir):
    assert isinstance(AutoConfig.from_pretrained(l2d_dir), L2DConfig)
    for wrong in (
        dict(variant="half"),
        dict(lora_rank=0),
        dict(frequency_width=7),
        dict(noise_std=0),
        dict(min_noise=1.0),
        dict(guidance_classes=["a", "a"]),
        dict(sampler={"budget": 14}),
        dict(sampler={"guidance_scale": 2.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "sampler" not in wrong else "budget|guidance"):
            L2DConfig(**wrong)
    config = L2DConfig(sampler={"budget": 31})
    assert config.default_sampler().budget == 31
    assert config.default_sampler({"solver": "euler"}).budget == 31
    assert config.default_sampler(SamplerConfig()).budget == 15
    with pytest.raises(ValueError, match="from_base"):
        L2DForCausalLM(config)


def test_the_tokenizer_beside_the_checkpoint_loads(l2d_dir):
    assert AutoTokenizer.from_pretrained(l2d_dir).eos_token == "</s>"
