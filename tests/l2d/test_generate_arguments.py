"""What transformers' `generate` may be given: it is followed as there, or refused in one sentence that names it.

Run: `python -m pytest tests/l2d/test_generate_arguments.py` (about ten seconds)
"""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    pipeline,
)

from l2d import L2DForCausalLM

IDS = torch.randint(3, 400, (3, 10), generator=torch.Generator().manual_seed(7))
ONE_BY_ONE = dict(draft_tokens=0)


@pytest.fixture(scope="module")
def model(make_base, make_l2d) -> L2DForCausalLM:
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()


REFUSED = [
    dict(num_beams=2),
    dict(penalty_alpha=0.6),
    dict(dola_layers="low"),
    dict(prompt_lookup_num_tokens=3),
    dict(assistant_early_exit=1),
    dict(guidance_scale=1.5),
    dict(output_attentions=True),
]


@pytest.mark.parametrize("given", REFUSED, ids=lambda given: next(iter(given)))
@pytest.mark.parametrize("place", ["argument", "generation_config", "model"])
def test_what_the_sampler_cannot_follow_is_refused_wherever_it_is_set(model, monkeypatch, given, place):
    settings = {"max_new_tokens": 2}
    if place == "argument":
        settings |= given
    elif place == "generation_config":
        settings = {"generation_config": GenerationConfig(**settings, **given)}
    else:
        monkeypatch.setattr(model.generation_config, *next(iter(given.items())))
    with pytest.raises(ValueError, match=f"{next(iter(given))} cannot be used"):
        model.generate(IDS, **settings)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(position_ids=torch.arange(10)[None].expand(3, -1) + 50), "position_ids"),
        (dict(noised_targets=1), "noised_targets"),
        (dict(attention_mask=torch.ones(3, 13, dtype=torch.int64)), "attention_mask"),
        (dict(attention_mask=torch.ones(3, 8, dtype=torch.int64)), "attention_mask"),
        (dict(noise=torch.zeros(1, 3, 16)), "noise"),
        (dict(noise=torch.zeros(2, 3, 1)), "noise"),
        (dict(noise=torch.zeros(2, 5, 16)), "noise"),
        (dict(request_keys=["one for all"]), "request_keys"),
        (dict(sampler="budget"), "sampler='budget'"),
        (dict(sampler={"seed": 1 << 64}), "seed="),
        (dict(stop_strings=["a"]), "stop_strings"),
    ],
)
def test_arguments_without_effect_or_of_another_shape_are_refused(model, given, named):
    with pytest.raises(ValueError, match=named):
        model.generate(IDS, max_new_tokens=2, **given)


@pytest.mark.parametrize("inputs", [[1, 2, 3], {"input_ids": IDS}, IDS[0]], ids=["list", "mapping", "one row"])
def test_prompts_are_rows_of_token_ids(model, inputs):
    with pytest.raises(ValueError, match="input_ids must be a tensor"):
        model.generate(inputs, max_new_tokens=2)


def test_an_empty_prompt_begins_with_the_start_token(model, tokenizer):
    """As in transformers, whose pipelines hand in no tokens at all for an empty text."""
    begun = torch.tensor([[model.config.bos_token_id]])
    assert torch.equal(model.generate(max_new_tokens=4), model.generate(begun, max_new_tokens=4))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for text in ("", "1 + 1 ="):
        (answer,) = pipe(text, max_new_tokens=4, do_sample=False, sampler={"budget": 3}, add_special_tokens=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        tokens = model.generate(ids.long() if text else begun, max_new_tokens=4, sampler={"budget": 3})
        assert answer["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_keys_of_rows_serve_all_their_copies(model):
    settings = dict(max_new_tokens=4, do_sample=True, num_return_sequences=2)
    copies = model.generate(IDS, request_keys=["a", "b", "c"], **settings)
    assert len(copies) == 6 and not torch.equal(copies[0], copies[1])
    assert torch.equal(model.generate(IDS[1:2], request_keys=["b"], **settings), copies[2:4])


def test_text_ends_with_a_stop_string(model, tokenizer):
    free = model.generate(IDS[:1], max_new_tokens=8)[0]
    strings = [tokenizer.decode(free[13:14])]
    expected = next(n for n in range(10, 18) if strings[0] in tokenizer.decode(free[n]))
    config = GenerationConfig(max_new_tokens=8, stop_strings=strings)
    for settings in (dict(max_new_tokens=8, stop_strings=strings), dict(generation_config=config)):
        stopped = model.generate(IDS[:1], tokenizer=tokenizer, **settings)[0]
        assert torch.equal(stopped, free[: expected + 1]) and len(stopped) < len(free)
    assert config.stop_strings == strings


class _Counting(LogitsProcessor):
    """What it favours depends on how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_add(1, torch.tensor([37 * self.calls % 400]), scores.new_full((len(scores), 1), 50.0))


def test_processors_with_a_state_are_asked_once_per_token(model):
    processors = [_Counting() for _ in range(2)]
    drafted, plain = (
        model.generate(IDS[:1], max_new_tokens=12, sampler=sampler, logits_processor=LogitsProcessorList([one]))
        for one, sampler in zip(processors, ({}, ONE_BY_ONE), strict=True)
    )
    assert torch.equal(drafted, plain) and [one.calls for one in processors] == [12, 12]


def test_a_watermark_is_the_same_with_and_without_drafts(model):
    watermark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3, 4, 5, 6], context_history_size=32)
    settings = dict(max_new_tokens=20, do_sample=True, watermarking_config=watermark)
    answers = [model.generate(IDS[:1], sampler=sampler, **settings) for sampler in ({}, ONE_BY_ONE)]
    assert torch.equal(*answers)


class _FirstRowEnds(StoppingCriteria):
    def __init__(self):
        self.scores: list = []

    def __call__(self, input_ids, scores, **kwargs):
        self.scores.append(scores)
        return torch.tensor([input_ids.shape[1] >= 12, False, False])


def test_rows_that_end_early_are_filled_with_padding_or_refused(model, monkeypatch):
    settings = dict(max_new_tokens=6, do_sample=True)
    stop = StoppingCriteriaList([_FirstRowEnds()])
    filled = model.generate(IDS, stopping_criteria=stop, pad_token_id=7, **settings)
    assert filled[0, 12:].tolist() == [7] * 4
    for name in ("pad_token_id", "eos_token_id"):
        monkeypatch.setattr(model.generation_config, name, None)
    with pytest.raises(ValueError, match="pad_token_id is not set"):
        model.generate(IDS, stopping_criteria=stop, **settings)
    assert model.generate(IDS, **settings).shape == (3, 16)


def test_stopping_criteria_see_the_scores_where_they_are_kept(model):
    stop = _FirstRowEnds()
    kept = dict(output_scores=True, return_dict_in_generate=True)
    model.generate(IDS, max_new_tokens=3, stopping_criteria=StoppingCriteriaList([stop]), **kept)
    assert [len(scores) for scores in stop.scores] == [1, 2, 3]


@pytest.mark.parametrize("guided", [False, True])
def test_evaluations_asked_for_are_counted_alike_for_all_solvers(model, guided):
    """T counts the free evaluation at t = 0 and, with guidance, both branches once; `nfe_computed` does not."""
    branches = dict(guidance_scale=1.5, guidance_class="math") if guided else {}
    for solver in (dict(solver="euler", budget=7, speculation=False), dict(solver="bosh3", max_evaluations=40)):
        _, record = model.generate(IDS, max_new_tokens=3, sampler={**solver, **branches}, return_record=True)
        for nfe_requested, nfe_computed, passes in zip(
            record.nfe_requested, record.nfe_computed, record.passes, strict=True
        ):
            assert nfe_computed == [(1 + guided) * (count - 2) + 1 for count in nfe_requested]
            assert passes == [count - 1 for count in nfe_requested] and max(nfe_requested) <= 40
        _, record = model.generate(IDS, max_new_tokens=2, sampler={**solver, "budget": 1}, return_record=True)
        assert record.nfe_requested == [[1, 1]] * 3 and record.nfe_computed == [[0, 0]] * 3
