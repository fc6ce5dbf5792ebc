"""The sampler: exact speculation, and results that depend on nothing but the request.

The model mocked here is a tiny random one whose path changes tokens several times per trajectory, so that speculation
is not flattered.
"""

import copy

import pytest
import torch
from torch.nn import functional
from torchdiffeq import odeint
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import l2d.decoding
import l2d.network.diffusion_path
import l2d.network.onednn
import l2d.sampling.speculation
from l2d import L2DForCausalLM, SamplerConfig
from l2d.decoding import DraftLength
from l2d.network.diffusion_path import PathInputs
from l2d.sampling.evaluator import clean_estimate
from l2d.sampling.noise import RequestNoise, default_keys, draw_token

GUIDED = dict(guidance_scale=1.5, guidance_class="math")


@pytest.fixture(scope="module")
def model(make_base, make_l2d):
    """A float64 model with guidance classes: equal tokens then mean an equal method."""
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()


def prompts(rows: int = 4, length: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of unequal lengths."""
    ids = torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : (3 * row) % 8] = 0
    return ids.masked_fill(mask == 0, 0), mask


def decode(model, sampler: dict, rows=4, tokens=12, **kwargs):
    ids, mask = prompts(rows)
    return model.generate(ids, attention_mask=mask, sampler=sampler, max_new_tokens=tokens, **kwargs)


def decode_and_score(model, sampler: dict):
    """Decode one row, whose tokens must be the most likely ones of their scores, at the evaluations that these ask for.

    Returns tokens (1, S) and the record.
    """
    length = prompts(1)[0].shape[1]
    out, record = decode(model, sampler, rows=1, return_record=True)
    new = torch.zeros(out.shape, dtype=torch.bool)
    new[:, length:] = True
    scored = model.score(out, continuation_mask=new, sampler=sampler)
    assert bool(scored.greedy[new].all())
    assert record.nfe_requested[0] == scored.nfe_requested[new].tolist()
    return out, record


SOLVERS = [("midpoint", 15), ("euler", 15), ("heun2", 15), ("heun3", 16), ("rk4", 17), ("midpoint", 3)]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("solver", "budget"), SOLVERS)
def test_speculation_gives_the_sequential_solvers_tokens(model, solver, budget, guided):
    settings = dict(solver=solver, budget=budget, **(GUIDED if guided else {}))
    fast, record = decode(model, settings, return_record=True)
    slow, plain = decode(model, {**settings, "speculation": False}, return_record=True)
    assert torch.equal(fast, slow)
    assert record.changes == plain.changes and sum(map(sum, record.changes)) >= 8
    for changes, passes in zip(record.changes, record.passes, strict=True):
        assert all(r <= c + 1 for c, r in zip(changes, passes, strict=True))
    assert all(nfe_requested == budget for row in record.nfe_requested for nfe_requested in row)


@pytest.mark.parametrize("temperature", [1.0, "polynomial_1_1.0", "polynomial_2_0.6"])
def test_speculation_is_exact_for_sampled_choices(model, temperature):
    settings = dict(choice_temperature=temperature)
    fast, slow = (decode(model, {**settings, "speculation": on}) for on in (True, False))
    assert torch.equal(fast, slow)
    assert not torch.equal(fast, decode(model, {}))


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("settings", [{}, GUIDED, dict(choice_temperature=1.0)])
@pytest.mark.parametrize("do_sample", [False, True])
def test_drafted_tokens_change_nothing(model, monkeypatch, settings, ahead, do_sample):
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)  # also where it does not pay
    settings = {**settings, "draft_tokens": 0}
    ids, mask = prompts(3)
    common = dict(attention_mask=mask, max_new_tokens=11, do_sample=do_sample, return_record=True)
    free, plain = model.generate(ids, sampler=settings, **common)
    end = int(free[1, 15])
    common |= dict(eos_token_id=end, pad_token_id=0)
    free, plain = model.generate(ids, sampler=settings, **common)
    drafted, record = model.generate(ids, sampler={**settings, "draft_tokens": ahead}, **common)
    assert torch.equal(drafted, free)
    assert record.nfe_requested == plain.nfe_requested and record.changes == plain.changes
    assert sum(map(sum, record.nfe_computed)) >= sum(map(sum, plain.nfe_computed))


def test_drafts_that_the_base_gets_right_save_passes(make_base):
    fresh = L2DForCausalLM.from_base(str(make_base("llama"))).eval()  # its path changes nothing: every draft is right
    ids, mask = prompts(1)
    passes = []
    fresh.path.register_forward_hook(lambda *a: passes.append(1))
    for ahead, expected in ((0, 12), (3, 3)):
        passes.clear()
        out = fresh.generate(ids, attention_mask=mask, max_new_tokens=12, sampler={"draft_tokens": ahead})
        assert len(passes) == expected
    assert torch.equal(out, fresh.base.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize(("room", "passes"), [(15, 12), (30, 6), (60, 3)])
def test_drafts_are_made_as_far_as_one_pass_has_room(make_base, monkeypatch, room, passes):
    fresh = L2DForCausalLM.from_base(str(make_base("llama"))).eval()
    ids, mask = prompts(1)
    made = []
    fresh.path.register_forward_hook(lambda *a: made.append(1))
    monkeypatch.setattr(l2d.decoding, "evaluations_per_pass", lambda hidden: room)
    fresh.generate(ids, attention_mask=mask, max_new_tokens=12, sampler=dict(budget=15, draft_tokens=3))
    assert len(made) == passes


def test_drafting_stops_where_the_base_guesses_wrong():
    length = DraftLength(3)
    assert [length.choose(rows) for rows in (1, 2, 8)] == [3, 1, 0]
    for _ in range(8):
        length.learn(False)
    assert sorted(length.choose(1) for _ in range(8)) == [0] * 7 + [1]
    for _ in range(40):
        length.learn(True)
    assert length.choose(8) == 3


def test_a_wrong_acceptance_rule_is_noticed(model, monkeypatch):
    slow = decode(model, dict(speculation=False))
    right = l2d.sampling.speculation._first_change

    def accept_everything(answers, assumed, plan, sites):
        return torch.full((sites,), assumed.shape[1])

    def one_evaluation_late(answers, *arguments):
        return right(answers.roll(1), *arguments)

    for wrong in (accept_everything, one_evaluation_late):
        monkeypatch.setattr(l2d.sampling.speculation, "_first_change", wrong)
        assert not torch.equal(decode(model, {}), slow)


def test_equal_prompts_are_different_requests_unless_keys_say_otherwise(model):
    ids = prompts(1)[0].expand(6, -1)
    settings = dict(max_new_tokens=8, do_sample=True)
    assert len(set(map(tuple, model.generate(ids, **settings).tolist()))) > 1
    same = model.generate(ids, request_keys=["one"] * 6, **settings)
    assert len(set(map(tuple, same.tolist()))) == 1
    assert default_keys([[1, 2], [3], [1, 2]])[0] != default_keys([[1, 2], [3], [1, 2]])[2]
    other = model.generate(ids, request_keys=["one"] * 6, sampler={"seed": 1}, **settings)
    assert not torch.equal(same, other)
    with pytest.raises(ValueError, match="request_keys"):
        model.generate(ids, request_keys=["a", "b", "c", "d"], **settings)


def test_budget_one_is_the_base_with_and_without_padding(model):
    ids, mask = prompts()
    expected = model.base.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12, sampler={"budget": 1}), expected)


def test_scores_are_the_log_probabilities_that_decoding_sees(model):
    ids, _ = prompts(1)
    out = model.generate(
        ids, max_new_tokens=6, return_dict_in_generate=True, output_logits=True, request_keys=["r"], sampler=GUIDED
    )
    mask = torch.zeros_like(out.sequences, dtype=torch.bool)
    mask[:, ids.shape[1] :] = True
    scored = model.score(out.sequences, None, continuation_mask=mask, request_keys=["r"], sampler=GUIDED)
    assert scored.greedy[mask].all()
    for step, logits in enumerate(out.logits):
        place = ids.shape[1] + step
        expected = logits.log_softmax(-1)[0, out.sequences[0, place]]
        assert float(scored.logprobs[0, place]) == pytest.approx(float(expected), abs=1e-5)


def test_scoring_needs_no_batch_mates_and_averages_probabilities(model):
    ids = prompts(3)[0]
    ids[:, 0] = 5
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    wanted = attention.bool().clone()
    wanted[:, :4] = False
    wanted[2, :] = False
    wanted[2, 9] = True
    together = model.score(ids, attention, continuation_mask=wanted, sampler={"mc_samples": 3})
    for row in range(3):
        alone = model.score(
            ids[row : row + 1, : int(attention[row].sum())],
            continuation_mask=wanted[row : row + 1, : int(attention[row].sum())],
            sampler={"mc_samples": 3},
        )
        width = alone.logprobs.shape[1]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row, :width], rtol=0, atol=1e-5)
    assert (together.nfe_requested[wanted] == 45).all() and not together.logprobs[~wanted].any()
    base = model.score(ids, attention, continuation_mask=wanted, sampler={"budget": 1})
    expected = model.base(ids, attention_mask=attention).logits.log_softmax(-1)
    rows, places = wanted.nonzero(as_tuple=True)
    torch.testing.assert_close(
        base.logprobs[rows, places].double(), expected[rows, places - 1, ids[rows, places]], rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="continuation_mask"):
        model.score(ids, attention, continuation_mask=torch.ones_like(wanted))


def test_solve_records_a_trajectory_that_its_own_evaluations_reproduce(model):
    ids = prompts(2)[0]
    state = model.paths.main_path(ids)
    index = torch.tensor([[3, 9], [5, -1]])
    x0 = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    solution = model.solve(state, index, x0, GUIDED)
    assert solution.trajectory.shape == (8, 2, 2, 16) and solution.chosen.shape == (14, 2, 2, 2)
    last = model.paths.path_logits(
        state, PathInputs(index, solution.trajectory[-1], torch.ones(2, 2), torch.zeros_like(index))
    )
    torch.testing.assert_close(last, solution.final_logits, rtol=0, atol=1e-9)
    for guided_class in ("math", "coding"):
        classes = torch.full((2,), ["math", "coding"].index(guided_class))
        by_row = model.solve(state, index, x0, dict(guidance_scale=1.5, guidance_class="math"), classes=classes)
        by_name = model.solve(state, index, x0, dict(guidance_scale=1.5, guidance_class=guided_class))
        torch.testing.assert_close(by_row.final_logits, by_name.final_logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["adaptive_heun", "bosh3", "fehlberg2", "dopri5"])
@torch.no_grad()
def test_adaptive_solvers_follow_torchdiffeq_and_ignore_batch_mates(model, solver):
    settings = SamplerConfig(
        solver=solver, choice="average", choice_temperature=1.0, final_time=0.9, rtol=1e-4, atol=1e-4, first_step=0.02
    )
    ids = prompts(3)[0]
    state = model.paths.main_path(ids)
    index = torch.full((3, 1), 9)
    x0 = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    together = model.solve(state, index, x0, settings).final_logits
    table = model.paths.vocabulary_table()
    for row in range(3):
        one = model.paths.main_path(ids[row : row + 1])

        def field(time, x, one=one):
            times = torch.full((1, 1), float(time))
            logits = model.paths.path_logits(one, PathInputs(index[:1], x, times))
            return (clean_estimate(logits, table, "average", 1.0)[0] - x) / (1 - float(time))

        alone = model.solve(one, index[:1], x0[row : row + 1], settings).final_logits
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-7)

        def torchdiffeq_logits(start=x0[row : row + 1], one=one, field=field, **settings):
            end = odeint(field, start, torch.tensor([0.0, 0.9], dtype=torch.float64), **settings)[-1]
            return model.paths.path_logits(one, PathInputs(index[:1], end, torch.full((1, 1), 0.9)))

        slack = 0.05 if solver == "fehlberg2" else 1e-3  # its error estimate is coarse, in torchdiffeq too
        exact = torchdiffeq_logits(rtol=1e-9, atol=1e-9)
        theirs = torchdiffeq_logits(method=solver, rtol=1e-4, atol=1e-4, options={"first_step": 0.02})
        assert float((alone - exact).abs().max()) < 2 * float((theirs - exact).abs().max()) + slack


def test_the_cap_of_adaptive_solvers_is_counted(model):
    settings = dict(solver="bosh3", max_evaluations=9)
    _, record = decode(model, settings, tokens=3, return_record=True)
    assert record.capped > 0
    assert max(max(row) for row in record.nfe_computed) <= 9
    _, record = decode(
        model, dict(solver="bosh3", choice="average", choice_temperature=1.0), tokens=2, return_record=True
    )
    assert record.capped == 0 and len({c for row in record.nfe_computed for c in row}) > 1


def test_adaptive_sampled_choices_run(model):
    out = decode(model, dict(solver="bosh3", choice_temperature="polynomial_1_0.5", max_evaluations=60), tokens=2)
    assert out.shape == (4, 12)


class _Collect(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.tolist())

    def end(self):
        self.ended = True


class _AfterLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)


def test_end_tokens_streaming_and_stopping_criteria(model):
    ids, mask = prompts(3)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=10)
    ends = sorted({int(free[0, 13]), int(free[1, 15])})
    stopped, record = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, eos_token_id=ends, pad_token_id=0, return_record=True
    )
    for row in range(3):
        new = free[row, 10:].tolist()
        cut = next((place for place, token in enumerate(new) if token in ends), len(new) - 1)
        assert stopped[row, 10 : 11 + cut].tolist() == new[: cut + 1]
        assert not stopped[row, 11 + cut :].any()
        assert len(record.nfe_requested[row]) == cut + 1  # finished rows cost nothing
    collect = _Collect()
    out = model.generate(ids[:1], max_new_tokens=5, streamer=collect)
    assert collect.ended and [t for part in collect.parts[1:] for t in part] == out[0, 10:].tolist()
    short = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, stopping_criteria=StoppingCriteriaList([_AfterLength()])
    )
    assert short.shape[1] == 13


def test_settings_that_would_be_ignored_are_refused(model):
    ids = prompts(1)[0]
    for wrong in (dict(num_beams=2), dict(inputs_embeds=torch.zeros(1, 1, 32)), dict(past_key_values=object())):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(ids, max_new_tokens=2, **wrong)
    contrastive, beams = dict(penalty_alpha=0.6, top_k=4), dict(num_beams=3)
    for wrong in (contrastive, dict(generation_config=GenerationConfig(**beams))):
        with pytest.raises(ValueError, match="the L2D sampler decodes greedily or samples"):
            model.generate(ids, max_new_tokens=2, **wrong)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match="guidance_class"):
        model.generate(ids, sampler=dict(guidance_scale=2.0))


def test_noise_is_a_function_of_seed_request_position_and_draw():
    noise = RequestNoise(0, "a")
    first = noise.normal(5, 0, 4096)
    assert (first == RequestNoise(0, "a").normal(5, 0, 4096)).all()
    others = (RequestNoise(1, "a").normal(5, 0, 4096), RequestNoise(0, "b").normal(5, 0, 4096))
    others += (noise.normal(6, 0, 4096), noise.normal(5, 1, 4096))
    assert all(abs(float((first * other).mean())) < 0.08 for other in others)
    assert abs(first.std() - 1) < 0.05


def test_inverse_transform_sampling_has_the_right_frequencies():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw_token(probabilities.expand(1000, -1), uniform)
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 200, 300]


def test_merged_deltas_change_nothing_but_speed(make_base, make_l2d, monkeypatch):
    single = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()
    layer = single.path.layers[0].twin.self_attn.q_proj
    ids, _ = prompts(2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    merged = single.score(ids, continuation_mask=mask)
    assert "forward" in layer.__dict__
    with torch.no_grad():
        layer.lora_B["diffusion"].weight.mul_(2.0)
    changed = single.score(ids, continuation_mask=mask)
    assert not torch.allclose(changed.logprobs, merged.logprobs)
    with torch.no_grad():
        layer.lora_B["diffusion"].weight.div_(2.0)
    single.train()
    assert "forward" not in layer.__dict__
    single.paths.prepare_inference()  # does nothing in training mode
    assert "forward" not in layer.__dict__
    single.eval()
    monkeypatch.setattr(single.paths, "prepare_inference", lambda: None)
    separate = single.score(ids, continuation_mask=mask)
    torch.testing.assert_close(separate.logprobs, merged.logprobs, rtol=0, atol=1e-6)


onednn = pytest.mark.skipif(l2d.network.onednn._ONEDNN is None, reason="this PyTorch has no oneDNN products")


@onednn
def test_products_by_onednn_are_those_of_pytorch(monkeypatch):
    monkeypatch.setattr(l2d.network.onednn, "_LEAST", 0)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(70, 33, generator=generator), torch.randn(70, generator=generator)
    served = []
    real = l2d.network.onednn._ONEDNN
    monkeypatch.setattr(l2d.network.onednn, "_ONEDNN", lambda *a: served.append(1) or real(*a))
    for shape in ((1, 33), (127, 33), (2, 3, 33), (1, 0, 33)):
        inputs = torch.randn(shape, generator=generator)
        for given in (bias, None):
            expected = functional.linear(inputs, weight, given)
            with torch.no_grad():
                results = (
                    l2d.network.onednn.linear(inputs, weight, given),
                    l2d.network.onednn.packed_linear(weight, given)(inputs),
                )
            for result in results:
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert len(served) == 14  # no call for an empty batch of unpacked inputs
    served.clear()
    assert torch.equal(l2d.network.onednn.linear(inputs.double(), weight.double()), inputs.double() @ weight.double().T)
    weight.requires_grad_()
    l2d.network.onednn.linear(torch.ones(1, 33), weight).sum().backward()  # gradients by PyTorch's own product
    assert not served and weight.grad is not None


@onednn
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_onednn_gives_the_tokens_of_plain_products(make_base, make_l2d, monkeypatch, variant):
    single = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), variant, ["math", "coding"]))
    plain = decode(single, GUIDED, tokens=8)
    greedy = decode(single, dict(budget=1), tokens=8)
    monkeypatch.setattr(l2d.network.onednn, "_LEAST", 0)
    single.train().eval()  # merge again
    assert torch.equal(decode(single, GUIDED, tokens=8), plain)
    assert torch.equal(decode(copy.deepcopy(single), GUIDED, tokens=8), plain)
    assert torch.equal(decode(single, {**GUIDED, "speculation": False}, tokens=8), plain)
    assert torch.equal(decode(single, dict(budget=1), tokens=8), greedy)
    real = l2d.network.onednn._PACK
    monkeypatch.setattr(l2d.network.onednn, "_PACK", lambda weight, size: real(weight.roll(1, 0), size))
    single.train().eval()  # merge again
    assert not torch.equal(decode(single, GUIDED, tokens=8), plain)  # so the packed weights are what is used


def test_rows_of_a_modulation_table_in_sequence_are_those_of_any_order(model, monkeypatch):
    times = torch.linspace(0.0, 0.9, 10)
    table = model.path.modulation_table(times, (0, 1))
    for at_once in (l2d.network.diffusion_path._AT_ONCE, 0):
        monkeypatch.setattr(l2d.network.diffusion_path, "_AT_ONCE", at_once)
        for rows in (torch.arange(3, 9), torch.tensor([4, 4, 9]), torch.tensor([7]), torch.tensor([5, 4])):
            part = table.select(rows)
            assert torch.equal(part.output, table.output[rows]) and torch.equal(part.input_std, table.input_std[rows])
            for number in range(len(model.path.layers)):
                assert torch.equal(part.layer(number), table.layer(number)[rows])
