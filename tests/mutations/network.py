"""Mutations of masks, the diffusion path and its loss (`l2d/network`, `l2d/loss.py`)."""

from tests.mutations import Mutation

_PROPERTIES = "tests/l2d/test_properties.py"
_ATTENTION = f"{_PROPERTIES}::test_attention_equals_a_dense_reference"
_LOSS = "tests/l2d/test_loss.py"
_CHUNKS = "tests/training/test_losses.py::test_losses_tokens_and_gradients"
_PARTS = "tests/l2d/test_path_parts.py"

_attention, _embeddings, _diffusion_path, _cross_entropy = (
    f"l2d/network/{name}.py" for name in ("attention", "embeddings", "diffusion_path", "cross_entropy")
)

MUTATIONS = [
    # masks
    Mutation(
        "masks: a site does not see its own position",
        _attention,
        "mask = keys <= position",
        "mask = keys < position",
        _ATTENTION,
    ),
    Mutation(
        "masks: a site sees what comes after it",
        _attention,
        "mask = keys <= position",
        "mask = keys <= position + 1",
        _ATTENTION,
    ),
    Mutation(
        "masks: a window of one key more",
        _attention,
        "mask &= keys > position - window",
        "mask &= keys >= position - window",
        _ATTENTION,
    ),
    Mutation("masks: padding is seen", _attention, "mask &= key_mask[:, None]", "pass", _ATTENTION),
    Mutation(
        "masks: other documents of a row are seen",
        _attention,
        "mask &= segments[:, None] == segments",
        "mask &= segments[:, None] <= segments",
        _ATTENTION,
    ),
    Mutation(
        "masks: a window of one key more while decoding",
        _attention,
        ">= state.key_count - window",
        ">= state.key_count - window - 1",
        f"{_PARTS}::test_the_last_position_sees_the_same_keys_while_decoding",
    ),
    Mutation(
        "masks: documents of one token are not told apart",
        "l2d/network/main_path.py",
        "prepend=position_ids[:, :1] - 1) != 1",
        "prepend=position_ids[:, :1] - 1) < 0",
        f"{_PARTS}::test_documents_of_any_length_are_told_apart",
    ),
    Mutation(
        "masks: positions of drafts counted from the last one",
        "l2d/network/main_path.py",
        "states[-1].key_mask, None, states[0].offset, position_ids",
        "states[-1].key_mask, None, states[-1].offset, position_ids",
        "tests/l2d/test_sampling.py::test_drafted_tokens_change_nothing",
    ),
    Mutation(
        "masks: rotary embeddings of the first position",
        _attention,
        "self.at(part).unsqueeze(0)",
        "self.at(part)[:1].expand(len(self._sites[0]), -1).unsqueeze(0)",
        "tests/l2d/test_architectures.py::test_an_open_path_is_the_main_path",
    ),
    # parts of the path
    Mutation(
        "path: the output's factor is not 0 at t = 0",
        _diffusion_path,
        "self.output_modulation(embedding) - self.output_modulation(at_zero)",
        "self.output_modulation(embedding)",
        f"{_PARTS}::test_the_output_is_modulated_by_the_distance_from_time_zero",
    ),
    Mutation(
        "path: no class is the first class",
        _diffusion_path,
        "return embedding + self.class_embedding.weight[-1]",
        "return embedding + self.class_embedding.weight[0]",
        f"{_PARTS}::test_no_class_is_the_last_embedding",
    ),
    Mutation(
        "path: gates exchanged",
        _diffusion_path,
        "torch.addcmul(hidden, gate1",
        "torch.addcmul(hidden, gate2",
        f"{_PARTS}::test_parts_of_a_modulation_are_in_the_published_order",
    ),
    Mutation(
        "path: scale and shift exchanged",
        _diffusion_path,
        "scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation",
        "shift1, scale1, gate1, scale2, shift2, gate2 = self.modulation",
        f"{_PARTS}::test_parts_of_a_modulation_are_in_the_published_order",
    ),
    Mutation(
        "path: input without the token's variance",
        _embeddings,
        "* self.noise_std) ** 2 + time**2 * self.token_variance",
        "* self.noise_std) ** 2",
        f"{_PARTS}::test_inputs_have_unit_variance_at_every_time",
    ),
    Mutation(
        "path: input rescaled by the noise's variance",
        _embeddings,
        "((1 - time) * self.noise_std) ** 2",
        "((1 - time) * self.noise_std)",
        f"{_PARTS}::test_inputs_have_unit_variance_at_every_time",
    ),
    Mutation(
        "path: tokens of norm 1",
        _embeddings,
        "return self.norm * functional.normalize",
        "return functional.normalize",
        f"{_PARTS}::test_tokens_lie_on_their_sphere",
    ),
    Mutation(
        "path: frequencies of the time embedding rise",
        _embeddings,
        "torch.exp(-math.log(10000) * steps / half)",
        "torch.exp(math.log(10000) * steps / half)",
        f"{_PARTS}::test_features_of_a_time_by_hand",
    ),
    Mutation(
        "path: sines before cosines",
        _embeddings,
        "[angles.cos(), angles.sin()]",
        "[angles.sin(), angles.cos()]",
        f"{_PARTS}::test_features_of_a_time_by_hand",
    ),
    # loss
    Mutation(
        "loss: spared targets are left out wherever the base stands",
        "l2d/loss.py",
        "trained & ~_easy(paths, state, noised, trained & noised.spared)",
        "trained & ~noised.spared",
        "tests/l2d/test_loss.py::test_spared_targets_are_left_out_where_the_base_is_sure",
    ),
    Mutation(
        "loss: one spared target counts where all are",
        "l2d/loss.py",
        "        nll = nll * trained\n",
        "        pass\n",
        "tests/l2d/test_loss.py::test_spared_targets_are_left_out_where_the_base_is_sure",
    ),
    Mutation(
        "loss: noise is not scaled",
        "l2d/loss.py",
        "(flat.of(noised.noise) * paths.config.noise_std) + time",
        "(flat.of(noised.noise)) + time",
        "tests/l2d/test_model.py::test_training_output_is_the_cross_entropy_of_path_logits",
    ),
    Mutation(
        "loss: time runs backwards",
        "l2d/loss.py",
        "x = (1 - time)[:, None] * (flat",
        "x = time[:, None] * (flat",
        "tests/l2d/test_model.py::test_training_output_is_the_cross_entropy_of_path_logits",
    ),
    Mutation(
        "loss: a wrong token may be the true one",
        "l2d/loss.py",
        ".scatter(-1, target[:, None], -torch.inf)",
        "",
        f"{_LOSS}::test_no_wrong_token_is_the_true_one",
    ),
    Mutation(
        "loss: a rollout's steps are too short",
        "l2d/loss.py",
        "((time - before) / (1 - before))",
        "(time - before)",
        f"{_LOSS}::test_rollout_follows_the_paths_own_choices",
    ),
    Mutation(
        "loss: a rollout goes on towards the base's token",
        "l2d/loss.py",
        "chosen = scored[-1][1] if counts else _argmax(paths, hidden)",
        "scored[-1][1] if counts else _argmax(paths, hidden)",
        f"{_LOSS}::test_rollout_follows_the_paths_own_choices",
    ),
    Mutation(
        "loss: a rollout's first scored evaluation is left out",
        "l2d/loss.py",
        "number >= unscored",
        "number > unscored",
        f"{_LOSS}::test_rollout_follows_the_paths_own_choices",
    ),
    Mutation(
        "loss: gradients of evaluations that have no loss",
        "l2d/loss.py",
        "with torch.set_grad_enabled(learning and counts):",
        "with torch.set_grad_enabled(learning):",
        f"{_LOSS}::test_gradients_of_a_rollout",
    ),
    Mutation(
        "loss: half the gradient at the target",
        _cross_entropy,
        "(len(target), 1), -1.0)",
        "(len(target), 1), -0.5)",
        _CHUNKS,
    ),
    Mutation(
        "loss: weights do not reach the gradient",
        _cross_entropy,
        "(gradient * grad_losses[:, None])",
        "gradient",
        _CHUNKS,
    ),
    Mutation(
        "loss: bfloat16 logits summed as they are",
        _cross_entropy,
        "full = at_least_float32(logits)",
        "full = logits",
        "tests/training/test_losses.py::test_bfloat16_logits_are_summed_in_float32",
    ),
]
