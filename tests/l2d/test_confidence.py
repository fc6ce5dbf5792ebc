"""Gates: a cheap answer where it is sure, the solver's everywhere else, and the cost of just that.

The rule is written out here from plain scores: of the cheap answer by itself, which say how sure it is, and without a
gate.
"""

import dataclasses
from typing import Any

import pytest
import torch

from l2d import L2DForCausalLM
from l2d.cli.session import load_session
from l2d.cli.trace import trace_prompt
from l2d.decoding import DraftLength
from l2d.sampler_config import single_evaluation
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


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gate's field, and the sampler settings that give its answer by themselves."""

    name: str
    answer: dict[str, Any]

    def at(self, threshold: float) -> dict[str, Any]:
        """The gate with a threshold."""
        return {self.name: threshold}

    def confidences(self, model, ids: torch.Tensor, settings: dict[str, Any] | None = None) -> torch.Tensor:
        """Probability (B, S - 1) of the answer's most likely next token."""
        return model.score(ids, sampler={**(settings or {}), **self.answer}).best_logprobs[:, 1:].exp()


BASE, EARLY = Gate("skip_confidence", {"budget": 1}), Gate("early_confidence", single_evaluation(0.5))
GATES = pytest.mark.parametrize("gate", [BASE, EARLY], ids=["base", "early"])
GATED = [(BASE, case) for case in CASES]
GATED += [(EARLY, case) for case in CASES if case not in ("draws", "noise-free")]  # every draw has an answer; refused
GATED_CASES = pytest.mark.parametrize(("gate", "case"), GATED, ids=lambda value: getattr(value, "name", value))


def rows() -> torch.Tensor:
    return torch.randint(3, 400, (3, 14), generator=torch.Generator().manual_seed(3))


@GATED_CASES
def test_scores_are_the_answers_where_it_is_sure_and_the_solvers_elsewhere(models, gate, case):
    model, ids, settings = models(case), rows(), CASES[case]
    confidence = gate.confidences(model, ids, settings)
    threshold = float(confidence.median()) + 1e-7
    sure = torch.zeros(ids.shape, dtype=torch.bool)
    sure[:, 1:] = confidence >= threshold
    assert 10 < int(sure.sum()) < 30
    gated, plain, answer = (
        model.score(ids, sampler=one)
        for one in ({**settings, **gate.at(threshold)}, settings, {**settings, **gate.answer})
    )
    for name in ("logprobs", "best", "best_logprobs", "greedy"):
        expected = torch.where(sure, getattr(answer, name), getattr(plain, name))
        torch.testing.assert_close(getattr(gated, name), expected, rtol=0, atol=1e-6)
    asked = answer.nfe_requested * settings.get("mc_samples", 1)
    assert torch.equal(gated.nfe_requested, torch.where(sure, asked, plain.nfe_requested))
    for name in ("nfe_computed", "passes"):
        assert torch.equal(getattr(gated, name)[sure], getattr(answer, name)[sure])
    unsure = ~sure[:, 1:]
    spent, tried, alone = (one.nfe_computed[:, 1:][unsure] for one in (gated, answer, plain))
    assert bool((spent > tried).all())
    if settings.get("speculation") is False:
        assert torch.equal(spent, tried + alone)


@pytest.mark.parametrize("case", ["midpoint", "guided", "carried"])
def test_the_bases_gate_comes_before_the_early_one(models, case):
    model, ids, settings = models(case), rows(), CASES[case]
    gates = (BASE, EARLY)
    confidences = [gate.confidences(model, ids, settings) for gate in gates]
    shares = (0.7, 0.4)
    thresholds = [float(one.quantile(share)) + 1e-7 for one, share in zip(confidences, shares, strict=True)]
    both = {name: value for gate, p in zip(gates, thresholds, strict=True) for name, value in gate.at(p).items()}
    gated, plain, base, early = (
        model.score(ids, sampler={**settings, **one}) for one in (both, {}, BASE.answer, EARLY.answer)
    )
    sure = [confidence >= p for confidence, p in zip(confidences, thresholds, strict=True)]
    assert int((sure[1] & ~sure[0]).sum()) > 3 and int((sure[0] & sure[1]).sum()) > 3
    for name in ("best", "logprobs", "nfe_requested"):
        columns = (getattr(one, name)[:, 1:] for one in (gated, base, early, plain))
        found, of_base, of_early, of_solver = columns
        expected = torch.where(sure[0], of_base, torch.where(sure[1], of_early, of_solver))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "case"), [one for one in GATED if one[1] != "draws"], ids=lambda value: getattr(value, "name", value)
)
def test_generation_follows_the_same_rule(models, monkeypatch, gate, case):
    """Every generated token is the most likely one of the gated score, whatever is drafted and however it is solved."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    model, settings = models(case), CASES[case]
    plain = decode(model, settings, rows=1)
    confidences = gate.confidences(model, plain, settings)
    threshold = float(confidences[:, prompts(1)[0].shape[1] - 1 :].median()) + 1e-7
    found = []
    for drafts in (0, 3):
        sampler = {**settings, **gate.at(threshold), "draft_tokens": drafts}
        out, record = decode_and_score(model, sampler)
        found.append((out.tolist(), record.nfe_requested, record.changes))
        skipped = [asked == gate.answer["budget"] for asked in record.nfe_requested[0]]
        assert 0 < sum(skipped) < len(skipped)
    assert found[0] == found[1]


@GATES
@pytest.mark.parametrize("do_sample", [False, True])
def test_speculation_drafts_and_batch_mates_change_nothing(models, monkeypatch, gate, do_sample):
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    model = models()
    threshold = float(gate.confidences(model, rows()).median())
    made = []
    for changes in ({}, dict(speculation=False), dict(draft_tokens=0)):
        made.append(decode(model, {**gate.at(threshold), **changes}, do_sample=do_sample))
    assert all(torch.equal(made[0], one) for one in made)
    ids, mask = prompts()
    for row in range(len(ids)):
        alone = model.generate(
            ids[row, mask[row].bool()][None],
            attention_mask=mask[row, mask[row].bool()][None],
            sampler=gate.at(threshold),
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


def test_an_early_gate_that_takes_everything_is_one_evaluation(models):
    model = models()
    for time in (0.5, 0.2):
        out, record = decode(model, {"early_confidence": 1e-9, "early_time": time}, return_record=True)
        assert torch.equal(out, decode(model, single_evaluation(time)))
        assert {n for row in record.nfe_computed for n in row} == {n for row in record.passes for n in row} == {1}


def test_a_noise_free_path_has_no_early_gate(models):
    with pytest.raises(ValueError, match="cannot be spent by a noise-free path"):
        models("noise-free").score(rows(), sampler={**CASES["noise-free"], "early_confidence": 0.5})


@GATES
def test_one_skips_nothing_even_where_an_answer_is_certain(models, monkeypatch, gate):
    """A probability can be rounded to 1."""
    model = models()
    ids = rows()
    plain = model.score(ids)
    monkeypatch.setattr(PathEvaluator, "logits", lambda self, hidden: 1 / 0)
    assert torch.equal(model.score(ids, sampler=gate.at(1)).logprobs, plain.logprobs)


@GATES
def test_chunks_of_logits_change_nothing(models, monkeypatch, gate):
    model, ids = models(), rows()
    sampler = gate.at(float(gate.confidences(model, ids).median()) + 1e-7)
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
@GATES
@pytest.mark.parametrize("guided", [False, True])
def test_a_recorded_solve_shows_the_answer_at_skipped_sites(models, gate, guided):
    model, ids = models(), rows()
    state = model.paths.main_path(ids)
    index = torch.arange(ids.shape[1]).expand(len(ids), -1)
    x0 = torch.randn(*index.shape, 16, generator=torch.Generator().manual_seed(1)).double()
    settings = model.sampler(GUIDED if guided else {})
    logits = solve(model.paths, state, index, x0, settings.replace(**gate.answer)).final_logits
    probability, token = torch.softmax(logits.float(), -1).max(-1)
    threshold = float(probability.median())
    gated, plain = (
        solve(model.paths, state, index, x0, one) for one in (settings.replace(**gate.at(threshold)), settings)
    )
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
    threshold = float(BASE.confidences(session.model, ids)[0, len(plain.prompt_tokens) - 1 :].median())
    trace = trace_prompt(session, "Question: Natalia", {"budget": 7, "skip_confidence": threshold}, max_new_tokens=10)
    skipped = [token for token in trace.tokens if token.nfe_requested == 1]
    assert 0 < len(skipped) < len(trace.tokens)
    for token in skipped:
        assert token.token == token.base_token and token.nfe_computed == 0 and not token.changes
        assert set(token.chosen) == {token.base_token}
        assert all(len(set(candidate.probabilities)) == 1 for candidate in token.candidates)
