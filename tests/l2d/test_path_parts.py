"""Parts of the diffusion path against plain arithmetic: embeddings, modulation, and who sees whom while decoding.

Run: `python -m pytest tests/l2d/test_path_parts.py` (about 5 seconds)
"""

import math

import pytest
import torch

from l2d import L2DForCausalLM
from l2d.network.attention import SiteLayout
from l2d.network.diffusion_path import PathInputs
from l2d.network.embeddings import InputProjection, TimeEmbedding

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(make_base, make_l2d) -> L2DForCausalLM:
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()


@pytest.mark.parametrize("norm", [None, 3.0])
def test_tokens_lie_on_their_sphere(make_base, make_l2d, norm):
    model = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), embedding_norm=norm))
    table, rows = model.paths.vocabulary_table(), model.get_input_embeddings().weight
    projected = rows @ model.path.vocabulary.projection.weight.T + model.path.vocabulary.projection.bias
    expected = projected / projected.norm(dim=-1, keepdim=True) * (math.sqrt(16) if norm is None else norm)
    torch.testing.assert_close(table, expected.detach())


@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 0.97, 1.0])
def test_inputs_have_unit_variance_at_every_time(time):
    projection = InputProjection(64, 8, 8, noise_std=3.0, token_variance=2.25, scale=1.0)
    seen: list[torch.Tensor] = []
    projection.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    generator = torch.Generator().manual_seed(0)
    noise, tokens = (torch.randn(2000, 64, generator=generator) for _ in range(2))
    projection((1 - time) * 3.0 * noise + time * 1.5 * tokens, projection.std(torch.full((2000,), time)))
    assert seen[0].var().item() == pytest.approx(1.0, abs=0.02)


def test_features_of_a_time_by_hand():
    features = TimeEmbedding(8, 4).features(torch.tensor([0.0, 0.4]))
    for time, row in zip((0.0, 0.4), features.tolist(), strict=True):
        angles = [time * 10000 ** (-k / 4) for k in range(4)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-6)


@torch.no_grad()
def test_no_class_is_the_last_embedding(model):
    time = torch.tensor([0.2, 0.9])
    last = model.path.conditioning(time, torch.tensor([2, 2]))
    assert torch.equal(model.path.conditioning(time), last)
    assert not torch.equal(model.path.conditioning(time, torch.tensor([0, 0])), last)


@torch.no_grad()
def test_the_output_is_modulated_by_the_distance_from_time_zero(model):
    path, time, classes = model.path, torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1, 1, 0])
    at = [path.output_modulation(path.conditioning(moment, classes)) for moment in (time, torch.zeros(3))]
    torch.testing.assert_close(path.modulate(time, classes).output, at[0] - at[1])
    assert not path.modulate(time, classes).output[0].any()


@torch.no_grad()
def test_parts_of_a_modulation_are_in_the_published_order(model):
    """Scale, shift and gate of attention, then of the MLP; scales are added to the norms' weights."""
    state, layer = model.paths.main_path(IDS), model.path.layers[0]
    embedding = model.path.conditioning(torch.tensor([0.3, 0.6]))
    raw = layer.modulation(embedding).chunk(6, dim=-1)
    weights = layer.twin.norm_weights()
    expected = (weights[0] + raw[0], *raw[1:3], weights[1] + raw[3], *raw[4:])
    for part, by_hand in zip(layer.modulate(embedding), expected, strict=True):
        torch.testing.assert_close(part, by_hand)
    hidden, rows = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 1])
    parts = [torch.randn(2, 32, generator=torch.Generator().manual_seed(n)).double() for n in range(6)]
    found = layer(hidden, torch.cat(parts, -1), None, SiteLayout(state, rows, rows + 3), state.layers[0])
    layout = SiteLayout(state, rows, rows + 3)
    attended = hidden + parts[2] * layer.twin.attend(hidden, parts[0], parts[1], layout, state.layers[0])
    torch.testing.assert_close(found, attended + parts[5] * layer.twin.transform(attended, parts[3], parts[4]))


@torch.no_grad()
def test_documents_of_any_length_are_told_apart(model):
    """Packed in one row: of three tokens, of one, and of two."""
    ids, lengths, kind = IDS[:1, :6], (3, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    numbers = torch.cat([torch.arange(length) for length in lengths])[None]
    packed, start = model.paths.main_path(ids, position_ids=numbers), 0
    x, time = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2)), torch.full((1, 1), 0.5)
    for length in lengths:
        alone = model.paths.main_path(ids[:, start : start + length])
        start += length
        pair = [
            model.paths.path_logits(state, PathInputs(torch.tensor([[last]]), x, time, kind))
            for state, last in ((packed, start - 1), (alone, length - 1))
        ]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 20])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_last_position_sees_the_same_keys_while_decoding(model, window, padding):
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    state, rows = model.paths.main_path(IDS, mask), torch.tensor([0, 1])
    seen = []
    for one, index in ((state, rows * 0 + 8), (state.last(), rows * 0)):
        visible = SiteLayout(one, rows, index).mask(0, window)
        whole = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        seen.append(whole if visible is None else visible.expand(2, 1, 1, 9))
    assert torch.equal(*seen)
    assert seen[0][1].sum() == min(window or 9, 9)
