"""Mutations of noise, solvers, sampler, decoding and scoring (`l2d/sampling`, `l2d/decoding.py`, `l2d/scoring.py`)."""

from tests.mutations import Mutation

_GRID = "tests/l2d/test_fixed_grid.py"
_SAMPLING = "tests/l2d/test_sampling.py"
_NOISE = "tests/l2d/test_noise.py"
_CHOICES = "tests/l2d/test_choices.py"

_GATE = "tests/l2d/test_confidence.py"
_own, _OWN = "l2d/network/own_keys_values.py", "tests/l2d/test_own_keys_values.py"

_fixed_grid, _evaluator, _noise, _adaptive, _speculation, _confidence = (
    f"l2d/sampling/{name}.py" for name in ("fixed_grid", "evaluator", "noise", "adaptive", "speculation", "confidence")
)

MUTATIONS = [
    # solvers
    Mutation(
        "solver: a stage of midpoint at 0.4",
        _fixed_grid,
        '"midpoint": ([0.0, 0.5], [[], [0.5]]',
        '"midpoint": ([0.0, 0.4], [[], [0.4]]',
        f"{_GRID}::test_linear_map_equals_torchdiffeq",
    ),
    Mutation(
        "solver: step weights of rk4",
        _fixed_grid,
        "[0.125, 0.375, 0.375, 0.125]",
        "[0.125, 0.375, 0.25, 0.25]",
        f"{_GRID}::test_linear_map_equals_torchdiffeq",
    ),
    Mutation(
        "solver: velocity without the division by 1 - t",
        _fixed_grid,
        "(estimate - stage) / (1 - time)",
        "(estimate - stage)",
        f"{_GRID}::test_linear_map_equals_torchdiffeq",
    ),
    Mutation(
        "solver: end velocities exchanged",
        _fixed_grid,
        'if end_velocity == "straight" else',
        'if end_velocity != "straight" else',
        f"{_GRID}::test_zero_end_velocity_leaves_noise_as_the_released_code_does",
    ),
    Mutation(
        "solver: stages at the start of a step",
        _fixed_grid,
        "else low + step * node",
        "else low",
        f"{_GRID}::test_evaluations_reach_the_network_at_the_documented_times",
    ),
    Mutation(
        "solver: midpoint's temperature a whole step ahead",
        _fixed_grid,
        'spacing / 2 if solver == "midpoint" else spacing',
        "spacing",
        f"{_CHOICES}::test_temperatures_are_read_ahead_of_an_evaluation",
    ),
    Mutation(
        "solver: temperature not ahead of its evaluation",
        _fixed_grid,
        "temperature_at(temperature, time + delta)",
        "temperature_at(temperature, time)",
        f"{_CHOICES}::test_temperatures_are_read_ahead_of_an_evaluation",
    ),
    Mutation(
        "solver: a step more than the budget",
        "l2d/sampler_config.py",
        "return stages(solver) * (levels - 1) + 1",
        "return stages(solver) * levels + 1",
        "tests/l2d/test_sampler_config.py::test_documented_budgets",
    ),
    Mutation(
        "solver: temperature schedule that ignores its end",
        "l2d/sampler_config.py",
        "(1 - time / end) ** power",
        "(1 - time) ** power",
        "tests/l2d/test_sampler_config.py::test_temperature_schedules",
    ),
    Mutation(
        "adaptive: safety factor",
        _adaptive,
        "_SAFETY, _GROWTH, _SHRINKAGE = 0.9,",
        "_SAFETY, _GROWTH, _SHRINKAGE = 0.8,",
        f"{_CHOICES}::test_steps_are_chosen_as_torchdiffeq_chooses_them",
    ),
    Mutation(
        "adaptive: norm of the error over all dimensions",
        _adaptive,
        "(error / scale).square().mean(-1).sqrt()",
        "(error / scale).square().sum(-1).sqrt()",
        f"{_CHOICES}::test_steps_are_chosen_as_torchdiffeq_chooses_them",
    ),
    Mutation(
        "adaptive: capped solves are not counted",
        _adaptive,
        "capped[stopped] = True",
        "capped[stopped] = False",
        f"{_SAMPLING}::test_the_cap_of_adaptive_solvers_is_counted",
    ),
    Mutation(
        "adaptive: a capped solve stays where it is",
        _adaptive,
        "x[stopped] += (sampler.final_time - time[stopped])[:, None] * velocity[stopped]",
        "pass",
        f"{_CHOICES}::test_a_capped_solve_goes_straight_to_its_estimate",
    ),
    # speculation
    Mutation(
        "speculation: one evaluation too many accepted",
        _speculation,
        "torch.where(right, end, change + 1)",
        "torch.where(right, end, change + 2)",
        f"{_SAMPLING}::test_speculation_gives_the_sequential_solvers_tokens",
    ),
    Mutation(
        "speculation: a change without a class is overlooked",
        _speculation,
        "differs = (answers != expected).cpu()",
        "differs = (answers != expected).cpu() & (branch == 0)",
        f"{_SAMPLING}::test_speculation_gives_the_sequential_solvers_tokens",
    ),
    Mutation(
        "speculation: choices drawn with the first evaluation's numbers",
        _speculation,
        "take(sites.uniforms[:, number], site[here])",
        "take(sites.uniforms[:, 0], site[here])",
        f"{_SAMPLING}::test_speculation_is_exact_for_sampled_choices",
    ),
    # the sampler's choices
    Mutation(
        "guidance: branches exchanged",
        _evaluator,
        "scale * clean[..., 0, :] + (1 - scale) * clean[..., 1, :]",
        "scale * clean[..., 1, :] + (1 - scale) * clean[..., 0, :]",
        f"{_CHOICES}::test_guidance_goes_from_no_class_towards_the_class",
    ),
    Mutation(
        "guidance: no class in place of the class",
        _evaluator,
        "own = classes if site_class is None else site_class",
        "own = classes",
        f"{_CHOICES}::test_guidance_goes_from_no_class_towards_the_class",
    ),
    Mutation(
        "guidance: a smaller scale",
        _evaluator,
        "scale = self.sampler.guidance_scale",
        "scale = 1 + (self.sampler.guidance_scale - 1) / 2",
        f"{_CHOICES}::test_guidance_goes_from_no_class_towards_the_class",
    ),
    Mutation(
        "average: normalize_average has no effect",
        _evaluator,
        "    if normalize:",
        "    if False:",
        f"{_CHOICES}::test_averaged_estimates_and_their_norm",
    ),
    Mutation(
        "average: of norm 1",
        _evaluator,
        "normalize(mean, dim=-1) * table[0].norm()",
        "normalize(mean, dim=-1)",
        f"{_CHOICES}::test_averaged_estimates_and_their_norm",
    ),
    Mutation(
        "choice: logits multiplied by the temperature",
        _evaluator,
        "torch.softmax(at_least_float32(logits) / temperature, dim=-1)",
        "torch.softmax(at_least_float32(logits) * temperature, dim=-1)",
        f"{_CHOICES}::test_averaged_estimates_and_their_norm",
    ),
    Mutation(
        "choice: most likely token below temperature 1",
        _evaluator,
        "    if temperature <= 0:",
        "    if temperature < 1:",
        f"{_CHOICES}::test_averaged_estimates_and_their_norm",
    ),
    Mutation(
        "choice: sequential solver draws with the first evaluation's numbers",
        "l2d/sampling/sequential.py",
        "sites.uniforms[:, number]",
        "sites.uniforms[:, 0]",
        f"{_SAMPLING}::test_speculation_is_exact_for_sampled_choices",
    ),
    # noise
    Mutation(
        "noise: the same at every position",
        _noise,
        "self._generator(_NORMAL, position, draw)",
        "self._generator(_NORMAL, 0, draw)",
        f"{_NOISE}::test_every_place_has_numbers_of_its_own",
    ),
    Mutation(
        "noise: the same in every draw",
        _noise,
        "self._generator(_NORMAL, position, draw)",
        "self._generator(_NORMAL, position, 0)",
        f"{_NOISE}::test_every_place_has_numbers_of_its_own",
    ),
    Mutation(
        "noise: choices with the same numbers at every position",
        _noise,
        "self._generator(_CHOICE, position, draw)",
        "self._generator(_CHOICE, 0, draw)",
        f"{_NOISE}::test_every_place_has_numbers_of_its_own",
    ),
    Mutation(
        "noise: output tokens with the same number at every position",
        _noise,
        "self._generator(_OUTPUT, position, 0)",
        "self._generator(_OUTPUT, 0, 0)",
        f"{_NOISE}::test_every_place_has_numbers_of_its_own",
    ),
    Mutation(
        "noise: choices and output tokens with the same numbers",
        _noise,
        "_NORMAL, _CHOICE, _OUTPUT = range(3)",
        "_NORMAL, _CHOICE, _OUTPUT = 0, 1, 1",
        f"{_NOISE}::test_every_place_has_numbers_of_its_own",
    ),
    Mutation(
        "noise: the seed has no effect",
        _noise,
        'seed.to_bytes(8, "little", signed=False) + content',
        "content",
        f"{_NOISE}::test_every_place_has_numbers_of_its_own",
    ),
    Mutation(
        "noise: equal prompts share it",
        _noise,
        "[*tokens, occurrence]",
        "[*tokens]",
        f"{_SAMPLING}::test_equal_prompts_are_different_requests_unless_keys_say_otherwise",
    ),
    Mutation(
        "noise: output tokens by step, not by position",
        "l2d/decoding.py",
        "noise.output(length + ahead)",
        "noise.output(ahead)",
        f"{_NOISE}::test_output_tokens_are_drawn_with_the_number_of_their_position",
    ),
    Mutation(
        "noise: sampled choices by row, not by position",
        "l2d/sampling/sites.py",
        "noise.choices(position, draw, count)",
        "noise.choices(0, draw, count)",
        f"{_NOISE}::test_choices_are_drawn_with_the_numbers_of_their_position",
    ),
    # decoding
    Mutation(
        "decoding: drafts are taken unseen",
        "l2d/decoding.py",
        "not all(agreed[row] for row in rows)",
        "False",
        f"{_SAMPLING}::test_drafted_tokens_change_nothing",
    ),
    Mutation(
        "decoding: a key too many stays in the cache",
        "l2d/decoding.py",
        "layer.keys.shape[-2] - (width - number - 1)",
        "layer.keys.shape[-2] - (width - number - 2)",
        f"{_SAMPLING}::test_drafted_tokens_change_nothing",
    ),
    Mutation(
        "decoding: finished rows go on",
        "l2d/decoding.py",
        "self.unfinished = self.unfinished & ~self.stopping(self.ids, scores)",
        "self.unfinished = ~self.stopping(self.ids, scores)",
        f"{_SAMPLING}::test_end_tokens_streaming_and_stopping_criteria",
    ),
    # scoring
    Mutation(
        "scoring: probabilities of several draws are added",
        "l2d/scoring.py",
        "total -= math.log(draws)",
        "total -= 0",
        "tests/l2d/test_noise.py::test_several_draws_average_probabilities",
    ),
    Mutation(
        "scoring: log-probabilities are averaged",
        "l2d/scoring.py",
        "total = torch.logaddexp(total, logprobs(draw))",
        "total = (total + logprobs(draw)) / 2 + math.log(2)",
        "tests/l2d/test_noise.py::test_several_draws_average_probabilities",
    ),
    Mutation(
        "scoring: several draws of the same noise",
        "l2d/scoring.py",
        "positions.tolist(), requests, draw)",
        "positions.tolist(), requests, 0)",
        "tests/l2d/test_noise.py::test_several_draws_average_probabilities",
    ),
    Mutation(
        "scoring: noise of the position before",
        "l2d/scoring.py",
        "rows, positions - 1, positions.tolist(), requests",
        "rows, positions - 1, (positions - 1).tolist(), requests",
        f"{_SAMPLING}::test_scores_are_the_log_probabilities_that_decoding_sees",
    ),
    Mutation(
        "scoring: continuations of one context do not share noise",
        "l2d/scoring.py",
        "default_keys([row[:count]])[0]",
        "default_keys([row])[0]",
        f"{_NOISE}::test_continuations_of_one_context_share_their_noise",
    ),
    # keys and values of the path's own
    Mutation(
        "own: decoding reads the base's values",
        _own,
        "layer.own_values = None if made[1] is None else kept[1]",
        "layer.own_values = None if made[1] is None else layer.values",
        f"{_OWN}::test_decoding_with_a_cache_is_scoring_without_one",
    ),
    Mutation(
        "own: the path reads the base's",
        _own,
        "return dataclasses.replace(layer, keys=made[0], values=made[1])",
        "return layer",
        f"{_OWN}::test_they_are_those_of_a_base_with_changed_projections",
    ),
    Mutation(
        "own: keys stay the base's",
        _own,
        "hidden_states=projected + self.change(received).to(projected.dtype),",
        "hidden_states=projected,",
        f"{_OWN}::test_they_are_those_of_a_base_with_changed_projections",
    ),
    Mutation(
        "own: after a call without gradients there are none",
        _own,
        "learning = torch.is_grad_enabled() and layer.received is not None",
        "learning = False",
        f"{_OWN}::test_with_gradients_they_are_made_anew",
    ),
    # gates
    Mutation(
        "gate: unsure sites are skipped",
        _confidence,
        "confidence >= threshold",
        "confidence < threshold",
        f"{_GATE}::test_scores_are_the_answers_where_it_is_sure_and_the_solvers_elsewhere",
    ),
    Mutation(
        "gate: solutions stay in the order in which they were joined",
        _confidence,
        ".take(torch.argsort(torch.cat([keep, done])))",
        "",
        f"{_GATE}::test_scores_are_the_answers_where_it_is_sure_and_the_solvers_elsewhere",
    ),
    Mutation(
        "gate: skipped sites count as if the budget had been asked for",
        _confidence,
        "evaluator.base_hidden(sites), nothing + 1, nothing,",
        "evaluator.base_hidden(sites), nothing + 15, nothing,",
        f"{_GATE}::test_generation_follows_the_same_rule",
    ),
    Mutation(
        "gate: an evaluation that was not sure costs nothing",
        _confidence,
        "solved.nfe_computed + answered.nfe_computed[keep]",
        "solved.nfe_computed",
        f"{_GATE}::test_scores_are_the_answers_where_it_is_sure_and_the_solvers_elsewhere",
    ),
    Mutation(
        "gate: the early one comes before the base's",
        _confidence,
        "((sampler.early_confidence, _early_answers), (sampler.skip_confidence, _base_answers))",
        "((sampler.skip_confidence, _base_answers), (sampler.early_confidence, _early_answers))",
        f"{_GATE}::test_the_bases_gate_comes_before_the_early_one",
    ),
    Mutation(
        "gate: the early one asks at another time",
        _confidence,
        "single_evaluation(sampler.early_time)",
        "single_evaluation(0.5)",
        f"{_GATE}::test_an_early_gate_that_takes_everything_is_one_evaluation",
    ),
]
