"""Which generation kwargs are followed: the harness's, the sampler's, and those of transformers' `generate`.

- `check_settings`: raises `UsageError` for all others, and for values that cannot be followed
- `check_beams`: the same for what a base's generation settings ask of a beam search

No model is needed; torch is imported only for settings of transformers.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from lm_eval_ext.arguments import SAMPLER_ARGUMENTS, SEARCH, UsageError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
_USUAL = (*SAMPLER_ARGUMENTS, SEARCH, "until", "do_sample", "temperature", "skip_special_tokens", *_LENGTHS)
_OURS = (
    *("input_ids", "inputs", "attention_mask", "sampler", "request_keys", "noise", "return_record", "pad_token_id"),
    *("stopping_criteria", "logits_processor", "streamer", "return_dict_in_generate", "generation_config"),
)
_OBJECTS = ("tokenizer", "prefix_allowed_tokens_fn", "synced_gpus")  # of `generate`, for code that hands them over
_ELSEWHERE = {
    "max_length": "depends on the prompt's length: set max_gen_toks instead",
    "num_return_sequences": "cannot be used, a request has one answer: set repeats in the task instead",
    **dict.fromkeys(_OURS, "is set by the model class: leave it out"),
}
_RATIOS = ("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "num_beam_groups")
"""Settings without effect at 1."""
_NOT_IN_BEAMS = (
    *(*_RATIOS, "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values", "watermarking_config"),
    *("stop_strings", "max_time", "early_stopping", "diversity_penalty"),
)
"""Settings that change what greedy decoding gives, or another beam search, and ours knows nothing of."""


def check_settings(given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a name that no one would follow or that is not the user's, and for a value of
    transformers' own settings that our decoding or their configuration refuses.
    """
    rest = {name: value for name, value in given.items() if name not in _USUAL}
    for name in rest:
        if name in _ELSEWHERE:
            raise UsageError(f"generation setting {name!r} {_ELSEWHERE[name]}.")
    if not rest:
        return
    from transformers import GenerationConfig  # late: half a second

    known = (*_USUAL, *_OBJECTS, *(other for other in vars(GenerationConfig()) if not other.startswith("_")))
    for name in rest:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            where = "python -m lm_eval_ext args lists the sampler's, transformers' GenerationConfig has the others"
            hint = f"did you mean {near[0]!r}? ({where})" if near else f"{where}."
            raise UsageError(f"generation setting {name!r} is not known: {hint}")
    from l2d.decoding import UNUSED_SETTINGS, refuse

    for name, value in rest.items():
        try:
            refuse({name: value}, UNUSED_SETTINGS)
            if name not in _OBJECTS:
                GenerationConfig(**{name: value}).get_generation_mode()  # both check it
        except (AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"generation setting {name}={value!r}: {reason}.") from error


def check_beams(search: str | None, base: Mapping[str, Any]) -> None:
    """Raise `UsageError` if `search` is a beam search and `base`, the model's generation settings, ask for what it
    does not do. Settings of sampling (temperature, top_k, ...) are not among them: greedy decoding has no use for them.
    """
    if search is None or not search.startswith("beam"):
        return
    for name in _NOT_IN_BEAMS:
        value = base.get(name)
        if value is not None and value not in (False, 0, [], {}) and not (name in _RATIOS and value == 1):
            raise UsageError(
                f"{SEARCH}={search} cannot follow {name}={value!r} of the model's generation_config.json: use "
                "best_of_N, or remove it there."
            )
