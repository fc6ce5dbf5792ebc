"""Which random number serves what: start noise, sampled choices and output tokens, by request, position and draw.

Run: `python -m pytest tests/l2d/test_noise.py` (about 5 seconds)

Each test does by hand what decoding or scoring does, with numbers that `RequestNoise` gives for the place.
"""

import itertools

import numpy as np
import pytest
import torch

from l2d import L2DForCausalLM
from l2d.sampling.noise import RequestNoise, default_keys, draw_token

IDS = torch.randint(3, 400, (2, 8), generator=torch.Generator().manual_seed(4))
KEYS = ["first", "second"]
SEED = 11


@pytest.fixture(scope="module")
def model(make_base, make_l2d) -> L2DForCausalLM:
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"))).double()


def solved(model, ids: torch.Tensor, key: str | bytes, position: int, sampler: dict, draw: int = 0) -> torch.Tensor:
    """Logits (V,) of the token at `position` of `ids` (1, S), solved with the numbers of that place."""
    noise, dim = RequestNoise(SEED, key), model.config.diffusion_dim
    x0 = torch.from_numpy(noise.normal(position, draw, dim)).double() * model.config.noise_std
    uniforms = torch.from_numpy(noise.choices(position, draw, 64))
    state = model.paths.main_path(ids[:, :position])
    index = torch.tensor([[position - 1]])
    return model.solve(state, index, x0[None, None], sampler, uniforms=uniforms[None, None]).final_logits[0, 0]


def test_every_place_has_numbers_of_its_own():
    normals, choices, outputs = set(), set(), set()
    places = list(itertools.product((0, 1), (b"a", b"b"), (0, 1, 7), (0, 1)))
    for seed, key, position, draw in places:
        noise = RequestNoise(seed, key)
        normals.add(noise.normal(position, draw, 4).tobytes())
        choices |= set(noise.choices(position, draw, 3).tolist())
        outputs.add(noise.output(position))
    assert len(normals) == len(places) and len(choices) == 3 * len(places) and len(outputs) == len(places) / 2
    assert not choices & outputs
    twice = [RequestNoise(1, b"a").normal(7, 1, 4) for _ in range(2)]
    assert np.array_equal(*twice)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_output_tokens_are_drawn_with_the_number_of_their_position(model, padding):
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    settings = dict(do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=None, request_keys=KEYS)
    made = model.generate(IDS, attention_mask=mask, sampler={"budget": 1, "seed": SEED}, **settings)
    for row, (key, start) in enumerate(zip(KEYS, (padding, 0), strict=True)):
        ids = IDS[row : row + 1, start:]
        for _ in range(6):
            probabilities = torch.softmax(model.base(ids).logits[0, -1].float(), -1)
            uniform = torch.tensor(RequestNoise(SEED, key).output(ids.shape[1]), dtype=torch.float64)
            ids = torch.cat([ids, draw_token(probabilities, uniform).view(1, 1)], dim=1)
        assert made[row, start:].tolist() == ids[0].tolist()


@pytest.mark.parametrize("speculation", [False, True])
def test_choices_are_drawn_with_the_numbers_of_their_position(model, speculation):
    sampler = dict(solver="euler", budget=5, choice_temperature=1.0, seed=SEED, draft_tokens=0)
    sampler["speculation"] = speculation
    kept = dict(output_logits=True, return_dict_in_generate=True, eos_token_id=None, max_new_tokens=5)
    made = model.generate(IDS, sampler=sampler, request_keys=KEYS, **kept)
    for row, key in enumerate(KEYS):
        for step, logits in enumerate(made.logits):
            expected = solved(model, made.sequences[row : row + 1], key, IDS.shape[1] + step, sampler)
            torch.testing.assert_close(logits[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_several_draws_average_probabilities(model):
    sampler = dict(budget=7, seed=SEED)
    scored = model.score(IDS, sampler={**sampler, "mc_samples": 3}, request_keys=KEYS)
    for row, key in enumerate(KEYS):
        for position in (1, 4, 7):
            draws = [solved(model, IDS[row : row + 1], key, position, sampler, draw) for draw in range(3)]
            mean = torch.stack([torch.softmax(logits, -1) for logits in draws]).mean(0)[IDS[row, position]]
            assert scored.logprobs[row, position].exp().item() == pytest.approx(mean.item(), rel=1e-4)


def test_continuations_of_one_context_share_their_noise(model):
    rows = IDS[:1].repeat(2, 1)
    rows[1, 5:] = IDS[1, 5:]
    marked = torch.zeros_like(rows, dtype=torch.bool)
    marked[:, 5:] = True
    own = model.score(rows, continuation_mask=marked, sampler={"seed": SEED})
    (key,) = default_keys([rows[0, :5].tolist()])
    shared = model.score(rows, continuation_mask=marked, sampler={"seed": SEED}, request_keys=[key, key])
    assert torch.equal(own.logprobs, shared.logprobs)
