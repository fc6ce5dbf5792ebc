"""The small parts of `lm_eval_ext`: stop strings, records, batches of requests.

Run: `python -m pytest tests/test_lm_eval_parts.py`
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2d.sampler_config import SamplerConfig
from lm_eval_ext.generation_requests import batches, make_jobs, parse_generation
from lm_eval_ext.record import QUANTITIES, RunRecord
from lm_eval_ext.stopping import TextStop, after_last
from tests.conftest import train_tokenizer

TOKENIZER = train_tokenizer()


@settings(max_examples=60, deadline=None)
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
    assert RunRecord().summary()["asked_per_token"] is None


def jobs_for(requests):
    """Jobs whose tokens are the prompt's characters."""
    return make_jobs(
        requests,
        lambda kwargs: parse_generation(kwargs, SamplerConfig(), None, 256, "</s>"),
        lambda text, _: [ord(character) for character in text],
    )


def test_requests_are_batched_by_settings_longest_first():
    plain, nested = {"until": ["a"]}, {"until": ["a"], "extra": {"x": 1}}
    requests = [("b", plain), ("ccc", nested), ("aa", plain), ("b", plain), ("d", {"until": ["a"], "extra": {"x": 2}})]
    found = [[job.index for job in batch] for batch in batches(jobs_for(requests), 2)]
    assert found == [[2, 0], [3], [1], [4]]


def test_keys_tell_equal_requests_apart_and_ignore_the_others():
    requests = [("b", {}), ("b", {}), ("a", {}), ("b", {"diffusion_budget": 3})]
    keys = [job.key for job in jobs_for(requests)]
    assert len({keys[0], keys[1], keys[2]}) == 3
    assert keys[3] == keys[0]  # another budget, the same noise
    assert [job.key for job in jobs_for(requests[2:] + requests[:2])] == keys[2:] + keys[:2]


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
