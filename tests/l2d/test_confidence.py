"""`skip_confidence`: the base's answer where it is sure, the solver's everywhere else, and the cost of just that.

The rule is written out here from plain scores: at T = 1, which say how sure the base is, and without a gate.
"""

import pytest
import torch

from l2d import L2DForCausalLM
from l2d.cli.session import load_session
from l2d.cli.trace import trace_prompt
from l2d.decoding import DraftLength
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.solve import solve
from tests.l2d.test_sampling import GUIDED, decode, decode_and_score, prompts

CASES = {
    "midpoint": {},
    "long": dict(budget=31),
    "guided": GUIDED,
    "sampled": dict(choice_temperature=1.0),
    "average": dict(choice="average", choice_temperature=0.5),
    "sequential": dict(speculation=False),
    "late start": dict(start_time=0.2),
    "adaptive": dict(solver="bosh3", rtol=0.1, atol=0.1),
    "draws": dict(mc_samples=3),
    "carried": {},
    "noise-free": dict(solver="euler", budget=2),
}
PATHS = {"carried": dict(carried_state=True), "noise-free": dict(noise_free=True)}


@pytest.fixture(scope="module")
def models(make_base, make_l2d):
    """Name of a case -> a float64 model: equal tokens then mean an equal method."""
    made = {}

    def model(case: str = "") -> L2DForCausalLM:
        settings = PATHS.get(case, {})
        if str(settings) not in made:
            classes = None if "noise_free" in settings else ["math", "coding"]
            folder = make_l2d(make_base("llama"), "lora", classes, **settings)
            made[str(settings)] = L2DForCausalLM.from_pretrained(folder).double()
        return made[str(settings)]

    return model


@torch.no_grad()
def confidences(model, ids: torch.Tensor) -> torch.Tensor:
    """Probability (B, S - 1) of the base's most likely next token."""
    return torch.softmax(model.base(ids).logits[:, :-1].float(), -1).amax(-1)


def rows() -> torch.Tensor:
    return torch.randint(3, 400, (3, 14), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_bases_where_it_is_sure_and_the_solvers_elsewhere(models, case):
    model, ids, settings = models(case), rows(), CASES[case]
    confidence = confidences(model, ids)
    threshold = float(confidence.median()) + 1e-7
    sure = torch.zeros(ids.shape, dtype=torch.bool)
    sure[:, 1:] = confidence >= threshold
    assert 10 < int(sure.sum()) < 30
    gated, plain, base = (
        model.score(ids, sampler=one) for one in ({**settings, "skip_confidence": threshold}, settings, {"budget": 1})
    )
    for name in ("logprobs", "best", "best_logprobs", "greedy"):
        expected = torch.where(sure, getattr(base, name), getattr(plain, name))
        torch.testing.assert_close(getattr(gated, name), expected, rtol=0, atol=1e-6)
    asked = plain.nfe_requested
    assert torch.equal(gated.nfe_requested, torch.where(sure, settings.get("mc_samples", 1), asked))
    assert not gated.nfe_computed[sure].any() and not gated.passes[sure].any()
    unsure = ~sure[:, 1:]
    assert bool((gated.nfe_computed[:, 1:][unsure] > 0).all())
    if settings.get("speculation") is False:
        assert torch.equal(gated.nfe_computed[:, 1:][unsure], plain.nfe_computed[:, 1:][unsure])


@pytest.mark.parametrize("case", [name for name in CASES if name != "draws"])
def test_generation_follows_the_same_rule(models, monkeypatch, case):
    """Every generated token is the most likely one of the gated score, whatever is drafted and however it is solved."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    model, settings = models(case), CASES[case]
    plain = decode(model, settings, rows=1)
    threshold = float(confidences(model, plain)[:, prompts(1)[0].shape[1] - 1 :].median()) + 1e-7
    found = []
    for drafts in (0, 3):
        sampler = {**settings, "skip_confidence": threshold, "draft_tokens": drafts}
        out, record = decode_and_score(model, sampler)
        found.append((out.tolist(), record.nfe_requested, record.changes))
        skipped = [asked == 1 for asked in record.nfe_requested[0]]
        assert 0 < sum(skipped) < len(skipped)
    assert found[0] == found[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_speculation_drafts_and_batch_mates_change_nothing(models, monkeypatch, do_sample):
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    model = models()
    threshold = float(confidences(model, rows()).median())
    made = []
    for changes in ({}, dict(speculation=False), dict(draft_tokens=0)):
        made.append(decode(model, {"skip_confidence": threshold, **changes}, do_sample=do_sample))
    assert all(torch.equal(made[0], one) for one in made)
    ids, mask = prompts()
    for row in range(len(ids)):
        alone = model.generate(
            ids[row, mask[row].bool()][None],
            attention_mask=mask[row, mask[row].bool()][None],
            sampler={"skip_confidence": threshold},
            max_new_tokens=12,
            do_sample=do_sample,
        )
        assert torch.equal(alone[0, -12:], made[0][row, -12:])


def test_a_gate_that_skips_everything_is_the_base_and_calls_no_path(models):
    model = models()
    ids, mask = prompts()

    def never(*arguments):
        raise AssertionError("the path was evaluated")

    hook = model.path.register_forward_pre_hook(never)
    try:
        out, record = decode(model, {"skip_confidence": 1e-9}, return_record=True)
    finally:
        hook.remove()
    assert torch.equal(out, decode(model, {"budget": 1}))
    assert not any(map(sum, record.nfe_computed)) and {n for row in record.nfe_requested for n in row} == {1}


def test_one_skips_nothing_even_where_the_base_is_certain(models, monkeypatch):
    """A probability can be rounded to 1."""
    model = models()
    ids = rows()
    plain = model.score(ids)
    monkeypatch.setattr(PathEvaluator, "logits", lambda self, hidden: 1 / 0)
    assert torch.equal(model.score(ids, sampler={"skip_confidence": 1}).logprobs, plain.logprobs)


def test_chunks_of_logits_change_nothing(models, monkeypatch):
    model, ids = models(), rows()
    sampler = {"skip_confidence": float(confidences(model, ids).median())}
    whole = model.score(ids, sampler=sampler)
    made = PathEvaluator.__init__

    def small(self, *arguments):
        made(self, *arguments)
        self.chunk = 5

    monkeypatch.setattr(PathEvaluator, "__init__", small)
    parts = model.score(ids, sampler=sampler)
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=0, atol=1e-6)
    assert torch.equal(parts.nfe_computed, whole.nfe_computed)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_a_recorded_solve_shows_the_base_at_skipped_sites(models, guided):
    model, ids = models(), rows()
    state = model.paths.main_path(ids)
    index = torch.arange(ids.shape[1]).expand(len(ids), -1)
    x0 = torch.randn(*index.shape, 16, generator=torch.Generator().manual_seed(1)).double()
    threshold = float(confidences(model, ids).median())
    settings = model.sampler(GUIDED if guided else {})
    gated, plain = (
        solve(model.paths, state, index, x0, one) for one in (settings.replace(skip_confidence=threshold), settings)
    )
    logits = model.paths.base_logits(state, index)
    probability, token = torch.softmax(logits.float(), -1).max(-1)
    sure = probability >= threshold
    assert bool((gated.chosen[:, sure] == (token[sure][:, None] if guided else token[sure])).all())
    assert torch.equal(gated.chosen[:, ~sure], plain.chosen[:, ~sure])
    torch.testing.assert_close(gated.trajectory[:, ~sure], plain.trajectory[:, ~sure])
    torch.testing.assert_close(gated.final_logits[sure], logits[sure])
    end = model.paths.vocabulary_table()[token[sure]].double()
    torch.testing.assert_close(gated.trajectory[-1, sure], end, rtol=0, atol=1e-6)


def test_a_trace_shows_skipped_tokens_as_the_base_has_them(l2d_dir):
    session = load_session(l2d_dir, device="cpu")
    plain = trace_prompt(session, "Question: Natalia", {"budget": 7}, max_new_tokens=10)
    ids = torch.tensor([[*plain.prompt_tokens, *(token.token for token in plain.tokens)]])
    threshold = float(confidences(session.model, ids)[0, len(plain.prompt_tokens) - 1 :].median())
    trace = trace_prompt(session, "Question: Natalia", {"budget": 7, "skip_confidence": threshold}, max_new_tokens=10)
    skipped = [token for token in trace.tokens if token.nfe_requested == 1]
    assert 0 < len(skipped) < len(trace.tokens)
    for token in skipped:
        assert token.token == token.base_token and token.nfe_computed == 0 and not token.changes
        assert set(token.chosen) == {token.base_token}
        assert all(len(set(candidate.probabilities)) == 1 for candidate in token.candidates)
