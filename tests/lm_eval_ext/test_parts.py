"""The small parts of `lm_eval_ext`: stop strings, records, batches of requests.

Run: `python -m pytest tests/lm_eval_ext/test_parts.py`
"""

import contextlib
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from l2d.decoding import UNUSED_SETTINGS, refuse
from l2d.sampler_config import SamplerConfig
from l2d.sampling.stop_strings import TextStop, after_last
from lm_eval_ext.argument_table import help_text, markdown, rows
from lm_eval_ext.arguments import ARGUMENTS, UsageError, token_search
from lm_eval_ext.generation_names import check_beams
from lm_eval_ext.requests.compute_record import QUANTITIES, RunRecord, sources
from lm_eval_ext.requests.guidance import class_of_task
from lm_eval_ext.requests.jobs import batches, make_jobs, parse_generation
from tests.conftest import SIZES, train_tokenizer

TOKENIZER = train_tokenizer()


@settings(max_examples=60)
@given(st.lists(st.integers(3, 399), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 6))
def test_a_stop_is_found_exactly_where_the_text_holds_it(tokens, start, length):
    text = TOKENIZER.decode(tokens)
    stop = text[start % len(text) :][:length]
    criterion = TextStop(TOKENIZER, [stop, "never in a text"], prompt_length=0)
    for count in range(1, len(tokens) + 1):
        if criterion.reached(tokens[:count]):
            assert stop in TOKENIZER.decode(tokens[:count])
            break
        assert stop not in TOKENIZER.decode(tokens[:count]) or "\ufffd" in stop


def test_rows_stop_by_themselves():
    ids = torch.tensor([TOKENIZER("The cat", add_special_tokens=False)["input_ids"]] * 2)
    criterion = TextStop(TOKENIZER, ["cat"], prompt_length=0)
    ids[1] = ids[1].flip(0)
    assert criterion(ids).tolist() == [True, "cat" in TOKENIZER.decode(ids[1])]
    assert not TextStop(TOKENIZER, ["cat"], prompt_length=ids.shape[1])(ids).any()
    assert not TextStop(TOKENIZER, [], prompt_length=0)(ids).any()


def test_stops_count_after_the_thinking_only():
    thinking = TOKENIZER("4 + 4 =", add_special_tokens=False)["input_ids"]
    end = TOKENIZER("Answer", add_special_tokens=False)["input_ids"]
    for think_end in ("Answer", end[-1]):
        criterion = TextStop(TOKENIZER, ["4"], prompt_length=0, think_end=think_end)
        assert not criterion.reached(thinking)
        assert not criterion.reached(thinking + end)
        assert criterion.reached(thinking + end + thinking)
    assert after_last([1, 2, 1, 3], 1) == [3]
    assert after_last([1, 2], 2) == []
    assert after_last([1, 2], 3) is None


@given(st.lists(st.integers(0, 40), min_size=1, max_size=50))
def test_statistics_of_a_record(values):
    record = RunRecord()
    record.add([values[:7], values[7:]], [values], [values], generated=True)
    other = RunRecord()
    other.add([[1]], [[1]], [[1]], generated=False)
    record.merge(other)
    summary, values = record.summary(), [*values, 1]
    assert summary["generated_tokens"] == len(values) - 1
    assert summary["scored_tokens"] == 1
    for name in QUANTITIES:
        statistics = summary[f"{name}_per_token"]
        assert statistics["mean"] == pytest.approx(np.mean(values))
        assert statistics["max"] == max(values)
        assert statistics["median"] == np.quantile(values, 0.5, method="inverted_cdf")
        assert statistics["p95"] == np.quantile(values, 0.95, method="inverted_cdf")


def test_an_empty_record_has_no_statistics():
    assert RunRecord().summary()["nfe_requested_per_token"] is None


def jobs_for(requests, docs=None, gather=lambda claims: claims):
    """Jobs whose tokens are the prompt's characters; `docs` are document numbers, by default those of the list."""
    numbers = docs or range(len(requests))
    instances = [Instance("generate_until", {}, r, 0, ("task", n, 1)) for r, n in zip(requests, numbers, strict=True)]
    return make_jobs(
        sources(instances),
        lambda kwargs, _: parse_generation(kwargs, SamplerConfig(), None, 256, "</s>"),
        lambda _: None,
        lambda text, _: [ord(character) for character in text],
        gather,
    )


def test_requests_are_batched_by_settings_longest_first():
    plain, nested = {"until": ["a"]}, {"until": ["a"], "sequence_bias": {"x": 1}}
    requests = [
        ("b", plain),
        ("ccc", nested),
        ("aa", plain),
        ("b", plain),
        ("d", {"until": ["a"], "sequence_bias": {"x": 2}}),
    ]
    found = [[job.index for job in batch] for batch in batches(jobs_for(requests), 2)]
    assert found == [[2, 0], [3], [1], [4]]


def test_keys_tell_equal_requests_apart_and_ignore_the_others():
    requests = [("b", {}), ("b", {}), ("a", {}), ("b", {"diffusion_budget": 3})]
    keys = [job.key for job in jobs_for(requests)]
    assert len({keys[0], keys[1], keys[2]}) == 3
    assert keys[3] == keys[0]  # another budget, the same noise
    shuffled = jobs_for([requests[i] for i in (1, 3, 0, 2)], docs=[1, 3, 0, 2])
    assert [job.key for job in shuffled] == [keys[i] for i in (1, 3, 0, 2)]


def test_equal_requests_on_two_processes_have_the_keys_of_one():
    requests = [("b", {}), ("a", {}), ("a", {}), ("b", {}), ("a", {}), ("a", {})]
    keys, claims = [job.key for job in jobs_for(requests)], []
    parts = [[0, 2, 4], [1, 3, 5]]
    for part in parts:  # what each process would send to the others
        jobs_for([requests[i] for i in part], part, lambda own: claims.extend(own) or own)
    for part in parts:
        own = jobs_for([requests[i] for i in part], part, lambda _: list(claims))
        assert [job.key for job in own] == [keys[i] for i in part]


def test_repeats_and_padding_of_the_harness():
    first, second = (Instance("generate_until", {}, ("a", {}), 0, ("task", n, 2)) for n in (0, 1))
    found = sources([first, first, second, second, second, second])
    assert [(source.repeat, source.padding) for source in found][2:] == [(0, False), (1, False), (2, True), (3, True)]
    record = RunRecord()
    ones = [[1]] * len(found)
    record.add_batch(found, ones, ones, ones, seconds=3.0, answers=[1] * len(found))
    assert record.generated_tokens == len(record.requests) == 4
    assert json.loads(record.requests[3].line())["repeat"] == 1


def test_generation_settings():
    kwargs = {"until": "x", "max_new_tokens": 5.0, "temperature": 0.7, "top_k": 0, "guidance_class": None, "seed": 3}
    parsed = parse_generation(kwargs, SamplerConfig(budget=7), None, 256, "</s>")
    assert parsed.stops == ["x", "</s>"]
    assert parsed.max_tokens == 5
    assert parsed.options == {"do_sample": True, "temperature": 0.7, "top_k": 0}
    assert parsed.sampler == SamplerConfig(budget=7, seed=3)
    greedy = parse_generation({"do_sample": False, "temperature": 0.7}, SamplerConfig(), None, 256, None)
    assert greedy.options == {"do_sample": False}
    assert greedy.stops == []
    assert greedy.max_tokens == 256


def test_search_among_the_generation_settings():
    beam = {"token_search": "beam_3", "do_sample": False}
    assert parse_generation(beam, SamplerConfig(), None, 256, None).search == "beam_3"
    assert parse_generation({}, SamplerConfig(), None, 256, None, "best_of_2").search == "best_of_2"
    assert parse_generation({"token_search": "none"}, SamplerConfig(), None, 256, None, "best_of_2").search is None
    with pytest.raises(UsageError, match="token_search=beam_3 takes no do_sample, temperature"):
        parse_generation({**beam, "do_sample": True, "temperature": 0.5}, SamplerConfig(), None, 256, None)
    for bad in ("beam", "beam_0", "best_of_two", "beam_1.5", 3):
        with pytest.raises(UsageError, match="must be best_of_N or beam_N"):
            token_search(bad)


def test_beams_are_refused_for_every_setting_that_greedy_decoding_would_follow():
    """Of all of transformers' settings, found by what its `generate` makes of them."""
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 32}))
    ids, found = torch.tensor([[5, 6, 7]]), set()
    for name, value in itertools.product(vars(GenerationConfig()), (2, 1.5, [5], [[5]], [2, 1.5], {(5,): 1.0}, True)):
        processors = LogitsProcessorList()
        with contextlib.suppress(Exception):  # most values suit few settings
            config = GenerationConfig(**{"do_sample": False, "eos_token_id": 2, "max_length": 9, name: value})
            config._eos_token_tensor = torch.tensor([2])
            processors = base._get_logits_processor(config, 3, ids, None, processors, device="cpu", model_kwargs={})
        if processors and name not in ("do_sample", "eos_token_id", "max_length", "renormalize_logits"):
            found.add(name)
            with pytest.raises(ValueError, match=name):
                refuse({name: value}, UNUSED_SETTINGS)
                check_beams("beam_2", {name: value})
    assert found >= {"repetition_penalty", "suppress_tokens", "bad_words_ids", "min_length", "sequence_bias"}
    neutral = {"repetition_penalty": 1.0, "min_length": 0, "suppress_tokens": [], "temperature": 0.6, "top_p": 0.9}
    check_beams("beam_2", {**neutral, "do_sample": True, "top_k": 50, "eos_token_id": [2, 3]})
    check_beams("best_of_2", {"repetition_penalty": 1.2})


@pytest.mark.parametrize(
    ("task", "doc", "name"),
    [
        ("gsm8k_cot", {}, "math"),
        ("hendrycks_math_algebra", {}, "math"),
        ("l2d_released_math_greedy", {}, "math"),
        ("l2d_released_humaneval", {}, None),
        ("l2d_released_mbpp", {}, "coding"),
        ("humaneval_instruct", {}, "coding"),
        ("mbpp", {}, "coding"),
        ("mmlu_anatomy", {}, "general_qa"),
        ("mmlu_high_school_statistics_generative", {}, "math"),
        ("mmlu_college_computer_science", {"subject": "college_computer_science"}, "general_qa"),
        ("mmlu_high_school_computer_science", {"subject": "high_school_computer_science"}, "coding"),
        ("l2d_released_mmlu", {"subject": "abstract_algebra"}, "math"),
        ("l2d_released_mmlu", {"subject": "machine_learning"}, "general_qa"),
        ("l2d_released_mmlu_pro", {"category": "computer science"}, "general_qa"),
        ("l2d_released_mmlu_pro_greedy", {"category": "math"}, "math"),
        ("mmlu_pro_math", {}, "math"),
        ("arc_easy", {}, "general_qa"),
    ],
)
def test_class_of_a_task(task, doc, name):
    assert class_of_task(task, doc, ["coding", "general_qa", "math"]) == name


def test_class_of_an_unknown_task():
    with pytest.raises(UsageError, match="guidance_class=auto has no class for task .tea."):
        class_of_task("tea", {}, ["math"])
    with pytest.raises(UsageError, match="has the class 'coding', which this model does not have, for task 'mbpp'"):
        class_of_task("mbpp", {}, ["math"])


def test_every_argument_is_in_the_table():
    assert [row[0] for row in rows()] == list(ARGUMENTS)
    assert all(name and allowed and default and meaning for name, allowed, default, meaning, _ in rows())
    assert all(row[0] in help_text() and f"| `{row[0]}` |" in markdown() for row in rows())


def test_a_model_that_serves_two_runs_counts_each_by_itself(l2d_dir):
    from lm_eval_ext.model import L2DLM

    model, seen = L2DLM(pretrained=str(l2d_dir), device="cpu", batch_size=4, diffusion_budget=3), []
    for count in (3, 1, 0):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", " b"), number) for number in range(count)])
        info = model.get_model_info()["l2d"]
        assert sum(cost.solved_tokens for cost in info.requests) == info["scored_tokens"]
        seen.append(len(info.requests))
    assert seen == [3, 1, 0]


def test_records_of_several_processes_hold_each_setting_once():
    one, two = RunRecord(), RunRecord()
    one.add_sampler("gsm8k", {"budget": 3})
    two.add_sampler("gsm8k", {"budget": 3})
    two.add_sampler("math", {})
    one.merge(two)
    assert one.summary()["task_samplers"] == {"gsm8k": [{"budget": 3}], "math": [{}]}
