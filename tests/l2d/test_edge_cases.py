"""Edges of the public calls: nothing to do, one token, odd padding, changed weights, shared bases, threads.

Every test here was a defect once, or guards a promise that no other test covers.
"""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import l2d.checkpoint.loading
from l2d import L2DConfig, L2DForCausalLM
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from tests.conftest import REPOSITORY, randomise_path

GUIDED = dict(guidance_scale=1.5, guidance_class="math")
PLAIN = dict(speculation=False, draft_tokens=0)
IDS = torch.randint(3, 400, (3, 10), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def folder(make_base, make_l2d):
    return make_l2d(make_base("llama"), "lora", ["math", "coding"])


@pytest.fixture
def model(folder):
    return L2DForCausalLM.from_pretrained(folder)


def changed(folder, seed: int = 5) -> L2DForCausalLM:
    """A freshly loaded model with other trained weights."""
    model = L2DForCausalLM.from_pretrained(folder)
    randomise_path(model, seed=seed)
    return model


@pytest.mark.parametrize("sampler", [{}, PLAIN, dict(budget=1), dict(solver="bosh3"), GUIDED])
def test_nothing_to_score_or_solve_is_an_empty_result(model, sampler):
    for ids in (IDS, IDS[:, :1]):
        scored = model.score(ids, continuation_mask=torch.zeros_like(ids, dtype=torch.bool), sampler=sampler)
        assert scored.logprobs.shape == ids.shape and not scored.nfe_requested.any()
    state, index, x0 = model.paths.main_path(IDS[:2]), torch.tensor([[4, -1], [-1, -1]]), torch.zeros(2, 2, 16)
    assert not model.solve(state, torch.full_like(index, -1), x0, sampler).final_logits.any()
    solved = model.solve(state, index, x0, sampler, classes=torch.tensor([1, 0])).final_logits
    assert solved[0, 0].any() and not solved[1].any()


def test_no_evaluations_at_all(model):
    state, index = model.paths.main_path(IDS[:2]), torch.full((2, 3), -1)
    assert not model.paths.path_logits(state, PathInputs(index, torch.zeros(2, 3, 16), torch.zeros(2, 3))).any()
    noised = NoisedTargets(index, index, torch.rand(2, 2, 3), torch.randn(2, 2, 3, 16))
    output = model.train()(input_ids=IDS[:2], noised_targets=noised)
    output.nll.sum().backward()
    assert not output.nll.any() and not output.valid.any()


def test_sampled_choices_of_a_solve_take_their_numbers(model):
    state, index = model.paths.main_path(IDS[:2]), torch.tensor([[3], [5]])
    settings = dict(choice_temperature=1.0)
    uniforms = torch.rand(2, 1, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = [
        model.solve(state, index, torch.zeros(2, 1, 16), {**settings, **more}, uniforms=uniforms).chosen
        for more in ({}, PLAIN)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("shape", ["one token", "holes", "one new"])
def test_odd_prompts_decode_as_the_plain_solver_does(model, shape):
    model.double()
    ids, mask = (IDS[:, -1:], torch.ones(3, 1)) if shape == "one token" else (IDS, torch.ones(3, 10))
    if shape == "holes":
        mask[0, 3] = mask[2, 7] = 0
    settings = dict(attention_mask=mask.long(), max_new_tokens=1 if shape == "one new" else 6)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, sampler=PLAIN, **settings))
    base = model.base.generate(ids, do_sample=False, **settings)
    assert torch.equal(model.generate(ids, sampler={"budget": 1}, use_cache=True, **settings), base)
    assert torch.equal(model.generate(ids, sampler={"budget": 1}, use_cache=False, **settings), base)


def test_wrong_padding_keys_and_ignored_settings_are_refused(model):
    right, left = torch.ones_like(IDS), torch.ones_like(IDS)
    right[1, -2:] = left[1, :2] = 0
    with pytest.raises(ValueError, match="on the left"):
        model.generate(IDS, attention_mask=right, max_new_tokens=2)
    wanted = torch.zeros_like(IDS, dtype=torch.bool)
    wanted[:, -1] = True
    with pytest.raises(ValueError, match="on the right"):
        model.score(IDS, left, continuation_mask=wanted)
    for keys in (["a"], ["a"] * 4, []):
        with pytest.raises(ValueError, match="request_keys"):
            model.score(IDS, continuation_mask=wanted, request_keys=keys)
    for wrong in (dict(guidance_scale=1.5), dict(prompt_lookup_num_tokens=2), dict(output_hidden_states=True)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(IDS, max_new_tokens=2, **wrong)


def test_a_field_that_is_not_finite_still_ends(model):
    with torch.no_grad():
        model.path.vocabulary.projection.bias.fill_(float("nan"))
    _, record = model.generate(
        IDS, max_new_tokens=1, sampler=dict(solver="bosh3", max_evaluations=20), return_record=True
    )
    assert record.capped == 3


@torch.no_grad()
def test_weights_that_change_after_inference_are_used(model, folder):
    settings = dict(max_new_tokens=6)
    index = torch.tensor([[3, 5], [3, 5]])

    def answers(one: L2DForCausalLM) -> tuple:
        inputs = PathInputs(index, torch.ones(2, 2, 16), torch.full((2, 2), 0.5))
        state = one.paths.main_path(IDS[:2])
        return one.paths.path_logits(state, inputs), one.solve(state, index, torch.ones(2, 2, 16)).final_logits

    other = changed(folder)
    for assign in (False, True):
        model.generate(IDS, **settings)
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
        for found, expected in zip(answers(model), answers(other), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(model.generate(IDS, **settings), other.generate(IDS, **settings))
        model = L2DForCausalLM.from_pretrained(folder)
    model.generate(IDS, **settings)
    for (_, own), (_, new) in zip(model.trained_parameters(), other.trained_parameters(), strict=True):
        own.data = new.data.clone()
    assert torch.equal(model.generate(IDS, **settings), other.generate(IDS, **settings))


def test_the_table_of_modulations_follows_the_norms_of_the_base(model):
    def solved() -> torch.Tensor:
        index = torch.tensor([[5]])
        return model.solve(
            model.paths.main_path(IDS[:1]), index, torch.ones(1, 1, 16), {"speculation": False}
        ).final_logits

    solved()
    norm = model.base.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm.mul_(1.5)
    kept = solved()
    model.path._tables = {}  # made anew
    assert torch.equal(kept, solved())


def test_a_deep_copy_is_a_model_of_its_own(model, folder):
    before = model.generate(IDS, max_new_tokens=6)
    for passes in (1, 2, 3):
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(IDS, max_new_tokens=6), before)
        for _ in range(passes):
            randomise_path(twin, seed=5)
        assert torch.equal(twin.generate(IDS, max_new_tokens=6), changed(folder).generate(IDS, max_new_tokens=6))
    assert torch.equal(model.generate(IDS, max_new_tokens=6), before)


def test_a_given_base_keeps_its_dtype_and_settings(folder, make_base):
    base = AutoModelForCausalLM.from_pretrained(make_base("llama"))
    model = L2DForCausalLM.from_pretrained(folder, base=base, dtype="torch.bfloat16")
    assert model.base.dtype == torch.bfloat16 and base.dtype == torch.float32
    fresh = L2DForCausalLM.from_base(base)
    fresh.generation_config.max_new_tokens = 3
    assert base.generation_config.max_new_tokens is None
    with pytest.raises(ValueError, match="float33"):
        L2DForCausalLM.from_pretrained(folder, base=base, dtype="float33")


def test_threads_may_share_a_model_and_a_base(folder, make_base):
    base = AutoModelForCausalLM.from_pretrained(make_base("llama"))
    pair = [L2DForCausalLM.from_pretrained(folder, base=base) for _ in range(2)]

    def decode(job: tuple[int, int]) -> torch.Tensor:
        return pair[job[0]].generate(IDS, max_new_tokens=6, sampler={"budget": job[1]})

    jobs = [(0, 15), (1, 7), (0, 7), (1, 15)] * 3
    expected = [decode(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(*both) for both in zip(expected, pool.map(decode, jobs), strict=True))


@pytest.mark.parametrize("library", ["peft", "trl", "lm_eval.models.huggingface"])
def test_libraries_that_load_transformers_may_be_imported_after_us(library):
    code = f"import l2d, {library}; from trl import SFTConfig; from transformers import AutoModelForCausalLM as A; "
    code += "assert any(c.__name__ == 'L2DConfig' for c in A._model_mapping.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM"])
def test_the_auto_classes_know_us_whatever_is_imported_first(folder, name):
    code = (
        "import sys, l2d; assert 'torch' not in sys.modules; "
        f"from transformers import {name} as A; print(type(A.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == [{"AutoConfig": "L2DConfig"}.get(name, "L2DForCausalLM")], done.stderr


@torch.no_grad()
def test_weights_changed_behind_autograd_are_used_once_the_mode_is_set(model, folder):
    other, index = changed(folder), torch.tensor([[3], [5]])
    state = model.paths.main_path(IDS[:2])
    model.generate(IDS, max_new_tokens=2)
    model.train()
    for (_, own), (_, new) in zip(model.trained_parameters(), other.trained_parameters(), strict=True):
        own.data.copy_(new.data)  # which no version of the parameter tells
    model.eval()
    solved = [one.solve(state, index, torch.ones(2, 1, 16)).final_logits for one in (model, other)]
    torch.testing.assert_close(*solved, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.paths.vocabulary_table(), other.paths.vocabulary_table())
    assert torch.equal(model.generate(IDS, max_new_tokens=6), other.generate(IDS, max_new_tokens=6))


@pytest.mark.parametrize("width", [64, 512])  # small, and large enough for products that are laid out anew
def test_a_model_can_be_pickled_after_inference(make_base, width):
    model = L2DForCausalLM.from_base(str(make_base("llama", hidden_size=width)), L2DConfig(lora_rank=2)).eval()
    before = model.generate(IDS, max_new_tokens=3)
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(IDS, max_new_tokens=3), before)


def test_a_model_may_be_loaded_in_inference_mode(folder, model):
    with torch.inference_mode():
        found = L2DForCausalLM.from_pretrained(folder).generate(IDS, max_new_tokens=4)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=4))


def test_what_is_kept_for_inference_does_not_remember_autocast(folder, model):
    index, x0 = torch.tensor([[3], [5], [8]]), torch.ones(3, 1, 16)
    solved = []
    for cast in (False, True):
        one = L2DForCausalLM.from_pretrained(folder)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            one.generate(IDS, max_new_tokens=2)
        solved.append(one.solve(one.paths.main_path(IDS), index, x0).final_logits)
    assert torch.equal(*solved)


def test_what_a_base_cannot_be(model, folder):
    with pytest.raises(ValueError, match="itself an L2D model"):
        L2DForCausalLM.from_base(model)
    before = model.generate(IDS, max_new_tokens=4)
    for change in (
        lambda: model.resize_token_embeddings(500),
        lambda: model.set_input_embeddings(torch.nn.Embedding(3, 3)),
        lambda: model.add_adapter(LoraConfig(target_modules="all-linear")),
    ):
        with pytest.raises(ValueError, match="cannot be changed"):
            change()
    assert torch.equal(model.generate(IDS, max_new_tokens=4), before)


def test_a_base_that_is_compiled_already_is_refused(base_dir):
    compiled = torch.compile(AutoModelForCausalLM.from_pretrained(base_dir))  # nothing is compiled before it is called
    with pytest.raises(ValueError, match="base is a OptimizedModule: give a model of transformers"):
        L2DForCausalLM.from_base(compiled)


@pytest.mark.parametrize("name", ["state_dict", "output_loading_info", "config"])
def test_arguments_of_loading_without_effect_are_refused(folder, name):
    given = {"state_dict": {}, "output_loading_info": True, "config": str(folder)}[name]
    with pytest.raises(ValueError, match=name):
        L2DForCausalLM.from_pretrained(folder, **{name: given})


@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_base_that_is_offloaded_is_refused(folder, tmp_path, rest):
    parts = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, rest), "model.layers.0": "disk"}
    with pytest.raises(ValueError, match="a part of the base would be offloaded"):
        L2DForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path))
    L2DForCausalLM.from_pretrained(folder, device_map=dict.fromkeys(places, "cpu"))


def test_access_to_the_hub_serves_the_base_too(folder, monkeypatch):
    load, seen = l2d.checkpoint.loading.load_base, {}

    def load_base(name, **kwargs):
        seen.update(kwargs)
        return load(name, **kwargs)

    monkeypatch.setattr(l2d.checkpoint.loading, "load_base", load_base)
    access = dict(token="secret", local_files_only=True, cache_dir="elsewhere")
    L2DForCausalLM.from_pretrained(folder, **access)
    assert {name: seen.get(name) for name in access} == access


def test_masks_and_classes_that_do_not_fit_are_refused(model, make_base, make_l2d):
    for given in (dict(attention_mask=torch.ones(3, 8)), dict(continuation_mask=torch.zeros(10, dtype=torch.bool))):
        with pytest.raises(ValueError, match=next(iter(given))):
            model.score(IDS, **given)
    place = model.paths.main_path(IDS[:1]), torch.tensor([[4]]), torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="votes was removed"):
        model.solve(*place, {"votes": 3})
    plain = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama")))
    for one, wrong in ((model, 5), (model, -1), (plain, 0)):
        with pytest.raises(ValueError, match="classes="):
            one.solve(*place, classes=torch.tensor([wrong]))
