"""Properties that hold for all inputs, on examples that hypothesis draws (the same ones in every run).

Run: `python -m pytest tests/l2d/test_properties.py` (about 20 seconds). Budget arithmetic is in `test_sampler_config`.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval._cli.utils import key_val_to_dict
from torchdiffeq import odeint

from l2d import L2DForCausalLM
from l2d.decoding import DraftLength
from l2d.network.attention import SiteLayout, path_attention
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from l2d.network.main_path import LayerState, MainPathState
from l2d.sampler_config import FIXED_SOLVERS, SamplerConfig, budget_for_levels
from l2d.sampling.fixed_grid import FixedGrid, fixed_grid
from l2d.sampling.noise import RequestNoise, default_keys
from l2d.sampling.stop_strings import TextStop
from lm_eval_ext.arguments import ARGUMENTS, BUDGET, SAMPLER_ARGUMENTS, UsageError, parse_arguments
from lm_eval_ext.requests.generate_until import AnswersGeneration
from tests.conftest import TRAINING_TEXT, train_tokenizer
from training.draws import split_targets
from training.trainer import response_positions

TOKENIZER = train_tokenizer()
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- grids -----------------------------------------------------------------------------------------------------------


@st.composite
def samplers(draw, final: float = 1.0) -> SamplerConfig:
    """Fixed-grid settings of any solver, with up to 12 time levels on any part of [0, `final`]."""
    solver = draw(st.sampled_from(sorted(FIXED_SOLVERS)))
    start = draw(st.sampled_from([0.0, 0.0, 0.1, 0.37]))
    end = draw(st.sampled_from([final, final, 0.41, 0.9]))
    budget = budget_for_levels(solver, draw(st.integers(2, 12)))
    return SamplerConfig(solver=solver, budget=budget, start_time=start, final_time=end)


def follow(grid: FixedGrid, noise: torch.Tensor, estimate) -> torch.Tensor:
    """Clean estimates (N, E, d) that `estimate(x, t)` gives along the trajectory, one evaluation after the other."""
    clean = noise.new_zeros(len(noise), grid.evaluations, noise.shape[1])
    for number in range(grid.evaluations):
        clean[:, number] = estimate(grid.states(noise, clean, number)[:, 0], float(grid.times[number]))
    return clean


@settings(max_examples=60)
@given(samplers(), SEEDS)
def test_equal_estimates_give_a_straight_line(sampler, seed):
    """At every evaluation, stages included, the state is where the line from noise to estimate is at that time."""
    grid, noise, clean = fixed_grid(sampler), 64 * drawn(seed, 3, 4), drawn(seed + 1, 3, 1, 4)
    done = (grid.times - sampler.start_time) / (1 - sampler.start_time)
    states = grid.states(noise, clean.expand(-1, grid.evaluations, -1))
    expected = (1 - done)[:, None] * noise[:, None] + done[:, None] * clean
    torch.testing.assert_close(states, expected, rtol=0, atol=2e-4)  # times are float32, noise is 64 wide


@settings(max_examples=60)
@given(samplers())
def test_times_and_counts_of_a_grid(sampler):
    grid = fixed_grid(sampler)
    assert grid.times[0] == pytest.approx(sampler.start_time) and grid.times[-1] == pytest.approx(sampler.final_time)
    assert (grid.times >= sampler.start_time - 1e-6).all() and (grid.times <= sampler.final_time + 1e-6).all()
    assert (grid.times[:-1] < 1).all() and grid.budget == sampler.budget
    assert grid.evaluations <= sampler.budget - 1 and len(grid.times) == grid.evaluations + 1
    assert not grid.clean_weights.triu().any(), "a state may depend on earlier estimates only"


@settings(max_examples=40)
@given(samplers(final=0.95), SEEDS)
def test_grids_solve_linear_fields_as_torchdiffeq_does(sampler, seed):
    grid, noise = fixed_grid(sampler), drawn(seed, 2, 3)
    matrix, slope, offset = drawn(seed + 1, 3, 3), drawn(seed + 2, 3), drawn(seed + 3, 3)

    def estimate(x: torch.Tensor, time: float) -> torch.Tensor:
        return x @ matrix + time * slope + offset

    def field(time: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (estimate(x, float(time)) - x) / (1 - float(time))

    expected = odeint(field, noise, grid.levels, method=sampler.solver)
    clean = follow(grid, noise, estimate)
    scale = float(expected.abs().max())
    torch.testing.assert_close(grid.trajectory(noise, clean), expected, rtol=0, atol=1e-11 * scale)


# ---- masks and ragged batches ----------------------------------------------------------------------------------------


@st.composite
def layouts(draw) -> tuple[MainPathState, torch.Tensor, torch.Tensor, torch.Tensor, int | None]:
    """A main path of padded or packed rows, with random keys; rows (N,) and index (N,) of queries; keys seen (N, S);
    window."""
    batch, length, offset = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.sampled_from([0, 0, 3]))
    kind = draw(st.sampled_from(["none", "left", "right", "packed"]))
    seed, window = draw(SEEDS), draw(st.sampled_from([None, 2, 5]))
    total = length + offset
    kept = torch.ones(batch, total, dtype=torch.bool)
    documents = torch.zeros(batch, total, dtype=torch.int64)
    if kind == "packed":
        offset, total = 0, length
        kept, documents = kept[:, :length], torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        cut = draw(st.integers(0, length - 1))
        if kind == "left":
            kept[row, : offset + cut] = False
        elif kind == "right":
            kept[row, total - cut :] = False
        elif kind == "packed":
            documents[row, cut:] = 1
    keys, values = drawn(seed, batch, 2, total, 4), drawn(seed + 1, batch, 2, total, 4)
    state = MainPathState(
        [LayerState(keys, values)], torch.zeros(batch, length, 8), None if kept.all() else kept,
        documents if kind == "packed" else None, offset,
    )  # fmt: skip
    rows, index = [], []
    for row in range(batch):
        places = torch.nonzero(kept[row, offset:])[:, 0].tolist()
        nfe_requested = draw(st.lists(st.sampled_from(places), max_size=6)) if places else []
        rows += [row] * len(nfe_requested)
        index += nfe_requested
    if not rows:
        place = int(torch.nonzero(kept[0, offset:])[0, 0])
        rows, index = [0], [place]
    rows, index = torch.tensor(rows), torch.tensor(index)
    place, key = (index + offset)[:, None], torch.arange(total)[None]
    seen = kept[rows] & (key <= place) & (documents[rows] == documents[rows].gather(1, place))
    if window is not None:
        seen &= key > place - window
    return state, rows, index, seen, window


@settings(max_examples=120)
@given(layouts(), st.sampled_from([None, 5.0]), SEEDS)
def test_attention_equals_a_dense_reference(layout, softcap, seed):
    """Four query heads over two key heads; padding, documents and windows; any number of queries per row."""
    state, rows, index, seen, window = layout
    query = drawn(seed, 1, 4, len(rows), 4)
    layer = state.layers[0]
    found, _ = path_attention(
        None, query, None, None, None,
        main_path=(SiteLayout(state, rows, index), layer), scaling=0.7, softcap=softcap, sliding_window=window,
    )  # fmt: skip
    keys, values = (part.repeat_interleave(2, dim=1)[rows] for part in (layer.keys, layer.values))  # (N, A, S, D)
    scores = 0.7 * torch.einsum("and,nasd->nas", query[0], keys)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("nas,nasd->nad", weights, values)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6 if softcap else 1e-12)


@pytest.fixture(scope="module")
def model(make_base, make_l2d) -> L2DForCausalLM:
    """A float64 model with guidance classes."""
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()


def test_ragged_batches_equal_rows_by_themselves(model):
    @settings(max_examples=25)
    @given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=6), SEEDS)
    @torch.no_grad()
    def check(shapes, seed):
        generator = torch.Generator().manual_seed(seed)
        width, most = max(length for length, _ in shapes), max(1, max(count for _, count in shapes))
        ids = torch.randint(3, 400, (len(shapes), width), generator=generator)
        index = torch.full((len(shapes), most), -1)
        mask = torch.zeros_like(ids)
        for row, (length, count) in enumerate(shapes):
            mask[row, :length] = 1
            index[row, :count] = torch.randint(0, length, (count,), generator=generator)
        x, time = drawn(seed, *index.shape, 16), torch.rand(index.shape, generator=generator).double()
        classes = torch.randint(0, 3, index.shape, generator=generator)
        logits = model.paths.path_logits(model.paths.main_path(ids, mask), PathInputs(index, x, time, classes))
        for row, (length, count) in enumerate(shapes):
            assert not logits[row, count:].any()
            if count:
                alone = PathInputs(*(part[row : row + 1, :count] for part in (index, x, time, classes)))
                expected = model.paths.path_logits(model.paths.main_path(ids[row : row + 1, :length]), alone)
                torch.testing.assert_close(logits[row, :count], expected[0], rtol=0, atol=1e-9)

    check()


# ---- stop strings ----------------------------------------------------------------------------------------------------

WORDS = TOKENIZER("".join(TRAINING_TEXT) + "né日本→ aaaa abab\n\n", add_special_tokens=False)["input_ids"]
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), st.integers(3, len(TOKENIZER) - 1)), min_size=1, max_size=40)


def answer(tokens: list[int], stops: list[str]) -> tuple[str, int]:
    """The text that a request gets, and after how many tokens its generation ends."""
    criterion = TextStop(TOKENIZER, stops, prompt_length=0)
    count = next((n for n in range(1, len(tokens) + 1) if criterion.reached(tokens[:n])), len(tokens))
    harness = SimpleNamespace(think_end_token=None, tok_decode=TOKENIZER.decode)
    return AnswersGeneration._text(harness, tokens[:count], SimpleNamespace(special_tokens=False, stops=stops)), count


@settings(max_examples=150)
@given(TEXTS, st.integers(0, 60), st.integers(1, 9))
def test_one_stop_cuts_the_text_where_it_first_occurs(tokens, start, length):
    full = TOKENIZER.decode(tokens)
    stop = full[start % len(full) :][:length]
    if "\ufffd" not in stop:  # half a character: not what a user can write
        assert answer(tokens, [stop])[0] == full.split(stop)[0]


@settings(max_examples=150)
@given(TEXTS, st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), min_size=1, max_size=4), st.text(max_size=4))
def test_several_stops_lose_nothing_and_leave_nothing_behind(tokens, spans, foreign):
    """Stops that overlap, contain each other, begin inside tokens, or never occur.

    Of several that one token completes, the harness takes the one listed first, in `--model hf` too.
    """
    full = TOKENIZER.decode(tokens)
    stops = [full[start % len(full) :][:length] for start, length in spans] + ([foreign] if foreign else [])
    stops = [stop for stop in stops if "\ufffd" not in stop]
    text, count = answer(tokens, stops)
    shown = [TOKENIZER.decode(tokens[:n]) for n in range(1, len(tokens) + 1)]
    first = next((n for n, part in enumerate(shown, 1) if any(stop in part for stop in stops)), len(tokens))
    assert count == first, "generation ends with the first token that completes a stop"
    begins = [shown[first - 1].index(stop) for stop in stops if stop in shown[first - 1]]
    assert shown[first - 1].startswith(text) and not any(stop in text for stop in stops)
    assert len(text) in (begins or [len(shown[-1])])


# ---- requests --------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=8), st.randoms(use_true_random=False))
def test_keys_are_of_requests(prompts, random):
    """All different; a prompt's keys depend on how many equal ones come before it, and on nothing else."""
    keys = default_keys(prompts)
    assert len(set(keys)) == len(prompts)
    order = list(range(len(prompts)))
    random.shuffle(order)
    shuffled = default_keys([prompts[n] for n in order])
    for prompt in prompts:
        own = [key for key, other in zip(keys, prompts, strict=True) if other == prompt]
        assert own == [key for key, n in zip(shuffled, order, strict=True) if prompts[n] == prompt]
        assert own == default_keys([prompt] * len(own))


@settings(max_examples=40)
@given(SEEDS, st.binary(max_size=20), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 50)), min_size=2))
def test_noise_does_not_depend_on_what_was_drawn_before(seed, key, places):
    noise, again = RequestNoise(seed, key), RequestNoise(seed, key)
    forward = [(noise.normal(*place, 4).tolist(), noise.choices(*place, 3).tolist()) for place in places]
    backward = [(again.normal(*place, 4).tolist(), again.choices(*place, 9)[:3].tolist()) for place in places[::-1]]
    assert forward == backward[::-1]
    assert len({str(values) for values in forward}) == len(set(places))


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        BUDGET: st.sampled_from([1, 3, 15, 127]), "solver": st.sampled_from(["midpoint", "heun2", "bosh3"]),
        "rtol": st.sampled_from([1e-5, 0.01, 1e-12]), "seed": st.integers(0, 2**40), "mc_samples": st.integers(1, 9),
        "final_time": st.sampled_from([0.02, 0.5, 1.0]), "choice": st.sampled_from(["sample", "average"]),
        "choice_temperature": st.sampled_from([0.0, 0.7, "polynomial_1_1.0"]), "speculation": st.booleans(),
        "guidance_class": st.sampled_from(["math", "coding", 0, 1]), "guidance_scale": st.just(1.0),
        "skip_confidence": st.sampled_from([0.5, 0.95, 1.0]),
        "early_confidence": st.sampled_from([0.3, 1.0]),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A folder with nothing but the configuration of a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {"model_type": "l2d", "base_name_or_path": "base", "guidance_classes": ["math", "coding"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_model_args_are_read_as_written(checkpoint):
    """On the command line or as JSON."""

    @settings(max_examples=80)
    @given(SETTINGS)
    def check(given):
        expected = SamplerConfig(**{SAMPLER_ARGUMENTS[name]: value for name, value in given.items()})
        words = ",".join(f"{name}={value}" for name, value in {"pretrained": checkpoint, **given}.items())
        written = [key_val_to_dict(words), json.loads(json.dumps({"pretrained": checkpoint, **given}))]
        assert [parse_arguments(arguments).sampler for arguments in written] == [expected] * 2

    check()


def test_any_model_args_are_settings_or_one_sentence(checkpoint):
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
        st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        st.sampled_from(["auto", "none", "1e400", "٣"]),
    )  # fmt: skip
    names = st.one_of(st.sampled_from([name for name in ARGUMENTS if name != "pretrained"]), st.text(max_size=8))

    @settings(max_examples=300)
    @given(st.dictionaries(names, values, max_size=3))
    def check(given):
        try:
            parse_arguments({"pretrained": checkpoint, **given})
        except UsageError as error:
            assert "\n" not in str(error) and any(repr(name)[1:-1] in str(error) for name in given)

    check()


# ---- training and drafting -------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=9), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_every_target_is_asked_once(rows, draws, data):
    """All pieces together hold each (draw, target) once, with its own time and noise."""
    width = max(map(len, rows))
    labels = torch.tensor(
        [[10 * n + 100 * place if on else -100 for place, on in enumerate(row)] + [-100] * (width - len(row))
         for n, row in enumerate(rows)]
    )  # fmt: skip
    index, targets = response_positions(labels)
    wanted = {(n, p - 1, int(labels[n, p])) for n, p in torch.nonzero(labels != -100).tolist() if p > 0}
    found = [(n, int(index[n, slot]), int(targets[n, slot])) for n, slot in torch.nonzero(index >= 0).tolist()]
    assert len(found) == len(wanted) and set(found) == wanted
    shape = (draws, *index.shape)
    time = torch.arange(float(torch.tensor(shape).prod())).view(shape)  # a number of its own for each
    noised = NoisedTargets(index, targets, time, time[..., None].expand(*shape, 2), time.long())
    most = data.draw(st.integers(1, 2 + len(wanted) * draws))
    nfe_requested = []
    for piece in split_targets(noised, most):
        valid = (piece.index >= 0).expand_as(piece.time)
        assert int(valid.sum()) <= most
        assert torch.equal(piece.time, piece.noise[..., 0]) and torch.equal(piece.time.long(), piece.classes)
        nfe_requested += piece.time[valid].tolist()
    assert sorted(nfe_requested) == sorted(time[(index >= 0).expand_as(time)].tolist())


@settings(max_examples=80)
@given(st.integers(0, 8), st.lists(st.tuples(st.integers(1, 16), st.booleans()), max_size=60))
def test_drafts_stay_within_bounds_and_follow_what_was_kept(most, steps):
    length = DraftLength(most)
    for rows, kept in steps:
        assert 0 <= length.choose(rows) <= most
        length.learn(kept)
    for _ in range(40):
        length.learn(True)
    assert [length.choose(rows) for rows in (1, 4, 16)] == [most] * 3
    for _ in range(40):
        length.learn(False)
    assert sum(length.choose(1) for _ in range(80)) == (10 if most else 0) and length.choose(2) == 0
