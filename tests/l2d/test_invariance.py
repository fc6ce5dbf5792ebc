"""What a result may depend on, shown with negative controls: with its mechanism switched off each check must fail.

Run: `python -m pytest tests/l2d/test_invariance.py` (about a minute)

A needle is a request whose answer and scores are known from a call of its own. Every check counts violations; the same
check runs with the mechanism intact, where there must be none, and sabotaged, where there must be some.
"""

import numpy as np
import pytest
import torch

import l2d.decoding
import l2d.scoring
from l2d import L2DForCausalLM
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from l2d.network.main_path import MainPathState
from l2d.network.two_paths import TwoPaths
from l2d.sampling.noise import RequestNoise, request_key

GUIDED = dict(guidance_scale=1.5, guidance_class="math")
SAMPLERS = {"1": dict(budget=1), "3": dict(budget=3), "15": dict(budget=15), "15 guided": GUIDED}
NEW = 6


@pytest.fixture(scope="module")
def folder(make_base, make_l2d):
    return make_l2d(make_base("llama"), "lora", ["math", "coding"])


@pytest.fixture(scope="module")
def model(folder) -> L2DForCausalLM:
    """In float64, where equal tokens mean an equal method."""
    return L2DForCausalLM.from_pretrained(folder).double()


@pytest.fixture(scope="module")
def single(folder) -> L2DForCausalLM:
    """The same in float32."""
    return L2DForCausalLM.from_pretrained(folder)


def draw_ids(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(3, 400, (length,), generator=generator).tolist()


def padded(rows: list[list[int]], left: int = 0, right: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, S) and their mask, padded on the left to the longest and `left` more, or on the right (`right` > 0)."""
    width = max(map(len, rows)) + max(left, right - 1)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        part = slice(0, len(row)) if right else slice(width - len(row), width)
        ids[number, part], mask[number, part] = torch.tensor(row), 1
    return ids, mask


NEEDLE = draw_ids(torch.Generator().manual_seed(99), 8)


def haystacks(count: int = 3) -> list[tuple[list[list[int]], int, int]]:
    """Batches with the needle somewhere in them: rows, the needle's row, and how much to pad beyond the longest."""
    generator, found = torch.Generator().manual_seed(5), []
    for size in range(2, 2 + count):
        rows = [draw_ids(generator, int(torch.randint(1, 15, (), generator=generator))) for _ in range(size)]
        place = 1 + int(torch.randint(0, size, (), generator=generator))  # never the first, where it is alone
        rows.insert(place, NEEDLE)
        found.append((rows, place, 3 * size))
    return found


def generated(model, rows: list[list[int]], left: int = 0, **settings) -> torch.Tensor:
    """The new tokens (B, NEW), zeros after an end token."""
    ids, mask = padded(rows, left)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **settings)[:, ids.shape[1] :]
    return torch.nn.functional.pad(new, (0, NEW - new.shape[1]))


def scored(model, rows: list[list[int]], right: int, sampler: dict) -> torch.Tensor:
    """Log-probabilities (B, S) of everything after the third token."""
    ids, mask = padded(rows, right=right)
    wanted = mask.bool()
    wanted[:, :3] = False
    return model.score(ids, mask, continuation_mask=wanted, sampler=sampler).logprobs


def needle_violations(model, sampler: dict, do_sample: bool = False, tolerance: float = 1e-9) -> int:
    """In how many haystacks the needle's answer or its scores are not those that it has alone."""
    alone = generated(model, [NEEDLE], sampler=sampler, do_sample=do_sample)[0]
    known = scored(model, [NEEDLE], 1, sampler)[0]
    found = 0
    for rows, place, more in haystacks():
        answer = generated(model, rows, more, sampler=sampler, do_sample=do_sample)[place]
        scores = scored(model, rows, more, sampler)[place, : len(NEEDLE)]
        found += not (torch.equal(answer, alone) and torch.allclose(scores, known, rtol=0, atol=tolerance))
    return found


# ---- how to break it -------------------------------------------------------------------------------------------------


def keys_of_rows(monkeypatch) -> None:
    """A request's noise depends on its row in the batch."""
    for module in (l2d.decoding, l2d.scoring):
        monkeypatch.setattr(module, "default_keys", lambda prompts: [request_key([n]) for n in range(len(prompts))])


def one_generator(monkeypatch) -> None:
    """All requests draw from one stream, in the order in which they come."""
    stream = np.random.default_rng(0)
    monkeypatch.setattr(RequestNoise, "normal", lambda self, p, d, size: stream.standard_normal(size, np.float32))
    monkeypatch.setattr(RequestNoise, "output", lambda self, position: float(stream.random()))


def changed_main_path(monkeypatch, before=lambda *given: given[:3], after=lambda state: state) -> None:
    """Other arguments for the main path, or another result."""
    run = TwoPaths.main_path

    def main_path(self, input_ids, attention_mask=None, position_ids=None, cache=None):
        return after(run(self, *before(input_ids, attention_mask, position_ids, cache), cache))

    monkeypatch.setattr(TwoPaths, "main_path", main_path)


def no_mask(monkeypatch) -> None:
    """Padding is seen by the base and by the path."""

    def seen(ids, mask, positions, cache):
        return ids, None if mask is None else torch.ones_like(mask), positions

    changed_main_path(monkeypatch, seen)


def without(state: MainPathState, name: str) -> MainPathState:
    setattr(state, name, None)
    return state


def no_path_mask(monkeypatch) -> None:
    """Padding is seen by the path alone."""
    changed_main_path(monkeypatch, after=lambda state: without(state, "key_mask"))


def absolute_positions(monkeypatch) -> None:
    """New tokens are placed by the cache's length, padding included, prompts by their mask."""

    def placed(ids, mask, positions, cache):
        new = cache is not None and cache.get_seq_length() > 0
        return ids, mask, torch.full_like(positions, cache.get_seq_length()) if new else positions

    changed_main_path(monkeypatch, placed)


# ---- a needle among others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_needle(model, sampler, do_sample):
    assert needle_violations(model, sampler, do_sample) == 0


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_needle_in_float32(single, sampler):
    assert needle_violations(single, sampler, tolerance=2e-4) == 0


@pytest.mark.parametrize("sabotage", [keys_of_rows, one_generator, no_mask, no_path_mask, absolute_positions])
def test_needle_control(model, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert needle_violations(model, SAMPLERS["15"]) > 0


def batching_violations(model, sampler: dict, do_sample: bool) -> int:
    """In how many other orders and batch sizes any of eight requests has another answer."""
    generator = torch.Generator().manual_seed(8)
    rows = [draw_ids(generator, length) for length in (10, 7, 4, 9, 1, 12, 6, 3)]
    settings = dict(sampler=sampler, do_sample=do_sample)
    together, found = generated(model, rows, **settings), 0
    order = torch.randperm(len(rows), generator=generator).tolist()
    found += not torch.equal(generated(model, [rows[n] for n in order], **settings), together[order])
    for size in (1, 3):
        parts = [generated(model, rows[start : start + size], **settings) for start in range(0, len(rows), size)]
        found += not torch.equal(torch.cat(parts), together)
    return found


@pytest.mark.parametrize("sampler", [{}, dict(budget=1), GUIDED, dict(choice_temperature=1.0)])
@pytest.mark.parametrize("do_sample", [False, True])
def test_batches_and_order(model, sampler, do_sample):
    assert batching_violations(model, sampler, do_sample) == 0


@pytest.mark.parametrize("sabotage", [keys_of_rows, one_generator, no_mask, absolute_positions])
def test_batches_and_order_control(model, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert batching_violations(model, {}, do_sample=True) >= 2


# ---- padding and packing ---------------------------------------------------------------------------------------------


def padding_violations(model) -> int:
    """At how many widths of padding the answer or the solve is not that of the bare prompt."""
    bare = generated(model, [NEEDLE])
    ids = torch.tensor([NEEDLE])
    x0 = torch.randn(1, 2, model.config.diffusion_dim, generator=torch.Generator().manual_seed(1)).double()
    index = torch.tensor([[3, 7]])
    logits = model.solve(model.paths.main_path(ids), index, x0).final_logits
    found = 0
    for width in (1, 2, 5, 33, 200):
        ids, mask = padded([NEEDLE], width)
        state = model.paths.main_path(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        same = torch.allclose(model.solve(state, index + width, x0).final_logits, logits, rtol=0, atol=1e-9)
        found += not (same and torch.equal(generated(model, [NEEDLE], width), bare))
    return found


def test_left_padding_of_any_width(model):
    assert padding_violations(model) == 0


@pytest.mark.parametrize("sabotage", [no_mask, no_path_mask, absolute_positions])
def test_left_padding_control(model, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert padding_violations(model) >= 4


def packed(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows one after the other (1, S), positions that restart, and where each begins."""
    starts = np.cumsum([0, *map(len, rows[:-1])]).tolist()
    return torch.tensor([sum(rows, [])]), torch.tensor([sum((list(range(len(row))) for row in rows), [])]), starts


ROWS = [draw_ids(torch.Generator().manual_seed(n), length) for n, length in enumerate((9, 4, 12, 6))]


def packing_violations(model) -> int:
    """How many of four documents have other logits packed in a row than left-padded in a batch."""
    generator = torch.Generator().manual_seed(3)
    x, time = torch.randn(4, 3, model.config.diffusion_dim, generator=generator).double(), torch.rand(4, 3).double()
    last = torch.tensor([[len(row) - 3, len(row) - 2, len(row) - 1] for row in ROWS])
    ids, mask = padded(ROWS, left=2)
    state = model.paths.main_path(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    shift = torch.tensor([[ids.shape[1] - len(row)] for row in ROWS])
    expected = model.paths.path_logits(state, PathInputs(last + shift, x, time))
    flat, positions, starts = packed(ROWS)
    index = (last + torch.tensor(starts)[:, None]).flatten()[None]
    inputs = PathInputs(index, x.flatten(0, 1)[None], time.flatten()[None])
    logits = model.paths.path_logits(model.paths.main_path(flat, None, positions), inputs).unflatten(1, (4, 3))[0]
    return int(((logits - expected).abs().amax((1, 2)) > 1e-8).sum())


def training_violations(model) -> int:
    """How many of the losses and gradients are not the same packed in a row as padded in a batch."""
    generator = torch.Generator().manual_seed(4)
    index = torch.tensor([[len(row) - 3, len(row) - 2] for row in ROWS])
    targets = torch.tensor([row[-2:] for row in ROWS])
    time, noise = torch.rand(2, 4, 2, generator=generator), torch.randn(2, 4, 2, 16, generator=generator)
    classes = torch.randint(0, 3, (2, 4, 2), generator=generator)
    ids, mask = padded(ROWS, right=4)
    flat, positions, starts = packed(ROWS)
    joined = NoisedTargets(
        (index + torch.tensor(starts)[:, None]).flatten()[None], targets.flatten()[None],
        *(values.flatten(1, 2)[:, None] for values in (time, noise, classes)),
    )  # fmt: skip
    results = []
    for inputs, noised in (
        (dict(input_ids=ids, attention_mask=mask), NoisedTargets(index, targets, time, noise, classes)),
        (dict(input_ids=flat, position_ids=positions), joined),
    ):
        model.zero_grad()
        nll = model(**inputs, noised_targets=noised).nll
        nll.sum().backward()
        gradients = [p.grad.flatten() for _, p in model.trained_parameters() if p.grad is not None]
        results.append((nll.detach().flatten(), torch.cat(gradients)))
    model.zero_grad()
    scale = float(results[0][1].abs().max())
    return sum(not torch.allclose(one, two, rtol=1e-6, atol=1e-6 * scale) for one, two in zip(*results, strict=True))


def no_segments(monkeypatch) -> None:
    """The path sees the documents before its own."""
    changed_main_path(monkeypatch, after=lambda state: without(state, "segments"))


def no_restarts(monkeypatch) -> None:
    """Packed documents are one long text."""

    def placed(ids, mask, positions, cache):
        return ids, mask, torch.arange(ids.shape[1])[None] if mask is None else positions

    changed_main_path(monkeypatch, placed)


@torch.no_grad()
def test_packed_documents_equal_left_padded_ones(model):
    assert packing_violations(model) == 0


@pytest.mark.parametrize("sabotage", [no_segments, no_restarts, no_path_mask])
@torch.no_grad()
def test_packing_control(model, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert packing_violations(model) >= 3  # the first document has nothing before it


def test_packed_training_equals_padded(model):
    assert training_violations(model) == 0


@pytest.mark.parametrize("sabotage", [no_segments, no_restarts])
def test_packed_training_control(model, monkeypatch, sabotage):
    sabotage(monkeypatch)
    assert training_violations(model) == 2


# ---- seeds -----------------------------------------------------------------------------------------------------------


def seed_violations(model, do_sample: bool) -> int:
    """Repeats of a seed that differ, and seeds that share an answer."""
    answers = []
    for seed in (0, 1, 2, 0, 1, 2):
        torch.manual_seed(len(answers))  # which nothing may depend on
        settings = dict(sampler=dict(seed=seed), do_sample=do_sample)
        answers.append(tuple(generated(model, [NEEDLE, ROWS[0]], **settings).flatten().tolist()))
    return sum(one != two for one, two in zip(answers[:3], answers[3:], strict=True)) + 3 - len(set(answers[:3]))


@pytest.mark.parametrize("do_sample", [False, True])
def test_seeds(model, do_sample):
    assert seed_violations(model, do_sample) == 0


@pytest.mark.parametrize("do_sample", [False, True])
def test_seed_control(model, monkeypatch, do_sample):
    make = RequestNoise.__init__
    with monkeypatch.context() as patch:
        patch.setattr(RequestNoise, "__init__", lambda self, seed, key: make(self, 0, key))  # the seed is ignored
        assert seed_violations(model, do_sample) == 2
    one_generator(monkeypatch)
    assert seed_violations(model, do_sample) == 3
