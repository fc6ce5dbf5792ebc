"""`L2DLM` without the command line: requests of all kinds at budget 1 and above, order, batches, records, refusals.

Run: `python -m pytest tests/lm_eval_ext/test_model.py`
"""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import hash_string
from safetensors.torch import load_file, save_file

from l2d import L2DForCausalLM
from l2d.sampling.noise import request_key
from lm_eval_ext.arguments import UsageError
from lm_eval_ext.model import L2DLM
from lm_eval_ext.requests.compute_record import RunRecord, sources
from lm_eval_ext.requests.jobs import make_jobs
from lm_eval_ext.requests.token_search import beam_search
from tests.pretend_device import PretendDevices

PROMPTS = ["Question: how many?", "The cat", "Natalia sold 48 clips in April and", "def add(a", "a", "0 1 2 3"]
CHOICES = [" yes", " no", "1", " 24 clips"]


def generation(prompts, **gen_kwargs):
    """Requests to generate up to 8 tokens after each prompt."""
    kwargs = {"until": ["\n"], "max_gen_toks": 8, **gen_kwargs}
    return [Instance("generate_until", {}, (prompt, dict(kwargs)), i) for i, prompt in enumerate(prompts)]


def choices(prompts):
    """Requests to score each choice after each prompt."""
    return [Instance("loglikelihood", {}, (p, c), i) for i, p in enumerate(prompts) for c in CHOICES]


def rolling(texts):
    """Requests to score whole texts."""
    return [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def lm(l2d_dir):
    """`lm(batch_size=1, **arguments)`: the harness's model around the tiny checkpoint."""
    made = {}

    def make(batch_size=4, folder=l2d_dir, **arguments):
        key = repr((batch_size, folder, sorted(arguments.items())))
        if key not in made:
            made[key] = L2DLM(pretrained=str(folder), device="cpu", batch_size=batch_size, **arguments)
        return made[key]

    return make


@pytest.fixture(scope="module")
def hf(base_dir):
    """The harness's own model class around the base."""
    return HFLM(pretrained=str(base_dir), device="cpu", batch_size=4)


# ---- budget 1 is the base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_budget_1_equals_hf(make_base, make_l2d, family, variant):
    base = make_base(family)
    ours = L2DLM(pretrained=str(make_l2d(base, variant)), diffusion_budget=1, device="cpu", batch_size=4)
    theirs = HFLM(pretrained=str(base), device="cpu", batch_size=4)
    assert ours.generate_until(generation(PROMPTS)) == theirs.generate_until(generation(PROMPTS))
    assert ours.loglikelihood(choices(PROMPTS)) == theirs.loglikelihood(choices(PROMPTS))
    assert ours.loglikelihood_rolling(rolling(PROMPTS)) == theirs.loglikelihood_rolling(rolling(PROMPTS))
    assert ours.max_length == theirs.max_length
    summary = ours.get_model_info()["l2d"]
    assert summary["nfe_requested_per_token"]["max"] == 1
    assert summary["nfe_computed_per_token"]["max"] == 0


def test_higher_budget_differs_from_the_base(lm, hf):
    assert lm().generate_until(generation(PROMPTS)) != hf.generate_until(generation(PROMPTS))
    ours, theirs = lm().loglikelihood(choices(PROMPTS)), hf.loglikelihood(choices(PROMPTS))
    assert max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) > 0.1


# ---- batches and order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gen_kwargs", [{}, {"do_sample": True, "temperature": 1.0}], ids=["greedy", "sampled"])
def test_generation_does_not_depend_on_batch_or_order(lm, gen_kwargs):
    wanted = lm(1).generate_until(generation(PROMPTS, **gen_kwargs))
    for size in (3, 16):
        assert lm(size).generate_until(generation(PROMPTS, **gen_kwargs)) == wanted
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = lm(3).generate_until(generation([PROMPTS[i] for i in order], **gen_kwargs))
    assert [shuffled[order.index(i)] for i in range(len(PROMPTS))] == wanted


def test_scores_do_not_depend_on_batch_or_order(lm):
    wanted = lm(1).loglikelihood(choices(PROMPTS))
    backwards = lm(16).loglikelihood(choices(PROMPTS)[::-1])[::-1]
    for other in (lm(3).loglikelihood(choices(PROMPTS)), backwards):
        assert [a[0] for a in other] == pytest.approx([a[0] for a in wanted], abs=1e-4)
        assert [a[1] for a in other] == [a[1] for a in wanted]
    texts = lm(1).loglikelihood_rolling(rolling(PROMPTS))
    assert lm(16).loglikelihood_rolling(rolling(PROMPTS)) == pytest.approx(texts, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 15])
def test_texts_are_scored_under_one_bar(lm, capsys, budget):
    """Whatever the budget, and not one bar per batch."""
    model = lm(2, diffusion_budget=budget)
    assert len(model.loglikelihood_rolling(rolling(PROMPTS))) == len(PROMPTS) > 2
    shown = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "Running" in line]
    assert {line.partition(":")[0] for line in shown} == {"Running loglikelihood_rolling requests"}
    assert (
        f"{len(PROMPTS)}/{len(PROMPTS)}" in shown[-1] and sum(": 0%" in line.replace("   ", " ") for line in shown) == 1
    )
    model.loglikelihood_rolling(rolling(PROMPTS), disable_tqdm=True)
    assert "Running" not in capsys.readouterr().err


def test_a_slow_dtype_is_said(l2d_dir, monkeypatch, caplog):
    for capability, dtype, told in (
        ("AVX2", "bfloat16", True),
        ("AVX2", "float32", False),
        ("AVX512", "bfloat16", False),
    ):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda said=capability: said)
        caplog.clear()
        L2DLM(pretrained=str(l2d_dir), device="cpu", dtype=dtype)
        assert ("dtype=bfloat16: this processor has no instructions for it" in caplog.text) == told


def test_samples_of_one_prompt_are_distinct_and_reproducible(lm):
    requests = generation(["The cat"] * 6, do_sample=True, temperature=1.0)
    first = lm(1).generate_until(requests)
    assert len(set(first)) > 3
    assert lm(4).generate_until(requests) == first
    assert lm(4, seed=1).generate_until(requests) != first


def test_result_is_that_of_generate(lm, tokenizer):
    model = lm().model
    tokens = tokenizer(PROMPTS[2])["input_ids"]
    output = model.generate(torch.tensor([tokens]), max_new_tokens=8, request_keys=[request_key(tokens)])
    text = tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True).split("\n")[0]
    assert lm().generate_until(generation([PROMPTS[2]])) == [text]


def test_score_of_one_token_is_the_logit_that_generation_sees(lm, tokenizer):
    context, model = tokenizer("The cat")["input_ids"], lm().model
    output = model.generate(
        torch.tensor([context]), max_new_tokens=1, request_keys=[request_key(context)], output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    logprobs = output.logits[0][0].log_softmax(-1)
    token = tokenizer("9", add_special_tokens=False)["input_ids"][:1]
    ((score, greedy),) = lm()._loglikelihood_tokens([(("The cat", "9"), context, token)], disable_tqdm=True)
    assert score == pytest.approx(float(logprobs[token[0]]), abs=1e-4)
    assert greedy == (int(logprobs.argmax()) == token[0])


# ---- settings per request ---------------------------------------------------------------------------------------


def test_generation_kwargs_set_the_sampler_per_request(lm):
    mixed = generation(PROMPTS[:3], diffusion_budget=1) + generation(PROMPTS[:3], diffusion_budget=15)
    answers = lm(diffusion_budget=7).generate_until(mixed)
    assert answers[:3] == lm(diffusion_budget=1).generate_until(generation(PROMPTS[:3]))
    assert answers[3:] == lm(diffusion_budget=15).generate_until(generation(PROMPTS[:3]))


def test_stops_and_lengths_are_those_of_each_request(lm, tokenizer):
    (long,) = lm().generate_until(generation(["The cat"], max_gen_toks=12))
    stop = long[len(long) // 2 :][:2]
    requests = generation(["The cat"], max_gen_toks=12) + generation(["The cat"], max_gen_toks=12, until=[stop])
    requests += generation(["The cat"], max_gen_toks=2) + generation(["The cat"], max_gen_toks=12, until=stop)
    answers = lm(16).generate_until(requests)
    assert answers[0] == long
    assert answers[1] == answers[3] == long.split(stop)[0]
    assert long.startswith(answers[2])
    assert len(tokenizer(answers[2], add_special_tokens=False)["input_ids"]) <= 4


def test_text_stops_save_the_rest_of_the_row(l2d_dir, lm):
    (long,) = lm().generate_until(generation(["The cat"], max_gen_toks=40, until=[]))
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", batch_size=4)
    fresh.generate_until(generation(["The cat"], max_gen_toks=40, until=[long[1:3]]))
    assert fresh.run_record.generated_tokens < 10
    fresh.run_record = RunRecord()
    texts = fresh.generate_until(generation(PROMPTS, max_gen_toks=40, until=["e"]))  # some rows end, others go on
    spent = {cost.prompt_hash: cost.solved_tokens for cost in fresh.run_record.requests}
    for prompt, text in zip(PROMPTS, texts, strict=True):
        (whole,) = lm().generate_until(generation([prompt], max_gen_toks=40, until=[]))
        assert whole.startswith(text)
        assert (spent[hash_string(prompt)] < 40) == (text != whole or len(whole) < 40)


def test_all_end_tokens_end_a_row(l2d_dir, tokenizer):
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", batch_size=8)
    (long,) = fresh.generate_until(generation(["The cat"], until=[], max_gen_toks=12))
    tokens = tokenizer(long, add_special_tokens=False)["input_ids"]
    fresh.model.generation_config.eos_token_id = [2, tokens[3]]
    answers = fresh.generate_until(generation(["The cat", *PROMPTS], until=[], max_gen_toks=12))
    assert long.startswith(answers[0])
    assert len(answers[0]) < len(long)
    assert "<pad>" not in "".join(answers)


def test_thinking_is_cut_and_stops_count_after_it(lm, tokenizer):
    (long,) = lm().generate_until(generation(["The cat"], until=[], max_gen_toks=12))
    middle = tokenizer(long, add_special_tokens=False)["input_ids"][6]
    thinker = lm(think_end_token=middle)
    (answer,) = thinker.generate_until(generation(["The cat"], until=[long[0]], max_gen_toks=12))
    assert answer == long.split(tokenizer.decode([middle]))[-1].lstrip().split(long[0])[0]


@pytest.mark.parametrize(
    ("arguments", "gen_kwargs"),
    [({"think_end_token": 399}, {}), ({"think_end_token": "a"}, {}), ({}, {"eos_token_id": 7}), ({}, {"until": " "})],
    ids=["thinking without end", "thinking text", "end token", "until"],
)
def test_answers_of_the_base_are_cut_as_the_harness_does(lm, base_dir, arguments, gen_kwargs):
    theirs = HFLM(pretrained=str(base_dir), device="cpu", **arguments)
    prompts = [*PROMPTS, " lead", "tail "]
    wanted = theirs.generate_until(generation(prompts, **{"until": [], **gen_kwargs}))
    ours = lm(diffusion_budget=1, **arguments).generate_until(generation(prompts, **{"until": [], **gen_kwargs}))
    assert ours == wanted


@pytest.mark.parametrize("budget", [1, 15])
@pytest.mark.parametrize("texts", [("a", ""), ("  ", "b")])
def test_what_has_no_tokens_is_not_scored(lm, budget, texts):
    with pytest.raises(UsageError, match="has no tokens"):
        lm(diffusion_budget=budget, add_bos_token=False).loglikelihood([Instance("loglikelihood", {}, texts, 0)])


def test_long_prompts_are_cut_from_the_left(lm):
    short = lm(max_length=16)
    cut = short.generate_until(generation(["b c " * 30 + "x y z x y z The cat"]))
    assert cut == short.generate_until(generation(["c c " * 40 + "x y z x y z The cat"]))
    assert cut != short.generate_until(generation(["cat"]))
    with pytest.raises(UsageError, match="max_gen_toks=16 must be below max_length=16"):
        short.generate_until(generation(["a"], max_gen_toks=16))


@pytest.mark.parametrize(
    ("gen_kwargs", "sentence"),
    [
        (dict(diffusion_budget=4), "diffusion_budget=4 cannot be met"),
        (dict(solver="eular"), "solver='eular' is not known"),
        (dict(guidance_scale=2.0), "guidance_scale=2 needs a model that was trained with guidance classes"),
        (dict(max_gen_toks=0), "max_gen_toks=0 must be at least 1"),
        (dict(max_length=20), "set max_gen_toks instead"),
        (dict(do_sample=True), "temperature=0.0 cannot be sampled at"),
        (dict(temperature="warm"), "could not convert string to float"),
        (dict(diffusion_bugdet=3), "'diffusion_bugdet' is not known: did you mean 'diffusion_budget'"),
        (dict(penalty_alpha=0.6, top_k=4), "decodes greedily or samples"),
        (dict(pad_token_id=3), "'pad_token_id' is set by the model class"),
    ],
)
def test_bad_generation_kwargs(lm, gen_kwargs, sentence):
    with pytest.raises(UsageError, match=sentence):
        lm().generate_until(generation(PROMPTS[:1], **gen_kwargs))


# ---- other samplers ---------------------------------------------------------------------------------------------


def test_guidance(make_l2d, base_dir, lm):
    folder = make_l2d(base_dir, "lora", ["math", "coding"])
    plain, guided = (
        lm(folder=folder, guidance_class="math", guidance_scale=scale).generate_until(generation(PROMPTS))
        for scale in (1.0, 3.0)
    )
    other = lm(folder=folder, guidance_class=1, guidance_scale=3.0).generate_until(generation(PROMPTS))
    assert plain != guided != other


def test_adaptive_solver_reports_what_it_chose(l2d_dir):
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", solver="bosh3", max_evaluations=60, rtol=1e-3, atol=1e-3)
    fresh.generate_until(generation(PROMPTS[:2], max_gen_toks=3))
    summary = fresh.get_model_info()["l2d"]
    assert 1 < summary["nfe_requested_per_token"]["mean"] <= summary["nfe_requested_per_token"]["max"]
    few = dict(solver="bosh3", max_evaluations=6)
    for search in ("none", "beam_2", "best_of_2"):
        capped = L2DLM(pretrained=str(l2d_dir), device="cpu", token_search=search, **few)
        capped.generate_until(generation(PROMPTS[:2], max_gen_toks=3))
        summary_of_search = capped.get_model_info()["l2d"]
        assert 0 < summary_of_search["capped_tokens"] <= summary_of_search["solved_tokens"]
    assert summary["generated_tokens"] <= 6
    assert summary["capped_tokens"] <= summary["generated_tokens"]


def test_mc_samples_average_probabilities(lm):
    one, many = (lm(mc_samples=count).loglikelihood(choices(["The cat"])) for count in (1, 8))
    assert one != many


def test_bfloat16_and_automatic_batch_size(lm):
    auto = lm("auto", dtype="bfloat16", max_batch_size=4)
    assert auto.model.base.dtype == torch.bfloat16
    assert len(auto.generate_until(generation(PROMPTS))) == len(PROMPTS)
    assert len(auto.loglikelihood(choices(PROMPTS))) == len(PROMPTS) * len(CHOICES)
    assert len(lm("auto", max_length=32, max_batch_size=2).loglikelihood_rolling(rolling(PROMPTS))) == len(PROMPTS)


# ---- records and caches -----------------------------------------------------------------------------------------


def test_record_of_a_run(l2d_dir, tokenizer):
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", diffusion_budget=15)
    texts = fresh.generate_until(generation(PROMPTS, until=[]))
    info = fresh.get_model_info()["l2d"]
    assert info["nfe_requested_per_token"] == {"mean": 15.0, "median": 15, "p95": 15, "max": 15}
    assert info["generated_tokens"] >= sum(map(bool, texts))
    assert info["sampler"]["budget"] == 15
    assert info["base_fingerprint"] == fresh.model.config.base_fingerprint
    assert info["checkpoint_fingerprint"] != info["base_fingerprint"]
    fresh.loglikelihood(choices(["a"]))
    assert fresh.get_model_info()["l2d"]["scored_tokens"] > 0


def test_response_cache_belongs_to_its_settings(l2d_dir, base_dir, tmp_path):
    def answers(model, name):
        return CachingLM(model, str(tmp_path / name)).generate_until(generation(PROMPTS))

    def ours(**arguments):
        return L2DLM(pretrained=str(l2d_dir), device="cpu", **arguments)

    first = answers(ours(diffusion_budget=15), "a.db")
    again = ours(diffusion_budget=15, batch_size=3, speculation=False, draft_tokens=2)
    assert answers(again, "a.db") == first
    assert again.run_record.generated_tokens == 0  # nothing was computed
    for arguments in (dict(diffusion_budget=1), dict(seed=1), dict(max_length=64), dict(token_search="beam_2")):
        with pytest.raises(UsageError, match="answers of other settings"):
            answers(ours(**arguments), "a.db")
    answers(HFLM(pretrained=str(base_dir), device="cpu"), "b.db")
    with pytest.raises(UsageError, match="another model's answers"):
        answers(ours(), "b.db")


def test_repeats_and_the_response_cache(l2d_dir, tmp_path):
    repeated = Instance("generate_until", {}, ("a", {"until": [], "max_gen_toks": 3}), 0, ("task", 0, 2))
    cached = CachingLM(L2DLM(pretrained=str(l2d_dir), device="cpu"), str(tmp_path / "c.db"))
    with pytest.raises(UsageError, match="--use_cache keeps one answer per prompt, and task 'task' asks for 2"):
        cached.generate_until([repeated] * 2)
    repeated.arguments[1].update(do_sample=True, temperature=1.0)
    first = cached.generate_until([repeated] * 2)
    assert cached.generate_until([repeated] * 2) == first  # the harness does not cache samples; ours are reproducible


def test_every_request_has_its_cost(l2d_dir):
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", batch_size=4)
    for budget in (15, 1):
        fresh.sampler = fresh.sampler.replace(budget=budget)
        fresh.generate_until(generation(PROMPTS, until=[]))
        fresh.loglikelihood(choices(PROMPTS[:2]))
        fresh.loglikelihood_rolling(rolling(PROMPTS[:2]))
        summary = fresh.get_model_info()["l2d"]
        costs = summary.requests
        kinds = [cost.kind for cost in costs]
        assert [kinds.count(kind) for kind in ("generate_until", "loglikelihood", "loglikelihood_rolling")] == [6, 8, 2]
        assert all(cost.nfe_requested == budget * cost.solved_tokens for cost in costs)
        assert all(cost.solved_tokens == cost.generated_tokens + cost.scored_tokens for cost in costs)
        generated = {cost.prompt_hash: cost.generated_tokens for cost in costs if cost.kind == "generate_until"}
        assert set(generated) == set(map(hash_string, PROMPTS))
        assert all(1 <= tokens <= 8 for tokens in generated.values())
        assert summary["seconds"] == pytest.approx(sum(cost.seconds for cost in costs))
        assert summary["tokens_per_second"] > 0
        assert summary["peak_memory_bytes"] > 1e7


# ---- token search -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "drafts"), [(1, 0), (7, 0), (7, 3)])
def test_likelihood_is_that_of_scoring(lm, tokenizer, budget, drafts):
    ours, tokens = lm(diffusion_budget=budget, draft_tokens=drafts), tokenizer(PROMPTS[2])["input_ids"]
    (job,) = make_jobs(
        sources(generation(PROMPTS[2:3], token_search="best_of_2", top_k=20)),
        ours._parse_generation, ours._guidance, ours._encode_prompt, lambda claims: claims,
    )  # fmt: skip
    sampled = dataclasses.replace(job.settings, options={"do_sample": True, "temperature": 0.7, "top_k": 20})
    (candidate,) = ours._decode([job], sampled, 0)
    ids = torch.tensor([tokens + candidate.tokens])
    mask = torch.arange(ids.shape[1])[None] >= len(tokens)
    scored = ours.model.score(ids, continuation_mask=mask, sampler=job.settings.sampler, request_keys=[job.key])
    assert candidate.likelihood == pytest.approx(float(scored.logprobs.sum()), abs=1e-3)


@pytest.mark.parametrize("budget", [1, 7])
def test_best_of_n_takes_the_likeliest_sample(lm, budget):
    ours = lm(diffusion_budget=budget)
    plain = ours.generate_until(generation(PROMPTS, do_sample=True, temperature=1.0))
    one = ours.generate_until(generation(PROMPTS, token_search="best_of_1"))
    assert one == plain
    many = ours.generate_until(generation(PROMPTS, token_search="best_of_6"))
    assert many != one
    other = lm(1, diffusion_budget=budget, draft_tokens=2)
    assert other.generate_until(generation(PROMPTS, token_search="best_of_6")) == many


@pytest.mark.parametrize("budget", [1, 7])
def test_beam_of_one_is_greedy_and_more_are_likelier(lm, budget):
    ours = lm(diffusion_budget=budget)
    greedy = ours.generate_until(generation(PROMPTS))
    assert ours.generate_until(generation(PROMPTS, token_search="beam_1")) == greedy
    many = ours.generate_until(generation(PROMPTS, token_search="beam_4"))
    assert lm(1, diffusion_budget=budget).generate_until(generation(PROMPTS, token_search="beam_4")) == many
    assert many != greedy


def test_beams_and_other_answers_than_one_under_the_models_own_settings(l2d_dir):
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", batch_size=4, diffusion_budget=3)
    expected = fresh.generate_until(generation(PROMPTS))
    fresh.model.generation_config.num_return_sequences, fresh.model.generation_config.do_sample = 2, True
    fresh.model.generation_config.return_dict_in_generate = True
    assert fresh.generate_until(generation(PROMPTS)) == expected
    fresh.model.generation_config.suppress_tokens = [5]
    with pytest.raises(UsageError, match=r"token_search=beam_2 cannot follow suppress_tokens=\[5\]"):
        fresh.generate_until(generation(PROMPTS, token_search="beam_2"))


def test_stop_strings_end_an_answer(lm):
    ours = lm(diffusion_budget=3)
    (free,) = ours.generate_until(generation(PROMPTS[:1], until=[]))
    stop = free[3:5]
    (stopped,) = ours.generate_until(generation(PROMPTS[:1], until=[], stop_strings=[stop]))
    assert free.startswith(stopped) and stop in stopped and len(stopped) < len(free)
    for wrong in (72, [""], ["a", 3]):
        with pytest.raises(UsageError, match="stop_strings=.* must be a text or a list of texts"):
            ours.generate_until(generation(PROMPTS[:1], stop_strings=wrong))
    with pytest.raises(UsageError, match="generation settings .*suppress_tokens"):  # no token of that number
        ours.generate_until(generation(PROMPTS[:1], suppress_tokens="a"))


def test_beam_search_with_the_base_is_that_of_transformers(lm, tokenizer):
    model = lm().model
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ends = [2, 17]
    ours = beam_search(
        model, prompts, [b"x"] * len(prompts), model.sampler({"budget": 1}), 3, 12, ends, lambda tokens: False, 0
    )
    for prompt, found in zip(prompts, ours, strict=True):
        wanted = model.base.generate(
            torch.tensor([prompt]), num_beams=3, early_stopping=True, max_new_tokens=12, eos_token_id=ends,
            pad_token_id=0, do_sample=False,
        )  # fmt: skip
        assert found.tokens == wanted[0, len(prompt) :].tolist()


def test_search_is_recorded(l2d_dir):
    fresh = L2DLM(pretrained=str(l2d_dir), device="cpu", token_search="best_of_3", batch_size=8)
    fresh.generate_until(generation(PROMPTS[:2], until=[], max_gen_toks=4))
    summary = fresh.get_model_info()["l2d"]
    costs = summary.requests
    assert all(cost.solved_tokens > cost.generated_tokens for cost in costs)
    assert summary["token_search"] == "best_of_3"
    assert summary["generated_tokens"] == sum(cost.generated_tokens for cost in costs)
    assert summary["solved_tokens"] == sum(cost.solved_tokens for cost in costs)


def test_what_a_task_changes_of_the_sampler_is_recorded(make_l2d, base_dir):
    fresh = L2DLM(pretrained=str(make_l2d(base_dir, "lora", ["math"])), device="cpu", token_search="best_of_2")
    tasks = {
        "plain": {},
        "cheap": {"diffusion_budget": 3.0, "token_search": "none"},
        "same": {"diffusion_budget": 15, "temperature": 0.0},
        "gsm8k": {"guidance_class": "auto", "guidance_scale": 2},
    }
    requests = [generation(PROMPTS[:1], **{"max_gen_toks": 1, **kwargs})[0] for kwargs in tasks.values()]
    for request, task in zip(requests, tasks, strict=True):
        request.task_name = task
    fresh.generate_until(requests)
    fresh.loglikelihood(choices(PROMPTS[:1]))
    recorded = json.loads(json.dumps(fresh.get_model_info()["l2d"]))["task_samplers"]
    assert recorded == {
        "plain": [{}],
        "cheap": [{"budget": 3, "token_search": None}],
        "same": [{}],
        "gsm8k": [{"guidance_class": "auto", "guidance_scale": 2.0}],
    }


# ---- guidance by task -------------------------------------------------------------------------------------------


def test_automatic_class_is_the_class_given_by_name(make_l2d, base_dir, lm):
    folder = make_l2d(base_dir, "lora", ["math", "coding"])

    def of_tasks(requests):
        for number, request in enumerate(requests):
            request.task_name = ("gsm8k", "mbpp")[number % 2]
        return requests

    auto, math, coding = (lm(folder=folder, guidance_class=c, guidance_scale=3.0) for c in ("auto", "math", "coding"))
    for method, requests in [
        ("generate_until", lambda: of_tasks(generation(PROMPTS))),
        ("loglikelihood", lambda: of_tasks(choices(PROMPTS))),
        ("loglikelihood_rolling", lambda: of_tasks(rolling(PROMPTS))),
    ]:
        mixed, first, second = (getattr(model, method)(requests()) for model in (auto, math, coding))
        wanted = [(first, second)[number % 2][number] for number in range(len(mixed))]
        flat = [numbers if method == "generate_until" else list(map(float, torch.tensor(numbers).flatten()))
                for numbers in (mixed, wanted)]  # fmt: skip
        assert flat[0] == (flat[1] if method == "generate_until" else pytest.approx(flat[1], abs=1e-4))
        assert first != second
    assert auto.get_model_info()["l2d"]["sampler"]["guidance_class"] == "auto"
    with pytest.raises(UsageError, match="has no class for task 'tea'"):
        auto.generate_until([Instance("generate_until", {}, ("a", {"until": []}), 0, ("tea", 0, 1))])


# ---- loading ----------------------------------------------------------------------------------------------------


def test_a_loaded_model_can_be_handed_over(l2d_dir, tokenizer, lm):
    model = L2DForCausalLM.from_pretrained(l2d_dir)
    handed = L2DLM(pretrained=model, tokenizer=tokenizer, diffusion_budget=7, batch_size=4)
    assert handed.generate_until(generation(PROMPTS)) == lm(diffusion_budget=7).generate_until(generation(PROMPTS))


def test_tokenizer_of_the_base_serves_where_the_checkpoint_has_none(l2d_dir, tmp_path, lm):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(l2d_dir / name, bare / name)
    answers = L2DLM(pretrained=str(bare), device="cpu", batch_size=4).generate_until(generation(PROMPTS))
    assert answers == lm().generate_until(generation(PROMPTS))


def test_foreign_base_and_damaged_checkpoint(l2d_dir, make_base, tmp_path):
    with pytest.raises(UsageError, match="is not the base that"):
        L2DLM(pretrained=str(l2d_dir), base=str(make_base("llama", seed=1)), device="cpu")
    damaged = tmp_path / "damaged"
    shutil.copytree(l2d_dir, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lacks 1 tensors"):
        L2DLM(pretrained=str(damaged), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="has no CUDA device"):
            L2DLM(pretrained=str(l2d_dir), device="cuda:0")


def test_parallelize_spreads_the_base_and_changes_no_answer(l2d_dir, lm, monkeypatch):
    """Loaded onto two devices, which pretend; where both are too small it is refused in one sentence."""
    requests = generation(PROMPTS[:3]), choices(PROMPTS[:2])
    plain = lm(diffusion_budget=5)
    expected = plain.generate_until(requests[0]), plain.loglikelihood(requests[1])
    monkeypatch.setattr("lm_eval_ext.model.check_device", lambda harness: None)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads know nothing of pretended devices
    settings = {"pretrained": str(l2d_dir), "device": "cuda:0", "parallelize": True, "diffusion_budget": 5}
    with PretendDevices():
        spread = L2DLM(**settings, batch_size=4, max_memory_per_gpu="160KiB")
        assert set(spread.model.base.hf_device_map.values()) == {0, 1}
        assert spread.generate_until(requests[0]) == expected[0]
        assert spread.loglikelihood(requests[1]) == expected[1]
        with pytest.raises(UsageError, match="a part of the base would be offloaded, .* max_memory_per_gpu"):
            L2DLM(**settings, max_memory_per_gpu="60KiB")
